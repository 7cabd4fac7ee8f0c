"""Guidance, on a mixture whose components are the classes, and on Gaussian data: every denoiser is known."""
import inspect

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import constraints, grids, guidance, sampling, schedules, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate, Level, Transform
from tests import oracles
from tests.core.tables import (
  GUIDANCE,
  LAW,
  MIXTURE,
  SCHEDULES,
  TRANSFORMS,
  check_complete,
  check_moments,
  close,
  halves,
  keys,
  over,
)

PROCESS = Gaussian(SCHEDULES['cosine'])
CLASSES = [oracles.Gaussian(mean, std**2 * np.eye(2)).denoiser(PROCESS)
           for mean, std in zip(MIXTURE.means, MIXTURE.stds, strict=True)]
NULL = MIXTURE.denoiser(PROCESS)
LABEL = jnp.array([0, 1, 1, 0])
X = jax.random.normal(jax.random.key(0), (4, 2))
LAWS = jax.jit(lambda level: [law(X, level).x0 for law in (*CLASSES, NULL)])


WEAK = oracles.Gaussian(np.array([0.2, 0.1]), np.eye(2)).denoiser(PROCESS)
# Every row that acts in an interval, by the interval.
DURING = {
  'guide': lambda *during: guidance.guide(2.5, *during),
  'rescale': lambda *during: guidance.rescale(2.5, 0.7, *during),
  'cfg_zero': lambda *during: guidance.cfg_zero(2.5, 0.0, *during),
  'apg': lambda *during: guidance.apg(2.5, 0.0, 1.0, *during),
  'perpendicular': lambda *during: guidance.perpendicular(2.5, {'label': 1}, 0.5, *during),
  'autoguide': lambda *during: guidance.autoguide(2.5, WEAK, *during),
  'classifier': lambda *during: guidance.classifier(lambda x, level, cond: -halves(x), 1.0, *during),
  'energy': lambda *during: guidance.energy(halves, 1.0, *during),
}


class Counted:
  """The denoiser of a class-conditional network; `batches` are the sizes it was called (or traced) with, `conds` what it
  was given."""
  def __init__(self):
    self.batches, self.conds = [], []

  def __call__(self, x, level, cond):
    self.batches.append(len(x))
    self.conds.append(cond)
    given = jnp.where(cond['label'][:, None] == 0, CLASSES[0](x, level).x0, CLASSES[1](x, level).x0)
    drop = cond['drop']['label'] if 'drop' in cond else jnp.zeros(len(x), bool)
    return Estimate(jnp.where(drop[:, None], NULL(x, level).x0, given))


def precise():
  """X in double precision."""
  return X.astype(jnp.float64)


def toy(x, level, cond):
  """A denoiser of two entries that is nothing special and costs little."""
  shift = jnp.array([[0.4, -0.3], [-0.8, 0.5], [0.1, 0.7]])[jnp.where(cond['drop']['label'], 2, cond['label'])
                                                            if 'drop' in cond else cond['label']]
  return Estimate(jnp.tanh(1.5 * x + shift))


def expected(weight, level):
  """x0_null + weight (x0_cond - x0_null), in numpy."""
  one, two, null = LAWS(level)
  given, null = np.where(np.asarray(LABEL)[:, None] == 0, one, two), np.asarray(null)
  return null + weight * (given - null)


def test_the_table_is_complete():
  check_complete(guidance, Transform, GUIDANCE)
  rows = {name for name in GUIDANCE if 'during' in inspect.signature(getattr(guidance, name.partition('(')[0])).parameters}
  assert rows == set(DURING) | {name for name in rows if '(' in name}


INERT = {
  'guide': guidance.guide(1.0),
  'guide(during)': guidance.guide(1.0, (0.2, 0.8), {'label': 3}),
  'rescale': guidance.rescale(1.0),
  'cfg_zero': guidance.cfg_zero(1.0),
  'apg': guidance.apg(1.0, radius=0.1),
  'blend': guidance.blend(0.0, {'label': 3}),
  'autoguide': guidance.autoguide(1.0, WEAK),
  'classifier': guidance.classifier(lambda x, level, cond: -halves(x), 0.0),
  'energy': guidance.energy(halves, 0.0),
  'chain': guidance.chain(),
}


