"""Sampling: shapes, the way and its end, one program, and errors for bad grids."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import sampling, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate
from tests.core.tables import ENTRIES, LAW, REACHING_NOISE, ROWS, SCHEDULES, SOLVERS, close, keys, over

PROCESS = Gaussian(SCHEDULES['cosine'])
DENOISE = ENTRIES.denoiser(PROCESS)
TREE = {'a': jax.ShapeDtypeStruct((3,), jnp.float32), 'b': jax.ShapeDtypeStruct((), jnp.float32)}


@over('solver', ROWS)
@pytest.mark.parametrize('grid', [np.linspace(1, 0, 6), np.linspace(0.9, 0.3, 6)], ids=['to 0', 'to 0.3'])
def test_the_trajectory_ends_where_sample_does(solver, grid):
  arguments = keys(4), PROCESS, solver, DENOISE, grid, (3,)
  x = sampling.sample(*arguments)
  xs, x0s = sampling.trajectory(*arguments)
  assert xs.shape == (6, 4, 3) and x0s.shape == (5, 4, 3)
  np.testing.assert_allclose(xs[-1], x, atol=1e-5)
  for t, xt, x0 in zip(grid[:-1], xs, x0s, strict=False):
    np.testing.assert_allclose(x0, DENOISE(xt, PROCESS.level(t)).x0, atol=1e-5)
  if grid[-1] == 0:
    np.testing.assert_array_equal(xs[-1], x0s[-1])


def test_the_trajectory_starts_at_the_prior_or_where_it_is_told():
  grid, start = np.array([0.5, 0.2]), jnp.arange(12.0).reshape(4, 3)
  xs, _ = sampling.trajectory(keys(4), PROCESS, SOLVERS['ddim'], DENOISE, grid, (3,), start=start)
  np.testing.assert_array_equal(xs[0], start)
  xs, _ = sampling.trajectory(keys(4000), PROCESS, SOLVERS['ddim'], DENOISE, grid, ())
  assert abs(np.std(xs[0]) - np.sin(np.pi / 4)) < 0.03


def test_a_start_follows_the_exact_flow_up_and_down():
  """A solver that rises carries data-like x to more noise and back."""
  start = LAW.flow_map(jnp.array([[1.0, 2.0], [-1.0, 0.5]]), PROCESS.level(1.0), PROCESS.level(0.3))
  grid = np.concatenate([np.linspace(0.3, 0.8, 101), np.linspace(0.8, 0.3, 101)[1:]])
  run = partial(sampling.sample, keys(2), PROCESS, SOLVERS['heun']._replace(rises=True), LAW.denoiser(PROCESS),
                shape=(2,), start=start)
  np.testing.assert_allclose(run(grid[:101]), LAW.flow_map(start, PROCESS.level(0.3), PROCESS.level(0.8)), atol=1e-3)
  np.testing.assert_allclose(run(grid), start, atol=1e-3)


def test_it_begins_at_the_prior_of_its_keys():
  grid = np.linspace(1, 0, 4)
  run = partial(sampling.sample, keys(3), PROCESS, SOLVERS['ancestral'], DENOISE, grid, (2,))
  np.testing.assert_array_equal(run(start=sampling.begin(keys(3), PROCESS, grid, (2,))), run())


def noises(count, size):
  """Two trees of normal noise."""
  draw = lambda seed: {'a': jax.random.normal(jax.random.key(seed), (count, size, 2)),
                       'b': jax.random.normal(jax.random.key(seed + 1), (count,))}
  return draw(0), draw(2)


def flat(tree):
  return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(tree)], 1).astype(np.float64)


def test_slerp_ends_where_it_should_and_each_example_goes_its_own_way():
  a, b = noises(4, 3)
  out = sampling.slerp(a, b, jnp.array([0.0, 1.0, 0.0, 1.0]))
  np.testing.assert_array_equal(flat(out), np.where([[0], [1], [0], [1]], flat(b), flat(a)))


def test_slerp_turns_at_one_speed_and_keeps_the_norm(x64):
  a, b = noises(5, 3)
  b = jax.tree.map(lambda leaf, factor=np.linalg.norm(flat(a), axis=1) / np.linalg.norm(flat(b), axis=1):
                   leaf * factor.reshape(-1, *[1] * (leaf.ndim - 1)), b)
  share = np.array([0.1, 0.25, 0.5, 0.7, 0.95])
  out, a, b = flat(sampling.slerp(a, b, jnp.asarray(share))), flat(a), flat(b)
  angle = lambda x, y: np.arccos((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))
  np.testing.assert_allclose(np.linalg.norm(out, axis=1), np.linalg.norm(a, axis=1), rtol=1e-12)
  np.testing.assert_allclose(angle(a, out), share * angle(a, b), rtol=1e-9)
  np.testing.assert_allclose(angle(out, b), (1 - share) * angle(a, b), rtol=1e-9)


@pytest.mark.parametrize('gap', [0.0, 1e-7, 1e-4])
def test_slerp_of_the_nearly_equal_is_the_mean(gap):
  a, other = noises(4, 3)
  b = jax.tree.map(lambda leaf, far: leaf + gap * far, a, other)
  out = sampling.slerp(a, b, jnp.full(4, 0.3))
  np.testing.assert_allclose(flat(out), 0.7 * flat(a) + 0.3 * flat(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('share', [0.2, 0.5])
def test_slerp_of_independent_noise_is_as_wide_as_they_are(share):
  """Of n entries the variance is 1 within 4 standard errors, and their law is normal."""
  x = flat(sampling.slerp(*noises(4, 20_000), jnp.full(4, share)))
  assert (np.abs(x.var(1) - 1) < 4 * np.sqrt(2 / x.shape[1])).all()
  assert all(stats.kstest(row, stats.norm.cdf).pvalue > 1e-3 for row in x)


@over('schedule', REACHING_NOISE)
def test_one_step_from_pure_noise_gives_the_mean(schedule):
  process = Gaussian(schedule)
  x = sampling.sample(keys(3), process, SOLVERS['ancestral'], LAW.denoiser(process), np.array([1.0, 0.0]), (2,))
  np.testing.assert_allclose(x, np.tile(LAW.mean, (3, 1)), atol=1e-6)
  xs, x0s = sampling.trajectory(keys(3), process, SOLVERS['heun'], LAW.denoiser(process), np.array([1.0, 0.0]), (2,))
  assert xs.shape == (2, 3, 2) and x0s.shape == (1, 3, 2)
  np.testing.assert_allclose(xs[1], x, atol=1e-6)


def test_the_moves_are_the_solver_s_with_fresh_keys_and_its_memory():
  """Every pair of times but the last reaches the solver, in order, with other keys each time."""
  def step(process, denoise, keys, x, t, s, memory):
    count, sum_t, sum_s = memory
    return jax.vmap(jax.random.uniform)(keys), (count + 1, sum_t + t.t * 10.0**count, sum_s + s.t * 10.0**count)
  solver = solvers.Solver(lambda x: (jnp.zeros(()), jnp.zeros(()), jnp.zeros(())), step)
  seen = []
  def last(x, level, cond):
    seen.append((level.t, cond))
    return Estimate(x)
  grid = np.array([0.9, 0.8, 0.5, 0.3])
  xs, _ = sampling.trajectory(keys(5), PROCESS, solver, last, grid, ())
  assert len(np.unique(xs)) == 20
  sampling.sample(keys(5), PROCESS, solver, last, np.append(grid, 0.0), (), {'label': jnp.arange(5)})
  assert float(seen[-1][0]) == np.float32(0.3) and seen[-1][1]['label'].shape == (5,)


def test_trees_of_samples():
  grid = np.linspace(1, 0, 4)
  x = sampling.sample(keys(4), PROCESS, SOLVERS['ddim'], DENOISE, grid, TREE)
  xs, x0s = sampling.trajectory(keys(4), PROCESS, SOLVERS['ddim'], DENOISE, grid, TREE)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(x) == {'a': (4, 3), 'b': (4,)}
  assert shapes(xs) == {'a': (4, 4, 3), 'b': (4, 4)} and shapes(x0s) == {'a': (3, 4, 3), 'b': (3, 4)}
  close(jax.tree.map(lambda leaf: leaf[-1], xs), x, atol=1e-6)
  from_array = sampling.sample(keys(4), PROCESS, SOLVERS['ddim'], DENOISE, grid, TREE['a'])
  assert from_array.shape == (4, 3)


def test_the_condition_reaches_every_call():
  denoise = lambda x, level, cond: Estimate(jnp.broadcast_to(cond['mean'][:, None], x.shape))
  cond = {'mean': jnp.array([1.0, -2.0])}
  for solver in (ROWS[name] for name in ('ancestral', 'heun', 'unipc', 'langevin')):
    x = sampling.sample(keys(2), PROCESS, solver, denoise, np.linspace(1, 0, 4), (3,), cond)
    np.testing.assert_array_equal(x, [[1.0] * 3, [-2.0] * 3])


def test_one_trace_serves_every_call():
  traces = []
  denoise = lambda x, level, cond=None: traces.append(1) or DENOISE(x, level)
  run = jax.jit(lambda keys: sampling.sample(keys, PROCESS, SOLVERS['heun'], denoise, np.linspace(1, 0, 20), (2,)))
  first, count = run(keys(2)), len(traces)
  assert count <= 2 * 2 + 1  # the body of the scan, perhaps twice, and the last move: not one a step
  second = run(keys(2, seed=1))
  assert len(traces) == count and np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize('grid', [[1.0], [], [1.0, 0.5, 0.5, 0.0], [1.0, -0.1], [1.1, 0.0], [1.0, 0.5, 0.0, 0.5, 0.0]])
@pytest.mark.parametrize('function', [sampling.sample, sampling.trajectory])
def test_bad_grids_are_errors(function, grid):
  with pytest.raises(ValueError, match=r'A grid has two or more times in \[0, 1\], each unlike the one before, and 0 at'):
    function(keys(2), PROCESS, SOLVERS['ddim'], DENOISE, np.array(grid), (2,))


def test_a_rising_grid_adds_the_noise_of_the_process():
  """q(xt | xs) of a Markov chain: from a point at 0.3 up to 0.8 in one move, whatever the solver."""
  s, t, count = PROCESS.level(0.3), PROCESS.level(0.8), 4000
  x = sampling.sample(keys(count), PROCESS, SOLVERS['heun'], DENOISE, np.array([0.3, 0.8]), (), start=jnp.full(count, 1.3))
  scale = float(t.alpha / s.alpha)
  law = stats.norm(1.3 * scale, np.sqrt(float(t.sigma)**2 - (scale * float(s.sigma))**2))
  assert stats.kstest(np.asarray(x, np.float64), law.cdf).pvalue > 1e-3


def test_after_a_rise_the_solver_starts_anew():
  """Of the moves down two before the rise and three after it, the last solver's memory knows three."""
  step = lambda process, denoise, keys, x, t, s, memory: (jnp.full_like(x, 1.0) * (memory + 1), memory + 1)
  solver = solvers.Solver(lambda x: jnp.zeros(()), step)
  x = sampling.sample(keys(2), PROCESS, solver, DENOISE, np.array([0.9, 0.7, 0.5, 0.8, 0.6, 0.4, 0.2]), ())
  np.testing.assert_array_equal(x, [3, 3])


def test_a_grid_from_the_data_needs_the_data():
  with pytest.raises(ValueError, match=r'A grid that begins at the data, t = 0, needs start=x0; got none.'):
    sampling.sample(keys(2), PROCESS, SOLVERS['ddim_inverse'], DENOISE, np.linspace(0, 1, 5), (2,))
  start = jnp.ones((2, 2))
  xs, x0s = sampling.trajectory(keys(2), PROCESS, SOLVERS['ddim_inverse'], DENOISE, np.linspace(0, 1, 5), (2,), start=start)
  assert np.isfinite(xs).all() and np.isfinite(x0s).all()
  np.testing.assert_array_equal(x0s[0], start)
