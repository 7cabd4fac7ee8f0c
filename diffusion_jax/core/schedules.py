"""Noise schedules: t -> (alpha, sigma) of xt = alpha x0 + sigma noise, from t = 0 (data) to t = 1 (noise).

Every schedule takes an array of times of any shape and is exact at its ends: t = 0 is (1, 0).
"""
import math
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from diffusion_jax.core.types import Schedule


def linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
  """Variance preserving with a linear rate: alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2).

  The continuous limit of DDPM's betas (arXiv:2006.11239), as in arXiv:2011.13456, eq. 33. The rates are per unit of t.
  """
  if not 0 < beta_min <= beta_max:
    raise ValueError(f'linear needs 0 < beta_min <= beta_max; got beta_min={beta_min}, beta_max={beta_max}.')
  def schedule(t):
    log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
    return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
  return schedule


def cosine() -> Schedule:
  """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (arXiv:2102.09672, eq. 17, without its offset s).

  alpha is written as sin(pi (1 - t) / 2), which is exactly 0 at t = 1.
  """
  return lambda t: (jnp.sin(0.5 * jnp.pi * (1 - t)), jnp.sin(0.5 * jnp.pi * t))


def flow() -> Schedule:
  """The straight path of flow matching and rectified flow: alpha = 1 - t, sigma = t (arXiv:2209.03003, eq. 1)."""
  return lambda t: (1 - t, t)


def karras(sigma_max: float = 80.0) -> Schedule:
  """Variance exploding with sigma in proportion to time: alpha = 1, sigma = sigma_max t (arXiv:2206.00364, table 1).

  The paper's clock is sigma itself; ours ends at t = 1. Its spacing of steps is the grid `karras`.
  """
  if sigma_max <= 0:
    raise ValueError(f'karras needs sigma_max > 0; got {sigma_max}.')
  return lambda t: (jnp.ones_like(t), sigma_max * t)


def path(logsnr: Callable[[Array], Array], p: float = 2.0) -> Schedule:
  """The schedule with alpha^p + sigma^p = 1 and alpha / sigma = exp(logsnr(t) / 2).

  p = 2 preserves the variance, p = 1 is the straight path (arXiv:2107.00630, eq. 3 for p = 2). logsnr may be infinite
  at t = 0 and t = 1; the slope there is given as 0, which makes a velocity target singular at that point.
  """
  if p <= 0:
    raise ValueError(f'path needs p > 0; got {p}.')
  def schedule(t):
    value = logsnr(t)
    inside = jnp.isfinite(value) & (t > 0)
    # The inner where keeps infinities out of the derivative of the branch that is not taken.
    half = 0.5 * p * jnp.where(inside, logsnr(jnp.where(inside, t, 0.5)), 0)
    ends = (t <= 0) | (value > 0)
    alpha = jnp.where(inside, jnp.exp(jax.nn.log_sigmoid(half) / p), jnp.where(ends, 1.0, 0.0))
    sigma = jnp.where(inside, jnp.exp(jax.nn.log_sigmoid(-half) / p), jnp.where(ends, 0.0, 1.0))
    return alpha, sigma
  return schedule


def logsnr_of(schedule: Schedule, t: ArrayLike) -> Array:
  """log(alpha^2 / sigma^2) at t, in nats."""
  alpha, sigma = schedule(t)
  return 2 * (jnp.log(alpha) - jnp.log(sigma))


def time_at(schedule: Schedule, logsnr: ArrayLike) -> Array:
  """The time t at which the schedule has this logsnr, by bisection; 0 or 1 where it lies beyond the schedule's ends."""
  logsnr = jnp.asarray(logsnr, jnp.result_type(float))
  def halve(_, bounds):
    low, high = bounds
    middle = 0.5 * (low + high)
    before = logsnr_of(schedule, middle) >= logsnr  # logsnr falls with t
    return jnp.where(before, middle, low), jnp.where(before, high, middle)
  low, _ = jax.lax.fori_loop(0, 80, halve, (jnp.zeros_like(logsnr), jnp.ones_like(logsnr)))
  return low


def shift(schedule: Schedule, factor: float) -> Callable[[Array], Array]:
  """The clock t -> t' with logsnr(t') = logsnr(t) - 2 log(factor), for images with `factor` times the resolution.

  On `cosine` this is the shift of simple diffusion (arXiv:2301.11093, sec. 3.1), on `flow` that of Stable Diffusion 3,
  t' = factor t / (1 + (factor - 1) t) (arXiv:2403.03206, eq. 23). It moves the times that are trained and the grid that
  is sampled (times.shift, grids.shift); the path, its velocity and the network's clock stay as they are. Raises
  ValueError for factor > 1 where the schedule has no such logsnr, because alpha > 0 at t = 1.
  """
  if factor <= 0:
    raise ValueError(f'shift needs factor > 0; got {factor}.')
  with jax.ensure_compile_time_eval():
    end = float(logsnr_of(schedule, jnp.ones(())))
  if factor > 1 and math.isfinite(end):
    raise ValueError(f'shift by {factor} needs lower logsnr than the {end:.3g} nats at which this schedule ends: take one '
                     "with alpha = 0 at t = 1, such as 'cosine()' or 'flow()', or give it more noise and no shift.")
  return lambda t: time_at(schedule, logsnr_of(schedule, t) - 2 * jnp.log(factor))
