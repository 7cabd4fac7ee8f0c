"""Variational bounds: against entropies, the closed forms of Gaussian data, enumeration of tokens, and scipy."""
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import special, stats

from diffusion_jax.core import bounds, schedules, targets, times, weights
from diffusion_jax.core.processes import Gaussian, Product, centred, part
from diffusion_jax.core.times import Times
from diffusion_jax.core.tokens import Masked, Uniform
from diffusion_jax.core.types import Draw, Estimate
from tests import oracles
from tests.core.tables import DECODERS, FEW, SCHEDULES, check_complete, close, draw, keys, over

COUNT, VARIANCE, MEAN = 10000, 0.36, 0.4  # of ENTRIES
ENTRIES = oracles.Independent(MEAN, np.sqrt(VARIANCE))
EVEN = times.stratified()
CHAIN = oracles.Markov(np.array([0.5, 0.3, 0.2]), np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.25, 0.7, 0.05]]), 3)
WORDS = np.array(list(itertools.product(range(3), repeat=3)))
TOKENS = {'masked': Masked(SCHEDULES['flow'], 3), 'uniform': Uniform(SCHEDULES['flow'], 3)}
BITS = 1 / np.log(2)


def at(t):
  """Always this time."""
  return Times(lambda process, draw: jnp.full(len(draw.index), t), lambda process, t: jnp.ones_like(t))


def evaluate(terms, denoiser, x0):
  """The bound of every example and its terms, compiled, as double precision."""
  whole = draw(len(jax.tree.leaves(x0)[0]))
  run = jax.jit(lambda key, index, x0: terms(denoiser, Draw(key, index, whole.total), x0))
  found = run(whole.key, whole.index, x0)
  return SimpleNamespace(**jax.tree.map(np.float64, {**found._asdict(), 'total': found.total}))


def check_mean(values, expected, error=None):
  """Within 4 standard errors, which are at most `error`. They are taken from the differences of neighbours, which differ by
  chance alone also where the times are stratified."""
  own = np.sqrt(0.5 * np.mean(np.diff(values)**2) / len(values))
  assert abs(values.mean() - expected) <= 4 * own + 1e-6 * abs(expected)
  assert error is None or own < error


def even_to(high):
  """logsnr uniform up to `high`: every part of the way counts alike. Below snr = 1e-5 are less than 1e-5 bits."""
  return times.log_uniform(float(np.exp(-0.5 * high - 0.01)), 300.0, EVEN)


def numbers(shape=(16,)):
  return MEAN + np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(3), (COUNT, *shape))


def with_fraction(denoiser, fraction):
  """The same estimate of x0, with this fraction of the variance."""
  def denoise(x, level, cond=None):
    x0 = denoiser(x, level).x0
    return Estimate(x0, jnp.full_like(x0, fraction))
  return denoise


def snr_of(schedule, t):
  alpha, sigma = (np.asarray(each, np.float64) for each in schedule(jnp.asarray(t)))
  return (alpha / sigma)**2


def mmse(snr):
  """The variance of x0 given xt."""
  return VARIANCE / (1 + VARIANCE * snr)


def test_every_decoder_has_a_row():
  check_complete(bounds, bounds.Decoder, DECODERS)


# Decoders

@pytest.mark.parametrize('name', ['discretized', 'softmax'])
@pytest.mark.parametrize('levels', [2, 7, 256])
def test_a_decoder_of_levels_is_a_law(name, levels, x64):
  """Its masses sum to 1, wherever the mean and however small or large the variance."""
  mean, std = (each.ravel() for each in np.meshgrid([-1.7, -1.0, 0.123, 1.0, 30.0], [1e-3, 0.1, 5.0]))
  values = jnp.asarray(np.linspace(-1, 1, levels)[:, None] * np.ones(len(mean)))
  nats = getattr(bounds, name)(levels)(values, jnp.asarray(mean[None]), jnp.asarray(std[None]**2))
  np.testing.assert_allclose(special.logsumexp(-nats, 0), np.zeros(len(mean)), atol=1e-8)


