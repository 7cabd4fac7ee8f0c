"""Solvers, on data whose denoiser is known: orders of convergence, laws of the samples, and the protocol."""
import inspect
from functools import cache, partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate, stats

from diffusion_jax.core import correctors, multistep, sampling, singlestep, solvers
from diffusion_jax.core.processes import Gaussian, centred
from diffusion_jax.core.solvers import Solver
from diffusion_jax.core.types import Estimate, Level
from tests.core.tables import (
  ALL_SOLVERS,
  CORRECTORS,
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

DETERMINISTIC = {name: solver for name, solver in ALL_SOLVERS.items() if solver.order and solver.calls}
STOCHASTIC = {name: solver for name, solver in ALL_SOLVERS.items() if not solver.order}
# Times between which every schedule moves most of the way: sigma / alpha from about 3 to 0.3.
INTERIOR = {'cosine': (0.8, 0.2), 'flow': (0.75, 0.25), 'linear': (0.5, 0.1), 'karras': (0.04, 0.004)}
STEPS = (96, 192, 384)
HIGH = 10.0  # sigma / alpha at which the two exact paths begin
BEGIN = np.array([[6.0, -3.0], [-8.0, 5.0]])


def test_the_tables_are_complete():
  for module, table in ((solvers, SOLVERS), (singlestep, SINGLESTEP), (multistep, MULTISTEP),
                        (correctors, CORRECTORS)):
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
def test_the_order_of_convergence(name, x64):
  """Error against the exact flow at the end of an interior interval, in double precision, by regression on steps. On the
  mixture, whose denoiser bends sharply, some still fall faster than their order."""
  for schedule, (start, end) in INTERIOR.items():
    even = name in ('ipndm', 'pndm', 'pndm(heun)') and schedule == 'karras'  # even steps of t are even of sigma there
    expected = 4 if even else DETERMINISTIC[name].order
    errors = [walk(name, schedule, np.linspace(start, end, steps + 1), 4 * (name in MULTISTEP)) for steps in STEPS]
    gaussian, mixture = measured_orders(errors)
    print(f'order of {name} on {schedule}: {gaussian:.2f} gaussian, {mixture:.2f} mixture')
    assert abs(gaussian - expected) < 0.25 and mixture > expected - 0.5, (schedule, gaussian, mixture, errors)


@pytest.mark.parametrize('name', [name for name in ROWS if name in DETERMINISTIC])
def test_the_order_to_the_end(name, x64):
  """All the way to t = 0, where the last move is the denoiser's, and without a history to start with."""
  for schedule in ('cosine', 'flow'):
    orders = measured_orders([walk(name, schedule, np.linspace(0.85, 0.0, steps + 1)) for steps in STEPS])
    print(f'order to the end of {name} on {schedule}: {orders[0]:.2f} gaussian, {orders[1]:.2f} mixture')
    assert (orders >= 0.8).all()


def measured_orders(errors):
  """Of the errors of both laws [steps, 2]."""
  return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


def walk(name, schedule, grid, remembered=0):
  """The errors on the Gaussian and on the mixture of a walk down the grid against the exact flow. `remembered` even steps
  before the grid give the solver a history that is exact."""
  which, (step, end) = list(INTERIOR).index(schedule), stepper(name)
  x, h = exact(schedule, grid[0]), grid[0] - grid[1]
  memory = DETERMINISTIC[name].init(x)
  for t in grid[0] + h * np.arange(remembered, 0, -1):
    _, memory = step(which, exact(schedule, t), memory, t, t - h)
    memory = memory._replace(x=exact(schedule, t)) if isinstance(memory, multistep.Place) else memory
  for t, s in zip(grid[:-1], grid[1:], strict=True):
    if s == 0:
      x = end(which, x, t)
    else:
      x, memory = step(which, x, memory, t, s)
  return np.abs(x - exact(schedule, grid[-1])).reshape(2, -1).max(1)


@cache
def stepper(name):
  """(a step, the last move) of a solver on the schedule that a number chooses, so that one program serves all of them."""
  def parts(which):
    process = Gaussian(lambda t: jax.lax.switch(which, [SCHEDULES[schedule] for schedule in INTERIOR], t))
    return process, both_laws(process)
  def step(which, x, memory, t, s):
    process, denoise = parts(which)
    return DETERMINISTIC[name].step(process, denoise, keys(len(x)), x, process.level(t), process.level(s), memory)
  def end(which, x, t):
    process, denoise = parts(which)
    return denoise(x, process.level(t)).x0
  return jax.jit(step), jax.jit(end)


def both_laws(process):
  """The denoiser of rows the first half of which are of the Gaussian law, the others of the mixture."""
  laws = LAW.denoiser(process), MIXTURE.denoiser(process)
  def denoise(x, level, cond=None):
    half = len(x) // 2
    part = lambda rows: jax.tree.map(lambda entry: jnp.broadcast_to(entry, len(x))[rows], level)
    first, second = laws[0](x[:half], part(slice(half))), laws[1](x[half:], part(slice(half, None)))
    return Estimate(jnp.concatenate([first.x0, second.x0]))
  return denoise


def exact(schedule, t):
  """x at time t on two paths of the Gaussian and two of the mixture, which begin at x / alpha = BEGIN."""
  alpha, sigma = (float(each) for each in SCHEDULES[schedule](jnp.asarray(t)))
  level = Level(jnp.asarray(t), jnp.ones(()), jnp.asarray(sigma / alpha))
  gaussian = LAW.flow_map(jnp.asarray(BEGIN), level._replace(sigma=jnp.asarray(HIGH)), level)
  return alpha * jnp.concatenate([gaussian, jnp.asarray(mixture_path()(max(sigma / alpha, 1e-9)).reshape(2, 2))])


@cache
def mixture_path():
  """sigma / alpha -> x / alpha, by SciPy: d(x / alpha) / d(sigma / alpha) is the noise, whatever the schedule."""
  process = Gaussian(SCHEDULES['karras'])
  @jax.jit
  def slope(ratio, x):
    x = x.reshape(2, 2)
    x0 = MIXTURE.denoiser(process)(x, Level(ratio, jnp.ones(()), ratio)).x0
    return ((x - x0) / ratio).ravel()
  return integrate.solve_ivp(slope, (HIGH, 1e-9), BEGIN.ravel(), 'DOP853', rtol=1e-13, atol=1e-13, max_step=0.02,
                             dense_output=True).sol


def moments(x):
  return np.mean(x, 0), np.cov(np.asarray(x, np.float64).T)


@over('solver', {**STOCHASTIC, **ROWS})
def test_samples_follow_the_law(solver):
  """Many steps, because stochastic solvers are biased low by a share of 1 / steps."""
  process, count = Gaussian(SCHEDULES['cosine']), 2000
  grid = np.linspace(1, 0, 251) if solver.calls else np.array([1.0, 0.02, 0.0])
  x = np.asarray(sampling.sample(keys(2 * count), process, solver, both_laws(process), grid, (2,)), np.float64)
  gaussian, mixture = np.split(x, 2)
  for entry in (0, 1):
    law = stats.norm(LAW.mean[entry], np.sqrt(LAW.covariance[entry][entry]))
    assert stats.kstest(gaussian[:, entry], law.cdf).pvalue > 1e-3
  mean, covariance = moments(gaussian)
  np.testing.assert_allclose(mean, LAW.mean, atol=0.06)
  np.testing.assert_allclose(covariance, LAW.covariance, atol=0.06)
  assert abs(np.mean(mixture.sum(1) > 0.25) - 0.3) < 0.04  # the line between the two components
  for ours, theirs in zip(moments(mixture), moments(MIXTURE.sample(keys(count, 1))), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=0.08)


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
def test_the_first_steps_are_finite_and_call_the_denoiser_as_often_as_stated(solver):
  """alpha = 0 and logsnr = -inf at t = 1, and the steps after it must not remember the infinity. Calls are counted as they
  run: both branches of a condition are traced, one is called."""
  calls = []
  @jax.jit
  def step(which, x, t, s, memory):
    process = Gaussian(lambda t: jax.lax.switch(which, [SCHEDULES['cosine'], SCHEDULES['flow']], t))
    def denoise(x, level):
      jax.debug.callback(lambda: calls.append(1))
      return ENTRIES.denoiser(process)(x, level)
    return solver.step(process, denoise, keys(1), x, process.level(t), process.level(s), memory)
  for which in (0, 1):
    x = jnp.array([[0.5, -2.0]])
    memory, times = solver.init(x), (1.0, 0.8, 0.6, 0.3, 0.1)
    for t, s in zip(times[:-1], times[1:], strict=True):
      x, memory = step(which, x, t, s, memory)
      assert np.isfinite(x).all()
  jax.effects_barrier()
  assert len(calls) == 2 * (4 * solver.calls + solver.more) if solver.calls else len(calls) > 8


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
  process, solver = Gaussian(SCHEDULES['flow']), multistep.dpm_2m()
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


@over('solver', {name: solver for name, solver in {**STOCHASTIC, **ROWS}.items() if name != 'ancestral(large)'})
def test_clouds_stay_centred(solver):
  """All noise is projected, so that nothing leaves the subspace in which the centre is 0."""
  process, x = Gaussian(SCHEDULES['flow'], centred), jnp.arange(12.0).reshape(2, 3, 2)
  x = x - x.mean(1, keepdims=True)
  step = solver.step(process, lambda x, level: Estimate(0.5 * x), keys(2), x, process.level(0.8), process.level(0.6),
                     solver.init(x))[0]
  np.testing.assert_allclose(step.mean(1), 0, atol=1e-5)


@pytest.mark.parametrize('name', ['dpm2(1)', 'dpm_2s(1)', 'ddim(1)'])
def test_a_level_of_less_noise_is_never_none(name):
  """Where alpha_t is tiny the fresh noise is nearly all of sigma_s; the rest must not cancel to 0."""
  process, called = Gaussian(SCHEDULES['flow']), []
  denoise = lambda x, level: called.append(float(level.sigma)) or Estimate(0.5 * x)
  x = ALL_SOLVERS[name].step(process, denoise, keys(2), jnp.ones((2, 2)), process.level(0.99999), process.level(0.5), ())[0]
  assert np.isfinite(x).all() and min(called) > 0


def test_eta_is_a_share():
  with pytest.raises(ValueError, match='ddim needs 0 <= eta <= 1; got 1.5.'):
    solvers.ddim(1.5)
