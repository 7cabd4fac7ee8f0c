"""Gaussian processes and products: their laws (corrupt, forward, reverse) against scipy and against each other."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate, linalg, stats

from diffusion_jax.core import schedules
from diffusion_jax.core.processes import Gaussian, Process, Product, centred, part, posterior_share, reverse_variance
from diffusion_jax.core.tokens import Masked, Uniform
from diffusion_jax.core.types import Estimate, Level, split
from tests import oracles
from tests.core.tables import DISCRETE, FEW, REACHING_NOISE, SCHEDULES, close, keys, over

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


@over('schedule', FEW)
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


@over('schedule', FEW)
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


@over('schedule', FEW)
def test_corrupt_returns_the_noise_in_xt(schedule):
  process, _, t = levels(schedule)
  xt, noise = process.corrupt(keys(4), TREE, t)
  close(xt, jax.tree.map(lambda x, n: np.float64(t.alpha) * x + np.float64(t.sigma) * n, TREE, noise), 1e-5, 1e-6)


@over('schedule', FEW)
@pytest.mark.parametrize('t', [0.3, 1.0])
def test_the_last_move_returns_x0_exactly(schedule, t):
  process = Gaussian(schedule)
  xt = jax.tree.map(lambda leaf: leaf + 1, TREE)
  close(process.reverse(keys(4), Estimate(TREE), xt, process.level(t), process.level(0.0)), TREE)


@over('schedule', FEW)
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


@over('schedule', {**SCHEDULES, **DISCRETE})
def test_level_at_finds_the_logsnr(schedule, x64):
  """Or the end of the schedule where it has none so high or so low."""
  first, last = schedules.ends(schedule)
  wanted = jnp.array([[-6.0, 0.0], [3.0, 8.0]])
  found = jax.jit(lambda wanted: Gaussian(schedule).level_at(wanted).logsnr)(wanted)
  np.testing.assert_allclose(found, jnp.clip(wanted, last, first), atol=1e-9)


def test_logsnr_of_a_level_is_infinite_at_the_ends():
  np.testing.assert_array_equal(Gaussian(SCHEDULES['cosine']).level(np.array([0.0, 1.0])).logsnr, [np.inf, -np.inf])


TEMPLATES = np.random.default_rng(0).normal(size=(2, 4, 3))
CLOUDS = oracles.Clouds(np.array([0.4, 0.6]), TEMPLATES - TEMPLATES.mean(1, keepdims=True), 0.2)
BASIS = linalg.helmert(4)  # three orthonormal directions in which four points differ


def check_centred_normal(x, residual):
  """No centre, and in the subspace independent standard normal entries."""
  assert np.abs(np.mean(x, 1)).max() < 1e-5
  entries = np.einsum('dp,bpa->bda', BASIS, np.asarray(residual, np.float64)).reshape(len(x), -1)
  assert stats.kstest(entries.ravel(), 'norm').pvalue > P_VALUE
  assert np.abs(np.cov(entries.T) - np.eye(9)).max() < 5 * np.sqrt(2 / len(x))


def test_centred_clouds_stay_centred_and_have_the_law_of_their_subspace():
  process, count = Gaussian(SCHEDULES['cosine'], centred), 4000
  s, t = process.level(0.3), process.level(0.7)
  x0 = CLOUDS.sample(keys(count, 7))
  @jax.jit
  def draw(first, second):
    below, above = process.corrupt(first, x0, s)[0], process.corrupt(first, x0, t)[0]
    return (process.prior(first, x0, t) + t.alpha * x0, t), (below, s), (process.forward(second, below, s, t), t), (
      process.reverse(second, Estimate(x0), above, t, s), s)
  for x, level in draw(*split(keys(count), 2)):
    check_centred_normal(x, (x - level.alpha * x0) / level.sigma)
  x, level = jnp.ones((2, 4, 3)).at[:, 0].set(3.0), process.level(0.7)
  np.testing.assert_allclose(centred({'x': x})['x'][0, :, 0], [1.5, -0.5, -0.5, -0.5])
  np.testing.assert_allclose(process.project(process.project(x)), process.project(x), atol=1e-6)


def test_the_clouds_of_the_oracle_have_its_density_and_denoiser(x64):
  """The score of the density in the subspace gives the denoiser (Tweedie); the mass of one template in a plane is 1."""
  process = Gaussian(SCHEDULES['cosine'], centred)
  level = process.level(0.4)
  x = process.corrupt(keys(5, 1), CLOUDS.sample(keys(5)), level)[0]
  score = centred(jax.grad(lambda x: CLOUDS.log_density(x, level).sum())(x))
  x0 = CLOUDS.denoiser(process)(x, level).x0
  np.testing.assert_allclose(x0, (x + level.sigma**2 * score) / level.alpha, atol=1e-10)
  pair = oracles.Clouds(np.array([1.0]), np.array([[[0.3], [-0.3]]]), 0.5)  # two points on a line: one dimension
  place = np.linspace(-10, 10, 2001)
  density = np.exp(pair.log_density(place[:, None, None] * np.array([[[1.0], [-1.0]]]) / np.sqrt(2), level))
  assert integrate.trapezoid(density, place) == pytest.approx(1, abs=1e-8)


def both_variances(s, t):
  """(alpha, sigma) at s and t, and the variances of q(xs | xt, x0) and q(xt | xs), in double precision."""
  (a_s, s_s), (a_t, s_t) = (np.float64([level.alpha, level.sigma]) for level in (s, t))
  large = s_t**2 - (a_t / a_s * s_s)**2
  return (a_s, s_s), (a_t, s_t), large * s_s**2 / s_t**2, large


@over('schedule', FEW)
def test_a_learned_variance_lies_between_the_two_of_the_literature(schedule, x64):
  """Fraction 0: that of q(xs | xt, x0); 1: that of q(xt | xs), beta for variance preserving; 0.3: log-linear between."""
  process, s, t = levels(schedule)
  (a_s, s_s), (a_t, s_t), small, large = both_variances(s, t)
  fraction = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.3, -0.5]), (COUNT, 4))
  expected = [small, large, small**0.7 * large**0.3, small**1.5 / large**0.5]
  np.testing.assert_allclose(reverse_variance(fraction, t, s)[0], expected, rtol=1e-9)
  if schedule in (SCHEDULES['linear'], SCHEDULES['cosine']):
    np.testing.assert_allclose(large, 1 - (a_t / a_s)**2, rtol=1e-9)
  x0, xt = jnp.full((COUNT, 4), 0.7), jnp.full((COUNT, 4), -0.4)
  drawn, last = jax.jit(lambda keys, estimate: (process.reverse(keys, estimate, xt, t, s),
                                               process.reverse(keys, estimate, xt, t, process.level(0.0))))(
                                                   keys(COUNT), Estimate(x0, fraction))
  mean = small * (a_s * 0.7 / s_s**2 + a_t / a_s * -0.4 / large)
  for column, variance in zip(np.asarray(drawn).T, expected, strict=True):
    assert stats.kstest(column, stats.norm(mean, np.sqrt(variance)).cdf).pvalue > P_VALUE
  np.testing.assert_array_equal(last, x0)


@over('schedule', FEW)
def test_divergence_is_the_integral_over_the_two_laws(schedule, x64):
  """KL(q(xs | xt, x0) | p(xs | xt)) by quadrature over scipy's densities."""
  process, s, t = levels(schedule)
  (a_s, s_s), (a_t, s_t), small, large = both_variances(s, t)
  law = lambda x0, variance: stats.norm(small * (a_s * x0 / s_s**2 + a_t / a_s * -0.4 / large), np.sqrt(variance))
  for fraction, variance in ((None, small), (0.0, small), (0.3, small**0.7 * large**0.3), (1.0, large)):
    true, ours = law(0.7, small), law(0.2, variance)
    expected = true.expect(lambda x, p=true, q=ours: p.logpdf(x) - q.logpdf(x))
    one = lambda x: None if x is None else jnp.full((1, 1), x)
    found = process.divergence(Estimate(one(0.2), one(fraction)), one(0.7), one(-0.4), t, s)
    np.testing.assert_allclose(found, [[expected]], rtol=1e-6)
  prior, end = stats.norm(0, s_t), stats.norm(a_t * 0.7, s_t)
  expected = end.expect(lambda x: end.logpdf(x) - prior.logpdf(x))
  np.testing.assert_allclose(process.prior_divergence(jnp.full((1, 1), 0.7), t), [[expected]], rtol=1e-6)


