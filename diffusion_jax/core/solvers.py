"""Solvers: one move from level t to level s < t, with the denoiser handed in.

`init(x)` makes the memory, a fixed pytree; `step(process, denoise, keys, x, t, s, memory)` returns (x, memory). The last
move, to t = 0, is not a solver's: sampling makes it by process.reverse; nor are moves up, but for a solver that `rises`.
Costs are in calls of the denoiser a step.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.targets import noise_of
from diffusion_jax.core.types import Level, combine, dot


class Solver(NamedTuple):
  """A sampler: see the module's first lines."""
  init: Callable
  step: Callable
  order: int | None = None  # of convergence; None: stochastic
  calls: int | None = 1  # of the denoiser a step; None: as many as it needs
  more: int = 0  # calls of the first steps beyond that
  rises: bool = False  # moves up, s > t, are its own steps; else they are process.forward


def ancestral(variance: str = 'estimate') -> Solver:
  """Draw from p(xs | xt), which is q(xs | xt, x0) at the estimated x0, for any process: DDPM (arXiv:2006.11239, alg. 2).

  For a Gaussian the variance 'small' is that of q(xs | xt, x0), 'large' that of q(xt | xs) (sec. 3.2: beta-tilde and beta),
  'estimate' what the denoiser says, which is learned (arXiv:2102.09672, eq. 15) or, where it says nothing, small.
  """
  if variance not in ('estimate', 'small', 'large'):
    raise ValueError(f"ancestral has the variances 'estimate', 'small' and 'large'; got {variance!r}.")
  def step(process, denoise, keys, x, t, s, memory):
    estimate = denoise(x, t)
    if variance != 'estimate':
      largest = jax.tree.map(jnp.ones_like, estimate.x0)
      estimate = estimate._replace(variance=largest if variance == 'large' else None)
    return process.reverse(keys, estimate, x, t, s), memory
  return Solver(no_memory, step)


def ddim(eta: float = 0.0) -> Solver:
  """alpha_s x0 + sqrt(sigma_s^2 - v) noise + sqrt(v) fresh noise, v = eta^2 Var q(xs | xt, x0) (arXiv:2010.02502, eq. 12).

  eta = 0 is deterministic and of order 1, eta = 1 has the law of `ancestral`.
  """
  return ancestral_form('ddim', first_order, eta, order=1)


def euler_ancestral(eta: float = 1.0) -> Solver:
  """Euler's method in sigma / alpha to less noise, and fresh noise (k-diffusion): `ddim(eta)` by another name."""
  return ancestral_form('euler_ancestral', first_order, eta, order=1)


def ddim_inverse(iterations: int = 1) -> Solver:
  """The inverse of a step of DDIM: `ddim`'s with the noise that the denoiser sees not at x but where the step ends, found
  by iterating from x itself (arXiv:2010.02502, sec. 4.3), with Anderson's acceleration of depth 1 in each example
  (arXiv:2309.04907, sec. 3): where the denoiser is sharp, iterates else swing about the end. Order 1, `iterations` calls.

  For a grid that rises, grid[::-1], with start=x0: with enough iterations `ddim` leads back exactly. One is what diffusers
  does while alpha > sigma; above, x0 is iterated in place of the noise, which is better conditioned.
  """
  if iterations < 1:
    raise ValueError(f'ddim_inverse needs iterations >= 1; got {iterations}.')
  def step(process, denoise, keys, x, t, s, memory):
    def end(there):
      x0 = denoise(there, s).x0
      from_data = combine((s.alpha / t.alpha, x), (s.sigma - s.alpha * t.sigma / t.alpha, noise_of(s, there, x0)))
      return jax.tree.map(lambda *both: jnp.where(t.alpha > t.sigma, *both), from_data, transfer(x, x0, t, s))
    there = found = end(x)
    gap = combine((1.0, found), (-1.0, x))
    for _ in range(iterations - 1):
      found, found_before = end(there), found
      gap, gap_before = combine((1.0, found), (-1.0, there)), gap
      change = combine((1.0, gap), (-1.0, gap_before))
      size = dot(change, change)
      back = dot(gap, change) / jnp.where(size > 0, size, 1)
      there = combine((1 - back, found), (back, found_before))
    return there, memory
  return Solver(no_memory, step, order=1, calls=iterations, rises=True)


def euler() -> Solver:
  """One step of Euler's method for the probability-flow ODE in t (arXiv:2011.13456, eq. 13). Order 1."""
  def step(process, denoise, keys, x, t, s, memory):
    return combine((1.0, x), (s.t - t.t, drift(process, denoise, x, t))), memory
  return Solver(no_memory, step, order=1)


