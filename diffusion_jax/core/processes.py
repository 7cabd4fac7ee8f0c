"""Noising processes: how data become noise (corrupt, forward) and the law of the way back given the data (reverse)."""
import dataclasses

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from diffusion_jax.core import schedules
from diffusion_jax.core.types import Estimate, Level, Schedule, combine, normal


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """xt = alpha_t x0 + sigma_t noise (arXiv:2107.00630, sec. 3.1), for arrays and pytrees x with a leading batch axis."""
  schedule: Schedule

  def level(self, t: ArrayLike) -> Level:
    """The level at time t in [0, 1]."""
    t = jnp.asarray(t, jnp.result_type(float))
    return Level(t, *self.schedule(t))

  def level_at(self, logsnr: ArrayLike) -> Level:
    """The level with this logsnr, in nats."""
    return self.level(schedules.time_at(self.schedule, logsnr))

  def slopes(self, t: Array) -> tuple[Array, Array]:
    """(d alpha / dt, d sigma / dt) at t."""
    return jax.jvp(self.schedule, (t,), (jnp.ones_like(t),))[1]

  def logsnr_slope(self, level: Level) -> Array:
    """d logsnr / dt, negative, in nats per unit of t."""
    alpha_slope, sigma_slope = self.slopes(level.t)
    return 2 * (alpha_slope / level.alpha - sigma_slope / level.sigma)

  def prior(self, keys: Key[Array, 'batch'], like: PyTree, level: Level) -> PyTree:
    """Noise N(0, sigma^2), where sampling starts: the law of xt at a level so high that the data no longer show."""
    return combine((level.sigma, normal(keys, like)))

  def corrupt(self, keys: Key[Array, 'batch'], x0: PyTree, level: Level) -> tuple[PyTree, PyTree]:
    """Draw (xt, noise) with xt ~ q(xt | x0)."""
    noise = normal(keys, x0)
    return combine((level.alpha, x0), (level.sigma, noise)), noise

  def forward(self, keys: Key[Array, 'batch'], xs: PyTree, s: Level, t: Level) -> PyTree:
    """Draw xt ~ q(xt | xs), s < t: N(a xs, sigma_t^2 - a^2 sigma_s^2) with a = alpha_t / alpha_s."""
    scale = t.alpha / s.alpha
    variance = jnp.maximum(t.sigma**2 - (scale * s.sigma)**2, 0)
    return combine((scale, xs), (jnp.sqrt(variance), normal(keys, xs)))

  def reverse(self, keys: Key[Array, 'batch'], estimate: Estimate, xt: PyTree, t: Level, s: Level) -> PyTree:
    """Draw xs ~ q(xs | xt, x0), s < t, for the estimated x0 (arXiv:2107.00630, app. A); its mean x0 at s = 0.

    Mean (alpha_t sigma_s^2) / (alpha_s sigma_t^2) xt + alpha_s (1 - r) x0, variance sigma_s^2 (1 - r), where
    r = snr_t / snr_s. Nothing here divides by alpha_t or sigma_s, which may be 0.
    """
    share = posterior_share(t, s)
    mean = combine((t.alpha / s.alpha * (s.sigma / t.sigma)**2, xt), (s.alpha * share, estimate.x0))
    return combine((1.0, mean), (s.sigma * jnp.sqrt(share), normal(keys, xt)))


def posterior_share(t: Level, s: Level) -> Array:
  """1 - snr_t / snr_s, the share of sigma_s^2 that q(xs | xt, x0) leaves random."""
  return jnp.maximum(1 - (t.alpha * s.sigma / (s.alpha * t.sigma))**2, 0)