@over('transform', INERT)
def test_no_guidance_is_the_denoiser_itself(transform):
  denoise = Counted()
  assert transform(denoise) is denoise


@pytest.mark.parametrize('t', [0.4, np.array([0.1, 0.3, 0.5, 0.9])])
def test_guidance_extrapolates_by_one_call_of_twice_the_batch(t):
  denoise, level, weights = Counted(), PROCESS.level(t), (0.0, 0.5, 3.0, -1.0)
  outs = jax.jit(lambda x: [guidance.guide(weight)(denoise)(x, level, {'label': LABEL}) for weight in weights])(X)
  assert denoise.batches == [8] * len(weights)
  for weight, out in zip(weights, outs, strict=True):
    np.testing.assert_allclose(out.x0, expected(weight, level), atol=1e-5)


@over('row', DURING)
def test_an_array_of_times_chooses_entry_by_entry(row):
  level, cond = PROCESS.level(jnp.array([0.1, 0.3, 0.5, 0.9])), {'label': LABEL}
  def estimates(level):
    return [transform(toy)(X, level, cond).x0 for transform in (row((0.3, 0.7)), row(), guidance.chain())]
  within, everywhere, nowhere = jax.jit(estimates)(level)
  inside = np.array([[False], [True], [True], [False]])
  np.testing.assert_allclose(within, np.where(inside, everywhere, nowhere), atol=1e-6)
  assert (np.abs(everywhere - nowhere) > 1e-4).any(1).all()


CALLS = {'guide': [8], 'rescale': [8], 'cfg_zero': [8], 'apg': [8], 'perpendicular': [12], 'autoguide': [4], 'energy': [4],
         'classifier': [4]}


@pytest.mark.parametrize('name', DURING)
def test_the_branches_are_one_call(name):
  denoise = Counted()
  jax.eval_shape(lambda x: DURING[name]()(denoise)(x, PROCESS.level(0.5), {'label': LABEL}), X)
  assert denoise.batches == CALLS[name]


def test_guidance_acts_within_its_interval_alone():
  denoise = Counted()
  run = jax.jit(lambda t: guidance.guide(2.5, (0.3, 0.7))(denoise)(X, PROCESS.level(t), {'label': LABEL}))
  for t, weight in ((0.1, 1.0), (0.3, 2.5), (0.5, 2.5), (0.7, 2.5), (0.71, 1.0)):
    np.testing.assert_allclose(run(t).x0, expected(weight, PROCESS.level(t)), atol=1e-5)
  assert sorted(denoise.batches) == [4, 8]  # both sides of the branch are traced; one runs


def test_outside_the_interval_half_of_the_work_is_saved():
  ran = []
  def denoise(x, level, cond):
    jax.debug.callback(lambda: ran.append(len(x)))
    return Estimate(x)
  for t in (0.1, 0.5):
    jax.block_until_ready(guidance.guide(2.5, (0.3, 0.7))(denoise)(X, PROCESS.level(t), {'label': LABEL}))
    jax.effects_barrier()
  assert ran == [4, 8]


def test_each_condition_is_dropped_in_the_second_branch():
  lost = lambda cond: jnp.where(cond['drop']['label'] & cond['drop']['text'], 1.0, 2.0)
  denoise = lambda x, level, cond: Estimate(lost(cond)[:, None] * x)
  cond = {'label': LABEL, 'text': {'tokens': jnp.zeros((4, 3), int)}}
  np.testing.assert_allclose(guidance.guide(3.0)(denoise)(X, PROCESS.level(0.5), cond).x0, 4 * X, rtol=1e-6)


def test_an_unconditional_network_is_asked_for_its_null():
  seen = []
  guidance.guide(3.0)(lambda x, level, cond: seen.append(cond) or Estimate(x))(X, PROCESS.level(0.5), None)
  assert seen == [{'drop': {}}]


