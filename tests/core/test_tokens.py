"""Processes of tokens: their laws against tables by Bayes' rule, and sampling with the denoiser of a Markov chain."""
import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import sampling, schedules, solvers, tokens
from diffusion_jax.core.processes import Gaussian, Product, part
from diffusion_jax.core.tokens import Masked, Uniform
from diffusion_jax.core.types import Estimate, Level, split
from tests import oracles
from tests.core.tables import ENTRIES, FEW, SCHEDULES, keys, over

CLASSES, P_VALUE = 4, 1e-3
PROCESSES = {
  'masked': Masked(SCHEDULES['flow'], CLASSES),
  'masked(cosine)': Masked(SCHEDULES['cosine'], CLASSES),
  'uniform': Uniform(SCHEDULES['flow'], CLASSES),
  'uniform(linear)': Uniform(SCHEDULES['linear'], CLASSES),
}
KINDS = {name: PROCESSES[name] for name in ('masked', 'uniform')}
LOGITS = np.array([1.0, 0.2, -0.7, -2.0])
GUESS = np.exp(LOGITS) / np.exp(LOGITS).sum()
SOURCE = oracles.Markov(np.array([0.5, 0.3, 0.2]), np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.25, 0.7, 0.05]]), 4)
WORDS = np.array(list(itertools.product(range(3), repeat=4)))


def moves(process, scale):
  """P(x at t | x at s), as a table, of alpha_t / alpha_s = scale. A mask stays a mask."""
  masked = isinstance(process, Masked)
  noise = np.eye(process.classes + 1)[-1] if masked else np.full(process.classes, 1 / process.classes)
  return scale * np.eye(len(noise)) + (1 - scale) * noise[None]


def bayes(process, p, t, s):
  """p(xs | xt) [xt, xs] in proportion to q(xt | xs) sum_x0 q(xs | x0) p(x0); NaN for an xt that is never seen."""
  alpha_t, alpha_s = np.float64(t.alpha), np.float64(s.alpha)
  law = moves(process, alpha_t / alpha_s).T * (p @ moves(process, alpha_s)[:process.classes])[None]
  with np.errstate(invalid='ignore'):
    return law / law.sum(1, keepdims=True)


def check_counts(observed, expected, fixed=0):
  """Chi-square where something is expected, and nothing where nothing is."""
  assert not observed[expected < 1e-9].any()
  some = expected >= 1e-9
  assert some.sum() == 1 + fixed or stats.chisquare(observed[some], expected[some], ddof=fixed).pvalue > P_VALUE


def table(shape, *tokens):
  """How often each combination of tokens was drawn."""
  cells = np.ravel_multi_index([np.ravel(each) for each in tokens], shape)
  return np.bincount(cells, minlength=np.prod(shape)).reshape(shape)


@over('process', PROCESSES)
def test_the_ways_to_two_levels_have_one_law(process):
  """corrupt to s and forward to t; corrupt to t and reverse to s: the joint law of (x0, xs, xt) is that of the tables."""
  s, t = process.level(0.3), process.level(0.6)
  x0 = jnp.broadcast_to(jnp.arange(80) % CLASSES, (1000, 80))
  first, second = split(keys(1000), 2)
  @jax.jit
  def draw(first, second):
    below, above = process.corrupt(first, x0, s)[0], process.corrupt(first, x0, t)[0]
    estimate = Estimate(100 * jax.nn.one_hot(x0, CLASSES))
    return below, process.forward(second, below, s, t), process.reverse(second, estimate, above, t, s), above
  below, forward, reverse, above = draw(first, second)
  up, down = moves(process, float(s.alpha)), moves(process, float(t.alpha / s.alpha))
  expected = 20000 * up[:CLASSES, :, None] * down[None]
  for xs, xt in ((below, forward), (reverse, above)):
    check_counts(table(expected.shape, x0, xs, xt), expected, CLASSES - 1)


