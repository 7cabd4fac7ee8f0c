"""The law that each inverse method samples, against the true conditional: python -m experiments.inverse.table

For Gaussian data every step of every method is affine, so the law of its samples is normal and is carried along in numpy
(tests/oracles.py, Gaussian.walk). Samples of the package stand beside it. Writes results.csv; about a minute on a CPU.
"""
import csv
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from diffusion_jax.core import constraints, grids, sampling, schedules, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Transform, example_keys
from tests import oracles

PROCESS = Gaussian(schedules.cosine())
MEAN = [0.5, -0.5, 0.5, -0.5]
CORRELATED = oracles.Gaussian(MEAN, (0.8**np.abs(np.subtract.outer(range(4), range(4)))).tolist())
WHITE = oracles.Gaussian(MEAN, np.eye(4).tolist())
SAMPLES, JUMP = 2000, 10
HERE = Path(__file__).parent


class Problem(NamedTuple):
  """y = see x0 + std noise; `free` are the entries that are not given outright."""
  prior: oracles.Gaussian
  see: np.ndarray
  y: np.ndarray
  std: float
  free: list[int]


PICK, PAIRS = np.eye(4)[[0, 3]], np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
PROBLEMS = {
  'inpainting': Problem(CORRELATED, PICK, np.array([1.0, -1.0]), 0.0, [1, 2]),
  'noisy means': Problem(CORRELATED, PAIRS, np.array([1.0, -1.0]), 0.3, [0, 1, 2, 3]),
  'noisy means, white': Problem(WHITE, PAIRS, np.array([1.0, -1.0]), 0.3, [0, 1, 2, 3]),
}


class Row(NamedTuple):
  """A method on a problem: its transform and the same by hand, on this many steps of ddim(eta) and so many jumps more."""
  problem: str
  method: str
  transform: Transform
  by_hand: object
  steps: int = 1000
  eta: float = 1.0
  jumps: int = 0


def exact(name: str, **options) -> Row:
  """The estimate of the true conditional: what the steps alone make wrong."""
  problem = PROBLEMS[name]
  truth = problem.prior.given(problem.see, problem.y, problem.std)
  return Row(name, 'exact estimate', lambda denoise: _listed(truth).denoiser(PROCESS), None, **options)


def replace(method: str = 'replace', **options) -> Row:
  values = np.array([1.0, 0.0, 0.0, -1.0], np.float32)
  return Row('inpainting', method, constraints.replace(values, np.array([True, False, False, True])),
             oracles.affine_ddnm(PICK, values[[0, 3]]), **options)


def ddnm(name: str) -> Row:
  _, see, y, _, _ = PROBLEMS[name]
  return Row(name, 'ddnm', constraints.ddnm(_seen(see), y), oracles.affine_ddnm(see, y))


def dps(name: str, std: float, scale: float = 1.0, **options) -> Row:
  _, see, y, _, _ = PROBLEMS[name]
  method = f'dps, std {std}' + (f', scale {scale}' if scale != 1 else '')
  return Row(name, method, constraints.dps(_seen(see), y, std, scale), oracles.affine_dps(see, y, std, scale), **options)


def pigdm(name: str, method: str = 'pigdm', **options) -> Row:
  _, see, y, std, _ = PROBLEMS[name]
  return Row(name, method, constraints.pigdm(_seen(see), y, std), oracles.affine_pigdm(see, y, std, 1.0), **options)


def every_row() -> list[Row]:
  inpainting = 'inpainting'
  rows = [exact(inpainting), replace(), *(replace(f'replace, jumps x {jumps}', jumps=jumps) for jumps in (1, 5, 20)),
          replace('replace, ddim', eta=0.0), pigdm(inpainting), pigdm(inpainting, 'pigdm, ddim', eta=0.0),
          *(dps(inpainting, std) for std in (0.05, 0.1, 0.2)),
          exact(inpainting, steps=100), replace(steps=100), replace('replace, jumps x 20', steps=100, jumps=20),
          *(dps(inpainting, std, steps=100) for std in (0.05, 0.1))]
  noisy = 'noisy means'
  rows += [exact(noisy), ddnm(noisy), pigdm(noisy), *(dps(noisy, std) for std in (0.1, 0.3, 0.4, 0.6)),
           dps(noisy, 0.3, 0.5)]
  white = 'noisy means, white'
  return rows + [exact(white), ddnm(white), pigdm(white), dps(white, 0.3)]