@pytest.mark.parametrize('row', [guidance.guide, guidance.rescale, guidance.apg, guidance.cfg_zero, guidance.perpendicular])
def test_a_negative_comes_with_the_condition_or_with_the_row(row):
  """The same either way, with one of its own for every example; the network never sees it."""
  given, level = {'label': LABEL, 'negative': {'label': 1 - LABEL}}, PROCESS.level(0.5)
  unseen = lambda x, level, cond: toy(x, level, cond) if 'negative' not in cond else None
  out = row(3.0)(unseen)(X, level, given).x0
  for i, label in enumerate(LABEL):
    alone = row(3.0, negative={'label': 1 - int(label)})(toy)(X[i:i + 1], level, {'label': label[None]}).x0
    np.testing.assert_allclose(out[i:i + 1], alone, rtol=1e-6)


GUIDES = {name: getattr(guidance, name)(3.0) for name in ('guide', 'rescale', 'apg', 'cfg_zero')}
AVOIDED = {'null': {}, 'negative': {'negative': {'label': jnp.full(4, 2)}}}


@pytest.mark.parametrize('row, negative', [
  (guidance.chain(), AVOIDED['null']), (guidance.perpendicular(3.0), AVOIDED['negative']),
  *((row, negative) for row in GUIDES.values() for negative in AVOIDED.values())])
def test_a_blend_at_its_ends_is_one_condition_or_the_other_whatever_guides_it(row, negative):
  """Shares 0 and 1 side by side; neither the null nor the negative is blended, and the network sees no 'towards'."""
  def unseen(x, level, cond):
    assert 'towards' not in cond and set(cond.get('drop', ())) <= {'label'}
    return toy(x, level, cond)
  share, level = jnp.array([0.0, 1.0, 0.0, 1.0]), PROCESS.level(0.5)
  cond = {'label': LABEL, 'towards': (share, {'label': 1 - LABEL}), **negative}
  out = row(guidance.blend()(unseen))(X, level, cond).x0
  np.testing.assert_allclose(out, row(toy)(X, level, {'label': jnp.where(share == 1, 1 - LABEL, LABEL), **negative}).x0,
                             rtol=1e-6, atol=1e-6)


@over('negative', AVOIDED)
def test_guidance_leads_the_blend_away_from_what_is_not_blended(negative):
  """x0 is a number for each condition: 0, 1 and, for the null and the negative, 4. One call of all four branches."""
  sizes = []
  def denoise(x, level, cond):
    sizes.append(len(x))
    label = jnp.where(cond['drop']['label'], 2, cond['label']) if 'drop' in cond else cond['label']
    return Estimate(jnp.array([0.0, 1.0, 4.0])[label][:, None] + 0 * x)
  share = jnp.array([0.0, 0.25, 0.5, 1.0])
  cond = {'label': jnp.zeros(4, int), 'towards': (share, {'label': jnp.ones(4, int)}), **negative}
  out = guidance.chain(guidance.blend(), guidance.guide(3.0))(denoise)(X, PROCESS.level(0.5), cond).x0
  np.testing.assert_allclose(out[:, 0], 4 + 3 * (share - 4), rtol=1e-6)
  assert sizes == [16]


def test_a_blend_of_a_row_s_own_goes_around_that_of_the_condition():
  cond = {'label': jnp.zeros(4, int), 'towards': (jnp.full(4, 0.5), {'label': jnp.ones(4, int)})}
  out = guidance.chain(guidance.blend(), guidance.blend(0.2, {'label': 2}))(toy)(X, PROCESS.level(0.5), cond).x0
  zero, one, two = (toy(X, PROCESS.level(0.5), {'label': jnp.full(4, label)}).x0 for label in range(3))
  np.testing.assert_allclose(out, 0.4 * zero + 0.4 * one + 0.2 * two, atol=1e-6)


