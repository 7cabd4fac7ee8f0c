"""Devices: the mesh over them, and how the rows of a batch lie on it."""
import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

AXES = ('data', 'fsdp', 'tensor')
"""Of every mesh. Rows are cut over data and fsdp, the state over fsdp and tensor, as runtime/sharding.py says."""


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh that a string such as 'data=-1,fsdp=8,tensor=2' names; an axis that is left out has size 1, -1 takes what is
  left of the devices, 'data=2' the first two.

  `devices` are by default those of this job.

  Raises ValueError where the string is not of that form or the devices cannot be laid out so.
  """
  devices = list(jax.devices() if devices is None else devices)
  words = [re.fullmatch(rf'({"|".join(AXES)})=(-1|[1-9]\d*)', word) for word in text.replace(' ', '').split(',')]
  given = {word[1]: int(word[2]) for word in words if word}
  if len(given) < len(words) or list(given.values()).count(-1) > 1:
    raise ValueError(f"config.mesh is {text!r}; legal are sizes for {', '.join(AXES)}, each once, one of them -1 for what "
                     "is left of the devices: 'data=-1,fsdp=8,tensor=2'.")
  fixed = math.prod(size for size in given.values() if size > 0)
  free = max(1, len(devices) // fixed)
  sizes = {name: free if given.get(name) == -1 else given.get(name, 1) for name in AXES}
  count = math.prod(sizes.values())
  if count > len(devices) or -1 in given.values() and count != len(devices):
    odd = f', which {fixed} does not divide' if -1 in given.values() else ''
    raise ValueError(f'config.mesh is {text!r}, but this job has {len(devices)} devices{odd}.')
  if jax.process_count() > 1 and count != len(devices):
    raise ValueError(f'config.mesh is {text!r}, {count} devices; several processes use all of theirs, here {len(devices)}: '
                     'let one axis be -1.')
  return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count])


def ways(mesh: Mesh) -> int:
  """In how many parts the rows of a batch are cut."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def part(mesh: Mesh) -> tuple[int, int]:
  """(which part of the rows of a batch this process feeds, of how many): processes that share an axis `tensor` feed the
  same rows."""
  feeds = lambda process: frozenset(i for i, row in enumerate(mesh.devices.reshape(ways(mesh), -1))
                                    if any(device.process_index == process for device in row))
  shares = [feeds(process) for process in range(jax.process_count())]
  parts = sorted(set(shares), key=min)
  if len(set(map(len, parts))) > 1 or sum(map(len, parts)) > ways(mesh):
    raise ValueError(f'A mesh of {dict(mesh.shape)} cuts the rows of a batch across the processes: choose a size of tensor '
                     'that divides the devices of a process, or that they divide.')
  return parts.index(shares[jax.process_index()]), len(parts)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of the array."""
  return NamedSharding(mesh, P())


def by_example(mesh: Mesh) -> NamedSharding:
  """The first axis is cut over the devices."""
  return NamedSharding(mesh, P(('data', 'fsdp')))


def put(batch: PyTree, mesh: Mesh, parts: int | None = None) -> PyTree:
  """The rows that this process feeds, as numpy arrays, become global arrays cut over the devices. Who puts often gives the
  `parts` of `part`, which goes through all devices of the job."""
  return _put(batch, mesh, parts or part(mesh)[1])


def place(batch: PyTree, mesh: Mesh) -> PyTree:
  """Arrays that every process has in full become global arrays cut over the devices by their first axis."""
  return _put(batch, mesh, 1)


def _put(batch: PyTree, mesh: Mesh, parts: int) -> PyTree:
  where = by_example(mesh)
  whole = lambda rows: (parts * len(rows), *rows.shape[1:])
  with jax.transfer_guard_host_to_device('allow'):  # JAX takes those of several processes for implicit
    put = lambda rows: jax.make_array_from_process_local_data(where, np.asarray(rows), whole(rows))  # they may be lazy
    return jax.tree.map(put, batch)


def gather(rows: jax.Array) -> np.ndarray:
  """All rows of a global array, on every host."""
  if rows.is_fully_addressable:
    return jax.device_get(rows)
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def shard_bytes(shapes: PyTree) -> int:
  """The bytes of a tree of placed arrays, or shapes with a sharding, that lie on one device."""
  part = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(map(part, jax.tree.leaves(shapes)))