def test_discretized_masses_are_scipy_s_in_the_tails_too(x64):
  """log of the mass between the edges: scipy's logcdf where it keeps its digits, far out the integral of the tail
  exp(-(z^2 - a^2) / 2) over the bin, by quadrature."""
  half, std = 1 / 255, 0.01
  values = np.linspace(-1, 1, 256)
  for mean in (0.1, 1.4, -3.0):
    a, b = (values - mean - half) / std, (values - mean + half) / std
    a[0], b[-1] = -np.inf, np.inf
    a, b = np.where(a + b > 0, -b, a), np.where(a + b > 0, -a, b)  # the bin's mirror image, on the left
    found = -np.float64(bounds.discretized(256)(jnp.asarray(values), jnp.full(256, mean), jnp.full(256, std**2)))
    near = np.abs(b) < 6
    np.testing.assert_allclose(found[near], np.log(stats.norm.cdf(b[near]) - stats.norm.cdf(a[near])), atol=1e-6)
    nodes, weight = np.polynomial.legendre.leggauss(200)
    inner = np.isfinite(a) & (b < -6)
    z = np.minimum(b - a, 40 / np.abs(b))[inner, None] * (nodes + 1) / 2  # how far left of b
    integral = (np.exp(b[inner, None] * z - z**2 / 2) @ weight) * z[:, -1] / (nodes[-1] + 1)
    expected = -b[inner]**2 / 2 - np.log(2 * np.pi) / 2 + np.log(integral)
    np.testing.assert_allclose(found[inner], expected, rtol=1e-9, atol=1e-8)


def test_discretized_stays_finite_in_single_precision():
  """Values and derivatives, from the middle of a bin to a million standard deviations away."""
  values = jnp.repeat(jnp.array([[-1.0], [-1 + 2 / 255], [101 / 255], [1.0]]), 40, 1)
  decode = lambda mean, log_std: bounds.discretized(256)(values, mean, jnp.exp(2 * log_std)).sum()
  for std in (1e-4, 1e-2, 1.0, 30.0):
    mean = jnp.broadcast_to(jnp.append(std * jnp.geomspace(1e-3, 1e6, 20), -std * jnp.geomspace(1e-3, 1e6, 20)), (4, 40))
    value, slopes = jax.value_and_grad(decode, (0, 1))(mean, jnp.full((4, 40), np.log(std)))
    assert np.isfinite(value) and np.isfinite(slopes).all()
    outward = np.asarray(slopes[0] * jnp.sign(mean - values))
    far = np.asarray((jnp.abs(values) < 1) & (jnp.abs(mean - values) > 4 * std + 2 / 255))
    assert (outward[far] > 0).all()


def test_density_is_that_of_scipy(x64):
  x0, mean, variance = (jnp.asarray(each) for each in np.random.default_rng(0).uniform(0.1, 2, (3, 5)))
  expected = -stats.norm.logpdf(x0, mean, np.sqrt(variance))
  np.testing.assert_allclose(bounds.density()(x0, mean, variance), expected, rtol=1e-9)


def test_softmax_is_the_law_of_a_value_given_the_last_latent(x64):
  """Bayes' rule for 5 equally likely values with normal noise."""
  values = np.linspace(-1, 1, 5)
  law = stats.norm.pdf(0.3, values, 0.4)
  found = bounds.softmax(5)(jnp.asarray(values), jnp.full(5, 0.3), jnp.full(5, 0.16))
  np.testing.assert_allclose(found, -np.log(law / law.sum()), rtol=1e-9)


# Gaussian data

def continuous(low, high):
  """The bound of the exact denoiser between two snr, nats an entry: H(N(0, v + 1 / high)), and what the prior misses of the
  law at the end, whose mean square is (v + m^2) low in units of its noise."""
  prior = 0.5 * ((VARIANCE + MEAN**2) * low - np.log1p(VARIANCE * low))
  return 0.5 * np.log(2 * np.pi * np.e * (VARIANCE + 1 / high)) + prior