def heun() -> Solver:
  """Heun's method for the probability-flow ODE in t (arXiv:2206.00364, alg. 1 without churn). Order 2."""
  def step(process, denoise, keys, x, t, s, memory):
    first = drift(process, denoise, x, t)
    ahead = combine((1.0, x), (s.t - t.t, first))
    half = 0.5 * (s.t - t.t)
    return combine((1.0, x), (half, first), (half, drift(process, denoise, ahead, s))), memory
  return Solver(no_memory, step, order=2, calls=2)


def no_memory(x: PyTree) -> tuple:
  """The memory of a solver that needs none."""
  return ()


def transfer(x: PyTree, x0: PyTree, t: Level, s: Level) -> PyTree:
  """xs that has the same noise as xt if the data are x0: alpha_s x0 + sigma_s (xt - alpha_t x0) / sigma_t."""
  ratio = s.sigma / t.sigma
  return combine((ratio, x), (s.alpha - ratio * t.alpha, x0))


def first_order(process, denoise, x, x0, t, s):
  """`transfer` as a move of `ancestral_form`."""
  return transfer(x, x0, t, s)


def stretch(t: Level, s: Level) -> Array:
  """alpha_s (sigma_s / alpha_s - sigma_t / alpha_t), by which a change of the noise moves xs; 0 from pure noise."""
  return jnp.where(t.alpha > 0, s.sigma - s.alpha * t.sigma / jnp.where(t.alpha > 0, t.alpha, 1.0), 0.0)


def is_ode(eta: float | Array) -> bool:
  """Whether a scale of the SDE's noise, a number or one that depends on time, is 0 for good."""
  return not isinstance(eta, jax.Array) and eta == 0


def below(t: Level, s: Level, eta: float | Array) -> Level:
  """The level at alpha_s with sigma_s e^(-eta h), h the step in log(alpha / sigma), to which an SDE solver moves before it
  adds noise; with eta = 1 what it adds has the variance of q(xs | xt, x0) (arXiv:2211.01095, app. D)."""
  if is_ode(eta):
    return s
  return s._replace(sigma=s.sigma * (t.alpha * s.sigma / (s.alpha * t.sigma))**eta)


def renoise(process: Gaussian, keys, x: PyTree, down: Level, s: Level) -> PyTree:
  """x at the level `down`, with fresh noise up to sigma_s."""
  return x if down is s else add_noise(x, down, s, process.noise(keys, x))


def add_noise(x: PyTree, down: Level, s: Level, noise: PyTree) -> PyTree:
  """x at the level `down`, with this noise up to sigma_s."""
  return combine((1.0, x), (jnp.sqrt(jnp.maximum(s.sigma**2 - down.sigma**2, 0)), noise))


def ancestral_form(name: str, move: Callable, eta: float, order: int, calls: int = 1):
  """The solver that makes move(process, denoise, x, x0, t, s); for eta > 0 to a level of less noise, and then adds noise of
  variance eta^2 Var q(xs | xt, x0)."""
  check_eta(name, eta, most=1.0)
  def step(process, denoise, keys, x, t, s, memory):
    x0, down = denoise(x, t).x0, s if is_ode(eta) else ancestral_level(t, s, eta)
    return renoise(process, keys, move(process, denoise, x, x0, t, down), down, s), memory
  return Solver(no_memory, step, order=order if is_ode(eta) else None, calls=calls)


def ancestral_level(t: Level, s: Level, eta: float) -> Level:
  """The level of less noise at alpha_s from which fresh noise of variance eta^2 Var q(xs | xt, x0) leads up to s."""
  ratio = t.alpha * s.sigma / (s.alpha * t.sigma)
  return s._replace(sigma=s.sigma * jnp.sqrt(1 - eta**2 + (eta * ratio)**2))


def check_eta(name: str, eta: float, most: float = math.inf) -> None:
  if not 0 <= eta <= most:
    raise ValueError(f'{name} needs 0 <= eta{"" if most == math.inf else f" <= {most:g}"}; got {eta}.')


def drift(process: Gaussian, denoise: Callable, x: PyTree, t: Level) -> PyTree:
  """dx/dt of the probability-flow ODE, alpha' x0 + sigma' noise, at the estimates (arXiv:2401.08740, eq. 3)."""
  x0 = denoise(x, t).x0
  alpha_slope, sigma_slope = process.slopes(t.t)
  return combine((alpha_slope, x0), (sigma_slope, noise_of(t, x, x0)))
