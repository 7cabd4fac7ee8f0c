"""Noise schedules: t -> (alpha, sigma) of xt = alpha x0 + sigma noise, from t = 0 (data) to t = 1 (noise).

Every schedule takes an array of times of any shape and is exact at its ends: t = 0 is (1, 0) by definition, also where
the paper starts at a small sigma: such a schedule jumps there. Tables of discrete betas are in betas.py.
"""
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from diffusion_jax.core.types import Learned, Schedule


def linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
  """Variance preserving with a linear rate: alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2).

  The continuous limit of DDPM's betas (arXiv:2006.11239), as in arXiv:2011.13456, eq. 33. The rates are per unit of t.
  """
  _check_rates('linear', beta_min, beta_max)
  return _preserving(lambda t: -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min)


def scaled_linear(beta_min: float = 0.85, beta_max: float = 12.0) -> Schedule:
  """Variance preserving with a rate whose square root is linear: beta = (sqrt(beta_min) (1 - t) + sqrt(beta_max) t)^2.

  The continuous limit of the betas of latent diffusion and Stable Diffusion (the code of arXiv:2112.10752).
  """
  _check_rates('scaled_linear', beta_min, beta_max)
  root, rise = math.sqrt(beta_min), math.sqrt(beta_max) - math.sqrt(beta_min)
  return _preserving(lambda t: -0.5 * (root**2 * t + root * rise * t**2 + rise**2 * t**3 / 3))


def exponential(rate: float = 12.0) -> Schedule:
  """Variance preserving at a constant rate: alpha = exp(-rate t / 2) (arXiv:2011.13456, eq. 11)."""
  if rate <= 0:
    raise ValueError(f'exponential needs rate > 0; got {rate}.')
  return _preserving(lambda t: -0.5 * rate * t)


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
  """alpha of `linear` with sigma = 1 - alpha^2, below that of the variance preserving (arXiv:2011.13456, eq. 29)."""
  _check_rates('sub_vp', beta_min, beta_max)
  log_alpha = lambda t: -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
  return lambda t: (jnp.exp(log_alpha(t)), -jnp.expm1(2 * log_alpha(t)))


def cosine(offset: float = 0.0) -> Schedule:
  """Variance preserving: alpha = cos(a(t)) / cos(a(0)), a(t) = pi/2 (t + s) / (1 + s) (arXiv:2102.09672, eq. 17).

  The paper's offset s is 0.008, its table of betas `discrete(cosine_betas())`. With offset 0 this is alpha = cos(pi t / 2),
  sigma = sin(pi t / 2). alpha is written so that it is exactly 0 at t = 1.
  """
  if offset < 0:
    raise ValueError(f'cosine needs offset >= 0; got {offset}.')
  if offset == 0:
    return trigonometric()
  pace = 0.5 * math.pi / (1 + offset)
  start = pace * offset
  def schedule(t):
    alpha = jnp.sin(pace * (1 - t)) / math.cos(start)
    sigma = jnp.sqrt(jnp.sin(pace * t) * jnp.sin(pace * t + 2 * start)) / math.cos(start)
    return _from_data(t, alpha, sigma)
  return schedule


def trigonometric(sigma_data: float = 1.0) -> Schedule:
  """alpha = cos(pi t / 2), sigma = sigma_data sin(pi t / 2): SiT's GVP (arXiv:2401.08740, sec. 2.3), TrigFlow (2410.11081).

  TrigFlow's clock is pi t / 2; `sigma_data` is the standard deviation of the data, which xt then keeps.
  """
  if sigma_data <= 0:
    raise ValueError(f'trigonometric needs sigma_data > 0; got {sigma_data}.')
  return lambda t: (jnp.sin(0.5 * jnp.pi * (1 - t)), sigma_data * jnp.sin(0.5 * jnp.pi * t))


