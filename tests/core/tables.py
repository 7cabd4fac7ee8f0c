"""One table per kind of the maths, a row for each public function; and small helpers that several tests share."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax import build
from diffusion_jax.core import grids, guidance, schedules, solvers, targets, times, weights
from diffusion_jax.core.types import Draw, example_keys
from tests import oracles

SCHEDULES = {
  'linear': schedules.linear(),
  'cosine': schedules.cosine(),
  'flow': schedules.flow(),
  'karras': schedules.karras(),
  'path': schedules.path(partial(schedules.logsnr_of, schedules.cosine()), p=1.5),
}
REACHING_NOISE = {name: SCHEDULES[name] for name in ('cosine', 'flow', 'path')}  # alpha(1) = 0
TARGETS = {
  'noise': targets.noise(),
  'x0': targets.x0(),
  'v': targets.v(),
  'velocity': targets.velocity(),
  'score': targets.score(),
  'edm': targets.edm(0.7),
}
# D = alpha b - sigma a, worked out by hand, of (alpha, sigma, d alpha / dt, d sigma / dt).
DETERMINANTS = {
  'noise': lambda a, s, da, ds: a,
  'x0': lambda a, s, da, ds: -s,
  'v': lambda a, s, da, ds: a**2 + s**2,
  'velocity': lambda a, s, da, ds: a * ds - s * da,
  'score': lambda a, s, da, ds: -a / s,
  'edm': lambda a, s, da, ds: -np.sqrt((0.7 * a)**2 + s**2) / 0.7,
}
TIMES = {
  'uniform': times.uniform(0.1, 0.9),
  'stratified': times.stratified(),
  'lognormal': times.lognormal(),
  'shift': times.shift(times.uniform(), 2.0),
}
GRIDS = {
  'uniform': grids.uniform(8),
  'karras': grids.karras(8, 0.01, 70.0),
  'logsnr': grids.logsnr(8, -8.0, 9.0),
  'shift': grids.shift(grids.uniform(8), 0.5),
}
WEIGHTS = {
  'constant': weights.constant(),
  'min_snr': weights.min_snr(),
  'edm': weights.edm(0.7),
  'sigmoid': weights.sigmoid(1.5),
  'measure': weights.measure(weights.sigmoid(1.5)),
}
TRANSFORMS = {
  'guide': guidance.guide(2.5),
  'guide(during)': guidance.guide(2.5, (0.3, 0.7)),
  'clip': guidance.clip(0.4),
  'chain': guidance.chain(guidance.guide(2.5), guidance.clip(0.4)),
}
SOLVERS = {
  'ancestral': solvers.ancestral(),
  'ddim': solvers.ddim(),
  'ddim(0.5)': solvers.ddim(0.5),
  'ddim(1)': solvers.ddim(1.0),
  'euler': solvers.euler(),
  'heun': solvers.heun(),
  'dpm_2m': solvers.dpm_2m(),
}
ROWS = {name: solver for name, solver in SOLVERS.items() if '(' not in name}  # one of each, for what costs time

LAW = oracles.Gaussian([0.5, -0.3], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = oracles.Mixture([0.3, 0.7], [[1.0, 0.5], [-0.6, -0.4]], [0.3, 0.2])
ENTRIES = oracles.Independent(0.4, 0.6)


def over(argument, table):
  """Run the test for every row of the table, under the row's name."""
  return pytest.mark.parametrize(argument, list(table.values()), ids=list(table))


def check_complete(module, kind, table):
  """Every public function of the module has a row; 'name(case)' is one more row of 'name'."""
  assert {name.partition('(')[0] for name in table} == set(build.rows(module, kind))


def keys(count, seed=0):
  return example_keys(jax.random.key(seed), jnp.arange(count))


def draw(count, seed=0):
  return Draw(jax.random.key(seed), jnp.arange(count), count)


def slopes(schedule, t, h=1e-6):
  """(d alpha / dt, d sigma / dt) by central differences, to be used in double precision."""
  return [(after - before) / (2 * h) for after, before in zip(schedule(t + h), schedule(t - h), strict=True)]


def close(a, b, rtol=0.0, atol=0.0):
  """Equal trees of equal arrays, within the tolerances."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
