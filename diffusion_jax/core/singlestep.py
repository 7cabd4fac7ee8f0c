"""Singlestep solvers of higher order: the denoiser is called at places between t and s, and nothing is remembered.

Each is the first-order move `transfer` and a correction. The places lie evenly in l = log(alpha / sigma); from pure noise,
where l is infinite, a step is one of first order. Costs and orders are those of the whole step.
"""
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core import ode, schedules
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.solvers import (
  Solver,
  add_noise,
  ancestral_form,
  ancestral_level,
  check_eta,
  drift,
  first_order,
  no_memory,
  stretch,
  transfer,
)
from diffusion_jax.core.targets import noise_of
from diffusion_jax.core.types import Level, combine, split


def dpm_solver(order: int = 2, eta: float = 0.0) -> Solver:
  """DPM-Solver-1, -2 and -3, in the noise (arXiv:2206.00927, eq. 3.7, alg. 1 and alg. 2): `order` calls a step.

  eta > 0 goes down to less noise and adds fresh noise, as `ddim` does.
  """
  if order not in (1, 2, 3):
    raise ValueError(f'dpm_solver has the orders 1, 2 and 3; got {order}.')
  def third(process, denoise, x, x0, t, s):
    h, (near, far) = width(t, s), (between(process, t, s, share) for share in (1 / 3, 2 / 3))
    one = noise_change(denoise, x, x0, t, transfer(x, x0, t, near), near)
    ahead = combine((1.0, transfer(x, x0, t, far)), (-2 * far.sigma * _slope(2 / 3 * h), one))
    two = noise_change(denoise, x, x0, t, ahead, far)
    return combine((1.0, transfer(x, x0, t, s)), (-1.5 * s.sigma * _slope(h), two))
  move = {1: first_order, 2: _through_middle, 3: third}[order]
  return ancestral_form('dpm_solver', move, eta, order, calls=order)


def dpm_2s(eta: float = 0.0) -> Solver:
  """DPM-Solver++(2S): the whole step with the x0 of its middle (arXiv:2211.01095, alg. 1 with r = 1/2). Order 2, two calls.

  eta > 0 goes down to less noise and adds fresh noise, as `ddim` does: k-diffusion's 2S ancestral.
  """
  def move(process, denoise, x, x0, t, s):
    middle = between(process, t, s, 0.5)
    return transfer(x, denoise(transfer(x, x0, t, middle), middle).x0, t, s)
  return ancestral_form('dpm_2s', move, eta, order=2, calls=2)


def dpm2(eta: float = 0.0) -> Solver:
  """The midpoint method over sigma / alpha, its middle the geometric mean (k-diffusion; arXiv:2206.00364, app. D), which is
  `dpm_solver(2, eta)` by another name."""
  return ancestral_form('dpm2', _through_middle, eta, order=2, calls=2)


def rk4() -> Solver:
  """The classical method of Runge and Kutta for the probability-flow ODE in t (Kutta 1901). Order 4, four calls."""
  def step(process, denoise, keys, x, t, s, memory):
    h, middle = s.t - t.t, process.level(0.5 * (t.t + s.t))
    first = drift(process, denoise, x, t)
    second = drift(process, denoise, combine((1.0, x), (0.5 * h, first)), middle)
    third = drift(process, denoise, combine((1.0, x), (0.5 * h, second)), middle)
    fourth = drift(process, denoise, combine((1.0, x), (h, third)), s)
    return combine((1.0, x), (h / 6, first), (h / 3, second), (h / 3, third), (h / 6, fourth)), memory
  return Solver(no_memory, step, order=4, calls=4)


def dormand_prince(rtol: float = 1e-4, atol: float = 1e-4) -> Solver:
  """The probability-flow ODE in t by Dormand and Prince's pair of orders 5 and 4, every sample with the steps that its own
  tolerance asks for (ode.adaptive; arXiv:2011.13456, sec. 4.3). Order 5; the calls are those of the slowest sample.

  The grid only says where it stops on its way, and every stop costs calls: 'logsnr(2)' goes from -10 to 10 nats in one.
  """
  integrate = ode.adaptive(rtol, atol)
  def step(process, denoise, keys, x, t, s, memory):
    slope = lambda u, x: drift(process, denoise, x, process.level(u))
    return integrate(slope, x, t.t, s.t)[0], memory
  return Solver(no_memory, step, order=5, calls=None)  # the order is the integrator's


