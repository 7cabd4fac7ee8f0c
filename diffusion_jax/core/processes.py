"""Noising processes: how data become noise (corrupt, forward) and the law of the way back given the data (reverse).

Every process also states how far a denoiser's way back is from the true one: `divergence` over a step, `rate` per unit of
t, `prior_divergence` at the end. All three are nats, entry by entry, in the shape of x0.
"""
import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from diffusion_jax.core import schedules
from diffusion_jax.core.types import Estimate, Level, Schedule, combine, fold, level_of, normal


@runtime_checkable
class Process(Protocol):
  """What samplers and bounds ask of a process; s < t, levels as in types.Level."""
  def level(self, t: ArrayLike) -> Level: ...
  def prior(self, keys: Key[Array, 'batch'], like: PyTree, level: Level) -> PyTree: ...
  def corrupt(self, keys: Key[Array, 'batch'], x0: PyTree, level: Level) -> tuple[PyTree, PyTree]: ...
  def forward(self, keys: Key[Array, 'batch'], xs: PyTree, s: Level, t: Level) -> PyTree: ...
  def reverse(self, keys: Key[Array, 'batch'], estimate: Estimate, xt: PyTree, t: Level, s: Level) -> PyTree: ...
  def divergence(self, estimate: Estimate, x0: PyTree, xt: PyTree, t: Level, s: Level) -> PyTree: ...
  def rate(self, estimate: Estimate, x0: PyTree, xt: PyTree, level: Level) -> PyTree: ...
  def prior_divergence(self, x0: PyTree, level: Level) -> PyTree: ...


def whole(x: PyTree) -> PyTree:
  """The projection that changes nothing."""
  return x


def centred(x: PyTree) -> PyTree:
  """The projection of clouds of points [B, points, axes] that takes away their centre (arXiv:2203.17003, sec. 3.1)."""
  return jax.tree.map(lambda leaf: leaf - leaf.mean(1, keepdims=True), x)


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """xt = alpha_t x0 + sigma_t noise (arXiv:2107.00630, sec. 3.1), for arrays and pytrees x with a leading batch axis.

  `project`, a linear projection, keeps data, noise and estimates in a subspace: `centred` for clouds of points.
  """
  schedule: Schedule
  project: Callable[[PyTree], PyTree] = whole

  def level(self, t: ArrayLike) -> Level:
    """The level at time t in [0, 1]."""
    return level_of(self.schedule, t)

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

  def noise(self, keys: Key[Array, 'batch'], like: PyTree) -> PyTree:
    """Standard normal noise, projected."""
    return self.project(normal(keys, like))

  def prior(self, keys: Key[Array, 'batch'], like: PyTree, level: Level) -> PyTree:
    """Noise N(0, sigma^2), where sampling starts: the law of xt at a level so high that the data no longer show."""
    return combine((level.sigma, self.noise(keys, like)))

  def corrupt(self, keys: Key[Array, 'batch'], x0: PyTree, level: Level) -> tuple[PyTree, PyTree]:
    """Draw (xt, noise) with xt ~ q(xt | x0)."""
    noise = self.noise(keys, x0)
    return combine((level.alpha, x0), (level.sigma, noise)), noise

  def forward(self, keys: Key[Array, 'batch'], xs: PyTree, s: Level, t: Level) -> PyTree:
    """Draw xt ~ q(xt | xs), s < t: N(a xs, sigma_t^2 - a^2 sigma_s^2) with a = alpha_t / alpha_s."""
    scale = t.alpha / s.alpha
    variance = jnp.maximum(t.sigma**2 - (scale * s.sigma)**2, 0)
    return combine((scale, xs), (jnp.sqrt(variance), self.noise(keys, xs)))

  def reverse(self, keys: Key[Array, 'batch'], estimate: Estimate, xt: PyTree, t: Level, s: Level) -> PyTree:
    """Draw xs ~ q(xs | xt, x0), s < t, for the estimated x0 (arXiv:2107.00630, app. A); its mean x0 at s = 0.

    Mean (alpha_t sigma_s^2) / (alpha_s sigma_t^2) xt + alpha_s (1 - r) x0, variance sigma_s^2 (1 - r), where
    r = snr_t / snr_s; the estimate may say that the variance is larger (reverse_variance). Nothing here divides by alpha_t
    or sigma_s, which may be 0.
    """
    share = posterior_share(t, s)
    mean = combine((t.alpha / s.alpha * (s.sigma / t.sigma)**2, xt), (s.alpha * share, estimate.x0))
    noise = self.noise(keys, xt)
    if estimate.variance is None:
      return combine((1.0, mean), (s.sigma * jnp.sqrt(share), noise))
    if self.project is not whole:
      raise ValueError('A variance for every entry leaves the subspace of a projection: take a target without one.')
    add = lambda mean, variance, noise: mean + jnp.sqrt(variance) * noise
    return jax.tree.map(add, mean, reverse_variance(estimate.variance, t, s), noise)

  def divergence(self, estimate: Estimate, x0: PyTree, xt: PyTree, t: Level, s: Level) -> PyTree:
    """KL(q(xs | xt, x0) | p(xs | xt)), s < t and s > 0, of two normal laws whose variances may differ.

    With equal variances it is (snr_s - snr_t) (x0 - estimate)^2 / 2 (arXiv:2107.00630, eq. 13).
    """
    squares = jax.tree.map(jnp.square, combine((1.0, x0), (-1.0, estimate.x0)))
    same = combine((0.5 * ((s.alpha / s.sigma)**2 - (t.alpha / t.sigma)**2), squares))
    if estimate.variance is None:
      return same
    stretch = combine((2 * (jnp.log(t.sigma) - jnp.log(s.sigma)), estimate.variance))  # log of p's variance over q's
    return jax.tree.map(lambda gap, log: gap * jnp.exp(-log) + 0.5 * (log + jnp.expm1(-log)), same, stretch)

  def rate(self, estimate: Estimate, x0: PyTree, xt: PyTree, level: Level) -> PyTree:
    """The divergence of a short step per unit of t: -snr'(t) (x0 - estimate)^2 / 2 (arXiv:2107.00630, eq. 15)."""
    alpha_slope, sigma_slope = self.slopes(level.t)
    fall = level.alpha * (level.alpha * sigma_slope - level.sigma * alpha_slope) / level.sigma**3
    return combine((fall, jax.tree.map(jnp.square, combine((1.0, x0), (-1.0, estimate.x0)))))

  def prior_divergence(self, x0: PyTree, level: Level) -> PyTree:
    """KL(q(xt | x0) | prior) at the level where sampling starts: (alpha x0 / sigma)^2 / 2."""
    return combine((0.5 * (level.alpha / level.sigma)**2, jax.tree.map(jnp.square, x0)))


