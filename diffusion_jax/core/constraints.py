"""Constraints: functions denoiser -> denoiser that hold the estimate of x0 to bounds or to measurements y of the data.

`see` is what was measured, a function of a batch of x0 whose result is a pytree of arrays [B, ...]; y has its shape, or
broadcasts to it. Where it is linear, A x0, every example must be seen on its own. They are for a Gaussian process.
"""
import math
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.guidance import add_score, energy, ratio, widened
from diffusion_jax.core.types import Transform, combine, dot, spread

ROUNDS = 500  # of conjugate gradients at most; they end before where the residual is rounding


def clip(limit: float = 1.0) -> Transform:
  """Clip the estimate of x0 to [-limit, limit] (static thresholding, arXiv:2205.11487, sec. 2.3)."""
  _check_positive('clip', limit=limit)
  return _after(lambda x0: jax.tree.map(lambda leaf: jnp.clip(leaf, -limit, limit), x0))


def dynamic_threshold(percentile: float = 99.5, limit: float = 1.0) -> Transform:
  """Clip x0 to [-s, s] and scale by limit / s, s = max(limit, that percentile of |x0|) (arXiv:2205.11487, sec. 2.3).

  s is an example's, leaf by leaf. Where the percentile is within the limit it is `clip`. Raises ValueError where
  percentile is not in (0, 100] or limit <= 0.
  """
  _check_positive('dynamic_threshold', limit=limit)
  if not 0 < percentile <= 100:
    raise ValueError(f'dynamic_threshold needs 0 < percentile <= 100; got {percentile}.')
  def one(leaf):
    sizes = jnp.abs(leaf.reshape(len(leaf), -1))
    s = spread(jnp.maximum(jnp.percentile(widened(sizes), percentile, axis=1), limit), leaf)
    return jnp.clip(leaf, -s, s) * (limit / s)
  return _after(lambda x0: jax.tree.map(one, x0))


def replace(values: PyTree, known: PyTree) -> Transform:
  """Known entries of x0 are the values: inpainting, imputation, forecasting. `known`, bool, and `values` broadcast to x.

  With a solver that draws q(xs | xt, x0), such as `ancestral`, the known part of xt then follows the forward path of the
  values. On a grid that also jumps up this is RePaint (arXiv:2201.09865, alg. 1), where the paper draws the known part
  afresh at every level and here it stays on one path. The unknown part is conditioned only by what the denoiser sees in
  xt, so without jumps its law is not that of p(x0 | values). Raises ValueError where a mask is not of bools.
  """
  for mask in jax.tree.leaves(known):
    if jnp.asarray(mask).dtype != bool:
      raise ValueError(f'replace needs known of bools, True where the value is known; got {jnp.asarray(mask).dtype}. '
                       'Write known != 0.')
  like = lambda leaf, value: jnp.broadcast_to(jnp.asarray(value), leaf.shape)
  put = lambda leaf, value, mask: jnp.where(like(leaf, mask), like(leaf, value), leaf)
  return _after(lambda x0: jax.tree.map(put, x0, values, known))


def ddnm(see: Callable, y: PyTree) -> Transform:
  """x0 + A^+ (y - A x0) for a linear measurement without noise, y = A x0 (DDNM, arXiv:2212.00490, sec. 3).

  The nearest x0 that agrees with y; if none does, the nearest of those that agree best. For a mask it is `replace`.
  """
  nearest = lambda x0: combine((1.0, x0), (1.0, regress(see, y, x0, 1.0, 0.0)))
  return _after(lambda x0: nearest(widened(x0)))


def dps(see: Callable, y: PyTree, std: float, scale: float = 1.0) -> Transform:
  """The score with scale grad log N(y; see(x0hat(xt)), std^2) added (DPS, arXiv:2209.14687, theorem 1; eq. 16).

  It is `energy` of |y - see(x0)|^2 / (2 std^2); `see` need not be linear. This is the formula, not the steps
  zeta / |residual| of the paper's algorithm 1, which are chosen by hand. The formula leaves out Var[x0 | xt], so at high
  noise it pushes too hard for a small std, and then wants a small scale. Raises ValueError where std <= 0.
  """
  _check_positive('dps', std=std)
  def misfit(x0):
    left = residual(y, see(widened(x0)))
    return dot(left, left) / (2 * std**2)
  return energy(misfit, scale)


