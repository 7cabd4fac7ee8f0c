"""Losses: the irreducible loss of a Gaussian law, the change of space, and masks."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import losses, targets, times, weights
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import Draw
from tests.core.tables import DETERMINANTS, LAW, SCHEDULES, TARGETS, WEIGHTS, draw, keys, slopes

COUNT, T = 4000, 0.4
AT_T = Times(lambda process, draw: jnp.full(len(draw.index), T), lambda process, t: jnp.ones_like(t))


def exact_network(process, target):
  """The network whose denoiser is the law's: a x0 + b noise at the estimates."""
  def network(scaled, feature, cond):
    level = process.level(jnp.full(len(scaled), T))
    xt = scaled / target.scale(level)[:, None]
    x0 = LAW.denoiser(process)(xt, level).x0
    return targets.value(process, target, level, x0, targets.noise_of(level, xt, x0))
  return network


def evaluate(loss, network, draw, x0, cond=None, scored=None):
  """The losses of a draw, compiled: faster than operation by operation."""
  compiled = jax.jit(lambda key, index, x0: loss(network, Draw(key, index, draw.total), x0, cond, scored))
  return compiled(draw.key, draw.index, x0)


def every_space(process, name, law):
  """The loss of one target, taken in all spaces."""
  spaces = {space: losses.regression(process, TARGETS[name], law, weights.constant(), TARGETS[space])
            for space in TARGETS}
  return lambda *arguments: {space: loss(*arguments) for space, loss in spaces.items()}


@pytest.mark.parametrize('name', TARGETS)
def test_the_exact_network_reaches_the_irreducible_loss(name):
  """The posterior variance of x0, mean over modes of v s^2 / (a^2 v + s^2), times (D_space / sigma)^2."""
  process = Gaussian(SCHEDULES['flow'])
  alpha, sigma, *rates = 1 - T, T, -1.0, 1.0
  variances, _ = LAW.modes
  posterior = np.mean(variances * sigma**2 / (alpha**2 * variances + sigma**2))
  x0, network = LAW.sample(keys(COUNT, 1)), exact_network(process, TARGETS[name])
  for space, loss in evaluate(every_space(process, name, AT_T), network, draw(COUNT), x0).items():
    loss = np.asarray(loss, np.float64)
    expected = posterior * (DETERMINANTS[space](alpha, sigma, *rates) / sigma)**2
    assert abs(loss.mean() - expected) < 4 * loss.std() / np.sqrt(COUNT), space
    assert loss.std() / np.sqrt(COUNT) < 0.03 * expected


@pytest.mark.parametrize('name', TARGETS)
def test_spaces_differ_by_the_ratio_of_determinants(name, x64):
  """At every example, for a network that is wrong; in its own space the loss is the plain squared residual."""
  process, whole, law = Gaussian(SCHEDULES['cosine']), draw(6), times.uniform(0.1, 0.9)
  x0 = jax.random.normal(jax.random.key(2), (6, 3))
  network = lambda x, feature, cond: 0.3 * jnp.cos(x)
  t = law.sample(process, whole.part(0))  # as the loss draws it
  d = lambda space: DETERMINANTS[space](*map(np.asarray, SCHEDULES['cosine'](t)), *slopes(SCHEDULES['cosine'], t))
  loss = evaluate(every_space(process, name, law), network, whole, x0)
  for space in TARGETS:
    np.testing.assert_allclose(loss[space], loss[name] * (d(space) / d(name))**2, rtol=1e-6)


def test_the_loss_is_the_weighted_square_of_the_error():
  """With x0 = 0, a network of zeros misses the noise xt / sigma, which it is shown."""
  process, whole, seen = Gaussian(SCHEDULES['flow']), draw(5), []
  network = lambda x, feature, cond: seen.append((x, feature, cond)) or jnp.zeros_like(x)
  loss = losses.regression(process, targets.noise(), times.uniform(), WEIGHTS['min_snr'], targets.noise())
  cond = {'label': jnp.arange(5)}
  value = loss(network, whole, jnp.zeros((5, 3)), cond)
  (x, feature, given), = seen
  t = np.asarray(feature) / 1000
  expected = np.minimum(1, 5 * (t / (1 - t))**2) * np.mean((x / t[:, None])**2, 1)
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  assert given is cond


