"""One table per kind of the maths, a row for each public function; and small helpers that several tests share."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax import build
from diffusion_jax.core import (
  betas,
  bounds,
  grids,
  guidance,
  losses,
  multistep,
  schedules,
  singlestep,
  solvers,
  targets,
  times,
  weights,
)
from diffusion_jax.core.types import Draw, example_keys
from tests import oracles

SCHEDULES = {
  'linear': schedules.linear(),
  'scaled_linear': schedules.scaled_linear(),
  'exponential': schedules.exponential(),
  'sub_vp': schedules.sub_vp(),
  'cosine': schedules.cosine(),
  'cosine(0.008)': schedules.cosine(0.008),
  'trigonometric': schedules.trigonometric(0.5),
  'sigmoid': schedules.sigmoid(),
  'polynomial': schedules.polynomial(),
  'geometric': schedules.geometric(),
  'karras': schedules.karras(),
  'flow': schedules.flow(),
  'laplace': schedules.laplace(),
  'cauchy': schedules.cauchy(),
  'path': schedules.path(partial(schedules.logsnr_of, schedules.cosine()), p=1.5),
}
TABLES = {
  'linear_betas': betas.linear_betas(),
  'scaled_linear_betas': betas.scaled_linear_betas(),
  'cosine_betas': betas.cosine_betas(),
  'sigmoid_betas': betas.sigmoid_betas(),
  'exponential_betas': betas.exponential_betas(100),
  'zero_snr': betas.zero_snr(betas.scaled_linear_betas()),
}
DISCRETE = {'discrete': betas.discrete(TABLES['linear_betas']), 'discrete(zero_snr)': betas.discrete(TABLES['zero_snr'])}
LEARNED = {'monotone': schedules.monotone(32)}
# Every kind of schedule: the rows, tables of betas, and a learned one at its first parameters.
ALL_SCHEDULES = {**SCHEDULES, **DISCRETE,
                 'monotone': LEARNED['monotone'].bind(LEARNED['monotone'].init(jax.random.key(0)))}
# alpha(1) = 0
REACHING_NOISE = {name: ALL_SCHEDULES[name] for name in (
  'cosine', 'cosine(0.008)', 'trigonometric', 'sigmoid', 'flow', 'laplace', 'cauchy', 'path', 'discrete(zero_snr)')}
FEW = {name: SCHEDULES[name] for name in ('linear', 'cosine', 'karras', 'flow', 'path')}  # for what costs time
TARGETS = {
  'noise': targets.noise(),
  'x0': targets.x0(),
  'v': targets.v(),
  'velocity': targets.velocity(),
  'score': targets.score(),
  'edm': targets.edm(0.7),
  'vp': targets.vp(),
  've': targets.ve(),
  'iddpm': targets.iddpm(),
}
# D = alpha b - sigma a, worked out by hand, of (alpha, sigma, d alpha / dt, d sigma / dt).
DETERMINANTS = {
  'noise': lambda a, s, da, ds: a,
  'x0': lambda a, s, da, ds: -s,
  'v': lambda a, s, da, ds: a**2 + s**2,
  'velocity': lambda a, s, da, ds: a * ds - s * da,
  'score': lambda a, s, da, ds: -a / s,
  'edm': lambda a, s, da, ds: -np.sqrt((0.7 * a)**2 + s**2) / 0.7,
  'vp': lambda a, s, da, ds: a,
  've': lambda a, s, da, ds: -a,
  'iddpm': lambda a, s, da, ds: a,
}
TIMES = {
  'uniform': times.uniform(0.1, 0.9),
  'stratified': times.stratified(),
  'antithetic': times.antithetic(),
  'discrete': times.discrete(50),
  'lognormal': times.lognormal(),
  'lognormal(stratified)': times.lognormal(-0.4, 1.0, times.stratified()),
  'log_uniform': times.log_uniform(0.02, 20.0),
  'logit_normal': times.logit_normal(0.3, 0.8),
  'mode': times.mode(1.29),
  'cosmap': times.cosmap(),
  'cosine_interpolated': times.cosine_interpolated(),
  'shift': times.shift(times.uniform(), 2.0),
  'dimension_shift': times.dimension_shift(times.uniform(), 16384, 4096),
}
GRIDS = {
  'uniform': grids.uniform(8),
  'quadratic': grids.quadratic(8),
  'cosine': grids.cosine(8),
  'beta': grids.beta(8),
  'leading': grids.leading(8),
  'trailing': grids.trailing(8),
  'linspace': grids.linspace(8),
  'exponential': grids.exponential(8, 0.02, 10.0),
  'karras': grids.karras(8, 0.02, 10.0),  # within the range of every schedule
  'logsnr': grids.logsnr(8, -4.9, 9.0),
  'shift': grids.shift(grids.uniform(8), 0.5),
  'dimension_shift': grids.dimension_shift(grids.uniform(8), 1024, 4096),
}
WEIGHTS = {
  'constant': weights.constant(),
  'elbo': weights.elbo(),
  'snr': weights.snr(0.5),
  'truncated_snr': weights.truncated_snr(),
  'min_snr': weights.min_snr(),
  'soft_min_snr': weights.soft_min_snr(),
  'p2': weights.p2(0.5, 2.0),
  'rectified_flow': weights.rectified_flow(),
  'logit_normal': weights.logit_normal(0.3, 0.8),
  'cosmap': weights.cosmap(),
  'edm': weights.edm(0.7),
  'sigmoid': weights.sigmoid(1.5),
  'measure': weights.measure(weights.sigmoid(1.5)),
}
DISTANCES = {
  'squared': losses.squared(),
  'absolute': losses.absolute(),
  'huber': losses.huber(0.5),
  'pseudo_huber': losses.pseudo_huber(0.3),
}
DECODERS = {
  'density': bounds.density(),
  'discretized': bounds.discretized(16),
  'softmax': bounds.softmax(16),
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
  'dpm_2m(1)': solvers.dpm_2m(1.0),
}
SINGLESTEP = {
  'dpm_solver(1)': singlestep.dpm_solver(1),
  'dpm_solver': singlestep.dpm_solver(),
  'dpm_solver(3)': singlestep.dpm_solver(3),
  'dpm_2s': singlestep.dpm_2s(),
  'dpm_2s(1)': singlestep.dpm_2s(1.0),
  'dpm2': singlestep.dpm2(),
  'dpm2(1)': singlestep.dpm2(1.0),
  'rk4': singlestep.rk4(),
  'dpm_sde': singlestep.dpm_sde(),
  'dpm_sde(0.6)': singlestep.dpm_sde(0.6, 0.4),
  'euler_maruyama': singlestep.euler_maruyama(),
  **{f'euler_maruyama({name})': singlestep.euler_maruyama(name)
     for name in ('constant', 'linear', 'decreasing', 'increasing_decreasing')},
}
MULTISTEP = {
  **{f'lms({order})': multistep.lms(order) for order in (1, 2, 3)},
  'lms': multistep.lms(),
  'deis': multistep.deis(),
  'deis(log_r)': multistep.deis(2, 'log_r'),
  'dpm_3m': multistep.dpm_3m(),
  'dpm_3m(1)': multistep.dpm_3m(1.0),
  'unipc': multistep.unipc(),
  'unipc(1)': multistep.unipc(1),
  'ipndm': multistep.ipndm(),
}
ALL_SOLVERS = {**SOLVERS, **SINGLESTEP, **MULTISTEP}
ROWS = {name: solver for name, solver in ALL_SOLVERS.items() if '(' not in name}  # one of each, for what costs time

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