def test_perpendicular_needs_a_negative():
  with pytest.raises(ValueError, match='needs what to avoid'):
    guidance.perpendicular(3.0)(toy)(X, PROCESS.level(0.5), {'label': LABEL})


def test_chain_goes_from_left_to_right():
  level, cond = PROCESS.level(0.5), {'label': LABEL}
  guide, clip = guidance.guide(4.0), constraints.clip(0.4)
  guided_first = guidance.chain(guide, clip)(Counted())(X, level, cond).x0
  np.testing.assert_allclose(guided_first, np.clip(expected(4.0, level), -0.4, 0.4), atol=1e-5)
  clipped_first = guidance.chain(clip, guide)(Counted())(X, level, cond).x0
  null, given = (np.clip(expected(weight, level), -0.4, 0.4) for weight in (0.0, 1.0))
  np.testing.assert_allclose(clipped_first, null + 4 * (given - null), atol=1e-5)
  assert np.abs(guided_first - clipped_first).max() > 0.1


@over('transform', TRANSFORMS)
def test_trees_shapes_and_dtypes_are_kept(transform):
  x = {'a': jnp.ones((4, 3), jnp.bfloat16), 'b': [jnp.ones(4), jnp.ones((4, 2, 2))]}
  def denoise(x, level, cond):
    return Estimate(x, variance=jax.tree.map(jnp.square, x), aux=jnp.ones((len(x['a']), 7)))
  cond = {'label': LABEL, 'text': jnp.ones((4, 5, 6))}
  call = lambda x, level: transform(denoise)(x, level, cond)
  out = jax.eval_shape(call, x, PROCESS.level(0.5))
  assert out == jax.eval_shape(lambda: Estimate(x, x, jnp.ones((4, 7))))


@over('transform', TRANSFORMS)
def test_an_example_keeps_its_own_place(transform):
  """Row i of the result depends on row i alone, whatever the others are."""
  level, order = PROCESS.level(0.5), np.array([2, 0, 3, 3])
  call = jax.jit(lambda x, label: transform(toy)(x, level, {'label': label}).x0)
  np.testing.assert_array_equal(call(X[order], LABEL[order]), call(X, LABEL)[order])


def test_branches_go_example_by_example():
  """The rows of an example are neighbours, so that they stay on its device."""
  seen = []
  def denoise(x, level, cond):
    seen.append((x, level, cond))
    return Estimate(cond['label'][:, None] * x)
  conds = [{'label': jnp.full(2, float(k))} for k in (1, 2, 3)]
  level = PROCESS.level(jnp.array([0.2, 0.8]))
  outs = guidance.branches(denoise, jnp.array([[1.0], [10.0]]), level, conds)
  np.testing.assert_array_equal(np.stack([out.x0[:, 0] for out in outs]), [[1, 10], [2, 20], [3, 30]])
  (x, at, cond), = seen
  np.testing.assert_array_equal(x[:, 0], [1, 1, 1, 10, 10, 10])
  np.testing.assert_allclose(at.t, [0.2] * 3 + [0.8] * 3)
  assert isinstance(at, Level) and 'drop' not in cond


NEGATIVE = {'label': 1}


def test_a_negative_takes_the_place_of_the_null():
  """Away from class 1, given class 0, without a word of dropped conditions."""
  denoise, level = Counted(), PROCESS.level(0.4)
  label = jnp.zeros(4, jnp.int32)
  out = jax.jit(guidance.guide(2.5, negative=NEGATIVE)(denoise))(X, level, {'label': label, 'text': jnp.ones((4, 3))})
  given, avoided = (np.asarray(law(X, level).x0, np.float64) for law in CLASSES)
  np.testing.assert_allclose(out.x0, avoided + 2.5 * (given - avoided), atol=1e-5)
  assert denoise.batches == [8] and set(denoise.conds[0]) == {'label', 'text'}


