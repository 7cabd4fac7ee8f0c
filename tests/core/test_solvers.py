"""Solvers, on data whose denoiser is known: orders of convergence, laws of the samples, and the protocol."""
import inspect
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import grids, multistep, sampling, singlestep, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.solvers import Solver
from diffusion_jax.core.types import Estimate, Level
from tests.core.tables import (
  ALL_SOLVERS,
  ENTRIES,
  LAW,
  MIXTURE,
  MULTISTEP,
  ROWS,
  SCHEDULES,
  SINGLESTEP,
  SOLVERS,
  check_complete,
  close,
  keys,
  over,
)

DETERMINISTIC = {name: solver for name, solver in ALL_SOLVERS.items() if solver.order}
STOCHASTIC = {name: solver for name, solver in ALL_SOLVERS.items() if not solver.order}
# Times between which every schedule moves most of the way: sigma / alpha from about 3 to 0.3.
INTERIOR = {'cosine': (0.8, 0.2), 'flow': (0.75, 0.25), 'linear': (0.5, 0.1), 'karras': (0.04, 0.004)}
# Many steps: the stochastic solvers are biased low by a share of 1 / steps.
GRIDS = {'cosine': grids.uniform(250), 'flow': grids.uniform(250), 'linear': grids.logsnr(250, -10.0, 9.0),
         'karras': grids.karras(250, 0.01, 80.0)}


def test_the_tables_are_complete():
  for module, table in ((solvers, SOLVERS), (singlestep, SINGLESTEP), (multistep, MULTISTEP)):
    check_complete(module, Solver, table)


@over('law', {'gaussian': LAW, 'mixture': MIXTURE})
def test_the_oracles_obey_tweedie_s_formula(law, x64):
  """E[x0 | xt] = (xt + sigma^2 grad log p(xt)) / alpha, so the laws of this suite do not rest on one formula."""
  process = Gaussian(SCHEDULES['flow'])
  level, x = process.level(np.linspace(0.1, 0.9, 5)), jax.random.normal(jax.random.key(0), (5, 2))
  score = jax.jit(jax.grad(lambda x: law.log_density(x, level).sum()))(x)
  expected = (x + level.sigma[:, None]**2 * score) / level.alpha[:, None]
  np.testing.assert_allclose(jax.jit(law.denoiser(process))(x, level).x0, expected, atol=1e-9)


def test_the_oracle_s_flow_obeys_the_ode(x64):
  process, t, h = Gaussian(SCHEDULES['cosine']), 0.5, 1e-5
  x, level = jnp.array([[0.3, -1.0]]), process.level(t)
  rate = (LAW.flow_map(x, level, process.level(t + h)) - LAW.flow_map(x, level, process.level(t - h))) / (2 * h)
  np.testing.assert_allclose(rate, solvers.drift(process, LAW.denoiser(process), x, level), atol=1e-8)


@pytest.mark.parametrize('name', DETERMINISTIC)
@pytest.mark.parametrize('schedule', INTERIOR)
def test_the_order_of_convergence(name, schedule, x64):
  """Error against the exact flow at the end of an interior interval, in double precision, by regression on steps."""
  process, solver = Gaussian(SCHEDULES[schedule]), DETERMINISTIC[name]
  start, end = INTERIOR[schedule]
  walk = walker(solver, process, remembered=4 if name in MULTISTEP else 0)
  errors = [walk(np.linspace(start, end, steps + 1)) for steps in STEPS]
  order = measured_order(errors)
  print(f'order of {name} on {schedule}: {order:.2f}')
  expected = 4 if (name, schedule) == ('ipndm', 'karras') else solver.order  # even steps of t are even steps of sigma there
  assert abs(order - expected) < 0.25, errors


@pytest.mark.parametrize('name', [name for name in ROWS if name in DETERMINISTIC])
@pytest.mark.parametrize('schedule', ['cosine', 'flow'])
def test_the_order_to_the_end(name, schedule, x64):
  """All the way to t = 0, where the last move is the denoiser's."""
  walk = walker(DETERMINISTIC[name], Gaussian(SCHEDULES[schedule]))
  order = measured_order([walk(np.linspace(0.9, 0.0, steps + 1)) for steps in STEPS])
  print(f'order to the end of {name} on {schedule}: {order:.2f}')
  assert order >= 0.8


STEPS = (48, 96, 192)


def measured_order(errors):
  return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


