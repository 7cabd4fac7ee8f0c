"""Losses: the irreducible loss of a Gaussian law, the change of space, and masks."""
from functools import cache

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


@cache
def exact_losses(schedule, name):
  """Losses [B] in all spaces of the exact network of a target."""
  process = Gaussian(SCHEDULES[schedule])
  def every(draw):
    x0, network = LAW.sample(keys(COUNT, 1)), exact_network(process, TARGETS[name])
    return {space: losses.regression(process, TARGETS[name], AT_T, weights.constant(), TARGETS[space])(network, draw, x0)
            for space in TARGETS}
  whole = draw(COUNT)
  every_jit = jax.jit(lambda key, index: every(Draw(key, index, COUNT)))
  return {space: np.asarray(loss, np.float64) for space, loss in every_jit(whole.key, whole.index).items()}


@pytest.mark.parametrize('schedule', ['flow', 'cosine'])
@pytest.mark.parametrize('name', TARGETS)
def test_the_exact_network_reaches_the_irreducible_loss(schedule, name):
  """The posterior variance of x0, mean over modes of v s^2 / (a^2 v + s^2), times (D_space / sigma)^2."""
  alpha, sigma = (float(each) for each in SCHEDULES[schedule](jnp.float32(T)))
  with jax.enable_x64(True):
    rates = [float(each) for each in slopes(SCHEDULES[schedule], jnp.float64(T))]
  variances, _ = LAW.modes
  posterior = np.mean(variances * sigma**2 / (alpha**2 * variances + sigma**2))
  for space, loss in exact_losses(schedule, name).items():
    expected = posterior * (DETERMINANTS[space](alpha, sigma, *rates) / sigma)**2
    assert abs(loss.mean() - expected) < 4 * loss.std() / np.sqrt(COUNT), space
    assert loss.std() / np.sqrt(COUNT) < 0.03 * expected


@pytest.mark.parametrize('name', TARGETS)
def test_spaces_differ_by_the_ratio_of_determinants(name, x64):
  """At every example, for a network that is wrong; in its own space the loss is the plain squared residual."""
  process, whole, law = Gaussian(SCHEDULES['cosine']), draw(6), times.uniform(0.1, 0.9)
  x0 = jax.random.normal(jax.random.key(2), (6, 3))
  network = lambda x, feature, cond: 0.3 * jnp.cos(x)
  t = law.sample(process, whole)
  d = lambda space: DETERMINANTS[space](*map(np.asarray, SCHEDULES['cosine'](t)), *slopes(SCHEDULES['cosine'], t))
  loss = lambda space: losses.regression(process, TARGETS[name], law, weights.constant(), TARGETS[space])(network, whole, x0)
  own = loss(name)
  for space in TARGETS:
    np.testing.assert_allclose(loss(space), own * (d(space) / d(name))**2, rtol=1e-6)


def test_the_loss_is_the_weighted_square_of_the_error():
  """With x0 = 0, a network of zeros misses the noise xt / sigma, which it is shown."""
  process, whole, seen = Gaussian(SCHEDULES['flow']), draw(5), []
  network = lambda x, feature, cond: seen.append((x, feature, cond)) or jnp.zeros_like(x)
  loss = losses.regression(process, targets.noise(), times.uniform(), WEIGHTS['min_snr'], targets.noise())
  cond = {'label': jnp.arange(5)}
  value = loss(network, whole, jnp.zeros((5, 3)), cond)
  (x, feature, given), = seen
  t = np.asarray(feature) / 1000
  np.testing.assert_allclose(value, np.minimum(1, 5 * (t / (1 - t))**2) * np.mean((x / t[:, None])**2, 1), rtol=1e-4)
  assert given is cond


@pytest.mark.parametrize('target, space', [('noise', 'noise'), ('v', 'noise'), ('x0', 'noise'), ('v', 'v'), ('x0', 'x0')])
@pytest.mark.parametrize('weight', ['constant', 'measure'])
def test_the_loss_is_finite_at_every_time_that_is_drawn(target, space, weight):
  """Row 15405709 of the key 0 draws u = 0, hence t = 1 exactly: once in 8 million examples, many times in a real run."""
  process, edge = Gaussian(SCHEDULES['cosine']), Draw(jax.random.key(0), jnp.array([15405709]), 2**24)
  assert float(times.uniform().sample(process, edge)[0]) > 1 - 1e-6
  loss = losses.regression(process, TARGETS[target], times.uniform(), WEIGHTS[weight], TARGETS[space])
  assert np.isfinite(loss(lambda x, feature, cond: 0.5 * x, edge, jnp.ones((1, 3)))).all()


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
  value = lambda fill: loss(lambda x, feature, cond: 0.5 * x, whole, jnp.where(scored, 1.0, fill), None, scored)
  np.testing.assert_array_equal(value(0.0), value(1e4))
  assert (np.asarray(value(0.0)) > 0).all()


@pytest.mark.parametrize('shape', [(), (3,), (2, 2, 1)])
def test_one_loss_an_example_that_belongs_to_its_row(shape):
  process, whole = Gaussian(SCHEDULES['cosine']), draw(6)
  loss = losses.regression(process, targets.v(), times.stratified(), weights.sigmoid(), targets.noise())
  x0 = jnp.ones((6, *shape))
  value = lambda draw, x0: loss(lambda x, feature, cond: 0.5 * x, draw, x0)
  together = value(whole, x0)
  assert together.shape == (6,)
  np.testing.assert_allclose(value(Draw(whole.key, whole.index[2:4], 6), x0[2:4]), together[2:4], rtol=1e-5)


def test_the_loss_of_a_pytree_is_the_mean_over_all_entries():
  process, whole = Gaussian(SCHEDULES['flow']), draw(3)
  loss = losses.regression(process, targets.x0(), AT_T, weights.constant(), targets.x0())
  guess = lambda x, feature, cond: jax.tree.map(jnp.zeros_like, x)
  value = loss(guess, whole, {'a': jnp.full((3, 2), 3.0), 'b': jnp.full((3, 2, 2), 1.0)})
  np.testing.assert_allclose(value, (2 * 9 + 4) / 6, rtol=1e-6)
