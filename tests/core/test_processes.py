"""The Gaussian process: its three laws (corrupt, forward, reverse) against scipy and against each other."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core.processes import Gaussian, posterior_share
from diffusion_jax.core.types import Estimate, Level, split
from tests.core.tables import REACHING_NOISE, SCHEDULES, close, keys, over

COUNT = 8000
P_VALUE = 1e-3
X0 = jnp.linspace(-2, 2, COUNT)
TREE = {'a': jnp.arange(12, dtype=jnp.float32).reshape(4, 3), 'b': jnp.arange(16, dtype=jnp.float32).reshape(4, 2, 2)}


def residual(x, level, x0=X0):
  """(x - alpha x0) / sigma in double precision, which is standard normal if x ~ q(x | x0)."""
  alpha, sigma = (np.asarray(entry, np.float64) for entry in (level.alpha, level.sigma))
  return (np.asarray(x, np.float64) - alpha * np.float64(x0)) / sigma


def check_standard_normal(*residuals):
  """Standard normal by moments and by Kolmogorov-Smirnov, and uncorrelated with the data."""
  for each in residuals:
    assert stats.kstest(each, 'norm').pvalue > P_VALUE
    assert abs(each.mean()) < 4 / np.sqrt(COUNT) and abs(each.std() - 1) < 4 / np.sqrt(2 * COUNT)
    assert abs(np.corrcoef(each, X0)[0, 1]) < 4 / np.sqrt(COUNT)


def levels(schedule):
  """(process, s, t) with a good part of the data left at s and little at t."""
  process = Gaussian(schedule)
  return process, process.level_at(1.0), process.level_at(-2.0)


@over('schedule', SCHEDULES)
def test_the_ways_to_two_levels_have_one_law(schedule):
  """corrupt to s and forward to t; corrupt to t and reverse to s: standard normal, with the same correlation."""
  process, s, t = levels(schedule)
  first, second = split(keys(COUNT), 2)
  below, _ = process.corrupt(first, X0, s)
  above, _ = process.corrupt(first, X0, t)
  up = residual(below, s), residual(process.forward(second, below, s, t), t)
  down = residual(process.reverse(second, Estimate(X0), above, t, s), s), residual(above, t)
  check_standard_normal(*up, *down)
  expected = np.exp((-2.0 - 1.0) / 2)  # Cov = (alpha_t / alpha_s) sigma_s^2, over sigma_s sigma_t: sqrt(snr_t / snr_s)
  for pair in (up, down):
    assert abs(np.corrcoef(*pair)[0, 1] - expected) < 4 * (1 - expected**2) / np.sqrt(COUNT)


@over('schedule', SCHEDULES)
def test_reverse_is_the_product_of_the_two_densities(schedule):
  """q(xs | xt, x0) by Bayes: the precisions of q(xs | x0) and q(xt | xs) add."""
  process, s, t = levels(schedule)
  below, above = np.float64([s.alpha, s.sigma]), np.float64([t.alpha, t.sigma])
  scale = above[0] / below[0]
  noise = above[1]**2 - (scale * below[1])**2
  variance = 1 / (1 / below[1]**2 + scale**2 / noise)
  mean = variance * (below[0] * 0.7 / below[1]**2 + scale * -0.4 / noise)
  drawn = process.reverse(keys(COUNT), Estimate(jnp.full(COUNT, 0.7)), jnp.full(COUNT, -0.4), t, s)
  assert stats.kstest(np.asarray(drawn, np.float64), stats.norm(mean, np.sqrt(variance)).cdf).pvalue > P_VALUE
  np.testing.assert_allclose(posterior_share(t, s), variance / below[1]**2, rtol=1e-4)


@over('schedule', REACHING_NOISE)
def test_reverse_from_pure_noise_forgets_xt(schedule):
  process, s, _ = levels(schedule)
  drawn = process.reverse(keys(COUNT), Estimate(X0), jnp.full(COUNT, 3.0), process.level(1.0), s)
  check_standard_normal(residual(drawn, s))


@over('schedule', SCHEDULES)
def test_corrupt_returns_the_noise_in_xt(schedule):
  process, _, t = levels(schedule)
  xt, noise = process.corrupt(keys(4), TREE, t)
  close(xt, jax.tree.map(lambda x, n: np.float64(t.alpha) * x + np.float64(t.sigma) * n, TREE, noise), 1e-5, 1e-6)


@over('schedule', SCHEDULES)
@pytest.mark.parametrize('t', [0.3, 1.0])
def test_the_last_move_returns_x0_exactly(schedule, t):
  process = Gaussian(schedule)
  xt = jax.tree.map(lambda leaf: leaf + 1, TREE)
  close(process.reverse(keys(4), Estimate(TREE), xt, process.level(t), process.level(0.0)), TREE)


@over('schedule', SCHEDULES)
def test_the_prior_has_the_spread_of_its_level(schedule):
  process = Gaussian(schedule)
  drawn = process.prior(keys(COUNT), jax.ShapeDtypeStruct((COUNT,), jnp.float32), process.level(1.0))
  check_standard_normal(np.asarray(drawn, np.float64) / np.float64(schedule(jnp.float32(1))[1]))


def test_pytrees_get_independent_noise_in_every_leaf():
  process, s, t = levels(SCHEDULES['cosine'])
  count = 2000
  x0 = {'a': jnp.ones((count, 3)), 'b': jnp.full((count, 2, 2), -2.0)}
  first, second = split(keys(count), 2)
  xt = process.forward(second, process.corrupt(first, x0, s)[0], s, t)
  xs = process.reverse(second, Estimate(x0), process.corrupt(first, x0, t)[0], t, s)
  for x, level in ((xt, t), (xs, s)):
    assert jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, x0)
    entries = np.concatenate([residual(x['a'], level, 1.0), residual(x['b'], level, -2.0).reshape(count, 4)], 1)
    assert stats.kstest(entries.ravel(), 'norm').pvalue > P_VALUE
    assert np.abs(np.corrcoef(entries.T) - np.eye(7)).max() < 5 / np.sqrt(count)


def test_every_frame_has_its_own_level():
  process, count = Gaussian(SCHEDULES['flow']), 2000
  s = process.level(jnp.broadcast_to(jnp.array([[0.0, 0.1, 0.4]]), (count, 3)))
  t = process.level(jnp.broadcast_to(jnp.array([[0.2, 0.5, 1.0]]), (count, 3)))
  x0 = jnp.ones((count, 3, 2))
  first, second = split(keys(count), 2)
  xt, _ = process.corrupt(first, x0, t)
  xs = process.reverse(second, Estimate(x0), xt, t, s)
  again = process.forward(second, process.corrupt(first, x0, s)[0], s, t)
  np.testing.assert_array_equal(xs[:, 0], x0[:, 0])
  for frame in range(3):
    at = lambda level, frame=frame: Level(*(entry[0, frame] for entry in level))
    for x, level in ((xt, at(t)), (again, at(t)), (xs, at(s))):
      if level.sigma > 0:
        assert stats.kstest(residual(x[:, frame], level, 1.0).ravel(), 'norm').pvalue > P_VALUE


@over('schedule', SCHEDULES)
def test_level_at_finds_the_logsnr(schedule, x64):
  wanted = jnp.array([[-6.0, 0.0], [3.0, 8.0]])
  np.testing.assert_allclose(Gaussian(schedule).level_at(wanted).logsnr, wanted, atol=1e-9)


def test_logsnr_of_a_level_is_infinite_at_the_ends():
  np.testing.assert_array_equal(Gaussian(SCHEDULES['cosine']).level(np.array([0.0, 1.0])).logsnr, [np.inf, -np.inf])