@over('schedule', FEW)
def test_rate_is_the_limit_of_the_divergence(schedule, x64):
  """The error of divergence / (t - s) halves with the step."""
  process, x0, t = Gaussian(schedule), jnp.array([[0.7, -1.0]]), Gaussian(schedule).level(0.6)
  rate = process.rate(Estimate(0.5 * x0), x0, x0, t)
  wrong = [np.abs(process.divergence(Estimate(0.5 * x0), x0, x0, t, process.level(0.6 - h)) / h - rate).max()
           for h in (2e-5, 1e-5)]
  assert wrong[1] < 1e-3 * rate.max() and wrong[1] < 0.52 * wrong[0] + 1e-8 * rate.max()


PARTS = {'x': Gaussian(SCHEDULES['cosine']), 'y': Gaussian(SCHEDULES['flow'], centred), 'z': Masked(SCHEDULES['flow'], 3)}


def arrays(seed):
  """An example batch of the three fields."""
  x, y = (jax.random.normal(jax.random.key(seed), shape) for shape in ((6, 3), (6, 4, 2)))
  return {'x': x, 'y': centred(y), 'z': jnp.arange(30).reshape(6, 5) % 3}


@pytest.mark.parametrize('process', [Gaussian(SCHEDULES['flow']), Gaussian(SCHEDULES['flow'], centred), Product(PARTS)],
                         ids=['gaussian', 'centred', 'product'])