def sigmoid(start: float = -3.0, end: float = 3.0, temperature: float = 1.0) -> Schedule:
  """Variance preserving: alpha^2 = (S(end) - S(x)) / (S(end) - S(start)), S the sigmoid of x / temperature,
  x = start + t (end - start) (arXiv:2212.11972; arXiv:2301.10972, alg. 1).

  A difference of sigmoids is written as sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)), which is exact at both ends.
  """
  if not start < end or temperature <= 0:
    raise ValueError(f'sigmoid needs start < end and temperature > 0; got {start}, {end}, {temperature}.')
  low, high = 0.5 * start / temperature, 0.5 * end / temperature
  scale = 1 / math.sinh(high - low)
  def schedule(t):
    here, left = low + t * (high - low), (1 - t) * (high - low)
    alpha = jnp.sinh(left) * math.cosh(low) * scale / jnp.cosh(here)
    sigma = jnp.sinh(t * (high - low)) * math.cosh(high) * scale / jnp.cosh(here)
    return _from_data(t, jnp.sqrt(alpha), jnp.sqrt(sigma))
  return schedule


def polynomial(power: float = 2.0, precision: float = 1e-5) -> Schedule:
  """Variance preserving: alpha = (1 - 2 precision) (1 - t^power) + precision (arXiv:2203.17003, app. B)."""
  if power <= 0 or not 0 < precision < 0.5:
    raise ValueError(f'polynomial needs power > 0 and 0 < precision < 0.5; got {power}, {precision}.')
  def schedule(t):
    lost = (1 - 2 * precision) * t**power + precision  # 1 - alpha
    alpha = (1 - 2 * precision) * (1 - t**power) + precision
    return _from_data(t, alpha, jnp.sqrt(lost * (1 + alpha)))
  return schedule


