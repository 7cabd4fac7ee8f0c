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
from diffusion_jax.core.types import Denoiser, Estimate, Level, Network, combine


class Target(NamedTuple):
  """What the network predicts, and the preconditioning of what it is given."""
  pair: Callable[[Gaussian, Level], tuple[Array, Array]]  # (a, b)
  scale: Callable[[Level], Array] = lambda level: jnp.ones_like(level.t)  # c_in, of the network's input
  feature: Callable[[Level], Array] = lambda level: 1000 * level.t  # c_noise, what the network is told of the level


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
  sigma / alpha; multiplied out they stay finite at alpha = 0, but for c_noise = log(sigma / alpha) / 4.
  """
  if sigma_data <= 0:
    raise ValueError(f'edm needs sigma_data > 0; got {sigma_data}.')
  scale = lambda level: 1 / jnp.sqrt(level.sigma**2 + (level.alpha * sigma_data)**2)
  def pair(process, level):
    c_skip = level.alpha * (sigma_data * scale(level))**2
    c_out = level.sigma * sigma_data * scale(level)
    return (1 - c_skip * level.alpha) / c_out, -c_skip * level.sigma / c_out
  return Target(pair, scale, lambda level: -level.logsnr / 8)


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


def denoiser(process: Gaussian, target: Target, network: Network) -> Denoiser:
  """The denoiser that a network of this target defines: x0 = (b xt - sigma pred) / D."""
  def denoise(xt, level, cond=None):
    batch = jax.tree.leaves(xt)[0].shape[0]
    feature = target.feature(level)
    feature = jnp.broadcast_to(feature, (batch,)) if feature.ndim == 0 else feature
    prediction = network(combine((target.scale(level), xt)), feature, cond)
    _, b = target.pair(process, level)
    d = determinant(process, target, level)
    return Estimate(combine((b / d, xt), (-level.sigma / d, prediction)))
  return denoise


def check_grid(process: Gaussian, target: Target, grid: np.ndarray, name: str = 'the target') -> None:
  """Raise ValueError if the target is singular at a time of the grid at which the network is called (all but t = 0)."""
  with jax.ensure_compile_time_eval():
    level = process.level(np.asarray(grid)[np.asarray(grid) > 0])
    d, feature = determinant(process, target, level), target.feature(level)
    bad = np.asarray(~(jnp.abs(d) > 1e-6) | ~jnp.isfinite(d) | ~jnp.isfinite(feature))
  if bad.any():
    t, alpha, sigma = (float(entry[bad][0]) for entry in map(np.asarray, level))
    raise ValueError(f'{name} is singular at t={t:g} (alpha={alpha:.3g}, sigma={sigma:.3g}), which the grid contains. '
                     "Start the grid lower, for example 'uniform(64, t_max=0.99)', or predict 'v()' or 'x0()'.")