@pytest.mark.parametrize('value', [3, np.float64(3), np.full(4, 3)])
def test_a_negative_has_the_shape_and_dtype_of_what_it_replaces(value):
  cond = {'label': LABEL, 'text': jnp.ones((4, 2, 3), jnp.bfloat16)}
  out = guidance.replaced(cond, {'label': value, 'text': np.arange(3.0)})
  close(out, {'label': np.full(4, 3), 'text': np.broadcast_to(np.arange(3.0), (4, 2, 3))})
  assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, cond) and out['text'].dtype == jnp.bfloat16


def gaussians(*means, covariance=((0.5, 0.2), (0.2, 0.3))):
  """A denoiser whose label chooses the mean of a normal law, the first where the condition is dropped, and the laws."""
  laws = [oracles.Gaussian(np.array(mean), np.array(covariance)) for mean in means]
  def denoise(x, level, cond):
    label = jnp.where(cond['drop']['label'], 0, cond['label']) if 'drop' in cond else cond['label']
    x0s = jnp.stack([law.denoiser(PROCESS)(x, level).x0 for law in laws])
    return Estimate(jnp.take_along_axis(x0s, label[None, :, None], 0)[0])
  return denoise, laws


def of_mean(law, mean):
  return oracles.Gaussian(mean, law.covariance)


SHIFTED = {
  'guide': (lambda weak: guidance.guide(2.5), lambda n, c, a: n + 2.5 * (c - n)),
  'guide(negative)': (lambda weak: guidance.guide(2.5, negative={'label': 2}), lambda n, c, a: a + 2.5 * (c - a)),
  'autoguide': (lambda weak: guidance.autoguide(2.5, weak), lambda n, c, a: a + 2.5 * (c - a)),
}