def measure(row: Row, samples: int = SAMPLES) -> dict:
  """The errors of the law of a row and, unless there are to be none, how far the samples are from that law."""
  problem = PROBLEMS[row.problem]
  truth = problem.prior.given(problem.see, problem.y, problem.std)
  grid = grids.jumps(grids.uniform(row.steps), JUMP, row.jumps + 1)(PROCESS.schedule)
  with np.errstate(over='ignore', invalid='ignore'):
    law = problem.prior.walk(PROCESS, grid, row.by_hand, row.eta) if row.by_hand else truth.walk(PROCESS, grid)
  name = {'problem': row.problem, 'method': row.method, 'steps': row.steps, 'calls': int(np.sum(np.diff(grid) < 0))}
  if not np.all(np.abs(law.covariance) < 1e6):
    return {**name, 'mean_error': np.inf, 'std_ratio': np.inf, 'w2': np.inf, 'sampled_errors': np.nan}
  free, std = problem.free, lambda law: np.sqrt(np.maximum(np.diag(law.covariance), 0))
  return {**name, 'mean_error': float(np.abs(law.mean - truth.mean)[free].max()),
          'std_ratio': float(np.mean(std(law)[free] / std(truth)[free])), 'w2': distance(law, truth),
          'sampled_errors': deviation(sample(row, grid, samples), law) if samples else np.nan}


def sample(row: Row, grid: np.ndarray, count: int) -> np.ndarray:
  """Samples of the package, as a user would draw them."""
  denoise = row.transform(PROBLEMS[row.problem].prior.denoiser(PROCESS))
  solver = solvers.ancestral() if row.eta == 1 else solvers.ddim(row.eta)
  draw = jax.jit(lambda keys: sampling.sample(keys, PROCESS, solver, denoise, grid, (4,)))
  return np.asarray(draw(example_keys(jax.random.key(0), jnp.arange(count))), np.float64)


def distance(one: oracles.Gaussian, other: oracles.Gaussian) -> float:
  """The Wasserstein distance W2 of two normal laws, over all entries."""
  root = _root(one.covariance)
  cross = _root(root @ other.covariance @ root)
  squared = np.sum((one.mean - other.mean)**2) + np.trace(one.covariance + other.covariance - 2 * cross)
  return float(np.sqrt(max(squared, 0.0)))


def deviation(x: np.ndarray, law: oracles.Gaussian) -> float:
  """The largest error of the mean and covariance of samples, in standard errors (and 1e-5, the rounding)."""
  variances = np.maximum(np.diag(law.covariance), 0)
  mean = np.abs(x.mean(0) - law.mean) / (np.sqrt(variances / len(x)) + 1e-5)
  spread = np.sqrt((np.outer(variances, variances) + law.covariance**2) / len(x)) + 1e-5
  return float(max(mean.max(), (np.abs(np.cov(x.T) - law.covariance) / spread).max()))


def _root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def _seen(see: np.ndarray):
  return lambda x0: x0 @ see.T.astype(x0.dtype)


def _listed(law: oracles.Gaussian) -> oracles.Gaussian:
  return oracles.Gaussian(law.mean.tolist(), law.covariance.tolist())


def main() -> None:
  table = []
  for row in every_row():
    table.append(measure(row))
    print('| ' + ' | '.join(_short(cell) for cell in table[-1].values()) + ' |', flush=True)
  with open(HERE / 'results.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, list(table[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows({name: _short(cell) for name, cell in row.items()} for row in table)


def _short(cell) -> str:
  return f'{cell:.4f}' if isinstance(cell, float) else str(cell)


if __name__ == '__main__':
  main()