def test_noise_belongs_to_an_example(process):
  x0 = arrays(0) if isinstance(process, Product) else arrays(0)['y']
  estimate = dict(x0, z=jax.nn.one_hot(x0['z'], 3)) if isinstance(process, Product) else x0
  @jax.jit
  def draws(keys, x0, estimate):
    s, t = process.level(0.3), process.level(0.7)
    return (process.prior(keys, x0, t), process.corrupt(keys, x0, t), process.forward(keys, x0, s, t),
            process.reverse(keys, Estimate(estimate), x0, t, s))
  order = np.array([4, 0, 5, 2, 2, 1])
  reorder = lambda tree: jax.tree.map(lambda leaf: leaf[order], tree)
  close(reorder(draws(keys(6), x0, estimate)), draws(keys(6)[order], reorder(x0), reorder(estimate)), atol=1e-6)


def test_a_product_is_its_parts():
  """The same numbers where nothing is drawn; noise that is independent from field to field."""
  process, x0, xt = Product(PARTS), arrays(0), arrays(1)
  t, s = process.level(0.7), process.level(0.4)
  estimate = Estimate(dict(arrays(2), z=jax.nn.one_hot(x0['z'], 3)), {'x': jnp.full((6, 3), 0.3), 'y': None, 'z': None})
  at = lambda name: (part(estimate, name), x0[name], xt[name])
  for name, field in PARTS.items():
    close(part(t, name), field.level(0.7))
    close(process.divergence(estimate, x0, xt, t, s)[name], field.divergence(*at(name), field.level(0.7), field.level(0.4)))
    close(process.rate(estimate, x0, xt, t)[name], field.rate(*at(name), field.level(0.7)))
    close(process.prior_divergence(x0, t)[name], field.prior_divergence(x0[name], field.level(0.7)))
  same = Product({'a': PARTS['x'], 'b': PARTS['x']})
  zeros = {'a': jnp.zeros((2000, 2)), 'b': jnp.zeros((2000, 2))}
  level = same.level(0.5)
  for x in (same.corrupt(keys(2000), zeros, level)[1], same.prior(keys(2000), zeros, level),
            same.forward(keys(2000), zeros, same.level(0.2), level),
            same.reverse(keys(2000), Estimate(zeros), zeros, level, same.level(0.2))):
    assert np.abs(np.corrcoef(np.concatenate([x['a'], x['b']], 1).T) - np.eye(4)).max() < 4.5 / np.sqrt(2000)


@pytest.mark.parametrize('process', [*PARTS.values(), Uniform(SCHEDULES['flow'], 3), Product(PARTS)])
def test_every_process_fits_the_protocol(process):
  assert isinstance(process, Process)


def test_a_learned_variance_in_a_subspace_gets_a_sentence():
  process = Gaussian(SCHEDULES['cosine'], centred)
  estimate = Estimate(jnp.zeros((2, 3, 2)), jnp.full((2, 3, 2), 0.5))
  with pytest.raises(ValueError, match='leaves the subspace of a projection'):
    process.reverse(keys(2), estimate, jnp.zeros((2, 3, 2)), process.level(0.6), process.level(0.4))
