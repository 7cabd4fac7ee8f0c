"""Variational bounds of -log p(x0) for any process, in bits per entry, and what turns the last latent into data.

-log p(x0) <= KL(q(x1 | x0) | prior) + the divergence of the way back + the expected -log p(x0 | the last latent).
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, PyTree

from diffusion_jax.core import losses, schedules, targets
from diffusion_jax.core.losses import Loss
from diffusion_jax.core.processes import Gaussian, Process, Product, part, reverse_variance, whole
from diffusion_jax.core.targets import Target
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import LATENT, NOISE, TIMES, Cond, Denoiser, Draw, Estimate, Level, combine, spread
from diffusion_jax.core.weights import Weight

Decoder = Callable[[Array, Array, Array], Array]  # (x0, mean, variance) -> nats an entry


def _check_levels(levels: int) -> int:
  if levels < 2:
    raise ValueError(f'A decoder of discrete data needs 2 levels or more; got {levels}.')
  return levels


class Bound(NamedTuple):
  """The three terms of a bound, bits per entry of each example, [B]."""
  prior: Array
  diffusion: Array
  reconstruction: Array

  @property
  def total(self) -> Array:
    return self.prior + self.diffusion + self.reconstruction


def density() -> Decoder:
  """-log N(x0; mean, variance), for data that are real numbers."""
  return lambda x0, mean, variance: -norm.logpdf(x0, mean, jnp.sqrt(variance))


def discretized(levels: int = 256) -> Decoder:
  """-log of the mass that N(mean, variance) has around x0, `levels` values from -1 to 1 (arXiv:2006.11239, eq. 13).

  A value's bin reaches half a step to both sides; the bins of -1 and 1 reach to infinity.
  """
  half = 1 / (_check_levels(levels) - 1)
  def decode(x0, mean, variance):
    std = jnp.sqrt(variance)
    left, right = (x0 - mean - half) / std, (x0 - mean + half) / std
    left = jnp.where(x0 <= -1 + half, -jnp.inf, left)
    right = jnp.where(x0 >= 1 - half, jnp.inf, right)
    # On the side of the shorter tail, where the difference of two cumulative functions keeps its digits.
    flip = left + right > 0
    high = norm.logcdf(jnp.where(flip, -left, right))
    low = norm.logcdf(jnp.where(flip, -right, left))
    return -high - jnp.log(-jnp.expm1(jnp.minimum(low - high, -jnp.finfo(high.dtype).tiny)))
  return decode


def softmax(levels: int = 256) -> Decoder:
  """-log of exp(-(x0 - mean)^2 / (2 variance)) over its sum for all values, from -1 to 1 (arXiv:2107.00630, sec. 3.3)."""
  values = np.linspace(-1, 1, _check_levels(levels))
  def decode(x0, mean, variance):
    score = lambda value: -0.5 * jnp.square(value - mean) / variance
    return jax.nn.logsumexp(jax.vmap(score)(jnp.asarray(values, mean.dtype)), 0) - score(x0)
  return decode


def variational(process: Process, times: Times, decoder: Decoder | None = None, steps: int | None = None,
                high: float | None = 13.3) -> Callable:
  """The bound of a denoiser as a function (denoiser, draw, x0, cond, scored) -> Bound, an unbiased estimate from one draw
  of t by `times`, divided by its density.

  With `steps` = T it is that of the chain t = i / T (arXiv:2006.11239, eq. 5): the step that t falls in, and always the
  first one, in which a Gaussian is decoded at the estimate of x0. Without, it is that of continuous time
  (arXiv:2107.00630, eq. 17): a Gaussian's last latent is the one at logsnr = `high` nats, or, for None or where that is
  lower, the one at which the schedule starts; it is decoded at xt / alpha. Tokens need no decoder and end at t = 0.
  """
  gaussians = [field for field in _fields(process) if isinstance(field, Gaussian)]
  _check_bound(gaussians, decoder, steps, high)
  def bound(denoiser: Denoiser, draw: Draw, x0: PyTree, cond: Cond = None, scored: PyTree = None) -> Bound:
    start = 1 / steps if steps else _start(gaussians, high)
    # A law that depends on a learned schedule is held still: its density is a divisor, no part of the bound.
    t = jax.lax.stop_gradient(times.sample(process, draw.part(TIMES)))
    share = jnp.where(t > start, 1 / jax.lax.stop_gradient(times.density(process, t)), 0.0)
    t = jnp.maximum(_upper(t, steps), 2 / steps) if steps else jnp.maximum(t, start)
    level = process.level(t)
    xt, _ = process.corrupt(draw.part(NOISE).keys, x0, level)
    estimate = denoiser(xt, level, cond)
    if steps:
      nats = combine((steps * share, process.divergence(estimate, x0, xt, level, process.level(t - 1 / steps))))
    else:
      nats = combine((share, process.rate(estimate, x0, xt, level)))
    bits = lambda nats: _bits(nats, scored)
    last = reconstruct(start, draw.part(LATENT).keys, lambda x, level: denoiser(x, level, cond), x0)
    return Bound(bits(process.prior_divergence(x0, process.level(1.0))), bits(nats), bits(last))
  def reconstruct(start, keys, denoise, x0):
    """-log p(x0 | the last latent), nats."""
    if not steps and not gaussians:
      return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), x0)
    level = process.level(start)
    x, _ = process.corrupt(keys, x0, level)
    only_gaussian = len(gaussians) == len(_fields(process))
    estimate = Estimate(x) if not steps and only_gaussian else denoise(x, level)
    return _reveal(process, decoder, estimate, x0, x, level, process.level(2 * start) if steps else None)
  return bound


def bound(process: Gaussian, target: Target, times: Times, decoder: Decoder, steps: int | None = None,
          high: float | None = 13.3) -> Loss:
  """The variational bound itself as the loss, bits per entry (see `variational`); its weight and space are its own."""
  if target.learns_variance and not steps:
    raise ValueError('A bound in continuous time does not train a variance. Give it steps=1000, or take the target alone.')
  terms = variational(process, times, decoder, steps, high)
  def loss(network, draw, x0, cond=None, scored=None):
    return terms(targets.denoiser(process, target, network), draw, x0, cond, scored).total
  return loss


def hybrid(process: Gaussian, target: Target, times: Times, weight: Weight, space: Target, steps: int = 1000,
           scale: float = 0.001, decoder: Decoder = discretized(256)) -> Loss:
  """L_simple + scale L_vlb for a network that also learns its variance (arXiv:2102.09672, eq. 16).

  L_vlb is the bound in bits per entry, estimated as T times the term of the step that was drawn; it moves the variance
  alone, the estimate of x0 in it being held still. Needs a target of learned_variance.
  """
  if not target.learns_variance:
    raise ValueError("hybrid trains a variance too; this target has none. Take 'learned_variance(noise())' or another.")
  if steps < 2:
    raise ValueError(f'hybrid needs 2 steps or more; got {steps}.')
  targets.check_grid(process, target, np.ones(1), 'The target of hybrid')
  losses.check_end(process, target, times._replace(reaches_end=True), weight, space)
  simple = losses.squared()
  def loss(network, draw, x0, cond=None, scored=None):
    drawn = times.sample(process, draw.part(TIMES))
    level = process.level(_upper(drawn, steps))
    xt, noise = process.corrupt(draw.part(NOISE).keys, x0, level)
    prediction, fraction = targets.predict(target, network, xt, level, cond)
    residual = losses.residual_of(process, target, space, level, prediction, x0, noise)
    estimate = jax.lax.stop_gradient(targets.estimate_of(process, target, level, xt, prediction))
    nats = step_term(process, decoder, Estimate(estimate, fraction), x0, xt, level, steps)
    density = times.density(process, drawn)
    bits = _bits(nats, scored) / density
    return losses.weight_at(process, times, weight, level) * simple(residual, scored) + scale * steps * bits
  return loss


def step_term(process: Gaussian, decoder: Decoder, estimate: Estimate, x0: PyTree, xt: PyTree, level: Level,
              steps: int) -> PyTree:
  """The term of the chain's bound for the step from t to t - 1 / T, nats an entry: a divergence, or at t = 1 / T the
  decoder (arXiv:2006.11239, eq. 5)."""
  first = level.t < 1.5 / steps
  safe = process.level(jnp.where(first, 2 / steps, level.t))
  inner = process.divergence(estimate, x0, xt, safe, process.level(safe.t - 1 / steps))
  at = process.level(1 / steps)
  last = _reveal(process, decoder, estimate, x0, xt, at, process.level(2 / steps))
  pick = lambda a, b: jnp.where(spread(first, a), a, b)
  return jax.tree.map(pick, last, inner)


def _reveal(process: Process, decoder: Decoder | None, estimate: Estimate, x0: PyTree, x: PyTree, level: Level,
            above: Level | None) -> PyTree:
  """-log p(x0 | x) for x at the lowest level but the data; `above` is the next one of a chain, None in continuous time."""
  if isinstance(process, Product):
    field = lambda name: _reveal(process.fields[name], decoder, part(estimate, name), x0[name], x[name], part(level, name),
                                 part(above, name) if above else None)
    return {name: field(name) for name in process.fields}
  if not isinstance(process, Gaussian):
    return process.divergence(estimate, x0, x, level, process.level(0.0))
  if above is None:
    variance = (level.sigma / level.alpha)**2
    return jax.tree.map(lambda a, b: decoder(a, b, variance), x0, combine((1 / level.alpha, x)))
  # The least variance of this step is 0; in its place, as in the papers' code, that of the step above it.
  zero = jax.tree.map(jnp.zeros_like, x0)
  fraction = estimate.variance if estimate.variance is not None else zero
  least = reverse_variance(zero, above, level)
  largest = level.sigma**2
  between = lambda f, least: jnp.exp((1 - f) * jnp.log(least) + f * jnp.log(largest))
  return jax.tree.map(lambda a, b, f, least: decoder(a, b, between(f, least)), x0, estimate.x0, fraction, least)


def _upper(t: Array, steps: int) -> Array:
  """The end i / T of the step in which t lies; a t that is i / T up to rounding is the end of step i."""
  return jnp.ceil(t * steps * (1 - 1e-6)) / steps


def _bits(nats: PyTree, scored: PyTree) -> Array:
  """Bits per scored entry of every example."""
  return losses.mean(lambda value: value / np.log(2), nats, scored)


def _start(gaussians: list[Gaussian], high: float | None) -> Array | float:
  """The time of the last latent in continuous time: 0 without Gaussian fields."""
  def one(field):
    first, _ = schedules.ends(field.schedule)
    return schedules.inner_time(field.schedule, first if high is None else jnp.minimum(first, high))
  return functools.reduce(jnp.maximum, [one(field) for field in gaussians]) if gaussians else 0.0


def _fields(process: Process) -> list[Process]:
  if isinstance(process, Product):
    return [field for each in process.fields.values() for field in _fields(each)]
  return [process]


def _check_bound(gaussians: list[Gaussian], decoder: Decoder | None, steps: int | None, high: float | None) -> None:
  if steps is not None and steps < 2:
    raise ValueError(f'A bound of discrete time needs 2 steps or more; got {steps}.')
  if gaussians and decoder is None:
    raise ValueError("A bound of a Gaussian process needs a decoder: 'density()' for real numbers, 'softmax(256)' or "
                     "'discretized(256)' for 256 values from -1 to 1.")
  if any(field.project is not whole for field in gaussians):
    raise ValueError('A bound counts every entry; data in a subspace have fewer dimensions: take likelihood.log_density.')
  starts = [schedules.ends(field.schedule)[0] for field in gaussians]
  if not steps and high is not None and any(isinstance(start, jax.core.Tracer) for start in starts):
    raise ValueError('The last latent of a learned schedule is where it starts: give the bound high=None.')
  if not steps and high is None:
    if any(not isinstance(start, jax.core.Tracer) and start > 60 for start in starts):
      raise ValueError('high=None is for a schedule that starts at a finite logsnr; this one starts at the data. Name the '
                       'logsnr of the last latent: high=13.3.')