def pigdm(see: Callable, y: PyTree, std: float = 0.0, data_std: float = 1.0) -> Transform:
  """Pseudoinverse guidance for y = A x0 + std noise: the score with grad log p(y | xt) added, for p(x0 | xt) taken to be
  N(x0hat, r^2), r^2 = sigma^2 data_std^2 / (alpha^2 data_std^2 + sigma^2) (PiGDM, ICLR 2023, Song et al., eq. 7).

  x0hat + sigma^2 / alpha J^T A^T (r^2 A A^T + std^2)^-1 (y - A x0hat), J = d x0hat / d xt: one call with its derivative.
  Exact for data N(m, data_std^2); for other data the nearer the smaller sigma is. At alpha = 0 it has the value to which
  it tends for such data. Raises ValueError where std < 0 or data_std <= 0.
  """
  _check_positive('pigdm', data_std=data_std)
  if not 0 <= std < math.inf:
    raise ValueError(f'pigdm needs std >= 0; got {std}.')
  def transform(denoise):
    def posterior(x, level, cond):
      def mean(x):
        estimate = denoise(x, level, cond)
        return estimate.x0, estimate
      x0, pull, estimate = jax.vjp(mean, x, has_aux=True)
      r2 = (level.sigma * data_std)**2 / ((level.alpha * data_std)**2 + level.sigma**2)
      push = regress(see, y, widened(x0), r2, std**2)
      slope, = pull(_as(push, x0))
      moved = add_score(combine((1.0, widened(x0)), (jnp.where(level.alpha > 0, 0.0, r2), push)), slope, level, 1.0)
      return estimate._replace(x0=_as(moved, x0))
    return posterior
  return transform


def residual(y: PyTree, seen: PyTree) -> PyTree:
  """y - seen, where y broadcasts to what is seen."""
  return jax.tree.map(lambda a, b: jnp.broadcast_to(jnp.asarray(a, b.dtype), b.shape) - b, y, seen)


def regress(see: Callable, y: PyTree, x0: PyTree, scale: Array | float, ridge: float) -> PyTree:
  """e with (scale A^T A + ridge) e = A^T (y - A x0), which is A^T (scale A A^T + ridge)^-1 (y - A x0); scale () or [B].

  With ridge = 0 it is A^+ (y - A x0) / scale, also where A has not full rank: the least of all solutions.
  """
  transpose = jax.linear_transpose(see, x0)
  normal = lambda e: combine((scale, transpose(see(e))[0]), (ridge, e))
  right = transpose(residual(y, see(x0)))[0]
  # A gradient from behind may ask for what A^T A cannot give: its part that A sees is taken first.
  back = lambda apply, b: conjugate_gradients(apply, conjugate_gradients(apply, apply(b)))
  return jax.lax.custom_linear_solve(normal, right, conjugate_gradients, back, symmetric=True)


def conjugate_gradients(apply: Callable, b: PyTree) -> PyTree:
  """z with apply(z) = b, for a linear and positive semidefinite `apply` of which b is a value (Hestenes and Stiefel, 1952).

  Every example has steps and an end of its own, so its solution does not depend on the others in the batch.
  """
  end = (16 * jnp.finfo(jax.tree.leaves(b)[0].dtype).eps)**2 * dot(b, b)
  def step(state):
    count, z, residual, direction, size = state
    image = apply(direction)
    curvature = dot(direction, image)
    going = (size > end) & (curvature > 0)
    length = jnp.where(going, ratio(size, curvature, 0.0), 0.0)
    z = combine((1.0, z), (length, direction))
    residual = combine((1.0, residual), (-length, image))
    smaller = jnp.where(going, dot(residual, residual), 0.0)
    return count + 1, z, residual, combine((1.0, residual), (ratio(smaller, size, 0.0), direction)), smaller
  start = (0, jax.tree.map(jnp.zeros_like, b), b, b, dot(b, b))
  return jax.lax.while_loop(lambda state: (state[0] < ROUNDS) & jnp.any(state[-1] > end), step, start)[1]


def _after(function: Callable) -> Transform:
  """The transform that applies a function to the estimated x0, whose dtypes it keeps."""
  def transform(denoise):
    def constrained(x, level, cond):
      estimate = denoise(x, level, cond)
      return estimate._replace(x0=_as(function(estimate.x0), estimate.x0))
    return constrained
  return transform


def _as(x: PyTree, like: PyTree) -> PyTree:
  """x in the dtypes of `like`."""
  return jax.tree.map(lambda a, b: a.astype(b.dtype), x, like)


def _check_positive(name: str, **numbers: float) -> None:
  for field, number in numbers.items():
    if not 0 < number < math.inf:
      raise ValueError(f'{name} needs {field} > 0; got {number}.')