@over('schedule', {name: FEW[name] for name in ('cosine', 'karras')})
def test_the_continuous_bound_of_normal_data_is_their_entropy_and_the_known_gap(schedule):
  process = Gaussian(schedule)
  first, last = (float(end) for end in schedules.ends(schedule))
  terms = bounds.variational(process, even_to(8.0), bounds.density(), high=8.0)
  found = evaluate(terms, ENTRIES.denoiser(process), numbers())
  low = np.exp(last)
  check_mean(found.total, BITS * continuous(low, np.exp(min(first, 8.0))), 0.04)
  check_mean(found.prior, BITS * 0.5 * low * (VARIANCE + MEAN**2))
  check_mean(found.reconstruction, BITS * 0.5 * (np.log(2 * np.pi * np.exp(-8.0)) + 1))


@over('schedule', FEW)
def test_the_rate_of_normal_data_integrates_to_what_xt_tells(schedule, x64):
  """int E[rate] dt = I(x0; x at the first t) - I(x0; x at the last t), by quadrature over t, x0 and the noise, whose two
  nodes each are exact for a square."""
  process = Gaussian(schedule)
  nodes, weight = np.polynomial.legendre.leggauss(60)
  t = jnp.asarray(0.1 + 0.8 * (nodes + 1) / 2)
  x0, noise = (np.ravel(each) for each in np.meshgrid(MEAN + np.sqrt(VARIANCE) * np.array([-1, 1]), [-1.0, 1.0]))
  level = process.level(t)
  xt = level.alpha[:, None] * x0[None] + level.sigma[:, None] * noise[None]
  rates = process.rate(ENTRIES.denoiser(process)(xt, level), jnp.broadcast_to(x0, xt.shape), xt, level).mean(1)
  high, low = snr_of(schedule, np.array([0.1, 0.9]))
  np.testing.assert_allclose(0.4 * weight @ rates, 0.5 * np.log((1 + VARIANCE * high) / (1 + VARIANCE * low)), rtol=1e-8)


def stepwise(schedule, steps, fraction):
  """The chain's bound of the exact denoiser, and the decoder's part of it, nats an entry: at every step the divergence of
  two normal laws whose variances are as small to small^(1 - f) large^f, and the decoder at the mean of x0. At the first
  step small is that of the second, as there it would be 0, and large = sigma^2."""
  grid = np.arange(1, steps + 1) / steps
  alpha, sigma = np.float64(schedule(jnp.asarray(grid)))
  snr = (alpha / sigma)**2
  gaps = 0.5 * (snr[:-1] - snr[1:]) * mmse(snr[1:])
  log = 2 * fraction * np.log(sigma[1:] / sigma[:-1])  # of our variance over the true one
  small = (sigma[1]**2 - (alpha[1] / alpha[0] * sigma[0])**2) * (sigma[0] / sigma[1])**2
  variance = small**(1 - fraction) * sigma[0]**(2 * fraction)
  decoder = 0.5 * np.log(2 * np.pi * variance) + mmse(snr[0]) / (2 * variance)
  steps = np.sum(gaps * np.exp(-log) + 0.5 * (log + np.exp(-log) - 1))
  return steps + decoder + 0.5 * snr[-1] * (VARIANCE + MEAN**2), decoder


@pytest.mark.parametrize('name, law, fraction', [
  ('linear', EVEN, None), ('cosine', times.discrete(10), None), ('flow', EVEN, 1.0), ('cosine', EVEN, 0.3)])
def test_the_bound_of_a_chain_is_the_sum_of_its_steps(name, law, fraction):
  """With the least variance, the largest, and one between: 10 steps, all of them drawn."""
  process = Gaussian(SCHEDULES[name])
  denoiser = ENTRIES.denoiser(process)
  denoiser = denoiser if fraction is None else with_fraction(denoiser, fraction)
  found = evaluate(bounds.variational(process, law, bounds.density(), steps=10), denoiser, numbers())
  total, decoder = stepwise(SCHEDULES[name], 10, fraction or 0.0)
  check_mean(found.total, BITS * total, 0.06)
  check_mean(found.reconstruction, BITS * decoder, 0.005)


