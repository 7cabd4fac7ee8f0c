"""Training losses: per-example numbers, in which an example's loss is the mean over its own entries."""
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core import targets
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.targets import Target
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import Cond, Draw, Network, combine
from diffusion_jax.core.weights import Weight

Loss = Callable[[Network, Draw, PyTree, Cond, PyTree], Array]


def regression(process: Gaussian, target: Target, times: Times, weight: Weight, space: Target) -> Loss:
  """w(logsnr_t) |residual|^2 at a random t, the residual taken in `space` (arXiv:2006.11239, eq. 14; arXiv:2202.00512).

  The network predicts `target`; its residual times D_space / D_target is that of `space` at the same xt. The weights of
  this package are stated for space = noise(). `scored` marks the entries that count, None for all: an example's loss is
  the mean over its own count. Returns losses [B].
  """
  def loss(network, draw, x0, cond=None, scored=None):
    level = process.level(times.sample(process, draw.part(0)))
    xt, noise = process.corrupt(draw.part(1).keys, x0, level)
    prediction = network(combine((target.scale(level), xt)), target.feature(level), cond)
    residual = combine((1.0, prediction), (-1.0, targets.value(process, target, level, x0, noise)))
    ratio = (targets.determinant(process, space, level) / targets.determinant(process, target, level))**2
    density = times.density(process, level.t) / jnp.abs(process.logsnr_slope(level))
    return weight(level.logsnr, density) * ratio * mean_square(residual, scored)
  return loss


def mean_square(residual: PyTree, scored: PyTree = None) -> Array:
  """The mean of residual^2 over the scored entries of each example, [B]; 0 where none is scored."""
  if scored is None:
    scored = jax.tree.map(jnp.ones_like, residual)
  rows = lambda tree: sum(leaf.reshape(len(leaf), -1).sum(1) for leaf in jax.tree.leaves(tree))
  marks = jax.tree.map(lambda mark, leaf: jnp.broadcast_to(mark, leaf.shape).astype(leaf.dtype), scored, residual)
  total = rows(jax.tree.map(lambda leaf, mark: jnp.square(leaf) * mark, residual, marks))
  return total / jnp.maximum(rows(marks), 1)
