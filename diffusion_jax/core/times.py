"""Laws of the time t at which a training example is noised."""
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array

from diffusion_jax.core import schedules
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Draw


class Times(NamedTuple):
  """A law of t. `sample` gives one t in (0, 1) for each row of the draw; `density` is per unit of t."""
  sample: Callable[[Gaussian, Draw], Array]
  density: Callable[[Gaussian, Array], Array]


def uniform(t_min: float = 0.0, t_max: float = 1.0) -> Times:
  """t ~ U(t_min, t_max], every example on its own (arXiv:2006.11239, alg. 1)."""
  _check_band(t_min, t_max)
  draw_unit = lambda draw: jax.vmap(jax.random.uniform)(draw.keys)
  return _from_unit(draw_unit, t_min, t_max)


def stratified(t_min: float = 0.0, t_max: float = 1.0) -> Times:
  """One random offset for the batch, then evenly spaced: u_i = (u_0 + i / B) mod 1 (arXiv:2107.00630, app. I.1).

  Each t is uniform on its own; the mean over the batch has less variance.
  """
  _check_band(t_min, t_max)
  draw_unit = lambda draw: (jax.random.uniform(draw.key) + draw.index / draw.total) % 1
  return _from_unit(draw_unit, t_min, t_max)


def lognormal(mean: float = -1.2, std: float = 1.2) -> Times:
  """log(sigma / alpha) ~ N(mean, std^2) (arXiv:2206.00364, table 1); for `flow` this is t logit-normal."""
  if std <= 0:
    raise ValueError(f'lognormal needs std > 0; got {std}.')
  def sample(process, draw):
    log_sigma = mean + std * jax.vmap(jax.random.normal)(draw.keys)
    return process.level_at(-2 * log_sigma).t
  def density(process, t):
    level = process.level(t)
    return norm.pdf(-level.logsnr / 2, mean, std) * jnp.abs(process.logsnr_slope(level)) / 2
  return Times(sample, density)


def shift(times: Times, factor: float) -> Times:
  """The times of another law, moved by schedules.shift to suit `factor` times the resolution."""
  def sample(process, draw):
    return schedules.shift(process.schedule, factor)(times.sample(process, draw))
  def density(process, t):
    before = process.level_at(process.level(t).logsnr + 2 * jnp.log(factor))
    inside = process.level(t).logsnr + 2 * jnp.log(factor) >= process.level(1.0).logsnr
    ratio = process.logsnr_slope(process.level(t)) / process.logsnr_slope(before)
    return jnp.where(inside, times.density(process, before.t) * ratio, 0.0)
  return Times(sample, density)


def _check_band(t_min: float, t_max: float) -> None:
  if not 0 <= t_min < t_max <= 1:
    raise ValueError(f'times need 0 <= t_min < t_max <= 1; got t_min={t_min}, t_max={t_max}.')


def _from_unit(draw_unit: Callable[[Draw], Array], t_min: float, t_max: float) -> Times:
  """Times that are linear in u ~ U(0, 1): t = t_max - u (t_max - t_min), never 0 or 1, where targets are singular."""
  def density(process, t):
    return jnp.where((t >= t_min) & (t <= t_max), 1 / (t_max - t_min), 0.0)
  def sample(process, draw):
    u = jnp.maximum(draw_unit(draw), 2.0**-24)  # jax.random.uniform can be 0; this is the least that moves 1 in float32
    return t_max - u * (t_max - t_min)
  return Times(sample, density)