@pytest.mark.parametrize('weight, target, space', [  # the others with `measure` are infinite at t = 1 in truth
  ('constant', 'noise', 'noise'), ('constant', 'v', 'noise'), ('constant', 'x0', 'noise'), ('constant', 'v', 'v'),
  ('constant', 'x0', 'x0'), ('measure', 'v', 'noise'), ('measure', 'x0', 'noise')])
def test_the_loss_is_finite_at_every_time_that_is_drawn(weight, target, space):
  """Row 15405709 of the key 0 draws u = 0, hence t = 1 exactly: one example in 8 million, many in a real run."""
  process, edge = Gaussian(SCHEDULES['cosine']), Draw(jax.random.key(0), jnp.array([15405709]), 2**24)
  assert float(times.uniform().sample(process, edge)[0]) > 1 - 1e-6
  loss = losses.regression(process, TARGETS[target], times.uniform(), WEIGHTS[weight], TARGETS[space])
  assert np.isfinite(evaluate(loss, lambda x, feature, cond: 0.5 * x, edge, jnp.ones((1, 3)))).all()


def test_an_example_s_loss_is_the_mean_over_its_own_count():
  residual = jnp.array([[1.0, 2.0, 1e6], [3.0, -1e6, 1e6], [7.0, 8.0, 9.0], [1.0, 2.0, 3.0]])
  scored = jnp.array([[True, True, False], [True, False, False], [False] * 3, [True] * 3])
  np.testing.assert_allclose(losses.mean_square(residual, scored), [5 / 2, 9, 0, 14 / 3], rtol=1e-6)
  np.testing.assert_allclose(losses.mean_square(residual[3:]), [14 / 3], rtol=1e-6)


def test_masks_of_pytrees_and_of_pixels():
  residual = {'a': jnp.full((2, 3), 2.0), 'b': jnp.full((2, 4, 5), 3.0)}
  scored = {'a': jnp.array([[1, 0, 0], [1, 1, 1]]), 'b': jnp.array([[1, 0, 0, 0], [0, 0, 0, 0]])[:, :, None]}
  np.testing.assert_allclose(losses.mean_square(residual, scored), [(1 * 4 + 5 * 9) / 6, 4], rtol=1e-6)
  np.testing.assert_allclose(losses.mean_square(residual), np.full(2, (3 * 4 + 20 * 9) / 23), rtol=1e-6)


def test_unscored_values_do_not_matter_to_the_loss():
  process, whole = Gaussian(SCHEDULES['cosine']), draw(4)
  scored = jnp.arange(12).reshape(4, 3) % 3 > 0
  loss = losses.regression(process, targets.v(), times.uniform(), weights.constant(), targets.noise())
  network = lambda x, feature, cond: 0.5 * x
  value = lambda fill: evaluate(loss, network, whole, jnp.where(scored, 1.0, fill), scored=scored)
  np.testing.assert_array_equal(value(0.0), value(1e4))
  assert (np.asarray(value(0.0)) > 0).all()


@pytest.mark.parametrize('shape', [(), (2, 2, 1)])
def test_one_loss_an_example_that_belongs_to_its_row(shape):
  process, whole = Gaussian(SCHEDULES['cosine']), draw(6)
  loss = losses.regression(process, targets.v(), times.stratified(), weights.sigmoid(), targets.noise())
  x0 = jnp.ones((6, *shape))
  value = lambda draw, x0: evaluate(loss, lambda x, feature, cond: 0.5 * x, draw, x0)
  together = value(whole, x0)
  assert together.shape == (6,)
  np.testing.assert_allclose(value(Draw(whole.key, whole.index[2:4], 6), x0[2:4]), together[2:4], rtol=1e-5)


def test_the_loss_of_a_pytree_is_the_mean_over_all_entries():
  process, whole = Gaussian(SCHEDULES['flow']), draw(3)
  loss = losses.regression(process, targets.x0(), AT_T, weights.constant(), targets.x0())
  guess = lambda x, feature, cond: jax.tree.map(jnp.zeros_like, x)
  value = evaluate(loss, guess, whole, {'a': jnp.full((3, 2), 3.0), 'b': jnp.full((3, 2, 2), 1.0)})
  np.testing.assert_allclose(value, (2 * 9 + 4) / 6, rtol=1e-6)