def test_a_chain_counts_every_step_once():
  """Rows stratified over t: as many for each of the 8 steps, the first one left to the decoder."""
  process, seen = Gaussian(SCHEDULES['flow']), []
  def denoise(x, level, cond=None):
    seen.append(np.round(8 * np.asarray(level.t), 3))
    return Estimate(x)
  for law in (EVEN, times.discrete(8, EVEN)):
    terms = bounds.variational(process, law, bounds.density(), steps=8)
    found = terms(denoise, draw(800), jnp.zeros((800, 1)))
    assert abs(np.sum(np.asarray(found.diffusion) == 0) - 100) <= 1
    drawn, last = seen[-2:]
    count = np.bincount(drawn.astype(int), minlength=9)
    np.testing.assert_allclose(count[3:], 100, atol=1)
    np.testing.assert_array_equal(last, 1)


@pytest.mark.parametrize('levels, high', [(2, 0.0), (256, 13.3)])
def test_even_values_cost_their_bits(levels, high):
  """x0 uniform over the levels with its exact denoiser: the softmax decoder is then Bayes' rule, so that the bound is
  log2(levels) wherever the last latent lies; the bins of `discretized` cost more."""
  process, values = Gaussian(SCHEDULES['cosine']), np.linspace(-1, 1, levels, dtype=np.float32)
  def denoise(x, level, cond=None):
    column = lambda entry: jnp.reshape(entry, (-1, 1, 1))
    score = -0.5 * ((x[..., None] - column(level.alpha) * values[None, None]) / column(level.sigma))**2
    return Estimate(jax.nn.softmax(score) @ values)
  x0 = jnp.asarray(values)[jax.random.randint(jax.random.key(1), (2000, 64), 0, levels)]
  found = evaluate(bounds.variational(process, even_to(high), bounds.softmax(levels), high=high), denoise, x0)
  check_mean(found.total, np.log2(levels), 0.1)
  decoder, level = bounds.discretized(levels), process.level_at(high)
  xt, _ = process.corrupt(keys(2000), x0, level)
  more = BITS * decoder(x0, xt / level.alpha, jnp.full(x0.shape, np.exp(-high)))
  less = BITS * bounds.softmax(levels)(x0, xt / level.alpha, jnp.full(x0.shape, np.exp(-high)))
  assert more.mean() > less.mean()


# Tokens

def expected_terms(process, source, t, s=None):
  """E of the rate at t, or of the divergence from t to s, nats an example, for every word: by enumeration of xt."""
  masked, level = isinstance(process, Masked), process.level(t)
  states = jnp.asarray(list(itertools.product(range(3 + masked), repeat=3)))
  noise = np.eye(4)[3] if masked else np.full(3, 1 / 3)
  table = level.alpha * np.eye(len(noise))[:3] + (1 - level.alpha) * noise[None]
  estimate = source(states, level)
  each = lambda word: ((process.rate(estimate, word, states, level) if s is None else
                        process.divergence(estimate, word, states, level, process.level(s))).sum(1))
  words = jnp.broadcast_to(WORDS[:, None], (len(WORDS), *states.shape))
  nats = jax.vmap(each)(words)
  law = table[WORDS[:, None], states[None]].prod(2)
  return jnp.where(law > 0, nats * law, 0).sum(1)


def chained(process, source, steps):
  """E of the sum over the steps of a chain, nats an example, for every word."""
  grid = jnp.arange(steps + 1) / steps
  return jax.jit(jax.vmap(lambda t, s: expected_terms(process, source, t, s)))(grid[1:], grid[:-1]).sum(0)