def dpm_sde(eta: float = 1.0, share: float = 0.5) -> Solver:
  """DPM-Solver++'s SDE in two stages: a move to the middle with noise, and the whole step with a mix of both x0
  (arXiv:2211.01095, app. D; k-diffusion). Two calls; the noise of both moves is of one Brownian path in sigma / alpha.

  `share` is where the middle lies in log(alpha / sigma). Independent noise for the two would lose variance.
  """
  check_eta('dpm_sde', eta, most=1.0)
  if not 0 < share <= 1:
    raise ValueError(f'dpm_sde needs 0 < share <= 1; got {share}.')
  def step(process, denoise, keys, x, t, s, memory):
    x0, middle = denoise(x, t).x0, between(process, t, s, share)
    first, rest = split(keys, 2)
    early = process.noise(first, x)
    place = ancestral_level(t, middle, eta)
    there = add_noise(transfer(x, x0, t, place), place, middle, early)
    mix = 1 / (2 * share)
    ahead = combine((1 - mix, x0), (mix, denoise(there, middle).x0))
    # The path from t to s is that to the middle and on, in proportion to the ways in sigma / alpha.
    ratio = jnp.where(t.alpha > 0, _way(t, middle) / _way(t, s), 1.0)
    late = combine((jnp.sqrt(ratio), early), (jnp.sqrt(1 - ratio), process.noise(rest, x)))
    place = ancestral_level(t, s, eta)
    return add_noise(transfer(x, ahead, t, place), place, s, late), memory
  return Solver(no_memory, step, calls=2)


def euler_maruyama(diffusion: str = 'sigma', scale: float = 1.0) -> Solver:
  """A step of the reverse SDE dx = (v - w score / 2) dt + sqrt(w) dW in t, with SiT's forms of w (arXiv:2401.08740, sec. 2
  and its code): 'constant' scale, 'sigma' scale sigma, 'linear' scale t, 'decreasing' (scale cos(pi (1 - t)) + 1)^2 / 4,
  'increasing_decreasing' scale sin(pi t)^2, 'sbdm' scale 2 (sigma sigma' - sigma^2 alpha' / alpha), of the schedule."""
  if diffusion not in DIFFUSIONS:
    raise ValueError(f'euler_maruyama has the diffusions {", ".join(DIFFUSIONS)}; got {diffusion!r}.')
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    noise, (alpha_slope, sigma_slope) = noise_of(t, x, x0), process.slopes(t.t)
    w, h = DIFFUSIONS[diffusion](scale, t, alpha_slope, sigma_slope), t.t - s.t
    moved = combine((1.0, x), (-h * alpha_slope, x0), (-h * (sigma_slope + 0.5 * w / t.sigma), noise))
    return combine((1.0, moved), (jnp.sqrt(w * h), process.noise(keys, x))), memory
  return Solver(no_memory, step)


DIFFUSIONS = {
  'constant': lambda scale, t, alpha_slope, sigma_slope: scale * jnp.ones_like(t.t),
  'sigma': lambda scale, t, alpha_slope, sigma_slope: scale * t.sigma,
  'linear': lambda scale, t, alpha_slope, sigma_slope: scale * t.t,
  'decreasing': lambda scale, t, alpha_slope, sigma_slope: 0.25 * (scale * jnp.cos(jnp.pi * (1 - t.t)) + 1)**2,
  'increasing_decreasing': lambda scale, t, alpha_slope, sigma_slope: scale * jnp.sin(jnp.pi * t.t)**2,
  'sbdm': lambda scale, t, alpha_slope, sigma_slope:
    scale * 2 * (t.sigma * sigma_slope - t.sigma**2 * alpha_slope / t.alpha)}


def _way(t: Level, s: Level) -> Array:
  """sigma_t / alpha_t - sigma_s / alpha_s, where that is finite."""
  return t.sigma / jnp.where(t.alpha > 0, t.alpha, 1.0) - s.sigma / s.alpha


def between(process: Gaussian, t: Level, s: Level, share: float) -> Level:
  """The level at this share of the way in logsnr from t to s; in time, where t is pure noise."""
  finite = jnp.isfinite(t.logsnr)
  start = jnp.where(finite, t.logsnr, s.logsnr)
  inner = schedules.time_at(process.schedule, start + share * (s.logsnr - start))
  return process.level(jnp.where(finite, inner, t.t + share * (s.t - t.t)))


def width(t: Level, s: Level) -> Array:
  """The step in log(alpha / sigma), which is positive; 0 from pure noise, where it is infinite."""
  h = 0.5 * (s.logsnr - t.logsnr)
  return jnp.where(jnp.isfinite(h), h, 0.0)


def noise_change(denoise, x: PyTree, x0: PyTree, t: Level, ahead: PyTree, middle: Level) -> PyTree:
  """The noise that is seen at `ahead`, less that at x."""
  there = noise_of(middle, ahead, denoise(ahead, middle).x0)
  return combine((1.0, there), (-1.0, noise_of(t, x, x0)))


def _through_middle(process, denoise, x, x0, t, s):
  """The whole step with the noise of its middle."""
  middle = between(process, t, s, 0.5)
  change = noise_change(denoise, x, x0, t, transfer(x, x0, t, middle), middle)
  return combine((1.0, transfer(x, x0, t, s)), (stretch(t, s), change))


def _slope(h: Array) -> Array:
  """(e^h - 1) / h - 1; 0 at h = 0."""
  safe = jnp.where(h == 0, 1.0, h)
  return jnp.where(h == 0, 0.0, jnp.expm1(safe) / safe - 1)
