"""Grids: the times that a sampler visits, from noise down to data. A grid is a numpy array [steps + 1] that ends at 0.

Where a grid rises on its way, sampling adds noise (process.forward).
"""
from collections.abc import Callable

import jax
import numpy as np
from jax.scipy.special import betainc

from diffusion_jax.core import schedules
from diffusion_jax.core.types import Schedule

Grid = Callable[[Schedule], np.ndarray]


def uniform(steps: int, t_max: float = 1.0) -> Grid:
  """Evenly spaced in t, from t_max to 0."""
  return _warped(steps, t_max, lambda u: u)


def quadratic(steps: int, t_max: float = 1.0) -> Grid:
  """t = t_max u^2, u even: denser near the data (arXiv:2010.02502, app. D.2)."""
  return _warped(steps, t_max, np.square)


def cosine(steps: int, t_max: float = 1.0) -> Grid:
  """t = t_max (1 - cos(pi u / 2)), u even: denser near the data, with a last step as long as that of `quadratic`."""
  return _warped(steps, t_max, lambda u: 1 - np.cos(0.5 * np.pi * u))


def beta(steps: int, alpha: float = 0.6, beta: float = 0.6, t_max: float = 1.0) -> Grid:
  """t = t_max times the quantile of Beta(alpha, beta) at even u: for 0.6 denser at both ends (arXiv:2407.12173)."""
  if alpha <= 0 or beta <= 0:
    raise ValueError(f'beta needs alpha > 0 and beta > 0; got {alpha}, {beta}.')
  def quantile(u):
    with jax.ensure_compile_time_eval():
      return np.asarray(schedules.bisect(lambda t: 1 - betainc(alpha, beta, t), 1 - u), np.float64)
  return _warped(steps, t_max, lambda u: np.where((u == 0) | (u == 1), u, quantile(u)))  # the ends without rounding


def leading(steps: int, table: int = 1000, offset: int = 1) -> Grid:
  """Of the numbers 0..table - 1 of a table of betas every (table // steps)-th, from `offset` on, t = (number + 1) / table
  (arXiv:2305.08891, table 2): what DDIM and Stable Diffusion sample at. It leaves the noisiest steps out."""
  return _numbered(steps, table, lambda: np.arange(steps) * (table // steps) + offset)


def trailing(steps: int, table: int = 1000) -> Grid:
  """From the last number of a table down by table / steps, rounded (arXiv:2305.08891, table 2): starts at t = 1."""
  return _numbered(steps, table, lambda: np.sort(np.round(table - np.arange(steps) * table / steps)) - 1)


def linspace(steps: int, table: int = 1000) -> Grid:
  """Evenly from the first number of a table to the last, rounded (arXiv:2305.08891, table 2; arXiv:2102.09672)."""
  return _numbered(steps, table, lambda: np.round(np.linspace(0, table - 1, steps)))


def karras(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
  """sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0 (arXiv:2206.00364, eq. 5).

  sigma is the ratio sigma / alpha of the schedule, so that the grid serves any of them.
  """
  _check_steps(steps)
  if not 0 < sigma_min < sigma_max or rho <= 0:
    raise ValueError(f'karras needs 0 < sigma_min < sigma_max and rho > 0; got {sigma_min}, {sigma_max}, {rho}.')
  sigmas = np.linspace(sigma_max**(1 / rho), sigma_min**(1 / rho), steps)**rho
  return _at_logsnr(-2 * np.log(sigmas))


def exponential(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Grid:
  """log(sigma / alpha) evenly from log(sigma_max) to log(sigma_min), then t = 0: `logsnr` in other words (k-diffusion)."""
  _check_steps(steps)
  if not 0 < sigma_min < sigma_max:
    raise ValueError(f'exponential needs 0 < sigma_min < sigma_max; got {sigma_min}, {sigma_max}.')
  return _at_logsnr(-2 * np.linspace(np.log(sigma_max), np.log(sigma_min), steps))


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
    times = np.asarray(jax.jit(schedules.shift(schedule, factor))(grid(schedule)))
    if not (np.diff(times) < 0).all():
      raise ValueError(f'shift by {factor} takes times of the grid beyond the logsnr at which this schedule starts, or '
                       'nearer to each other than floats: take fewer steps, or no shift.')
    return times
  return shifted


def dimension_shift(grid: Grid, size: int, base: int = 4096) -> Grid:
  """`shift` by sqrt(size / base) for examples of `size` numbers (schedules.dimension_factor)."""
  return shift(grid, schedules.dimension_factor(size, base))


def jumps(grid: Grid, length: int = 10, repeats: int = 10) -> Grid:
  """RePaint's way down another grid: after every `length` steps as many back up, in one move, and down again, until each
  stretch was walked `repeats` times (arXiv:2201.09865, app. B); 1 changes nothing. About `repeats` times the steps."""
  if length < 1 or repeats < 1:
    raise ValueError(f'jumps needs length >= 1 and repeats >= 1; got {length}, {repeats}.')
  def jumping(schedule):
    times, way = grid(schedule), []
    if repeats > 1 and length > len(times) - 2:
      raise ValueError(f'jumps of {length} steps do not fit into the {len(times) - 2} steps of this grid before its last.')
    for place, time in enumerate(times):
      way.append(time)
      if place >= length and (len(times) - 2 - place) % length == 0:  # the last is the time before 0
        way += [*times[place - length:place + 1]] * (repeats - 1)
    return np.array(way)
  return jumping


def restart(grid: Grid, low: float = 0.2, high: float = 0.5, steps: int = 4, repeats: int = 2) -> Grid:
  """Restart sampling: at the time of another grid that is nearest `low` noise up to `high` and back in `steps` even steps,
  `repeats` times (arXiv:2306.14878, alg. 1). `repeats` * `steps` steps more."""
  if not 0 < low < high <= 1 or steps < 1 or repeats < 0:
    raise ValueError('restart needs 0 < low < high <= 1, steps >= 1 and repeats >= 0; got '
                     f'{low}, {high}, {steps}, {repeats}.')
  def restarting(schedule):
    times = grid(schedule)
    place = int(np.argmin(np.abs(times - low)))
    if not 0 < times[place] < high:
      raise ValueError(f'restart finds no time of the grid near low={low} to go up from; its times are {times}.')
    return np.concatenate([times[:place + 1], *[np.linspace(high, times[place], steps + 1)] * repeats, times[place + 1:]])
  return restarting


def _warped(steps: int, t_max: float, warp: Callable[[np.ndarray], np.ndarray]) -> Grid:
  """t_max warp(u) for even u from 1 to 0."""
  _check_steps(steps)
  if not 0 < t_max <= 1:
    raise ValueError(f'A grid needs 0 < t_max <= 1; got {t_max}.')
  return lambda schedule: t_max * warp(np.linspace(1, 0, steps + 1))


def _numbered(steps: int, table: int, numbers: Callable[[], np.ndarray]) -> Grid:
  """The times (number + 1) / table of rising numbers, from the last down, then 0."""
  _check_steps(steps)
  if steps > table:
    raise ValueError(f'A table of {table} steps has no grid of {steps}.')
  times = (numbers()[::-1] + 1) / table
  if times[0] > 1:
    raise ValueError(f'The grid begins at number {times[0] * table - 1:g} of a table that ends at {table - 1}: lower the '
                     'offset.')
  return lambda schedule: np.append(times, 0.0)


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
