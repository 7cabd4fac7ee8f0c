"""Guidance and constraints: functions denoiser -> denoiser."""
import jax
from jax import numpy as jnp
from jaxtyping import PyTree

from diffusion_jax.core.types import Cond, Denoiser, Estimate, Level, Transform


def guide(weight: float, during: tuple[float, float] = (0.0, 1.0)) -> Transform:
  """Classifier-free guidance: x0 = x0_null + weight (x0_cond - x0_null) while t is in `during` (arXiv:2207.12598, eq. 6).

  weight 1 is the conditional denoiser itself, 0 the unconditional one; the paper's w is weight - 1. Outside the interval
  (arXiv:2404.07724, sec. 3) only the conditional branch is computed.
  """
  low, high = during
  if not 0 <= low < high <= 1:
    raise ValueError(f'guide needs during=(low, high) with 0 <= low < high <= 1; got {during}.')
  def transform(denoise):
    if weight == 1:
      return denoise
    def guided(x, level, cond):
      given, null = branches(denoise, x, level, [cond, dropped(x, cond)])
      return given._replace(x0=jax.tree.map(lambda c, u: u + weight * (c - u), given.x0, null.x0))
    if during == (0.0, 1.0):
      return guided
    def within(x, level, cond):
      inside = (low <= level.t) & (level.t <= high)
      return jax.lax.cond(inside, lambda: guided(x, level, cond), lambda: denoise(x, level, cond))
    return within
  return transform


def clip(limit: float = 1.0) -> Transform:
  """Clip the estimate of x0 to [-limit, limit] (static thresholding, arXiv:2205.11487, sec. 2.3)."""
  if limit <= 0:
    raise ValueError(f'clip needs limit > 0; got {limit}.')
  def transform(denoise):
    def clipped(x, level, cond):
      estimate = denoise(x, level, cond)
      return estimate._replace(x0=jax.tree.map(lambda leaf: jnp.clip(leaf, -limit, limit), estimate.x0))
    return clipped
  return transform


def chain(*transforms: Transform) -> Transform:
  """Apply transforms from left to right: chain(a, b)(denoise) = b(a(denoise)). A config writes it a | b."""
  def transform(denoise):
    for each in transforms:
      denoise = each(denoise)
    return denoise
  return transform


def dropped(x: PyTree, cond: Cond) -> Cond:
  """The condition whose every part the network replaces by its null."""
  return {**(cond or {}), 'drop': jnp.ones(jax.tree.leaves(x)[0].shape[0], bool)}


def branches(denoise: Denoiser, x: PyTree, level: Level, conds: list[Cond]) -> list[Estimate]:
  """Estimates of the same x under several conditions by one batched call. The conditions must have the same entries."""
  batch, count = jax.tree.leaves(x)[0].shape[0], len(conds)
  conds = [{'drop': jnp.zeros(batch, bool), **(cond or {})} for cond in conds]
  # Example by example, not branch by branch: the rows of an example then stay on its device.
  stack = lambda *leaves: jnp.stack(leaves, 1).reshape(batch * count, *leaves[0].shape[1:])
  repeat = lambda leaf: jnp.repeat(leaf, count, 0) if leaf.ndim else leaf
  out = denoise(jax.tree.map(repeat, x), jax.tree.map(repeat, level), jax.tree.map(stack, *conds))
  return [jax.tree.map(lambda leaf, i=i: leaf[i::count], out) for i in range(count)]
