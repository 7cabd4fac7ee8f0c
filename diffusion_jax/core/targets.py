"""Parametrizations: the network predicts a x0 + b noise, and xt = alpha x0 + sigma noise gives the rest.

With D = alpha b - sigma a, the two equations give x0 = (b xt - sigma pred) / D and noise = (alpha pred - a xt) / D. A
target is singular where D = 0. A residual of one target becomes that of another times the ratio of their D.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Cond, Denoiser, Estimate, Level, Network, combine, per_example


class Target(NamedTuple):
  """What the network predicts, and the preconditioning of what it is given."""
  pair: Callable[[Gaussian, Level], tuple[Array, Array]]  # (a, b)
  scale: Callable[[Level], Array] = lambda level: jnp.ones_like(level.t)  # c_in, of the network's input
  feature: Callable[[Level], Array] = lambda level: 1000 * level.t  # c_noise, what the network is told of the level
  learns_variance: bool = False  # the network's output has twice the channels, the second half for the variance


def noise() -> Target:
  """The noise: (a, b) = (0, 1) (arXiv:2006.11239, eq. 12). D = alpha: singular where alpha = 0."""
  return Target(lambda process, level: (jnp.zeros_like(level.t), jnp.ones_like(level.t)))


def x0() -> Target:
  """The data: (a, b) = (1, 0) (arXiv:2202.00512, sec. 4). D = -sigma: singular at t = 0 alone."""
  return Target(lambda process, level: (jnp.ones_like(level.t), jnp.zeros_like(level.t)))


def v() -> Target:
  """v = alpha noise - sigma x0: (a, b) = (-sigma, alpha) (arXiv:2202.00512, sec. 4). D = alpha^2 + sigma^2."""
  return Target(lambda process, level: (-level.sigma, level.alpha))


def velocity() -> Target:
  """dxt/dt = alpha' x0 + sigma' noise (arXiv:2401.08740, eq. 3); on `flow` noise - x0 (arXiv:2210.02747, eq. 23)."""
  return Target(lambda process, level: process.slopes(level.t))


def score() -> Target:
  """grad log q(xt | x0) = -noise / sigma: (a, b) = (0, -1 / sigma) (arXiv:2011.13456, eq. 7). D = -alpha / sigma."""
  return Target(lambda process, level: (jnp.zeros_like(level.t), -1 / level.sigma))


def edm(sigma_data: float = 0.5) -> Target:
  """The preconditioning of EDM, x0 = c_skip xt + c_out pred (arXiv:2206.00364, eq. 7 and table 1).

  `sigma_data` is the standard deviation of the data. For alpha != 1 the paper's formulas hold for xt / alpha and noise
  sigma / alpha; multiplied out they stay finite at alpha = 0 and keep their digits at small sigma, but for c_noise =
  log(sigma / alpha) / 4, which is infinite at both ends.
  """
  if sigma_data <= 0:
    raise ValueError(f'edm needs sigma_data > 0; got {sigma_data}.')
  scale = lambda level: 1 / jnp.sqrt(level.sigma**2 + (level.alpha * sigma_data)**2)
  # (1 - c_skip alpha) / c_out and -c_skip sigma / c_out.
  pair = lambda process, level: (level.sigma * scale(level) / sigma_data, -level.alpha * sigma_data * scale(level))
  return Target(pair, scale, lambda level: -level.logsnr / 8)


def vp(steps: int = 1000) -> Target:
  """The VP column of EDM's table 1: the noise, from xt at unit scale, with the time feature (steps - 1) t (2206.00364)."""
  _check_steps('vp', steps)
  return noise()._replace(scale=_to_unit_scale, feature=lambda level: (steps - 1) * level.t)


def ve() -> Target:
  """The VE column of EDM's table 1: -noise, from xt / alpha, with the time feature log(sigma / (2 alpha)) (2206.00364).

  D = -alpha: singular where alpha = 0.
  """
  minus = lambda process, level: (jnp.zeros_like(level.t), -jnp.ones_like(level.t))
  return Target(minus, lambda level: 1 / level.alpha, lambda level: -0.5 * level.logsnr - jnp.log(2))