@over('process', PROCESSES)
def test_reverse_draws_by_bayes_rule_for_a_guess(process):
  t, s = process.level(0.7), process.level(0.45)
  law = bayes(process, GUESS, t, s)
  xt = jnp.broadcast_to(jnp.arange(80) % len(law), (1000, 80))
  estimate = Estimate(jnp.broadcast_to(LOGITS, (*xt.shape, CLASSES)))
  xs = jax.jit(lambda keys: process.reverse(keys, estimate, xt, t, s))(keys(1000))
  check_counts(table(law.shape, xt, xs), np.bincount(xt.ravel())[:, None] * law, len(law) - 1)


@over('process', PROCESSES)
def test_corrupt_says_which_tokens_are_noised(process):
  x0 = jnp.ones((1000, 40), int)
  xt, noised = process.corrupt(keys(1000), x0, process.level(0.4))
  left = float(process.level(0.4).alpha)
  assert stats.binomtest(int(noised.sum()), noised.size, 1 - left).pvalue > P_VALUE
  np.testing.assert_array_equal(xt[~noised], 1)
  assert xt.dtype == x0.dtype


@over('process', PROCESSES)
def test_divergence_is_that_of_the_tables(process, x64):
  """Against scipy.stats.entropy, for every x0 and xt and a level of its own for every token; at s = 0 it is -log p(x0)."""
  x0, xt = map(jnp.ravel, jnp.meshgrid(jnp.arange(CLASSES), jnp.arange(len(moves(process, 0.5)))))
  for low, high in ((0.2, 0.21), (0.5, 0.9), (0.0, 0.3)):
    t, s = (process.level(jnp.full((1, len(x0)), time)) for time in (high, low))
    estimate = Estimate(jnp.broadcast_to(LOGITS, (1, len(x0), CLASSES)))
    found = process.divergence(estimate, x0[None], xt[None], t, s)[0]
    at = lambda level: Level(*(entry[0, 0] for entry in level))
    ours = bayes(process, GUESS, at(t), at(s))
    true = np.stack([bayes(process, row, at(t), at(s)) for row in np.eye(CLASSES)])
    seen = np.isfinite(true[x0, xt]).all(1)
    np.testing.assert_allclose(found[seen], stats.entropy(true[x0, xt], ours[xt], axis=1)[seen], rtol=1e-9, atol=1e-14)


@over('process', PROCESSES)
def test_rate_is_the_limit_of_the_divergence(process, x64):
  """The error of divergence / (t - s) halves with the step, but for rounding."""
  x0, xt = (each.reshape(1, -1) for each in jnp.meshgrid(jnp.arange(CLASSES), jnp.arange(len(moves(process, 0.5)))))
  seen = (xt == CLASSES) | (xt == x0) | isinstance(process, Uniform)
  estimate = Estimate(jnp.broadcast_to(LOGITS, (*x0.shape, CLASSES)))
  for time in (0.15, 0.8):
    t = process.level(time)
    rate = np.where(seen, process.rate(estimate, x0, xt, t), 0)
    wrong = []
    for step in (2e-5, 1e-5):
      near = process.divergence(estimate, x0, xt, t, process.level(time - step)) / step
      wrong.append(np.abs(np.where(seen, near, 0) - rate).max())
    assert rate.max() > 0.1 and wrong[1] < 1e-4 * rate.max() and wrong[1] < 0.52 * wrong[0] + 1e-9 * rate.max()


@over('process', PROCESSES)
def test_prior_divergence_is_that_of_the_tables(process, x64):
  level = process.level(0.8 if isinstance(process, Uniform) else 1.0)
  expected = stats.entropy(moves(process, float(level.alpha))[0], moves(process, 0.0)[0])
  np.testing.assert_allclose(process.prior_divergence(jnp.zeros((2, 3), int), level), np.full((2, 3), expected), rtol=1e-9)