def walker(solver, process, remembered=0):
  """grid -> the error of the solver's walk down the grid against the exact flow. `remembered` even steps before the grid
  give the solver a history that is exact."""
  denoise, x = LAW.denoiser(process), jnp.array([[1.5, -0.4], [-2.0, 0.9]])
  @jax.jit
  def step(x, memory, t, s):
    return solver.step(process, denoise, keys(2), x, process.level(t), process.level(s), memory)
  def walk(grid):
    start = xt = LAW.flow_map(x, process.level(1.0), process.level(grid[0]))
    memory = solver.init(start)
    for t in grid[0] + (grid[0] - grid[1]) * np.arange(remembered, 0, -1):
      exact = LAW.flow_map(x, process.level(1.0), process.level(t))
      _, memory = step(exact, memory, t, t - (grid[0] - grid[1]))
      memory = memory._replace(x=exact) if isinstance(memory, multistep.Place) else memory
    for t, s in zip(grid[:-1], grid[1:], strict=True):
      if s == 0:
        xt = denoise(xt, process.level(t)).x0
      else:
        xt, memory = step(xt, memory, t, s)
    return float(jnp.abs(xt - LAW.flow_map(start, process.level(grid[0]), process.level(grid[-1]))).max())
  return walk


def moments(x):
  return np.mean(x, 0), np.cov(np.asarray(x, np.float64).T)


@pytest.mark.parametrize('name', ROWS)
@pytest.mark.parametrize('schedule', ['karras'])
def test_the_moments_of_gaussian_data(name, schedule):
  process, count = Gaussian(SCHEDULES[schedule]), 2000
  grid = GRIDS[schedule](process.schedule)
  x = sampling.sample(keys(count), process, ALL_SOLVERS[name], LAW.denoiser(process), grid, (2,))
  mean, covariance = moments(x)
  np.testing.assert_allclose(mean, LAW.mean, atol=0.05)
  np.testing.assert_allclose(covariance, LAW.covariance, atol=0.05)


@over('solver', ROWS)
def test_the_law_of_a_mixture(solver):
  process, count = Gaussian(SCHEDULES['flow']), 2000
  x = sampling.sample(keys(count), process, solver, MIXTURE.denoiser(process), GRIDS['flow'](process.schedule), (2,))
  true = MIXTURE.sample(keys(count, 1))
  assert abs(np.mean(np.asarray(x).sum(1) > 0.25) - 0.3) < 0.04  # the line between the two components
  for ours, theirs in zip(moments(x), moments(true), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=0.07)


@over('solver', STOCHASTIC)
def test_samples_follow_the_law(solver):
  process, count = Gaussian(SCHEDULES['cosine']), 4000
  grid = GRIDS['cosine'](process.schedule)
  x = sampling.sample(keys(count, 5), process, solver, ENTRIES.denoiser(process), grid, ())
  assert stats.kstest(np.asarray(x, np.float64), stats.norm(0.4, 0.6).cdf).pvalue > 1e-3


def one_step(solver, t, s, x, x0):
  """xs of many keys by a step from x, the data being x0."""
  denoise = lambda x, level: Estimate(jnp.broadcast_to(x0, x.shape))
  process = Gaussian(SCHEDULES['cosine'])
  return np.asarray(solver.step(process, denoise, keys(len(x)), x, t, s, solver.init(x))[0], np.float64)


@pytest.mark.parametrize('name', ['ancestral', 'ddim(1)'])
def test_a_step_has_the_law_of_bayes(name):
  """q(xs | xt, x0): the precisions of q(xs | x0) and q(xt | xs) add. So ddim(1) has the law of ancestral."""
  t, s = (Level(*map(jnp.float32, (t, np.cos(t), np.sin(t)))) for t in (1.2, 0.7))
  scale = np.cos(1.2) / np.cos(0.7)
  noise = np.sin(1.2)**2 - (scale * np.sin(0.7))**2
  variance = 1 / (1 / np.sin(0.7)**2 + scale**2 / noise)
  mean = variance * (np.cos(0.7) * 0.3 / np.sin(0.7)**2 + scale * 1.5 / noise)
  xs = one_step(SOLVERS[name], t, s, jnp.full(4000, 1.5), 0.3)
  assert stats.kstest(xs, stats.norm(mean, np.sqrt(variance)).cdf).pvalue > 1e-3


@pytest.mark.parametrize('name', ['ancestral', 'ddim', 'ddim(0.5)', 'ddim(1)'])
def test_a_step_at_the_true_data_keeps_the_marginal(name):
  """At the data x0, a step carries q(xt | x0) to q(xs | x0), whatever eta (arXiv:2010.02502, lemma 1)."""
  process = Gaussian(SCHEDULES['cosine'])
  t, s = process.level(0.7), process.level(0.4)
  xt = process.corrupt(keys(4000, 3), jnp.full(4000, -0.8), t)[0]
  xs = one_step(SOLVERS[name], t, s, xt, -0.8)
  assert stats.kstest(xs, stats.norm(-0.8 * float(s.alpha), float(s.sigma)).cdf).pvalue > 1e-3
  if name == 'ddim':
    np.testing.assert_allclose((xs + 0.8 * s.alpha) / s.sigma, (xt + 0.8 * t.alpha) / t.sigma, atol=1e-5)