def posterior_share(t: Level, s: Level) -> Array:
  """1 - snr_t / snr_s, the share of sigma_s^2 that q(xs | xt, x0) leaves random."""
  return jnp.maximum(1 - (t.alpha * s.sigma / (s.alpha * t.sigma))**2, 0)


def reverse_variance(fraction: PyTree, t: Level, s: Level) -> PyTree:
  """The variance small^(1 - fraction) large^fraction of p(xs | xt) (arXiv:2102.09672, eq. 15), entry by entry; 0 at s = 0.

  `small` is that of q(xs | xt, x0), which is right for data without spread, `large` that of q(xt | xs), right for white
  data of variance 1; their ratio is (sigma_s / sigma_t)^2.
  """
  ratio = jnp.where(s.sigma > 0, s.sigma / t.sigma, 1.0)
  scales = combine((2 * jnp.log(ratio), jax.tree.map(lambda leaf: 1 - leaf, fraction)))
  largest = jnp.where(s.sigma > 0, t.sigma**2 * posterior_share(t, s), 0.0)
  return combine((largest, jax.tree.map(jnp.exp, scales)))


@dataclasses.dataclass(frozen=True)
class Product:
  """One process a field, at one time: x is {field: x of the field} (arXiv:2203.17003: positions beside kinds of atoms).

  Its levels hold one alpha and sigma a field, {field: number}.
  """
  fields: dict[str, Process]

  def level(self, t: ArrayLike) -> Level:
    levels = {name: process.level(t) for name, process in self.fields.items()}
    return Level(jnp.asarray(t, jnp.result_type(float)), {name: level.alpha for name, level in levels.items()},
                 {name: level.sigma for name, level in levels.items()})

  def prior(self, keys, like, level):
    return self._each(lambda name, process, i: process.prior(fold(keys, i), like[name], part(level, name)))

  def corrupt(self, keys, x0, level):
    both = self._each(lambda name, process, i: process.corrupt(fold(keys, i), x0[name], part(level, name)))
    return tuple({name: pair[i] for name, pair in both.items()} for i in (0, 1))

  def forward(self, keys, xs, s, t):
    return self._each(lambda name, process, i: process.forward(fold(keys, i), xs[name], part(s, name), part(t, name)))

  def reverse(self, keys, estimate, xt, t, s):
    return self._each(lambda name, process, i: process.reverse(
        fold(keys, i), part(estimate, name), xt[name], part(t, name), part(s, name)))

  def divergence(self, estimate, x0, xt, t, s):
    return self._each(lambda name, process, i: process.divergence(
        part(estimate, name), x0[name], xt[name], part(t, name), part(s, name)))

  def rate(self, estimate, x0, xt, level):
    return self._each(lambda name, process, i: process.rate(part(estimate, name), x0[name], xt[name], part(level, name)))

  def prior_divergence(self, x0, level):
    return self._each(lambda name, process, i: process.prior_divergence(x0[name], part(level, name)))

  def _each(self, function):
    return {name: function(name, process, i) for i, (name, process) in enumerate(self.fields.items())}


def part(every: Level | Estimate, name: str) -> Level | Estimate:
  """The level or the estimate of one field of a Product."""
  return type(every)(*(entry[name] if isinstance(entry, dict) and name in entry else entry for entry in every))