@over('process', PROCESSES)
def test_all_is_finite_at_every_time_that_is_drawn(process):
  """Also where alpha rounds to 1 in single precision, and where it is 0."""
  t = jnp.append(jnp.geomspace(1e-8, 1, 100), 1e-30)
  x0 = jnp.broadcast_to(jnp.arange(8) % CLASSES, (len(t), 8))
  level = process.level(t)
  xt, _ = process.corrupt(keys(len(t)), x0, level)
  estimate = Estimate(jnp.broadcast_to(LOGITS, (*x0.shape, CLASSES)))
  values = jax.jit(lambda x0, xt: [
      process.rate(estimate, x0, xt, level), process.divergence(estimate, x0, xt, level, process.level(0.5 * t)),
      process.divergence(estimate, x0, xt, level, process.level(0 * t))])(x0, xt)
  assert np.isfinite(values).all() and np.min(values) > -1e-6


@over('process', KINDS)
def test_the_last_move_is_a_draw_of_x0(process):
  """Masks are revealed by the guess, other tokens stay; a uniform process weighs the guess with the token that it sees."""
  t, s = process.level(0.6), process.level(0.0)
  law = bayes(process, GUESS, t, s)
  assert law[:, :CLASSES].sum() == pytest.approx(len(law))
  xt = jnp.broadcast_to(jnp.arange(40) % len(law), (500, 40))
  estimate = Estimate(jnp.broadcast_to(LOGITS, (*xt.shape, CLASSES)))
  x0 = jax.jit(lambda keys: process.reverse(keys, estimate, xt, t, s))(keys(500))
  check_counts(table(law.shape, xt, x0), np.bincount(xt.ravel())[:, None] * law, len(law) - 1)


@over('process', KINDS)
def test_every_token_has_its_own_level(process):
  t, s = (process.level(jnp.broadcast_to(jnp.array(times), (20000, 3))) for times in ([0.2, 0.5, 1.0], [0.0, 0.4, 0.9]))
  x0 = jnp.ones((20000, 3), int)
  @jax.jit
  def draw(first, second):
    xt, _ = process.corrupt(first, x0, t)
    xs = process.reverse(second, Estimate(100 * jax.nn.one_hot(x0, CLASSES)), xt, t, s)
    return xt, xs, process.forward(second, process.corrupt(first, x0, s)[0], s, t)
  xt, xs, again = draw(*split(keys(20000), 2))
  for x, alphas in ((xt, [0.8, 0.5, 0.0]), (xs, [1.0, 0.6, 0.1]), (again, [0.8, 0.5, 0.0])):
    for i, alpha in enumerate(alphas):
      law = moves(process, alpha)[1]
      check_counts(np.bincount(x[:, i], minlength=len(law)), 20000 * law)


@over('process', KINDS)
def test_noise_belongs_to_an_example(process):
  s, t = process.level(0.3), process.level(0.7)
  x0 = jnp.arange(6 * 9).reshape(6, 9) % CLASSES
  @jax.jit
  def draws(keys, x0):
    estimate = Estimate(jnp.broadcast_to(LOGITS, (*x0.shape, CLASSES)))
    return (process.prior(keys, x0, t), process.corrupt(keys, x0, t)[0], process.forward(keys, x0, s, t),
            process.reverse(keys, estimate, x0, t, s))
  order = np.array([4, 0, 5, 2, 2, 1])
  for whole, some in zip(draws(keys(6), x0), draws(keys(6)[order], x0[order]), strict=True):
    np.testing.assert_array_equal(whole[order], some)


def test_the_priors_are_all_mask_and_uniform():
  like = jax.ShapeDtypeStruct((2000, 20), jnp.int32)
  masks, drawn = (process.prior(keys(2000), like, process.level(1.0)) for process in KINDS.values())
  assert masks.dtype == drawn.dtype == jnp.int32
  np.testing.assert_array_equal(masks, CLASSES)
  check_counts(np.bincount(drawn.ravel()), np.full(CLASSES, 10000.0))


