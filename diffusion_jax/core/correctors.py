"""Solvers of solvers: noise added before another solver's step, or Langevin's moves after it.

The other solver must be without a memory: what it remembers would lie on another path than the one it is put on.
"""
import jax
from jax import numpy as jnp

from diffusion_jax.core.solvers import Solver, no_memory
from diffusion_jax.core.targets import noise_of
from diffusion_jax.core.types import combine, fold, split


def churn(solver: Solver, amount: float = 40.0, steps: int = 64, during: tuple[float, float] = (0.05, 50.0),
          noise: float = 1.003) -> Solver:
  """EDM's stochastic sampler: noise is added up to the level at which sigma / alpha is 1 + gamma times as large, and the
  step is made from there, by heun() in the paper (arXiv:2206.00364, alg. 2).

  gamma = min(amount / steps, sqrt(2) - 1) while sigma / alpha is in `during`, else 0; `amount`, `during` and `noise`, which
  stretches what is added, are the paper's S_churn, S_tmin to S_tmax and S_noise, and `steps` the grid's.
  """
  _check_memory('churn', solver)
  if amount < 0 or steps < 1 or not 0 <= during[0] < during[1] or noise < 0:
    raise ValueError('churn needs amount >= 0, steps >= 1, during=(low, high) with 0 <= low < high, and noise >= 0; got '
                     f'{amount}, {steps}, {during}, {noise}.')
  gamma = min(amount / steps, 2**0.5 - 1)
  if gamma == 0:
    return solver
  def step(process, denoise, keys, x, t, s, memory):
    fresh, rest = split(keys, 2)
    ratio = jnp.exp(-0.5 * t.logsnr)
    churned = (during[0] <= ratio) & (ratio <= during[1])
    higher = process.level_at(t.logsnr - 2 * jnp.log1p(gamma))
    higher = jax.tree.map(lambda a, b: jnp.where(churned, a, b), higher, t)
    still = combine((higher.alpha / t.alpha, x))
    there = combine((noise, process.forward(fresh, x, t, higher)), (1 - noise, still))
    there = jax.tree.map(lambda a, b: jnp.where(churned, a, b), there, x)
    return solver.step(process, denoise, rest, there, higher, s, memory)
  return solver._replace(step=step, order=None)


def langevin(solver: Solver, corrections: int = 1, snr: float = 0.16) -> Solver:
  """Predictor-corrector sampling: after a step `corrections` moves of Langevin's at its end, x + e score + sqrt(2 e) z with
  e = 2 (snr |z| / |score|)^2 (arXiv:2011.13456, alg. 4). One call more a correction.

  |z| / |score| is taken as sigma, which it is on the mean for data without spread: the paper's mean over the batch would
  make samples depend on each other. Its factor 1 - beta for preserved variance (alg. 5), near 1, is left out.
  """
  _check_memory('langevin', solver)
  if corrections < 1 or snr <= 0:
    raise ValueError(f'langevin needs corrections >= 1 and snr > 0; got {corrections}, {snr}.')
  def step(process, denoise, keys, x, t, s, memory):
    x, memory = solver.step(process, denoise, fold(keys, 0), x, t, s, memory)
    for number in range(1, corrections + 1):
      seen, fresh = noise_of(s, x, denoise(x, s).x0), process.noise(fold(keys, number), x)
      x = combine((1.0, x), (-2 * snr**2 * s.sigma, seen), (2 * snr * s.sigma, fresh))
    return x, memory
  return solver._replace(step=step, order=None, calls=None if solver.calls is None else solver.calls + corrections)


def _check_memory(name: str, solver: Solver) -> None:
  if solver.init is not no_memory or solver.rises:
    what = 'moves up' if solver.rises else 'has a memory'
    raise ValueError(f'{name} needs a solver that remembers nothing and moves down, such as heun(); the one it got {what}.')