@over('process', TOKENS)
def test_the_continuous_bound_of_tokens_is_log_p_of_every_word(process, x64):
  """int E[rate | x0] dt = -log p(x0) with the exact denoiser, by enumeration of xt and quadrature over t = u^4."""
  nodes, weight = np.polynomial.legendre.leggauss(40)
  u = (nodes + 1) / 2
  rates = jax.jit(jax.vmap(lambda t: expected_terms(process, CHAIN.denoiser(process), t)))(u**4)
  np.testing.assert_allclose((weight * 2 * u**3) @ rates, -CHAIN.log_prob(WORDS), rtol=1e-5)


@over('process', TOKENS)
def test_the_bound_of_a_chain_of_tokens_falls_to_the_entropy(process, x64):
  """The excess halves with the step; zero logits cost log V at every number of steps, to the last digit."""
  law = np.exp(CHAIN.log_prob(WORDS))
  excess = [law @ chained(process, CHAIN.denoiser(process), steps) - CHAIN.entropy for steps in (1, 8, 16, 32)]
  apart = sum(stats.entropy(row) for row in CHAIN.marginals) - CHAIN.entropy  # one step: every token on its own
  assert excess[0] == pytest.approx(apart, rel=1e-9) and 0 < excess[3] < 0.05 * apart
  np.testing.assert_allclose([excess[1] / excess[2], excess[2] / excess[3]], 2, atol=0.2)
  none = lambda x, level: Estimate(jnp.zeros((*x.shape, 3)))
  for steps in (1, 3):
    np.testing.assert_allclose(chained(process, none, steps), np.full(27, 3 * np.log(3)), rtol=1e-12)


@over('process', TOKENS)
@pytest.mark.parametrize('steps', [None, 8])
def test_the_drawn_bound_of_tokens_is_the_expected_one(process, steps):
  x0 = jax.jit(CHAIN.sample)(keys(COUNT, 5))
  entropy, oracle = CHAIN.entropy, CHAIN.denoiser(process)
  if steps:
    entropy = np.exp(CHAIN.log_prob(WORDS)) @ chained(process, oracle, steps)
  found = evaluate(bounds.variational(process, EVEN, steps=steps), oracle, x0)
  check_mean(found.total, BITS * entropy / 3, 0.06)
  assert not found.prior.any() and (steps or not found.reconstruction.any())
  if not steps:
    guess = lambda x, level, cond=None: Estimate(jnp.zeros((*x.shape, 3)))
    check_mean(evaluate(bounds.variational(process, EVEN), guess, x0).total, np.log2(3), 0.06)


def test_a_product_costs_what_its_parts_cost():
  """Sixteen numbers and three tokens that are independent: the mean over all entries of what each field costs alone."""
  process = Product({'x': Gaussian(SCHEDULES['cosine']), 'z': TOKENS['masked']})
  oracle = {'x': ENTRIES.denoiser(None), 'z': CHAIN.denoiser(TOKENS['masked'])}
  denoise = lambda x, level, cond=None: Estimate({name: oracle[name](x[name], part(level, name)).x0 for name in x})
  x0 = {'x': numbers(), 'z': jax.jit(CHAIN.sample)(keys(COUNT, 5))}
  law = times.logit_normal(0.0, 2.5, EVEN)
  found = evaluate(bounds.variational(process, law, bounds.density(), high=10.0), denoise, x0)
  check_mean(found.total, BITS * (16 * continuous(0, np.exp(10.0)) + CHAIN.entropy) / 19, 0.06)
  found = evaluate(bounds.variational(process, EVEN, bounds.density(), steps=8), denoise, x0)
  tokens = np.exp(CHAIN.log_prob(WORDS)) @ chained(TOKENS['masked'], oracle['z'], 8)
  both = 16 * stepwise(SCHEDULES['cosine'], 8, 0.0)[0] + tokens
  check_mean(found.total, BITS * both / 19, 0.06)


# Masks, errors

