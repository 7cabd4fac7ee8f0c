"""Tables of discrete betas, as DDPM, ADM, DiT and Stable Diffusion have them, and the schedule that such a table is.

A table is a numpy array [T] in double precision: beta_i is the share of noise that step i = 1..T adds, q(x_i | x_{i-1}) =
N(sqrt(1 - beta_i) x_{i-1}, beta_i). `discrete(betas)` makes a schedule of it, exact at every t = i / T.
"""
from collections.abc import Callable
from typing import NewType

import numpy as np
from jax import numpy as jnp

from diffusion_jax.core.types import Schedule

Betas = NewType('Betas', np.ndarray)  # a name of its own, by which configs find the tables


def discrete(betas: Betas) -> Schedule:
  """Variance preserving with alpha^2 = prod_{j <= i} (1 - beta_j) at t = i / T (arXiv:2006.11239, eq. 4); alpha is linear
  between two steps.

  alpha and 1 - alpha are both kept, so that sigma = sqrt((1 - alpha) (1 + alpha)) has all its digits at both ends. Raises
  ValueError for betas outside (0, 1); the last may be 1 (`zero_snr`).
  """
  betas = check_betas(betas)
  log_alpha = np.append(0.0, 0.5 * np.cumsum(_log1p(-betas)))
  times, alphas, lost = np.arange(len(betas) + 1) / len(betas), np.exp(log_alpha), -np.expm1(log_alpha)
  def schedule(t):
    at = lambda values: jnp.interp(t, jnp.asarray(times, t.dtype), jnp.asarray(values, t.dtype))
    alpha = at(alphas)
    return alpha, jnp.sqrt(at(lost) * (1 + alpha))
  return lambda t: schedule(jnp.asarray(t, jnp.result_type(float)))


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Betas:
  """Evenly spaced from `start` to `end` (arXiv:2006.11239, sec. 4). ADM and DiT divide both by steps / 1000."""
  return check_betas(np.linspace(start, end, _count(steps)))


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Betas:
  """Square roots evenly spaced: Stable Diffusion (the code of arXiv:2112.10752, 'linear' there)."""
  start, end = np.sqrt(check_betas(np.array([start, end])))
  return check_betas(np.linspace(start, end, _count(steps))**2)


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Betas:
  """1 - a(i) / a(i - 1), none above `largest`, a(i) = cos^2(pi/2 (i / T + s) / (1 + s)) (arXiv:2102.09672, eq. 17)."""
  return betas_of(lambda t: np.cos(0.5 * np.pi * (t + offset) / (1 + offset))**2, steps, largest)


def sigmoid_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Betas:
  """start + (end - start) sigmoid(x), x evenly spaced from -6 to 6 (GeoDiff, arXiv:2203.02923, and its code)."""
  return check_betas(start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, _count(steps)))))


def exponential_betas(steps: int = 1000, rate: float = 12.0, largest: float = 0.999) -> Betas:
  """The table of alpha^2 = exp(-rate t): the same beta at every step."""
  return betas_of(lambda t: np.exp(-rate * t), steps, largest)


def zero_snr(betas: Betas) -> Betas:
  """Shift and scale alpha so that it is 0 at the last step and unchanged at the first (arXiv:2305.08891, alg. 1)."""
  if np.size(betas) < 2:
    raise ValueError('zero_snr needs 2 betas or more: the first step keeps its alpha, the last gets 0.')
  alpha = np.exp(0.5 * np.cumsum(_log1p(-check_betas(betas))))
  alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
  return check_betas(1 - np.append(alpha[0], alpha[1:] / alpha[:-1])**2)


def betas_of(alpha_squared: Callable[[np.ndarray], np.ndarray], steps: int, largest: float) -> np.ndarray:
  """The betas whose products follow alpha^2(t), none above `largest` (arXiv:2102.09672, sec. 3.2)."""
  t = np.arange(_count(steps) + 1) / steps
  with np.errstate(divide='ignore', invalid='ignore'):  # where alpha^2 is below the least number: check_betas says so
    return check_betas(np.minimum(1 - alpha_squared(t[1:]) / alpha_squared(t[:-1]), largest))


def check_betas(betas: np.ndarray) -> np.ndarray:
  """The table in double precision. Raises ValueError unless it is one axis of numbers in (0, 1); the last may be 1."""
  betas = np.asarray(betas, np.float64)
  if betas.ndim != 1 or len(betas) == 0:
    raise ValueError(f'A table of betas is one axis of 1 or more numbers; got the shape {betas.shape}.')
  bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
  bad = bad[(bad < len(betas) - 1) | (betas[bad] != 1)]
  if len(bad):
    raise ValueError(f'betas must lie in (0, 1), but for a last one of 1; beta {bad[0] + 1} of {len(betas)} is '
                     f'{betas[bad[0]]:g}.')
  return betas


def _log1p(x: np.ndarray) -> np.ndarray:
  with np.errstate(divide='ignore'):
    return np.log1p(x)


def _count(steps: int) -> int:
  if steps < 1:
    raise ValueError(f'A table of betas needs 1 step or more; got {steps}.')
  return steps