def test_the_denoiser_of_a_network_hands_it_a_thousand_times_t():
  seen = []
  denoise = tokens.denoiser(lambda x, feature, cond: seen.append((feature, cond)) or jax.nn.one_hot(x, CLASSES))
  x = jnp.zeros((2, 3), int)
  for t in (0.25, jnp.array([0.25, 0.25])):
    estimate = denoise(x, KINDS['uniform'].level(t), {'label': jnp.arange(2)})
    np.testing.assert_array_equal(seen[-1][0], [250, 250])
    assert seen[-1][1]['label'].shape == (2,) and estimate.x0.shape == (2, 3, CLASSES) and estimate.variance is None


def test_bad_input_gets_a_sentence():
  for kind in (Masked, Uniform):
    with pytest.raises(ValueError, match='A process of tokens needs 2 classes or more; got 1'):
      kind(schedules.flow(), 1)
  for name in ('linear', 'karras'):
    with pytest.raises(ValueError, match=r'alpha = 0 at t = 1, where all is mask; this one ends at .* Take'):
      Masked(FEW[name], CLASSES)


def alone(process, t):
  """p(x0_i | xt without entry i) [xt, i, x0_i] by enumeration, and the words xt."""
  states = np.array(list(itertools.product(range(len(moves(process, 0.5))), repeat=4)))
  likelihood = moves(process, float(t.alpha))[:3, states].transpose(1, 2, 0)  # [xt, i, x0_i]
  given = likelihood[:, np.arange(4)[None], WORDS]  # [xt, x0, i]
  given = np.stack([np.delete(given, i, 2).prod(2) for i in range(4)], 1) * np.exp(SOURCE.log_prob(WORDS))[None, None]
  with np.errstate(invalid='ignore'):
    return np.einsum('xiw,wiv->xiv', given, np.eye(3)[WORDS]) / given.sum(2, keepdims=True), states


def sampler_law(process, grid):
  """The law of the words x0 [81] to which the ancestral sampler walks, tokens being drawn independently given xt."""
  law = None
  for t, s in itertools.pairwise(map(process.level, grid)):
    given, states = alone(process, t)
    if law is None:
      law = moves(process, 0.0)[0][states].prod(1)
    steps = np.stack([[bayes(process, given[x, i], t, s)[states[x, i]] for i in range(4)] for x in range(len(states))])
    law = sum(law[x] * np.einsum('a,b,c,d->abcd', *steps[x]).ravel() for x in range(len(states)) if law[x] > 0)
  return law.reshape((steps.shape[-1],) * 4)[:3, :3, :3, :3].ravel()


CHAINS = {'masked': Masked(SCHEDULES['flow'], 3), 'uniform': Uniform(SCHEDULES['flow'], 3)}


def test_the_source_has_its_entropy_and_draws_its_law():
  law = np.exp(SOURCE.log_prob(WORDS))
  np.testing.assert_allclose([law.sum(), stats.entropy(law)], [1, SOURCE.entropy], rtol=1e-12)
  for i, marginal in enumerate(SOURCE.marginals):
    np.testing.assert_allclose(np.bincount(WORDS[:, i], law), marginal, rtol=1e-12)
  drawn = jax.jit(SOURCE.sample)(keys(20000))
  check_counts(table((3,) * 4, *drawn.T).ravel(), 20000 * law)


@over('process', CHAINS)
def test_the_oracle_of_the_chain_is_bayes_rule(process, x64):
  t = process.level(0.4)
  given, states = alone(process, t)
  found = jax.jit(lambda x: jax.nn.softmax(SOURCE.denoiser(process)(x, t).x0))(states)
  seen = np.isfinite(given).all((1, 2))
  np.testing.assert_allclose(found[seen], given[seen], rtol=1e-9)