@over('solver', ALL_SOLVERS)
def test_a_step_calls_the_denoiser_as_often_as_stated(solver):
  process, calls = Gaussian(SCHEDULES['cosine']), []
  denoise = lambda x, level: calls.append(level) or ENTRIES.denoiser(process)(x, level)
  x, memory, times = jnp.ones((2, 3)), solver.init(jnp.ones((2, 3))), (0.8, 0.6, 0.4)
  for t, s in zip(times[:-1], times[1:], strict=True):
    x, memory = solver.step(process, denoise, keys(2), x, process.level(t), process.level(s), memory)
  assert len(calls) == 2 * solver.calls


@over('solver', ALL_SOLVERS)
@over('x', {'scalars': jnp.ones(2), 'tree': {'a': jnp.ones((2, 3)), 'b': [jnp.ones((2, 2, 2))]}})
def test_the_protocol(solver, x):
  """The names of the arguments; x and memory keep their structure, shapes and dtypes, as a scan needs."""
  assert list(inspect.signature(solver.step).parameters) == ['process', 'denoise', 'keys', 'x', 't', 's', 'memory']
  assert solver.order is None or solver.order >= 1
  process = Gaussian(SCHEDULES['cosine'])
  step = partial(solver.step, process, ENTRIES.denoiser(process), keys(2))
  form = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  memory = solver.init(x)
  assert form(jax.eval_shape(step, x, process.level(0.8), process.level(0.6), memory)) == form((x, memory))


@over('solver', ALL_SOLVERS)
@pytest.mark.parametrize('schedule', ['cosine', 'flow'])
def test_a_step_from_pure_noise_is_finite(solver, schedule):
  """alpha = 0 and logsnr = -inf at t = 1, and the step after it must not remember the infinity."""
  process = Gaussian(SCHEDULES[schedule])
  x = jnp.array([[0.5, -2.0]])
  memory = solver.init(x)
  for t, s in ((1.0, 0.8), (0.8, 0.6), (0.6, 0.1)):
    levels = process.level(t), process.level(s)
    x, memory = solver.step(process, ENTRIES.denoiser(process), keys(1), x, *levels, memory)
    assert np.isfinite(x).all()


@over('solver', ROWS)
def test_a_sample_does_not_depend_on_the_batch(solver):
  """To a last bit or two: XLA rounds what it fuses otherwise for another size."""
  process = Gaussian(SCHEDULES['cosine'])
  denoise, grid = ENTRIES.denoiser(process), np.linspace(1, 0, 9)
  draw = lambda count: sampling.sample(keys(count), process, solver, denoise, grid, (16,))
  np.testing.assert_allclose(draw(3), draw(8)[:3], atol=1e-6)


@over('solver', {name: ROWS[name] for name in ('ancestral', 'heun', 'dpm_2m', 'dpm_sde', 'unipc')})
def test_scalars_and_trees_are_sampled_alike(solver):
  process, count = Gaussian(SCHEDULES['cosine']), 2000
  shape = {'a': jax.ShapeDtypeStruct((), jnp.float32), 'b': jax.ShapeDtypeStruct((2, 1), jnp.float32)}
  x = sampling.sample(keys(count), process, solver, ENTRIES.denoiser(process), np.linspace(1, 0, 251), shape)
  assert x['a'].shape == (count,) and x['b'].shape == (count, 2, 1)
  entries = np.concatenate([x['a'][:, None], x['b'][:, :, 0]], 1)
  np.testing.assert_allclose(entries.mean(0), 0.4, atol=0.06)
  np.testing.assert_allclose(np.cov(entries.T), 0.36 * np.eye(3), atol=0.05)


def test_the_two_step_memory_is_the_paper_s():
  """DPM-Solver++(2M), arXiv:2211.01095, alg. 2, step by step in numpy on flow."""
  process, solver = Gaussian(SCHEDULES['flow']), solvers.dpm_2m()
  estimates = iter([0.2, -0.5, 0.9])
  denoise = lambda x, level: Estimate(jnp.full_like(x, next(estimates)))
  x, times = jnp.array([1.3]), np.array([0.9, 0.7, 0.4, 0.3])
  memory, expected = solver.init(x), 1.3
  lam = np.log((1 - times) / times)
  h = np.diff(lam, prepend=np.nan)
  data = [None, 0.2, -0.5, 0.9]
  for i in (1, 2, 3):
    r = h[i - 1] / h[i]
    d = data[1] if i == 1 else (1 + 1 / (2 * r)) * data[i] - 1 / (2 * r) * data[i - 1]
    expected = times[i] / times[i - 1] * expected - (1 - times[i]) * np.expm1(-h[i]) * d
    x, memory = solver.step(process, denoise, keys(1), x, process.level(times[i - 1]), process.level(times[i]), memory)
    close(x, np.array([expected], np.float32), atol=1e-5)


def test_eta_is_a_share():
  with pytest.raises(ValueError, match='ddim needs 0 <= eta <= 1; got 1.5.'):
    solvers.ddim(1.5)
