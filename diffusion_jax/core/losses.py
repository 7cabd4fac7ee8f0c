"""Training losses: per-example numbers, in which an example's loss is the mean over its own entries."""
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core import targets
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.targets import Target
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import NOISE, TIMES, Cond, Draw, Level, Network, combine
from diffusion_jax.core.weights import Weight

Loss = Callable[[Network, Draw, PyTree, Cond, PyTree], Array]
Distance = Callable[[PyTree, PyTree], Array]  # (residual, which entries are scored or None) -> [B]


def squared() -> Distance:
  """The mean of r^2 (arXiv:2006.11239, eq. 14)."""
  return lambda residual, scored: mean(jnp.square, residual, scored)


def absolute() -> Distance:
  """The mean of |r|, L1 (arXiv:2009.00713, sec. 2): its best prediction is the median."""
  return lambda residual, scored: mean(jnp.abs, residual, scored)


def huber(delta: float = 1.0) -> Distance:
  """The mean of r^2 / 2 where |r| <= delta, and of delta (|r| - delta / 2) beyond (Huber 1964, eq. 1)."""
  _check_positive('huber', 'delta', delta)
  inner = lambda r: jnp.minimum(jnp.abs(r), delta)
  return lambda residual, scored: mean(lambda r: inner(r) * (jnp.abs(r) - 0.5 * inner(r)), residual, scored)


def pseudo_huber(c: float = 0.00054) -> Distance:
  """sqrt(mean r^2 + c^2) - c, one norm an example (arXiv:2310.14189, sec. 3.3: sqrt(d) times this)."""
  _check_positive('pseudo_huber', 'c', c)
  def distance(residual, scored):
    mean_square = mean(jnp.square, residual, scored)
    return mean_square / (jnp.sqrt(mean_square + c**2) + c)  # exact also where the residual is far below c
  return distance


def regression(process: Gaussian, target: Target, times: Times, weight: Weight, space: Target,
               distance: Distance = squared()) -> Loss:
  """w(logsnr_t) distance(residual) at a random t, the residual taken in `space` (2006.11239, eq. 14; 2202.00512, sec. 4).

  The network predicts `target`; its residual times D_space / D_target is that of `space` at the same xt. The weights of
  this package are stated for space = noise() and squares. `scored` marks the entries that count, None for all: an example's
  loss is the mean over its own count. Returns losses [B].
  """
  if target.learns_variance:
    raise ValueError('regression does not train a variance. Take a loss that does, such as hybrid(), or the target alone.')
  check_end(process, target, times, weight, space)
  def loss(network, draw, x0, cond=None, scored=None):
    level = process.level(times.sample(process, draw.part(TIMES)))
    xt, noise = process.corrupt(draw.part(NOISE).keys, x0, level)
    prediction, _ = targets.predict(target, network, xt, level, cond)
    residual = residual_of(process, target, space, level, prediction, x0, noise)
    return weight_at(process, times, weight, level) * distance(residual, scored)
  return loss


def residual_of(process: Gaussian, target: Target, space: Target, level: Level, prediction: PyTree, x0: PyTree,
                noise: PyTree) -> PyTree:
  """The error of a prediction of `target`, as an error of `space` at the same xt: times D_space / D_target."""
  ratio = _ratio(process, target, space, level)
  return combine((ratio, prediction), (-ratio, targets.value(process, target, level, x0, noise)))


def check_end(process: Gaussian, target: Target, times: Times, weight: Weight, space: Target) -> None:
  """Raise ValueError where times draw t = 1 itself and the loss is not finite there."""
  with jax.ensure_compile_time_eval():
    level = process.level(1.0)
    if not times.reaches_end or isinstance(level.alpha, jax.core.Tracer):
      return
    factor = _ratio(process, target, space, level)**2 * weight_at(process, times, weight, level)
    if not jnp.isfinite(factor):
      raise ValueError(f'These times draw t = 1, where alpha = {float(level.alpha):.3g} and the weight of the loss is '
                       f'{float(factor)}. Take other times, or a target, space and weight that stay finite.')


def weight_at(process: Gaussian, times: Times, weight: Weight, level: Level) -> Array:
  """The weight of the training times at this level."""
  density = times.density(process, level.t) / jnp.abs(process.logsnr_slope(level))
  return weight(level.logsnr, density)


def _ratio(process: Gaussian, target: Target, space: Target, level: Level) -> Array:
  """D_space / D_target; 1 where they are equal, as in one space at a singular point."""
  top, bottom = (targets.determinant(process, each, level) for each in (space, target))
  same = top == bottom
  return jnp.where(same, 1.0, top / jnp.where(same, 1.0, bottom))


def mean(function: Callable[[Array], Array], tree: PyTree, scored: PyTree = None) -> Array:
  """The mean of function(x) over the scored entries x of each example, [B]; 0 where none is scored."""
  if scored is None:
    scored = jax.tree.map(jnp.ones_like, tree)
  rows = lambda tree: sum(leaf.reshape(len(leaf), -1).sum(1) for leaf in jax.tree.leaves(tree))
  marks = jax.tree.map(lambda mark, leaf: jnp.broadcast_to(mark, leaf.shape).astype(leaf.dtype), scored, tree)
  known = jax.tree.map(lambda leaf, mark: jnp.where(mark > 0, leaf, 0), tree, marks)  # padding may be anything, also NaN
  total = rows(jax.tree.map(lambda leaf, mark: function(leaf) * mark, known, marks))
  return total / jnp.maximum(rows(marks), 1)


def _check_positive(name: str, argument: str, value: float) -> None:
  if value <= 0:
    raise ValueError(f'{name} needs {argument} > 0; got {value}.')
