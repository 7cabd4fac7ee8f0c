"""Devices: the mesh over them, and how arrays lie on it."""
import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh that a string such as 'data=-1' names; -1 takes all devices, 'data=2' the first two.

  `devices` are by default those of this job.

  Raises ValueError where the string is not of that form or asks for more devices than there are.
  """
  match = re.fullmatch(r'data=(-?\d+)', text.replace(' ', ''))
  if not match:
    raise ValueError(f"config.mesh is {text!r}; legal is 'data=N', with N devices or -1 for all of them.")
  devices = jax.devices() if devices is None else devices
  count = len(devices) if match[1] == '-1' else int(match[1])
  if not 1 <= count <= len(devices):
    raise ValueError(f'config.mesh is {text!r}, but this job has {len(devices)} devices.')
  if jax.process_count() > 1 and count != len(devices):
    raise ValueError(f"config.mesh is {text!r}; with {jax.process_count()} processes type 'data=-1'.")
  return Mesh(np.array(devices[:count]), ('data',), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of the array."""
  return NamedSharding(mesh, P())


def by_example(mesh: Mesh) -> NamedSharding:
  """The first axis is cut over the devices."""
  return NamedSharding(mesh, P('data'))


def check_divisible(count: int, mesh: Mesh, name: str) -> None:
  """Raise ValueError if `count` rows cannot be cut evenly over the devices and processes."""
  if count % mesh.size:
    raise ValueError(f'{name} is {count}, which {mesh.size} devices cannot share evenly: choose a multiple of {mesh.size}.')


def put(batch: dict, mesh: Mesh) -> dict:
  """Rows of this process, as numpy arrays, become one global array cut over the devices."""
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(by_example(mesh), rows), batch)


def gather(rows: jax.Array) -> np.ndarray:
  """All rows of a global array, on every host."""
  if rows.is_fully_addressable:
    return np.asarray(rows)
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def shard_bytes(shapes: PyTree) -> int:
  """The bytes of a tree of placed arrays, or shapes with a sharding, that lie on one device."""
  part = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(map(part, jax.tree.leaves(shapes)))