def geometric(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
  """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t for t > 0 (arXiv:2011.13456, eq. 30-31)."""
  if not 0 < sigma_min < sigma_max:
    raise ValueError(f'geometric needs 0 < sigma_min < sigma_max; got {sigma_min}, {sigma_max}.')
  rate = math.log(sigma_max / sigma_min)
  return lambda t: _from_data(t, jnp.ones_like(t), sigma_min * jnp.exp(rate * t))


def karras(sigma_max: float = 80.0) -> Schedule:
  """Variance exploding with sigma in proportion to time: alpha = 1, sigma = sigma_max t (arXiv:2206.00364, table 1).

  The paper's clock is sigma itself; ours ends at t = 1. Its spacing of steps is the grid `karras`.
  """
  if sigma_max <= 0:
    raise ValueError(f'karras needs sigma_max > 0; got {sigma_max}.')
  return lambda t: (jnp.ones_like(t), sigma_max * t)


def flow() -> Schedule:
  """The straight path of flow matching and rectified flow: alpha = 1 - t, sigma = t (arXiv:2209.03003, eq. 1)."""
  return lambda t: (1 - t, t)


def laplace(mean: float = 0.0, scale: float = 0.5) -> Schedule:
  """Variance preserving; logsnr of a uniform t has the law of Laplace, density exp(-|logsnr - mean| / scale) / (2 scale)
  (arXiv:2407.03297, table 1). In single precision it ends at mean - 16 scale, because 1 - t has no finer steps."""
  if scale <= 0:
    raise ValueError(f'laplace needs scale > 0; got {scale}.')
  return path(lambda t: mean + scale * jnp.where(t < 0.5, -jnp.log(2 * t), jnp.log(2 * (1 - t))))


def cauchy(mean: float = 0.0, scale: float = 1.0) -> Schedule:
  """Variance preserving; logsnr of a uniform t has the law of Cauchy: logsnr = mean + scale tan(pi (1 - 2 t) / 2)
  (arXiv:2407.03297, table 1).

  Its tails are heavy: where |logsnr| > 170 nats, t within 0.002 scale of an end, alpha or sigma is 0 in single precision;
  train and sample inside, as with 'uniform(0.01, 0.99)'.
  """
  if scale <= 0:
    raise ValueError(f'cauchy needs scale > 0; got {scale}.')
  # The tangent as cosine over sine, whose argument is exactly 0 at both ends.
  return path(lambda t: mean + scale * jnp.cos(jnp.pi * t) / jnp.sin(jnp.pi * jnp.minimum(t, 1 - t)))


def path(logsnr: Callable[[Array], Array], p: float = 2.0) -> Schedule:
  """The schedule with alpha^p + sigma^p = 1 and alpha / sigma = exp(logsnr(t) / 2).

  p = 2 preserves the variance, p = 1 is the straight path (arXiv:2107.00630, eq. 3 for p = 2). logsnr may be infinite
  at t = 0 and t = 1; the slope there is given as 0, which makes a velocity target singular at that point.
  """
  if p <= 0:
    raise ValueError(f'path needs p > 0; got {p}.')
  def schedule(t):
    value = logsnr(t)
    inside = ~jnp.isinf(value) & (t > 0)
    # The inner where keeps infinities out of the derivative of the branch that is not taken.
    half = 0.5 * p * jnp.where(inside, logsnr(jnp.where(inside, t, 0.5)), 0)
    ends = (t <= 0) | (value > 0)
    alpha = jnp.where(inside, jnp.exp(jax.nn.log_sigmoid(half) / p), jnp.where(ends, 1.0, 0.0))
    sigma = jnp.where(inside, jnp.exp(jax.nn.log_sigmoid(-half) / p), jnp.where(ends, 0.0, 1.0))
    return alpha, sigma
  return schedule


def monotone(hidden: int = 1024, high: float = 13.3, low: float = -5.0) -> Learned:
  """The learned schedule of VDM: variance preserving, logsnr a falling network of t (arXiv:2107.00630, app. H; its code).

  logsnr = high + (low - high) (g(t) - g(0)) / (g(1) - g(0)) with g(t) = |a| t + mean_h |c_h| sigmoid(|b_h| (2 t - 1) +
  d_h). Its parameters are {'ends': {high, low}, 'inner': {a, b, c, d}}: the bound depends on the ends alone, the inner ones
  set its variance.
  """
  if hidden < 1 or not low < high:
    raise ValueError(f'monotone needs hidden >= 1 and low < high; got hidden={hidden}, high={high}, low={low}.')
  def init(key):
    slopes, outputs = jax.random.normal(key, (2, hidden))
    inner = {'a': jnp.ones(()), 'b': slopes, 'c': outputs, 'd': jnp.zeros(hidden)}
    return {'ends': {'high': jnp.full((), high), 'low': jnp.full((), low)}, 'inner': inner}
  def bind(params):
    ends, inner = params['ends'], params['inner']
    def raw(t):
      units = jax.nn.sigmoid(jnp.abs(inner['b']) * (2 * t - 1) + inner['d'])
      return jnp.abs(inner['a']) * t + jnp.mean(jnp.abs(inner['c']) * units)
    def logsnr(t):
      first, last = raw(0.0), raw(1.0)
      return ends['high'] + (ends['low'] - ends['high']) * (raw(t) - first) / (last - first)
    return path(jnp.vectorize(logsnr))
  return Learned(init, bind)


def logsnr_of(schedule: Schedule, t: ArrayLike) -> Array:
  """log(alpha^2 / sigma^2) at t, in nats."""
  alpha, sigma = schedule(t)
  return 2 * (jnp.log(alpha) - jnp.log(sigma))


def time_at(schedule: Schedule, logsnr: ArrayLike) -> Array:
  """The time t at which the schedule has this logsnr, by bisection; 0 or 1 where it lies beyond the schedule's ends."""
  t = bisect(lambda t: logsnr_of(schedule, t), logsnr)
  return jnp.where(jnp.asarray(logsnr) == jnp.inf, 0.0, t)  # also where sigma is below the least number at some t > 0


def inner_time(schedule: Schedule, logsnr: ArrayLike) -> Array:
  """`time_at`, but never the data at 0: beyond the start of a schedule that jumps there, its first time."""
  t = time_at(schedule, logsnr)
  return jnp.maximum(t, jnp.finfo(t.dtype).tiny)


def bisect(falling: Callable[[Array], Array], value: ArrayLike) -> Array:
  """The t in [0, 1] at which a falling function has this value, to the last digit; 0 or 1 where it has not."""
  value = jnp.asarray(value, jnp.result_type(float))
  def halve(_, bounds):
    low, high = bounds
    middle = 0.5 * (low + high)
    before = falling(middle) >= value
    return jnp.where(before, middle, low), jnp.where(before, high, middle)
  low, _ = jax.lax.fori_loop(0, 80, halve, (jnp.zeros_like(value), jnp.ones_like(value)))
  return low


def ends(schedule: Schedule) -> tuple[Array, Array]:
  """(logsnr just after t = 0, logsnr at t = 1): the range that the schedule covers, where it may jump to the data."""
  t = jnp.asarray([jnp.finfo(jnp.result_type(float)).tiny, 1.0])
  first, last = logsnr_of(schedule, t)
  return first, last


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


def dimension_factor(size: int, base: int) -> float:
  """The factor sqrt(size / base) by which `shift` keeps the noise as strong against `size` numbers an example as it was
  against `base` (arXiv:2403.03206, sec. 5.3.2: pixels; arXiv:2510.11690, sec. 4.2: all dimensions of a latent)."""
  if size < 1 or base < 1:
    raise ValueError(f'A dimension shift needs size >= 1 and base >= 1, numbers an example; got {size} and {base}.')
  return math.sqrt(size / base)


def check(schedule: Schedule, name: str = 'the schedule') -> None:
  """Raise ValueError if the schedule is no way from data to noise: t = 0 is (1, 0), logsnr falls, all is finite."""
  t = np.linspace(0, 1, 1001, dtype=np.float32)
  with jax.ensure_compile_time_eval():
    found = jax.jit(lambda t: (*schedule(t), logsnr_of(schedule, t)))(t)  # one program, not one for each operation
    alpha, sigma, logsnr = map(np.asarray, found)
  if not (np.isfinite(alpha).all() and np.isfinite(sigma).all() and (alpha >= 0).all() and (sigma >= 0).all()):
    raise ValueError(f'{name} has an alpha or sigma that is negative or not finite between t = 0 and t = 1.')
  if alpha[0] != 1 or sigma[0] != 0:
    raise ValueError(f'{name} starts at (alpha, sigma) = ({alpha[0]:g}, {sigma[0]:g}); t = 0 is the data, (1, 0).')
  # Where alpha or sigma is below the least number the logsnr is infinite, and stays so.
  falls = (logsnr[1:] < logsnr[:-1]) | (np.isinf(logsnr[1:]) & (logsnr[1:] == logsnr[:-1]))
  rises = np.flatnonzero(~falls)
  if len(rises):
    i = rises[0]
    raise ValueError(f'{name} must have a logsnr that falls from t = 0 to t = 1; from t = {t[i]:.3f} to t = {t[i + 1]:.3f} '
                     f'it goes from {logsnr[i]:.6g} to {logsnr[i + 1]:.6g} nats.')


def _check_rates(name: str, beta_min: float, beta_max: float) -> None:
  if not 0 < beta_min <= beta_max:
    raise ValueError(f'{name} needs 0 < beta_min <= beta_max; got beta_min={beta_min}, beta_max={beta_max}.')


def _preserving(log_alpha: Callable[[Array], Array]) -> Schedule:
  """alpha^2 + sigma^2 = 1, with sigma exact where alpha is nearly 1."""
  return lambda t: (jnp.exp(log_alpha(t)), jnp.sqrt(-jnp.expm1(2 * log_alpha(t))))


def _from_data(t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
  """(1, 0) at t = 0, for a schedule that starts at a small sigma or whose formula is 1 there only up to rounding."""
  return jnp.where(t > 0, alpha, 1.0), jnp.where(t > 0, sigma, 0.0)
