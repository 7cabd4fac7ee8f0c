"""Losses: the irreducible loss of a Gaussian law, the change of space, and masks."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import optimize, special

from diffusion_jax.core import losses, targets, times, weights
from diffusion_jax.core.losses import Distance
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import Draw
from tests.core.tables import DETERMINANTS, DISTANCES, LAW, SCHEDULES, TARGETS, WEIGHTS, check_complete, draw, keys, slopes

COUNT, T = 4000, 0.4
SPACES = ('noise', 'x0', 'v', 'velocity', 'score', 'edm')  # of the others D is that of the noise, or minus it
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
            for space in SPACES}
  return lambda *arguments: {space: loss(*arguments) for space, loss in spaces.items()}


@pytest.mark.parametrize('name', [*SPACES, 've'])
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


@pytest.mark.parametrize('name', [*SPACES, 've'])
def test_spaces_differ_by_the_ratio_of_determinants(name, x64):
  """At every example, for a network that is wrong."""
  process, whole, law = Gaussian(SCHEDULES['cosine']), draw(6), times.uniform(0.1, 0.9)
  x0 = jax.random.normal(jax.random.key(2), (6, 3))
  network = lambda x, feature, cond: 0.3 * jnp.cos(x)
  t = law.sample(process, whole.part(0))  # as the loss draws it
  d = lambda space: DETERMINANTS[space](*map(np.asarray, SCHEDULES['cosine'](t)), *slopes(SCHEDULES['cosine'], t))
  loss = evaluate(every_space(process, name, law), network, whole, x0)
  for space in SPACES:
    np.testing.assert_allclose(loss[space], loss['noise'] * (d(space) / d('noise'))**2, rtol=1e-6)


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
  np.testing.assert_allclose(losses.mean(jnp.square, residual, scored), [5 / 2, 9, 0, 14 / 3], rtol=1e-6)
  np.testing.assert_allclose(losses.mean(jnp.square, residual[3:]), [14 / 3], rtol=1e-6)


def test_masks_of_pytrees_and_of_pixels():
  residual = {'a': jnp.full((2, 3), 2.0), 'b': jnp.full((2, 4, 5), 3.0)}
  scored = {'a': jnp.array([[1, 0, 0], [1, 1, 1]]), 'b': jnp.array([[1, 0, 0, 0], [0, 0, 0, 0]])[:, :, None]}
  np.testing.assert_allclose(losses.mean(jnp.square, residual, scored), [(1 * 4 + 5 * 9) / 6, 4], rtol=1e-6)
  np.testing.assert_allclose(losses.mean(jnp.square, residual), np.full(2, (3 * 4 + 20 * 9) / 23), rtol=1e-6)


def test_unscored_values_do_not_matter_to_the_loss():
  process, whole = Gaussian(SCHEDULES['cosine']), draw(4)
  scored = jnp.arange(12).reshape(4, 3) % 3 > 0
  loss = losses.regression(process, targets.v(), times.uniform(), weights.constant(), targets.noise())
  network = lambda x, feature, cond: 0.5 * x
  value = lambda fill: evaluate(loss, network, whole, jnp.where(scored, 1.0, fill), scored=scored)
  for fill in (1e4, np.nan):
    np.testing.assert_array_equal(value(0.0), value(fill))
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


# The distances of tests.core.tables for the entries r of one example, of which scipy's pseudo_huber has c times ours.
EXPECTED = {
  'squared': lambda r: np.mean(r**2),
  'absolute': lambda r: np.mean(np.abs(r)),
  'huber': lambda r: np.mean(special.huber(0.5, r)),
  'pseudo_huber': lambda r: special.pseudo_huber(0.3, np.sqrt(np.mean(r**2))) / 0.3,
}


def test_the_table_of_distances_is_complete():
  check_complete(losses, Distance, DISTANCES)
  assert DISTANCES.keys() == EXPECTED.keys()


@pytest.mark.parametrize('size', [1e-4, 0.5, 100.0])
@pytest.mark.parametrize('name', DISTANCES)
def test_a_distance_is_that_of_scipy_over_the_scored_entries(name, size, x64):
  rng = np.random.default_rng(0)
  residual = {'a': size * rng.normal(size=(4, 3)), 'b': size * rng.normal(size=(4, 2, 5))}
  scored = {'a': rng.random((4, 3)) < 0.6, 'b': rng.random((4, 2, 1)) < 0.7}
  marks = np.concatenate([scored['a'], np.repeat(scored['b'].reshape(4, 2), 5, 1)], 1)
  entries = np.concatenate([residual['a'], residual['b'].reshape(4, 10)], 1)
  assert 0 < marks.sum() < marks.size and marks.any(1).all()
  residual, scored = jax.tree.map(jnp.asarray, (residual, scored))
  np.testing.assert_allclose(DISTANCES[name](residual, None), [EXPECTED[name](r) for r in entries], rtol=1e-7)
  expected = [EXPECTED[name](r[mark]) for r, mark in zip(entries, marks, strict=True)]
  np.testing.assert_allclose(DISTANCES[name](residual, scored), expected, rtol=1e-7)


@pytest.mark.parametrize('name', DISTANCES)
def test_a_distance_has_finite_gradients_and_its_digits_where_the_residual_is_0_or_tiny(name):
  slope = jax.grad(lambda r: DISTANCES[name](r, None).sum())(jnp.zeros((2, 3)))
  assert (np.abs(slope) <= (1 / 3 + 1e-6 if name == 'absolute' else 0)).all()  # of |r| any slope from -1 to 1 is right at 0
  tiny = 3e-5 * np.array([[1.0, -2.0, 0.5]])
  np.testing.assert_allclose(DISTANCES[name](jnp.asarray(tiny, jnp.float32), None), [EXPECTED[name](tiny)], rtol=1e-5)
  scored = jnp.array([[True, False, False], [False, False, False]])
  masked = jax.grad(lambda r: DISTANCES[name](r, scored).sum())(jnp.ones((2, 3)))
  np.testing.assert_array_equal(masked != 0, scored)


@pytest.mark.parametrize('name, centre', [('squared', np.mean), ('absolute', np.median)])
def test_the_best_constant_is_the_mean_or_the_median(name, centre, x64):
  x = np.random.default_rng(0).lognormal(size=1001)
  total = jax.jit(lambda m: DISTANCES[name](jnp.asarray(x)[None] - m, None)[0])
  found = optimize.minimize_scalar(lambda m: float(total(m)), bounds=(0, 5), method='bounded', options={'xatol': 1e-7})
  np.testing.assert_allclose(found.x, centre(x), atol=1e-3)
  assert abs(np.mean(x) - np.median(x)) > 0.3


def test_a_huber_distance_lies_between_half_the_square_and_the_absolute(x64):
  """Half the square for a large delta, delta times the absolute value for a small one; the slope is clipped at delta."""
  r = jnp.array([[-3.0, -0.2, 0.0, 0.7, 2.0]])
  np.testing.assert_allclose(losses.huber(10.0)(r, None), losses.squared()(r, None) / 2, rtol=1e-12)
  np.testing.assert_allclose(losses.huber(1e-9)(r, None) / 1e-9, losses.absolute()(r, None), rtol=1e-8)
  slope = 5 * jax.grad(lambda r: losses.huber(0.5)(r, None).sum())(r)
  np.testing.assert_allclose(slope, np.clip(r, -0.5, 0.5), rtol=1e-12)


@pytest.mark.parametrize('space', ['noise', 'x0', 'velocity', 've'])
def test_the_distance_is_of_the_residual_in_the_stated_space(space, x64):
  """A network of zeros for v, x0 = 1: its error is -v, of which the space shows D_space / D_v."""
  process, x0, law = Gaussian(SCHEDULES['linear']), jnp.ones((4, 3)), AT_T._replace(density=lambda process, t: 0.5 + 0 * t)
  zeros = lambda x, feature, cond: jnp.zeros_like(x)
  made = {name: losses.regression(process, targets.v(), law, WEIGHTS['measure'], TARGETS[space], distance)
          for name, distance in DISTANCES.items()}
  values = evaluate(lambda *arguments: {name: loss(*arguments) for name, loss in made.items()}, zeros, draw(4), x0)
  level = process.level(jnp.full(4, T))
  _, noise = process.corrupt(draw(4).part(1).keys, x0, level)
  alpha, sigma, falls, rises = map(float, (level.alpha[0], level.sigma[0], *slopes(SCHEDULES['linear'], T)))
  ratio = DETERMINANTS[space](alpha, sigma, falls, rises)  # D_v = 1
  weight = special.expit(1.5 - 2 * np.log(alpha / sigma)) * 2 * abs(falls / alpha - rises / sigma) / 0.5
  for name, value in values.items():
    expected = [EXPECTED[name](ratio * (alpha * n - sigma)) for n in np.asarray(noise)]
    np.testing.assert_allclose(value, weight * np.array(expected), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('call, sentence', [
  (lambda: losses.huber(0.0), 'huber needs delta > 0; got 0.0.'),
  (lambda: losses.pseudo_huber(-1.0), 'pseudo_huber needs c > 0; got -1.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence


@pytest.mark.parametrize('target, space, weight, fine', [
  ('v', 'v', 'constant', True), ('noise', 'noise', 'constant', True), ('x0', 'v', 'constant', True),
  ('noise', 'v', 'constant', False), ('v', 'noise', 'edm', False), ('v', 'v', 'elbo', False)])
def test_times_that_draw_pure_noise_need_a_loss_that_is_finite_there(target, space, weight, fine):
  """At t = 1 of cosine alpha is 0. A loss that is accepted is finite there; another gets a sentence."""
  process, law = Gaussian(SCHEDULES['cosine']), times.discrete(1)
  make = lambda: losses.regression(process, TARGETS[target], law, WEIGHTS[weight], TARGETS[space])
  if fine:
    assert np.isfinite(evaluate(make(), lambda x, feature, cond: 0.5 * x, draw(4), jnp.ones((4, 3)))).all()
  else:
    with pytest.raises(ValueError, match='where alpha = 0 and the weight of the loss is (inf|nan)'):
      make()