@pytest.mark.parametrize('steps', [None, 5])
def test_entries_that_are_not_scored_do_not_count(steps):
  process = Gaussian(SCHEDULES['cosine'])
  terms = bounds.variational(process, EVEN, bounds.density(), steps=steps)
  value = jax.jit(lambda x0, scored: terms(lambda x, level, cond=None: Estimate(0.5 * x), draw(4), x0, None, scored))
  x0, column = jax.random.normal(jax.random.key(0), (4, 3)), jnp.arange(12).reshape(4, 3) % 3
  close(value(x0, column > 0), value(jnp.where(column > 0, x0, 1e3), column > 0))
  apart = [value(x0, column == i).total for i in range(3)]
  np.testing.assert_allclose(np.mean(apart[1:], 0), value(x0, column > 0).total, rtol=1e-5)
  np.testing.assert_allclose(np.mean(apart, 0), value(x0, column >= 0).total, rtol=1e-5)


def test_the_loss_is_the_total_of_the_bound_of_its_denoiser():
  process, target, x0 = Gaussian(SCHEDULES['cosine']), targets.v(), jnp.ones((4, 3))
  network = lambda x, feature, cond: 0.3 * x
  loss = bounds.bound(process, target, EVEN, bounds.discretized(16), steps=7)
  terms = bounds.variational(process, EVEN, bounds.discretized(16), steps=7)
  both = jax.jit(lambda: (loss(network, draw(4), x0), terms(targets.denoiser(process, target, network), draw(4), x0).total))
  np.testing.assert_allclose(*both(), rtol=1e-6)


def test_bad_input_gets_a_sentence():
  gaussian, both = Gaussian(SCHEDULES['cosine']), Product({'x': Gaussian(SCHEDULES['flow']), 'z': TOKENS['masked']})
  for process in (gaussian, both):
    with pytest.raises(ValueError, match=r"A bound of a Gaussian process needs a decoder: 'density\(\)'"):
      bounds.variational(process, EVEN)
    with pytest.raises(ValueError, match='high=None is for a schedule that starts at a finite logsnr; .* high=13.3'):
      bounds.variational(process, EVEN, bounds.density(), high=None)
  for process in (gaussian, TOKENS['masked']):
    with pytest.raises(ValueError, match='A bound of discrete time needs 2 steps or more; got 1'):
      bounds.variational(process, EVEN, bounds.density(), steps=1)
  for decoder in (bounds.discretized, bounds.softmax):
    with pytest.raises(ValueError, match='A decoder of discrete data needs 2 levels or more; got 1'):
      decoder(1)
  learns = targets.learned_variance(targets.noise())
  with pytest.raises(ValueError, match=r"this target has none. Take 'learned_variance\(noise\(\)\)'"):
    bounds.hybrid(gaussian, targets.noise(), EVEN, weights.constant(), targets.noise())
  with pytest.raises(ValueError, match='A bound in continuous time does not train a variance. Give it steps=1000'):
    bounds.bound(gaussian, learns, EVEN, bounds.density())
  with pytest.raises(ValueError, match='hybrid needs 2 steps or more; got 1'):
    bounds.hybrid(gaussian, learns, EVEN, weights.constant(), targets.noise(), steps=1)
  bounds.variational(Gaussian(SCHEDULES['geometric']), EVEN, bounds.density(), high=None)


def test_a_bound_in_a_subspace_gets_a_sentence():
  with pytest.raises(ValueError, match='data in a subspace have fewer dimensions: take likelihood.log_density'):
    bounds.variational(Gaussian(SCHEDULES['cosine'], centred), times.stratified(), bounds.density())


# A learned variance

def hybrid_of(schedule, law, steps, scale, decoder=None):
  """The hybrid loss of a network that answers (prediction, u) with the noise as target, as a function of both."""
  process, target = Gaussian(schedule), targets.learned_variance(targets.noise())
  loss = bounds.hybrid(process, target, law, weights.constant(), targets.noise(), steps, scale, decoder or bounds.density())
  def value(prediction, u, draw, x0):
    return loss(lambda x, feature, cond: jnp.concatenate([prediction(x), u], -1), draw, x0)
  return value


