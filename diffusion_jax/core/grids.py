"""Grids: the times that a sampler visits, from noise down to data. A grid is a numpy array [steps + 1] that ends at 0."""
from collections.abc import Callable

import numpy as np

from diffusion_jax.core import schedules
from diffusion_jax.core.types import Schedule

Grid = Callable[[Schedule], np.ndarray]


def uniform(steps: int, t_max: float = 1.0) -> Grid:
  """Evenly spaced in t, from t_max to 0."""
  _check_steps(steps)
  if not 0 < t_max <= 1:
    raise ValueError(f'uniform needs 0 < t_max <= 1; got {t_max}.')
  return lambda schedule: np.linspace(t_max, 0, steps + 1)


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
  """sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0 (arXiv:2206.00364, eq. 5).

  sigma is the ratio sigma / alpha of the schedule, so that the grid serves any of them.
  """
  _check_steps(steps)
  if not 0 < sigma_min < sigma_max or rho <= 0:
    raise ValueError(f'karras needs 0 < sigma_min < sigma_max and rho > 0; got {sigma_min}, {sigma_max}, {rho}.')
  sigmas = np.linspace(sigma_max**(1 / rho), sigma_min**(1 / rho), steps)**rho
  return _at_logsnr(-2 * np.log(sigmas))


def logsnr(steps: int, low: float = -10.0, high: float = 10.0) -> Grid:
  """Evenly spaced in logsnr from `low` to `high`, in nats, then t = 0 (arXiv:2206.00927)."""
  _check_steps(steps)
  if low >= high:
    raise ValueError(f'logsnr needs low < high; got low={low}, high={high}.')
  return _at_logsnr(np.linspace(low, high, steps))


def shift(grid: Grid, factor: float) -> Grid:
  """Another grid, moved by schedules.shift to suit `factor` times the resolution.

  Raises ValueError where factor < 1 takes some of its times beyond the start of the schedule.
  """
  def shifted(schedule):
    times = np.asarray(schedules.shift(schedule, factor)(grid(schedule)))
    if not (np.diff(times) < 0).all():
      raise ValueError(f'shift by {factor} takes times of the grid beyond the logsnr at which this schedule starts, or '
                       'nearer to each other than floats: take fewer steps, or no shift.')
    return times
  return shifted


def dimension_shift(grid: Grid, size: int, base: int = 4096) -> Grid:
  """`shift` by sqrt(size / base) for examples of `size` numbers (schedules.dimension_factor)."""
  return shift(grid, schedules.dimension_factor(size, base))


def _at_logsnr(values: np.ndarray) -> Grid:
  def grid(schedule):
    times = np.append(np.asarray(schedules.time_at(schedule, values)), 0.0)
    end = float(schedules.logsnr_of(schedule, np.float32(1)))
    if values[0] < end - 1e-4 or not (np.diff(times) < 0).all():
      raise ValueError(f'The grid asks for logsnr from {values[0]:.4g} to {values[-1]:.4g} nats; the schedule begins, at '
                       f't = 1, at {end:.4g}, and times nearer than floats to each other or to 0 are no steps: choose ends '
                       'inside.')
    return times
  return grid


def _check_steps(steps: int) -> None:
  if steps < 1:
    raise ValueError(f'A grid needs at least 1 step; got {steps}.')