def iddpm(steps: int = 1000) -> Target:
  """The iDDPM column of EDM's table 1: the noise, from xt at unit scale, with the number 0..steps - 1 of the nearest step
  as time feature, as networks trained on a table of `steps` betas expect it (2206.00364)."""
  _check_steps('iddpm', steps)
  return noise()._replace(scale=_to_unit_scale, feature=lambda level: jnp.maximum(jnp.round(steps * level.t) - 1, 0))


def learned_variance(target: Target) -> Target:
  """The same target, with a network that also predicts the variance of the reverse step (arXiv:2102.09672, eq. 15).

  The last axis of its output is twice that of x: the prediction, then u, where (u + 1) / 2 is the place of the log
  variance between the least and the largest (processes.reverse_variance), as in ADM and DiT. Train it with `hybrid`.
  """
  return target._replace(learns_variance=True)


def determinant(process: Gaussian, target: Target, level: Level) -> Array:
  """D = alpha b - sigma a; the target is singular where it is 0."""
  a, b = target.pair(process, level)
  return level.alpha * b - level.sigma * a


def value(process: Gaussian, target: Target, level: Level, x0: PyTree, noise: PyTree) -> PyTree:
  """What the network should predict: a x0 + b noise."""
  a, b = target.pair(process, level)
  return combine((a, x0), (b, noise))


def noise_of(level: Level, xt: PyTree, x0: PyTree) -> PyTree:
  """The noise in xt if the data are x0: (xt - alpha x0) / sigma."""
  return combine((1 / level.sigma, xt), (-level.alpha / level.sigma, x0))


def predict(target: Target, network: Network, xt: PyTree, level: Level, cond: Cond) -> tuple[PyTree, PyTree]:
  """(prediction, the fraction of Estimate.variance or None) of a network at xt."""
  out = network(combine((target.scale(level), xt)), per_example(target.feature(level), xt), cond)
  if not target.learns_variance:
    return out, None
  halves = jax.tree.map(lambda leaf: tuple(jnp.split(leaf, 2, -1)), out)
  first, second = jax.tree.transpose(jax.tree.structure(out), jax.tree.structure((0, 0)), halves)
  return first, jax.tree.map(lambda leaf: (leaf + 1) / 2, second)


def estimate_of(process: Gaussian, target: Target, level: Level, xt: PyTree, prediction: PyTree) -> PyTree:
  """The estimate of x0 that a prediction stands for: (b xt - sigma pred) / D."""
  _, b = target.pair(process, level)
  d = determinant(process, target, level)
  return process.project(combine((b / d, xt), (-level.sigma / d, prediction)))


def denoiser(process: Gaussian, target: Target, network: Network) -> Denoiser:
  """The denoiser that a network of this target defines."""
  def denoise(xt, level, cond=None):
    prediction, variance = predict(target, network, xt, level, cond)
    return Estimate(estimate_of(process, target, level, xt, prediction), variance)
  return denoise


def check_grid(process: Gaussian, target: Target, grid: np.ndarray, name: str = 'the target') -> None:
  """Raise ValueError if the target is singular at a time of the grid at which the network is called (all but t = 0)."""
  with jax.ensure_compile_time_eval():
    def look(t):
      level = process.level(t)
      d, feature = determinant(process, target, level), target.feature(level)
      return level, ~(jnp.abs(d) > 1e-6) | ~jnp.isfinite(d) | ~jnp.isfinite(feature)
    level, bad = jax.tree.map(np.asarray, jax.jit(look)(np.asarray(grid)[np.asarray(grid) > 0]))
  if bad.any():
    t, alpha, sigma = (float(entry[bad][0]) for entry in level)
    raise ValueError(f'{name} is singular at t={t:g} (alpha={alpha:.3g}, sigma={sigma:.3g}), which the grid contains. '
                     "Start the grid lower, for example 'uniform(64, t_max=0.99)', or predict 'v()' or 'x0()'.")


def _to_unit_scale(level: Level) -> Array:
  """1 / sqrt(1 + (sigma / alpha)^2), which brings xt / alpha of unit data to unit scale, as a factor of xt."""
  return 1 / jnp.sqrt(level.alpha**2 + level.sigma**2)


def _check_steps(name: str, steps: int) -> None:
  if steps < 2:
    raise ValueError(f'{name} needs 2 steps or more; got {steps}.')