def test_the_bound_in_hybrid_moves_the_variance_alone():
  value, plain = (hybrid_of(SCHEDULES['linear'], times.discrete(20), 20, scale) for scale in (3.0, 0.0))
  x0 = jax.random.normal(jax.random.key(4), (64, 2))
  def slopes(value):
    total = lambda bias, u: value(lambda x: 0.4 * x + bias, u, draw(64), x0).sum()
    return jax.jit(jax.grad(total, (0, 1)))(jnp.full((64, 2), 0.1), jnp.full((64, 2), 0.2))
  (bias, u), (bias_alone, u_alone) = slopes(value), slopes(plain)
  np.testing.assert_array_equal(bias, bias_alone)
  assert np.abs(bias).min() > 0 and np.abs(u).min() > 0 and not u_alone.any()


@pytest.mark.parametrize('number', [1, 2, 9])
def test_hybrid_is_least_at_the_variance_of_the_step(number):
  """With the exact mean the best variance of p(xs | xt) is that of xs given xt, worked out for normal data from the
  covariances; at the first step that of x0 given xt. And the loss is mean square + scale T bits of that normal law."""
  schedule, steps, scale = SCHEDULES['linear'], 10, 0.5
  x0, t = numbers() - MEAN, number / steps
  (a_t, s_t), (a_s, s_s) = (np.float64(schedule(jnp.asarray(max(number - up, 1) / steps))) for up in (0, 1))
  if number == 1:
    (a_u, s_u), true = np.float64(schedule(jnp.asarray(2 / steps))), mmse((a_t / s_t)**2)
    large, small = s_t**2, (s_u**2 - (a_u / a_t * s_t)**2) * s_t**2 / s_u**2
    entropy, floor = 0.0, 0.5 * np.log(2 * np.pi * np.e * true)
  else:
    a = a_t / a_s
    large = s_t**2 - (a * s_s)**2
    small = large * s_s**2 / s_t**2
    total = a_s**2 * VARIANCE + s_s**2
    true = total - (a * total)**2 / (a**2 * total + large)
    entropy = 0.5 * np.log(2 * np.pi * np.e * small)
    floor = 0.5 * np.log(2 * np.pi * np.e * true) - entropy
  best = np.log(true / small) / np.log(large / small)
  value = hybrid_of(schedule, at(t), steps, scale)
  gain = a_t * VARIANCE / (a_t**2 * VARIANCE + s_t**2)
  exact = lambda x: (1 - a_t * gain) / s_t * x
  run = jax.jit(lambda u: value(exact, jnp.full(x0.shape, u), draw(COUNT), x0))
  losses = [np.float64(run(2 * (best + change) - 1)) for change in (-0.05, 0.0, 0.05)]
  simple = (a_t / s_t)**2 * mmse((a_t / s_t)**2)
  check_mean(losses[1], simple + scale * steps * BITS * floor, 0.1)
  assert losses[0].mean() > losses[1].mean() < losses[2].mean()
  slope = (losses[2] - losses[0]) / 0.1
  curve = (losses[2] - 2 * losses[1] + losses[0]).mean() / 0.05**2
  noise = 4 * slope.std() / np.sqrt(COUNT) / curve
  assert abs(slope.mean() / curve) < 0.01 + noise < 0.1  # where the least loss lies, beside the stated fraction


def test_the_slopes_of_hybrid_are_finite_for_a_bad_network():
  """Near t = 1 an estimate of x0 from the noise is far outside the data, and the decoder is computed though not used."""
  value = hybrid_of(SCHEDULES['linear'], times.uniform(0.9, 0.9999), 1000, 1.0, bounds.discretized(256))
  x0 = jnp.zeros((64, 2))
  slope = jax.jit(jax.grad(lambda u: value(lambda x: -3 * x, u, draw(64), x0).sum()))(jnp.zeros((64, 2)))
  assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_hybrid_needs_a_target_that_lasts_to_the_end():
  with pytest.raises(ValueError, match=r'The target of hybrid is singular at t=1 \(alpha=0, sigma=1\)'):
    hybrid_of(SCHEDULES['cosine'], times.discrete(10), 10, 1.0)