@over('row', SHIFTED)
def test_guidance_between_gaussians_of_one_covariance_is_a_gaussian(row, x64):
  """The denoisers differ by a linear image of the means, so the guided one is that of the extrapolated mean."""
  make, mean_of = row
  denoise, (null, given, avoided) = gaussians([0.1, 0.4], [1.0, -0.5], [-0.3, 0.2])
  mean = mean_of(null.mean, given.mean, avoided.mean)
  level = PROCESS.level(np.array([0.05, 0.4, 0.8, 1.0]))
  out = jax.jit(make(avoided.denoiser(PROCESS))(denoise))(precise(), level, {'label': jnp.ones(4, jnp.int32)})
  np.testing.assert_allclose(out.x0, of_mean(given, mean).denoiser(PROCESS)(precise(), level).x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize('share', [0.3, 1.0, 1.4])
def test_a_blend_is_the_denoiser_of_the_geometric_mixture(share, x64):
  """p^(1 - share) q^share of two noised normal laws is normal: their precisions are averaged, and these times the means."""
  laws, shares = (LAW, oracles.Gaussian(np.array([-1.0, 0.4]), np.array([[0.3, -0.1], [-0.1, 0.9]]))), (1 - share, share)
  def denoise(x, level, cond):
    x0s = [law.denoiser(PROCESS)(x, level).x0 for law in laws]
    return Estimate(jnp.where(cond['label'][:, None] == 0, *x0s))
  run = jax.jit(lambda level: guidance.blend(share, {'label': 1})(denoise)(precise(), level, {'label': jnp.zeros(4, int)}))
  for t in (0.05, 0.4, 0.8):
    level = PROCESS.level(t)
    alpha, variance = float(level.alpha), float(level.sigma)**2 * np.eye(2)
    precisions = [each * np.linalg.inv(alpha**2 * np.asarray(law.covariance) + variance)
                  for each, law in zip(shares, laws, strict=True)]
    pull = sum(precision @ (alpha * np.asarray(law.mean)) for precision, law in zip(precisions, laws, strict=True))
    score = pull - np.asarray(precise()) @ sum(precisions)
    np.testing.assert_allclose(run(level).x0, (precise() + score @ variance) / alpha, rtol=0, atol=1e-9)


def test_perp_neg_keeps_what_the_conditions_share(x64):
  """With one isotropic covariance the difference of estimates is that of means: pushed along the condition in full, and
  away from the negative's part across it."""
  denoise, (null, given, avoided) = gaussians([0.0, 0.0], [2.0, 0.0], [0.7, 0.5], covariance=0.4 * np.eye(2))
  level = PROCESS.level(np.array([0.05, 0.4, 0.8, 1.0]))
  row = guidance.perpendicular(3.0, {'label': 2}, 0.6)
  out = jax.jit(row(denoise))(precise(), level, {'label': jnp.ones(4, jnp.int32)})
  mean = np.array([3 * 2.0, -3 * 0.6 * 0.5])
  np.testing.assert_allclose(out.x0, of_mean(given, mean).denoiser(PROCESS)(precise(), level).x0, rtol=0, atol=1e-9)


def both(t, rows):
  """x0 of the rows at class 0 and 1 by LABEL, and of the two branches, in numpy."""
  level, cond = PROCESS.level(t), {'label': LABEL}
  run = lambda level: [row(toy)(precise(), level, cond).x0 for row in (*rows, guidance.chain(), guidance.guide(0.0))]
  return [np.asarray(x0) for x0 in jax.jit(run)(level)]


def test_rescaling_gives_back_the_deviation_of_the_conditional(x64):
  full, half, none, guided, given, _ = both(0.4, [
    guidance.rescale(3.0, 1.0), guidance.rescale(3.0, 0.5), guidance.rescale(3.0, 0.0), guidance.guide(3.0)])
  np.testing.assert_allclose(none, guided, rtol=0, atol=1e-9)
  np.testing.assert_allclose(half, (full + guided) / 2, rtol=0, atol=1e-9)
  np.testing.assert_allclose(full.std(1), given.std(1), rtol=1e-9)
  np.testing.assert_allclose(full[:, 0] * guided[:, 1], full[:, 1] * guided[:, 0], rtol=0, atol=1e-9)  # parallel
  assert (np.abs(guided.std(1) / given.std(1) - 1) > 0.1).any()


def test_projected_guidance_goes_across_the_estimate(x64):
  across, short, full, far, guided, given, _ = both(0.4, [
    guidance.apg(3.0), guidance.apg(3.0, 1.0, 0.2), guidance.apg(3.0, 1.0), guidance.apg(3.0, 1.0, 100.0),
    guidance.guide(3.0)])
  np.testing.assert_allclose(full, guided, rtol=0, atol=1e-9)
  np.testing.assert_allclose(far, guided, rtol=0, atol=1e-9)
  np.testing.assert_allclose(((across - given) * given).sum(1), 0, rtol=0, atol=1e-9)
  left = across - guided
  np.testing.assert_allclose(left[:, 0] * given[:, 1], left[:, 1] * given[:, 0], rtol=0, atol=1e-9)  # parallel
  length = np.linalg.norm(guided - given, axis=1)
  assert length.min() < 0.4 < length.max()
  np.testing.assert_allclose(short - given, (guided - given) * np.minimum(1, 2 * 0.2 / length)[:, None], rtol=0, atol=1e-9)


@pytest.mark.parametrize('schedule', ['flow', 'cosine'])
def test_cfg_zero_scales_the_null_s_velocity_to_the_nearest(schedule, x64):
  """Along the null's velocity all weights go as far as the conditional; across it they extrapolate from 0. On any
  schedule the velocity is that of the flow path at x / (alpha + sigma)."""
  t = 0.7
  if schedule == 'cosine':
    t = float(schedules.time_at(SCHEDULES['cosine'], schedules.logsnr_of(SCHEDULES['flow'], jnp.float64(t))))
  process = Gaussian(SCHEDULES[schedule])
  flow, level = Gaussian(SCHEDULES['flow']).level(0.7), process.level(t)
  x = precise() * (level.alpha + level.sigma)
  x0s = jax.random.normal(jax.random.key(1), (2, 4, 2))  # of the null and given
  denoise = lambda x, level, cond: Estimate(jnp.where(cond['drop']['label'][:, None], *jnp.repeat(x0s, 2, 1)))
  run = jax.jit(lambda weight: guidance.cfg_zero(weight)(denoise)(x, level, {'label': LABEL}).x0, static_argnums=0)
  velocity = lambda x0: np.asarray((precise() - x0) / flow.t)  # on the flow path, xt = x0 + t velocity
  null, given, one, three = (velocity(x0) for x0 in (*x0s, run(0.0), run(3.0)))
  along = lambda v: (v * null).sum(1) / (null**2).sum(1)
  across = lambda v: v - along(v)[:, None] * null
  for v in (one, three):
    np.testing.assert_allclose(along(v), along(given), atol=1e-8)
  np.testing.assert_allclose(across(one), 0, atol=1e-8)
  np.testing.assert_allclose(across(three), 3 * across(given), atol=1e-8)
  assert np.abs(across(given)).max() > 1


@pytest.mark.parametrize('schedule', ['flow', 'cosine'])
def test_zero_init_leaves_the_noise_where_it_is(schedule):
  """While t > 1 - still a step along the flow path goes nowhere; below, steps go as they do without."""
  process = Gaussian(SCHEDULES[schedule])
  denoise = lambda x, level, cond: Estimate(0.3 * x)
  run = jax.jit(lambda t, s, still: solvers.ddim().step(
    process, lambda x, level: guidance.cfg_zero(1.0, still)(denoise)(x, level, None), keys(4), X, process.level(t),
    process.level(s), ())[0], static_argnums=2)
  total = lambda t: sum(process.level(t)[1:])
  np.testing.assert_allclose(run(0.9, 0.85, 0.2) / total(0.85), X / total(0.9), atol=1e-6)
  np.testing.assert_allclose(run(0.7, 0.6, 0.2), run(0.7, 0.6, 0.0), atol=1e-6)
  assert np.abs(run(0.9, 0.85, 0.2) - run(0.9, 0.85, 0.0)).max() > 0.01


B = np.array([0.8, -0.5])
TILTS = {
  'energy': lambda scale: guidance.energy(lambda x0: -x0 @ B, scale),
  'classifier': lambda scale: guidance.classifier(lambda x, level, cond: LAW.denoiser(PROCESS)(x, level).x0 @ B, scale),
}


@over('row', TILTS)
@pytest.mark.parametrize('schedule', ['cosine', 'karras'])
def test_a_linear_energy_tilts_gaussian_data(row, schedule, x64):
  """Samples of p(x0) exp(b x0) have the mean m + C b, and of exp(scale b x0) m + scale C b; so has the denoiser."""
  process = Gaussian(SCHEDULES[schedule])
  level = process.level(np.array([0.02, 0.3, 0.6, 0.97]))
  tilted = LAW.tilted(1.7 * B).denoiser(process)(precise(), level).x0
  np.testing.assert_allclose(jax.jit(row(1.7)(LAW.denoiser(process)))(precise(), level, None).x0, tilted, rtol=0, atol=1e-9)
  assert np.abs(tilted - LAW.denoiser(process)(precise(), level).x0).max() > 0.1


def test_samples_under_a_linear_energy_have_the_tilted_law():
  grid, denoise = grids.uniform(100, 0.995)(PROCESS.schedule), TILTS['energy'](1.0)(LAW.denoiser(PROCESS))
  x = jax.jit(lambda keys: sampling.sample(keys, PROCESS, solvers.heun(), denoise, grid, (2,)))(keys(4000))
  law = LAW.tilted(B)
  check_moments(x, law.mean, law.covariance, bias=0.01)


def test_a_quadratic_energy_moves_the_estimate_by_the_chain_rule(x64):
  """Of data N(0, v), x0hat = k xt; the energy x0^2 / 2 then adds -sigma^2 / alpha k^2 xt, by hand."""
  level, v = PROCESS.level(0.6), 0.7
  k = level.alpha * v / (level.alpha**2 * v + level.sigma**2)
  denoise = oracles.Gaussian(np.zeros(2), v * np.eye(2)).denoiser(PROCESS)
  out = jax.jit(lambda x: guidance.energy(halves, 0.5)(denoise)(x, level, None).x0)(precise())
  np.testing.assert_allclose(out, k * precise() * (1 - 0.5 * level.sigma**2 / level.alpha * k), rtol=0, atol=1e-9)


@over('row', TILTS)
def test_nothing_is_added_where_the_factor_has_no_value(row):
  level = PROCESS.level(jnp.array([1.0, 1.0, 0.5, 0.0]))
  out = jax.jit(row(1.0)(LAW.denoiser(PROCESS)))(X, level, None).x0
  change = np.abs(out - LAW.denoiser(PROCESS)(X, level).x0).max(1)
  assert np.isfinite(out).all() and (change[[0, 1, 3]] < 1e-6).all() and change[2] > 0.01


@pytest.mark.parametrize('call, sentence', [
  (lambda: guidance.guide(2.0, (0.8, 0.2)),
   'guide needs during=(low, high) with 0 <= low < high <= 1; got (0.8, 0.2).'),
  (lambda: guidance.perpendicular(2.0, {}, during=(0.0, 1.5)),
   'perpendicular needs during=(low, high) with 0 <= low < high <= 1; got (0.0, 1.5).'),
  (lambda: guidance.energy(halves, during=(0.5, 0.5)),
   'energy needs during=(low, high) with 0 <= low < high <= 1; got (0.5, 0.5).'),
  (lambda: guidance.guide(float('nan')), 'guide needs a finite weight; got nan.'),
  (lambda: guidance.autoguide(float('inf'), WEAK), 'autoguide needs a finite weight; got inf.'),
  (lambda: guidance.classifier(len, float('inf')), 'classifier needs a finite scale; got inf.'),
  (lambda: guidance.perpendicular(2.0, {}, float('nan')), 'perpendicular needs a finite negative_weight; got nan.'),
  (lambda: guidance.rescale(2.0, 1.2), 'rescale needs 0 <= phi <= 1; got 1.2.'),
  (lambda: guidance.cfg_zero(2.0, 1.0), 'cfg_zero needs 0 <= still < 1; got 1.0.'),
  (lambda: guidance.cfg_zero(2.0, 0.1, (0.0, 0.8)),
   'cfg_zero stands still at t > 0.9, where during=(0.0, 0.8) lets nothing act: raise its end.'),
  (lambda: guidance.apg(2.0, radius=0.0), 'apg needs radius > 0; got 0.0.'),
  (lambda: guidance.apg(2.0, float('nan')), 'apg needs a finite parallel; got nan.'),
  (lambda: guidance.guide(2.0, negative={'colour': 1})(Counted())(X, PROCESS.level(0.5), {'label': LABEL, 'text': X}),
   "{'colour': ...} is to replace an entry that cond has not; it has 'label', 'text'."),
  (lambda: guidance.guide(2.0, negative={'label': 1})(Counted())(X, PROCESS.level(0.5), None),
   "{'label': ...} is to replace an entry that cond has not; it has none."),
  (lambda: guidance.blend(0.5)(Counted()), 'blend needs both share and towards, or neither; got 0.5 and None.'),
  (lambda: guidance.blend(float('inf'), {'label': 1}), 'blend needs a finite share; got inf.'),
  (lambda: guidance.blend()(Counted())(X, PROCESS.level(0.5), {'label': LABEL}),
   "blend needs where to go: blend(0.5, {'label': 3}), or an entry 'towards' of cond."),
  (lambda: guidance.energy(lambda x0: x0)(LAW.denoiser(PROCESS))(X, PROCESS.level(0.5), None),
   'function gives one number an example, shape (4,) here; got (4, 2).'),
  (lambda: guidance.classifier(lambda x, level, cond: jnp.sum(x))(LAW.denoiser(PROCESS))(X, PROCESS.level(0.5), None),
   'log_prob gives one number an example, shape (4,) here; got ().'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
