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
  constraints,
  correctors,
  grids,
  guidance,
  losses,
  multistep,
  schedules,
  singlestep,
  solvers,
  targets,
  times,
  unmasking,
  weights,
)
from diffusion_jax.core.types import Draw, Estimate, example_keys
from tests import oracles


def halves(x):
  """|x|^2 / 2 of every example."""
  return sum(0.5 * jnp.sum(jnp.square(leaf).reshape(len(leaf), -1), 1) for leaf in jax.tree.leaves(x))


def first_replaced(denoise):
  """`replace` for any x: the first entry of every leaf is 0.2."""
  first = lambda leaf: jnp.arange(leaf[0].size).reshape(leaf.shape[1:]) == 0
  row = lambda x: constraints.replace(jax.tree.map(lambda leaf: 0.2, x), jax.tree.map(first, x))
  return lambda x, level, cond: row(x)(denoise)(x, level, cond)


def measured(row):
  """The constraint row(see, y) for any x: what is seen is the sum of the entries of every leaf and is 0.2."""
  see = lambda x0: jax.tree.map(lambda leaf: jnp.sum(leaf.reshape(len(leaf), -1), 1), x0)
  return lambda denoise: lambda x, level, cond: row(see, jax.tree.map(lambda leaf: 0.2, x))(denoise)(x, level, cond)


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
RISING_GRIDS = {
  'jumps': grids.jumps(grids.uniform(8), 2, 3),
  'restart': grids.restart(grids.uniform(8)),
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
GUIDANCE = {
  'guide': guidance.guide(2.5),
  'guide(during)': guidance.guide(2.5, (0.3, 0.7)),
  'guide(negative)': guidance.guide(2.5, negative={'label': 1}),
  'rescale': guidance.rescale(2.5),
  'cfg_zero': guidance.cfg_zero(2.5),
  'cfg_zero(still)': guidance.cfg_zero(2.5, 0.6),
  'apg': guidance.apg(2.5),
  'apg(radius)': guidance.apg(2.5, 0.5, 0.1),
  'perpendicular': guidance.perpendicular(2.5, {'label': 1}, 0.7),
  'blend': guidance.blend(0.3, {'label': 1}),
  'autoguide': guidance.autoguide(2.5, lambda x, level, cond: Estimate(jax.tree.map(jnp.sin, x))),
  'classifier': guidance.classifier(lambda x, level, cond: -halves(x), 0.5),
  'energy': guidance.energy(lambda x0: halves(x0), 0.5),
  'chain': guidance.chain(guidance.guide(2.5), constraints.clip(0.4)),
  'chain(blend)': guidance.chain(guidance.blend(0.3, {'label': 1}), guidance.guide(2.5)),
}
CONSTRAINTS = {
  'clip': constraints.clip(0.4),
  'dynamic_threshold': constraints.dynamic_threshold(70.0, 0.1),
  'replace': first_replaced,
  'ddnm': measured(constraints.ddnm),
  'dps': measured(partial(constraints.dps, std=0.5)),
  'pigdm': measured(partial(constraints.pigdm, std=0.5)),
}
TRANSFORMS = {**GUIDANCE, **CONSTRAINTS}
SOLVERS = {
  'ancestral': solvers.ancestral(),
  'ancestral(large)': solvers.ancestral('large'),
  'ddim': solvers.ddim(),
  'ddim(0.5)': solvers.ddim(0.5),
  'ddim(1)': solvers.ddim(1.0),
  'euler_ancestral': solvers.euler_ancestral(),
  'ddim_inverse': solvers.ddim_inverse(),
  'ddim_inverse(3)': solvers.ddim_inverse(3),
  'euler': solvers.euler(),
  'heun': solvers.heun(),
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
  'dormand_prince': singlestep.dormand_prince(1e-3, 1e-3),
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
  'dpm_2m': multistep.dpm_2m(),
  'dpm_2m(heun)': multistep.dpm_2m(kind='heun'),
  'dpm_2m(1)': multistep.dpm_2m(1.0),
  'dpm_3m': multistep.dpm_3m(),
  'dpm_3m(1)': multistep.dpm_3m(1.0),
  'unipc': multistep.unipc(),
  'unipc(1)': multistep.unipc(1),
  'unipc(2, b1)': multistep.unipc(2, 'b1'),
  'unipc(3, b2)': multistep.unipc(3, 'b2'),
  'sa_solver': multistep.sa_solver(),
  'sa_solver(during)': multistep.sa_solver(2, 2, 0.7, (0.2, 0.8)),
  'sa_solver(ode)': multistep.sa_solver(2, 3, 0.0),
  'sa_solver(3, 2)': multistep.sa_solver(3, 2, 0.0),
  'ipndm': multistep.ipndm(),
  'pndm': multistep.pndm(),
  'pndm(heun)': multistep.pndm('heun'),
}
CORRECTORS = {
  'churn': correctors.churn(solvers.heun()),
  'churn(euler)': correctors.churn(solvers.euler(), 10.0, 64, (0.1, 10.0), 1.0),
  'langevin': correctors.langevin(solvers.ancestral()),
  'langevin(2)': correctors.langevin(solvers.ddim(), 2),
}
UNMASKING = {  # for the process Masked alone
  'maskgit': unmasking.maskgit(),
  'maskgit(0)': unmasking.maskgit(0.0),
  'remdm': unmasking.remdm(),
  'remdm(cap)': unmasking.remdm('cap', 0.3),
  'remdm(rescale)': unmasking.remdm('rescale', 0.4),
}
ALL_SOLVERS = {**SOLVERS, **SINGLESTEP, **MULTISTEP, **CORRECTORS}
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


def check_moments(x, mean, covariance, bias=0.0):
  """The mean and covariance of normal samples x [N, d] are right within 4 standard errors and the sampler's own bias."""
  mean, covariance, x = np.asarray(mean), np.asarray(covariance), np.asarray(x, np.float64)
  variances = np.diag(covariance)
  errors = np.sqrt((np.outer(variances, variances) + covariance**2) / len(x))
  assert (np.abs(x.mean(0) - mean) <= 4 * np.sqrt(variances / len(x)) + bias + 1e-5).all(), (x.mean(0), mean)
  assert (np.abs(np.cov(x.T) - covariance) <= 4 * errors + bias + 1e-5).all(), (np.cov(x.T), covariance)