@over('process', CHAINS)
def test_sampling_walks_to_the_law_of_the_source(process):
  """One step draws every token on its own from its marginal law; the law of 3 steps is the enumerated one; with 64 the
  81 words have the law of the source, by chi-square with 8000 samples."""
  like = jax.ShapeDtypeStruct((4,), jnp.int32)
  source, far = np.exp(SOURCE.log_prob(WORDS)), []
  apart = SOURCE.marginals[np.arange(4)[None], WORDS].prod(1)
  for steps, expected in ((1, apart), (3, sampler_law(process, np.linspace(1, 0, 4))), (64, source)):
    grid = np.linspace(1, 0, steps + 1)
    run = lambda keys, grid=grid: sampling.sample(keys, process, solvers.ancestral(), SOURCE.denoiser(process), grid, like)
    x = jax.jit(run)(keys(8000, steps))
    assert x.dtype == jnp.int32
    check_counts(table((3,) * 4, *x.T).ravel(), 8000 * expected)
    far.append(0.5 * np.abs(expected - source).sum())
  assert far[0] > 0.3 and far[1] < 0.6 * far[0]


def test_numbers_and_tokens_are_sampled_side_by_side():
  """A Product of processes whose fields are independent: the numbers' moments follow the linear recursion of their means
  and variances, the tokens the enumerated law, and the two are uncorrelated."""
  process = Product({'x': Gaussian(SCHEDULES['cosine']), 'z': CHAINS['masked']})
  oracle = {'x': ENTRIES.denoiser(None), 'z': SOURCE.denoiser(CHAINS['masked'])}
  denoise = lambda x, level, cond=None: Estimate({name: oracle[name](x[name], part(level, name)).x0 for name in x})
  shape = {'x': jax.ShapeDtypeStruct((2,), jnp.float32), 'z': jax.ShapeDtypeStruct((4,), jnp.int32)}
  grid, count = np.linspace(1, 0, 4), 8000
  x = jax.jit(lambda keys: sampling.sample(keys, process, solvers.ancestral(), denoise, grid, shape))(keys(count))
  mean, variance = 0.0, 1.0
  for t, s in itertools.pairwise(np.pi / 2 * grid):
    a_t, s_t, a_s, s_s = np.cos(t), np.sin(t), np.cos(s), np.sin(s)
    gain, scale = a_t * 0.36 / (a_t**2 * 0.36 + s_t**2), a_t / a_s
    share = 1 - (scale * s_s / s_t)**2
    slope = scale * (s_s / s_t)**2 + a_s * share * gain
    mean, variance = slope * mean + a_s * share * (1 - gain * a_t) * 0.4, slope**2 * variance + s_s**2 * share
  assert abs(x['x'].mean() - mean) < 4 * np.sqrt(variance / (2 * count))
  assert abs(x['x'].std() / np.sqrt(variance) - 1) < 4 / np.sqrt(4 * count)
  check_counts(table((3,) * 4, *x['z'].T).ravel(), count * sampler_law(CHAINS['masked'], grid))
  assert np.abs(np.corrcoef(np.concatenate([x['x'], x['z']], 1).T)[:2, 2:]).max() < 4.5 / np.sqrt(count)


@pytest.mark.parametrize('process', [Masked(schedules.flow(), 4), Uniform(schedules.flow(), 4)])
def test_a_shape_without_its_dtype_gets_a_sentence(process):
  denoise = tokens.denoiser(lambda xt, feature, cond: jnp.zeros((*xt.shape, 4)))
  with pytest.raises(ValueError, match=r'Tokens are whole numbers; got float32. Give the shape with its dtype'):
    sampling.sample(keys(2), process, solvers.ancestral(), denoise, np.array([1.0, 0.5, 0.0]), (3,))


@pytest.mark.parametrize('t, s', [(0.2, 0.0), (0.6, 0.3)])
def test_a_denoiser_that_is_sure_and_wrong_costs_a_finite_number(t, s):
  """A gap of 200 nats between logits: -log p is 200 at the data, and its slope is finite."""
  process = Uniform(schedules.flow(), 3)
  x0, xt = jnp.array([[0, 1]]), jnp.array([[0, 0]])
  cost = lambda logits: process.divergence(Estimate(logits), x0, xt, process.level(t), process.level(s)).sum()
  logits = jnp.array([[[-200.0, 0.0, 0.0], [0.0, -200.0, 0.0]]])
  value, slope = jax.value_and_grad(cost)(logits)
  assert np.isfinite(value) and np.isfinite(slope).all()
  if s == 0:
    assert value > 300
