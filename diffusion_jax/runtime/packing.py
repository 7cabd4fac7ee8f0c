"""The training state in fewer arrays, as a call of the step takes and gives it."""
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from diffusion_jax.runtime.sharding import ends


class Layout(NamedTuple):
  """The tree of a state, and for each array of its packed form the numbers of the leaves that are in it."""
  structure: jax.tree_util.PyTreeDef
  parts: tuple[tuple[int, ...], ...]


def _stack(parts: list[list[jax.Array]]) -> list[jax.Array]:
  return [jnp.stack(rows) for rows in parts]


@jax.tree_util.register_pytree_with_keys_class
class Packed:
  """A state as one list of arrays: the moments and moving averages of each vector among its parameters (a bias, a scale) are
  the rows of one matrix, and every other leaf is an array.

  A call of a program costs its host some microseconds for each array and each dict that go in and out, on every device.
  The vectors themselves are arrays of their own, so that the program of the network is the same.
  """

  def __init__(self, arrays: list, layout: Layout):
    self.arrays, self.layout = arrays, layout

  @property
  def state(self) -> PyTree:
    leaves = {}
    for part, array in zip(self.layout.parts, self.arrays, strict=True):
      rows = [array] if len(part) == 1 else [array[row] for row in range(len(part))]
      leaves |= zip(part, rows, strict=True)
    return jax.tree.unflatten(self.layout.structure, [leaves[number] for number in range(len(leaves))])

  def like(self, state: PyTree, stack: Callable = _stack) -> 'Packed':
    """Another state in the same arrays, with `stack` to make the matrices."""
    leaves = jax.tree.leaves(state)
    made = iter(stack([[leaves[number] for number in part] for part in self.layout.parts if len(part) > 1]))
    return Packed([next(made) if len(part) > 1 else leaves[part[0]] for part in self.layout.parts], self.layout)

  def tree_flatten(self):
    return self.arrays, self.layout

  def tree_flatten_with_keys(self):
    """With the name of its first leaf for each array, as a plan or an error is to say it."""
    structure = self.layout.structure
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(structure.unflatten(range(structure.num_leaves))), strict=True)
    keys = [jax.tree_util.GetAttrKey(jax.tree_util.keystr(paths[part[0]]).removeprefix('.')) for part in self.layout.parts]
    return list(zip(keys, self.arrays, strict=True)), self.layout

  @classmethod
  def tree_unflatten(cls, layout, arrays):
    return cls(arrays, layout)


def packed_shapes(state: PyTree) -> Packed:
  """The arrays of a state, which has `params`, as shapes with where they lie; it may be of shapes itself."""
  params, parts = {path for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}, {}
  leaves, structure = jax.tree.flatten_with_path(state)
  for number, (path, leaf) in enumerate(leaves):
    place = next((end for end in ends(path) if end in params), None)
    joined = place and leaf.ndim == 1 and path[0].name != 'params'
    key = (place, leaf.shape, leaf.dtype, leaf.sharding) if joined else number
    parts.setdefault(key, []).append(number)
  def shape(part):
    leaf = leaves[part[0]][1]
    if len(part) == 1:
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    place = NamedSharding(leaf.sharding.mesh, P(None, *leaf.sharding.spec))
    return jax.ShapeDtypeStruct((len(part), *leaf.shape), leaf.dtype, sharding=place)
  return Packed([shape(part) for part in parts.values()], Layout(structure, tuple(map(tuple, parts.values()))))


def pack(state: PyTree) -> Packed:
  """A state in fewer arrays, of which all but the matrices are its own."""
  shapes = packed_shapes(state)
  places = [array.sharding for array, part in zip(shapes.arrays, shapes.layout.parts, strict=True) if len(part) > 1]
  return shapes.like(state, jax.jit(_stack, out_shardings=places))


@jax.jit
def unpack(packed: Packed) -> PyTree:
  """A copy of the state, which stays as it is when the step takes the memory of `packed`."""
  return jax.tree.map(jnp.copy, packed.state)
