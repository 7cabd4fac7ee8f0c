"""How the state lies on the mesh: rules over the paths of parameters, with no word of it in the networks."""
import math
import re
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from diffusion_jax.build import build

Rule = Callable[[tuple[int, ...], Mesh, list[str | None]], list[str | None]]
"""(shape, mesh, the mesh axis by which each axis is cut so far) -> the same with one more cut."""


def name_of(path: tuple) -> str:
  """The path of a parameter in its tree as 'params/backbone/in/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def replicate() -> Rule:
  """Every device holds all of the parameter."""
  return lambda shape, mesh, cuts: cuts


def fsdp(least: int = 4096) -> Rule:
  """The largest axis that the mesh's fsdp divides is cut by it (arXiv:1910.02054, stage 3): the devices of fsdp hold a part
  each and gather it where it is used. A parameter of fewer than `least` entries, or with no axis left, stays as it is."""
  def rule(shape, mesh, cuts):
    size, left = mesh.shape['fsdp'], [axis for axis, name in enumerate(cuts) if name is None]
    if size == 1 or math.prod(shape) < least or not left:
      return cuts
    chosen = max(left, key=lambda axis: (shape[axis] % size == 0, shape[axis]))
    if shape[chosen] % size:
      raise ValueError(f"fsdp={size} divides none of its axes that are not cut yet; take a smaller fsdp, or 'replicate()'")
    return [*cuts[:chosen], 'fsdp', *cuts[chosen + 1:]]
  return rule


def tensor(axis: int) -> Rule:
  """The axis is cut by the mesh's tensor (arXiv:1909.08053): each of its devices computes with a part of the channels."""
  def rule(shape, mesh, cuts):
    size = mesh.shape['tensor']
    if size == 1:
      return cuts
    if not -len(shape) <= axis < len(shape) or shape[axis] % size:
      raise ValueError(f'axis {axis} cannot be cut by tensor={size}')
    chosen = axis % len(shape)
    return [*cuts[:chosen], 'tensor', *cuts[chosen + 1:]]
  return rule


def shardings(params: PyTree, rules: Sequence[tuple[str, str]], mesh: Mesh) -> PyTree:
  """Where every parameter lies: the first rule, such as ('conv_1/kernel', 'tensor(-1) | fsdp()'), whose regular expression
  is found in its path 'params/backbone/...'.

  Raises ValueError where a parameter has no rule, or its rule cannot be applied, with its name, shape and axis.
  """
  parsed = [_parse(pattern, text) for pattern, text in rules]
  def place(path, leaf):
    name = name_of(path)
    text, rule = next(((text, rule) for pattern, text, rule in parsed if pattern.search(name)), (None, None))
    if rule is None:
      raise ValueError(f"config.sharding has no rule for {name}: end it with ('.*', 'fsdp()'), or ('.*', 'replicate()').")
    try:
      cuts = rule(leaf.shape, mesh, [None] * len(leaf.shape))
    except ValueError as error:
      raise ValueError(f'config.sharding: {text!r} cannot be applied to {name} of shape {leaf.shape}: {error}.') from error
    return NamedSharding(mesh, P(*cuts))
  return jax.tree_util.tree_map_with_path(place, params)


def ends(path: tuple) -> Iterator[tuple]:
  """The ends of a path, the longest first: that of a moment or a moving average ends as its parameter's."""
  return (path[first:] for first in range(len(path)))


def follow(tree: PyTree, params: PyTree, places: PyTree, mesh: Mesh) -> PyTree:
  """Where every leaf of a state lies: one whose path ends as that of a parameter, and has its shape, as it does, a moment
  or a moving average; any other is whole on every device."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  known = {(path, leaf.shape): place for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True)}
  def place(path, leaf):
    found = (known[end, leaf.shape] for end in ends(path) if (end, leaf.shape) in known)
    return next(found, NamedSharding(mesh, P()))
  return jax.tree_util.tree_map_with_path(place, tree)


def _parse(pattern: str, text: str) -> tuple[re.Pattern, str, Rule]:
  try:
    return re.compile(pattern), text, build(text, {'replicate': replicate, 'fsdp': fsdp, 'tensor': tensor}, join=_all)
  except re.error as error:
    raise ValueError(f'config.sharding: {pattern!r} is no regular expression: {error}.') from error
  except ValueError as error:
    raise ValueError(f'config.sharding: {error}') from error


def _all(*parts: Rule) -> Rule:
  """One rule after the other."""
  def rule(shape, mesh, cuts):
    for part in parts:
      cuts = part(shape, mesh, cuts)
    return cuts
  return rule
