"""Laws of the time t at which a training example is noised.

`uniform`, `stratified` and `antithetic` draw u in (0, 1); the other laws carry such a u to their quantile, so that each can
be stratified: 'lognormal(-1.2, 1.2, stratified())'.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.scipy.special import ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, PyTree

from diffusion_jax.core import schedules
from diffusion_jax.core.processes import Gaussian, Process
from diffusion_jax.core.types import Draw, example_keys

LEAST = 2.0**-24  # jax.random.uniform can be 0; this is the least that moves 1 in float32


class Times(NamedTuple):
  """A law of t. `sample` gives one t in (0, 1] for each row of the draw; `density` is per unit of t."""
  sample: Callable[[Process, Draw], Array]
  density: Callable[[Process, Array], Array]
  flat: bool = False  # uniform on (0, 1): what other laws may take as their u
  reaches_end: bool = False  # draws t = 1 itself


class Adaptive(NamedTuple):
  """A law of t that learns from the losses it led to; `state` is kept with what is trained."""
  init: Callable[[], PyTree]
  times: Callable[[PyTree], Times]
  update: Callable[[PyTree, Array, Array], PyTree]  # (state, t [B], losses [B]) -> state


def uniform(t_min: float = 0.0, t_max: float = 1.0) -> Times:
  """t ~ U(t_min, t_max], every example on its own (arXiv:2006.11239, alg. 1)."""
  return _from_unit(lambda draw: jax.vmap(jax.random.uniform)(draw.keys), t_min, t_max)


def stratified(t_min: float = 0.0, t_max: float = 1.0) -> Times:
  """One random offset for the batch, then evenly spaced: u_i = (u_0 + i / B) mod 1 (arXiv:2107.00630, app. I.1).

  Each t is uniform on its own; the mean over the batch has less variance.
  """
  return _from_unit(lambda draw: (jax.random.uniform(draw.key) + draw.index / draw.total) % 1, t_min, t_max)


def antithetic(t_min: float = 0.0, t_max: float = 1.0) -> Times:
  """Rows 2 k and 2 k + 1 of a batch share a u: one gets u, the other 1 - u (the sampling of DDIM's code, 2010.02502)."""
  def draw_unit(draw):
    u = jnp.maximum(jax.vmap(jax.random.uniform)(example_keys(draw.key, draw.index // 2)), LEAST)
    return jnp.where(draw.index % 2 == 0, u, 1 - u)
  return _from_unit(draw_unit, t_min, t_max)


def discrete(steps: int = 1000, base: Times | None = None) -> Times:
  """t uniform on i / steps, i = 1..steps (arXiv:2006.11239, sec. 3). Its density is counted as 1, that of the limit."""
  if steps < 1:
    raise ValueError(f'discrete needs steps >= 1; got {steps}.')
  sample = lambda process, draw: jnp.ceil(_unit(base, process, draw) * steps) / steps
  return Times(sample, lambda process, t: jnp.ones_like(t), reaches_end=True)


def lognormal(mean: float = -1.2, std: float = 1.2, base: Times | None = None) -> Times:
  """log(sigma / alpha) ~ N(mean, std^2) (arXiv:2206.00364, table 1); for `flow` this is t logit-normal."""
  _check_std('lognormal', std)
  density = lambda logsnr: 0.5 * norm.pdf(-0.5 * logsnr, mean, std)
  return _from_logsnr(lambda u: -2 * (mean + std * ndtri(u)), density, base)


def log_uniform(sigma_min: float = 0.002, sigma_max: float = 80.0, base: Times | None = None) -> Times:
  """log(sigma / alpha) uniform from log(sigma_min) to log(sigma_max), as logsnr is then (arXiv:2011.13456, app. C)."""
  if not 0 < sigma_min < sigma_max:
    raise ValueError(f'log_uniform needs 0 < sigma_min < sigma_max; got {sigma_min}, {sigma_max}.')
  low, high = -2 * math.log(sigma_max), -2 * math.log(sigma_min)
  density = lambda logsnr: jnp.where((logsnr >= low) & (logsnr <= high), 1 / (high - low), 0.0)
  return _from_logsnr(lambda u: high + u * (low - high), density, base)


def logit_normal(mean: float = 0.0, std: float = 1.0, base: Times | None = None) -> Times:
  """log(t / (1 - t)) ~ N(mean, std^2), on the schedule's own clock (arXiv:2403.03206, eq. 19)."""
  _check_std('logit_normal', std)
  def density(process, t):
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)
    return jnp.where(inside, norm.pdf(jnp.log(t) - jnp.log1p(-t), mean, std) / (t * (1 - t)), 0.0)
  return Times(lambda process, draw: jax.nn.sigmoid(mean + std * ndtri(_unit(base, process, draw))), density)


def mode(scale: float = 1.29, base: Times | None = None) -> Times:
  """t = 1 - u - scale (cos^2(pi u / 2) - 1 + u): more in the middle for scale > 0 (arXiv:2403.03206, eq. 20)."""
  if not -1 <= scale <= 2 / (math.pi - 2):
    raise ValueError(f'mode needs -1 <= scale <= 2 / (pi - 2) = 1.7519, between which t falls with u; got {scale}.')
  # Written in 1 - u, in which nothing cancels where t is small.
  quantile = lambda u: (1 + scale) * (1 - u) - scale * jnp.sin(0.5 * jnp.pi * (1 - u))**2
  return _from_time(quantile, base)


def cosmap(base: Times | None = None) -> Times:
  """logsnr of `cosine` at a uniform u, on `flow`: t = 1 - 1 / (1 + tan(pi u / 2)) (arXiv:2403.03206, eq. 21-22)."""
  def sample(process, draw):
    angle = 0.5 * jnp.pi * _unit(base, process, draw)
    return jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))
  return Times(sample, lambda process, t: 2 / (jnp.pi * (t**2 + (1 - t)**2)))


def cosine_interpolated(size: int = 64, low: int = 32, high: int = 64, base: Times | None = None) -> Times:
  """logsnr(u) = u l_low(u) + (1 - u) l_high(u), where l_n(u) = -2 log tan(pi u / 2) + 2 log(n / size) is `cosine` for
  images of `size` pixels a side with the noise of n (simple diffusion, arXiv:2301.11093, sec. 3.1)."""
  if min(size, low, high) < 1:
    raise ValueError(f'cosine_interpolated needs sizes in pixels, 1 or more; got {size}, {low}, {high}.')
  if low >= math.exp(math.pi) * high:
    raise ValueError(f'cosine_interpolated needs low < 23.14 high, or logsnr would rise; got low={low}, high={high}.')
  first, last = 2 * math.log(high / size), 2 * math.log(low / size)
  def quantile(u):
    angle = 0.5 * jnp.pi * u
    return -2 * (jnp.log(jnp.sin(angle)) - jnp.log(jnp.sin(0.5 * jnp.pi - angle))) + first + u * (last - first)
  slope = lambda u: -2 * jnp.pi / jnp.sin(jnp.pi * u) + (last - first)
  density = lambda logsnr: 1 / jnp.abs(slope(schedules.bisect(quantile, logsnr)))
  return _from_logsnr(quantile, density, base)


def shift(times: Times, factor: float) -> Times:
  """The times of another law, moved by schedules.shift to suit `factor` times the resolution.

  Raises ValueError for factor < 1 where the schedule starts at a finite logsnr: the first times have nowhere to go.
  """
  def sample(process, draw):
    _check_start(process, factor)
    return schedules.shift(process.schedule, factor)(times.sample(process, draw))
  def density(process, t):
    t = jnp.clip(t, 1e-7, 1 - 1e-6)  # at the ends both slopes are infinite
    before = process.level_at(process.level(t).logsnr + 2 * jnp.log(factor))
    inside = process.level(t).logsnr + 2 * jnp.log(factor) >= process.level(1.0).logsnr
    ratio = process.logsnr_slope(process.level(t)) / process.logsnr_slope(before)
    return jnp.where(inside, times.density(process, before.t) * ratio, 0.0)
  return Times(sample, density, reaches_end=times.reaches_end)


def dimension_shift(times: Times, size: int, base: int = 4096) -> Times:
  """`shift` by sqrt(size / base) for examples of `size` numbers (schedules.dimension_factor)."""
  return shift(times, schedules.dimension_factor(size, base))


def importance(steps: int = 1000, history: int = 10, floor: float = 0.001) -> Adaptive:
  """t = i / steps with probability in proportion to sqrt(E[loss^2 | i]) (arXiv:2102.09672, sec. 3.3).

  E is the mean over the last `history` losses of each step; until every step has that many the law is uniform. `floor` is
  the share that stays uniform. Divided by the density the expected loss is that of uniform t.
  """
  if steps < 1 or history < 1 or not 0 < floor <= 1:
    raise ValueError(f'importance needs steps >= 1, history >= 1 and 0 < floor <= 1; got {steps}, {history}, {floor}.')
  init = lambda: {'losses': jnp.zeros((steps, history)), 'count': jnp.zeros(steps, jnp.int32)}
  def times(state):
    root = jnp.sqrt(jnp.mean(jnp.square(state['losses']), 1))
    share = root / jnp.maximum(root.sum(), jnp.finfo(root.dtype).tiny)
    warm = (state['count'] >= history).all() & (root.sum() > 0) & jnp.isfinite(root.sum())
    chances = jnp.where(warm, (1 - floor) * share + floor / steps, 1 / steps)
    which = lambda draw: jax.vmap(lambda key: jax.random.categorical(key, jnp.log(chances)))(draw.keys)
    density = lambda process, t: steps * chances[_step_of(t, steps)]
    return Times(lambda process, draw: (which(draw) + 1) / steps, density, reaches_end=True)
  def update(state, t, losses):
    step, count = _step_of(t, steps), state['count']
    same = step[:, None] == step[None, :]
    rank = jnp.tril(same, -1).sum(1)  # how many earlier rows of the batch have the same step
    kept = same.sum(1) - rank <= history  # later rows of the batch would overwrite the others
    row = jnp.where(kept, step, steps)  # beyond the end: dropped
    values = state['losses'].at[row, (count[step] + rank) % history].set(losses, mode='drop')
    return {'losses': values, 'count': count.at[step].add(1)}
  return Adaptive(init, times, update)


def _step_of(t: Array, steps: int) -> Array:
  return jnp.clip(jnp.round(t * steps).astype(int) - 1, 0, steps - 1)


def _check_start(process: Gaussian, factor: float) -> None:
  with jax.ensure_compile_time_eval():
    start, _ = schedules.ends(process.schedule)
    lost = float(schedules.time_at(process.schedule, start + 2 * jnp.log(factor)))
  if factor < 1 and lost > LEAST:
    raise ValueError(f'shift by {factor} needs higher logsnr than the {float(start):.3g} nats at which this schedule '
                     f'starts: times below {lost:.3g} would all become that start.')


def _check_std(name: str, std: float) -> None:
  if std <= 0:
    raise ValueError(f'{name} needs std > 0; got {std}.')


def _from_unit(draw_unit: Callable[[Draw], Array], t_min: float, t_max: float) -> Times:
  """Times that are linear in u ~ U(0, 1): t = t_max - u (t_max - t_min), never 0 or 1, where targets are singular."""
  if not 0 <= t_min < t_max <= 1:
    raise ValueError(f'times need 0 <= t_min < t_max <= 1; got t_min={t_min}, t_max={t_max}.')
  def density(process, t):
    return jnp.where((t >= t_min) & (t <= t_max), 1 / (t_max - t_min), 0.0)
  def sample(process, draw):
    u = jnp.maximum(draw_unit(draw), LEAST)
    return t_max - u * (t_max - t_min)
  return Times(sample, density, flat=(t_min, t_max) == (0, 1))


def _unit(base: Times | None, process: Process, draw: Draw) -> Array:
  """u in (0, 1) by the law `base`, independent rows by default."""
  if base and not base.flat:
    raise ValueError("The base of a law is uniform on (0, 1): 'uniform()', 'stratified()' or 'antithetic()'.")
  return (base or uniform()).sample(process, draw)


def _from_time(quantile: Callable[[Array], Array], base: Times | None) -> Times:
  """The law of t = quantile(u), which falls with u."""
  def density(process, t):
    u = schedules.bisect(quantile, t)
    return 1 / jnp.abs(jax.jvp(quantile, (u,), (jnp.ones_like(u),))[1])
  return Times(lambda process, draw: quantile(_unit(base, process, draw)), density)


def _from_logsnr(quantile: Callable[[Array], Array], density: Callable[[Array], Array], base: Times | None) -> Times:
  """The law of logsnr = quantile(u), which falls with u, given that it lies where the schedule does; `density` is that of
  logsnr without the condition."""
  def bounds(process):
    return [schedules.bisect(quantile, end) for end in schedules.ends(process.schedule)]
  def sample(process, draw):
    first, last = bounds(process)
    return schedules.inner_time(process.schedule, quantile(first + _unit(base, process, draw) * (last - first)))
  def over_time(process, t):
    first, last = bounds(process)
    level = process.level(t)
    value = density(level.logsnr) * jnp.abs(process.logsnr_slope(level)) / (last - first)
    return jnp.where(jnp.isfinite(level.logsnr), value, 0.0)
  return Times(sample, over_time)
