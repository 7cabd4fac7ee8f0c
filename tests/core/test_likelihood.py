"""Likelihoods: log densities of known laws on every schedule with every target, the trace, and bits of whole numbers."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate, linalg, optimize, special, stats

from diffusion_jax.core import likelihood, ode, schedules, targets
from diffusion_jax.core.likelihood import Dequantizer, Trace
from diffusion_jax.core.processes import Gaussian, centred
from diffusion_jax.core.types import Estimate, Level
from tests import oracles
from tests.core.tables import (
  ALL_SCHEDULES,
  ENTRIES,
  LAW,
  REACHING_NOISE,
  SCHEDULES,
  TARGETS,
  check_complete,
  keys,
  over,
)

TRACES = {'exact': likelihood.exact(), 'hutchinson': likelihood.hutchinson(16),
          'hutchinson(normal)': likelihood.hutchinson(16, 'normal')}
RANDOM = {name: trace for name, trace in TRACES.items() if not trace.exact}
DEQUANTIZERS = {
  'uniform_noise': likelihood.uniform_noise(),
  'logistic_normal': likelihood.logistic_normal(lambda values: (jnp.full(values.shape, 0.3), jnp.full(values.shape, -0.2))),
}
# A straight path, a curved one, without an end in pure noise, exploding, with a jump at the data, of betas, and learned.
KINDS = ('flow', 'cosine', 'linear', 'karras', 'polynomial', 'discrete(zero_snr)', 'monotone')
DATA = Level(np.zeros(()), np.ones(()), np.zeros(()))
POINTS = np.array([[0.3, -0.8], [1.9, 0.4], [-0.6, -0.2]])
TRUE = stats.multivariate_normal(LAW.mean, LAW.covariance).logpdf(POINTS)
PROCESS = Gaussian(SCHEDULES['flow'])
RK4 = ode.fixed(120)


def test_the_tables_are_complete():
  check_complete(likelihood, Trace, TRACES)
  check_complete(likelihood, Dequantizer, DEQUANTIZERS)


def score(process, denoiser, x, seed=0, cond=None, integrator=RK4, **how):
  """The likelihood of x, compiled."""
  count = len(jax.tree.leaves(x)[0])
  run = jax.jit(lambda x, cond: likelihood.log_density(
    process, denoiser, keys(count, seed), x, cond, integrator=integrator, **how))
  return run(x, cond)


def sample(law, count, seed):
  return jax.jit(lambda: law.sample(keys(count, seed)))()


def truth(law, x):
  return jax.jit(law.log_density)(x, DATA)


def exact_network(process, target, level):
  """The network whose denoiser is the law's, at this level."""
  def network(scaled, feature, cond):
    xt = scaled / target.scale(level)
    x0 = LAW.denoiser(process)(xt, level).x0
    return targets.value(process, target, level, x0, targets.noise_of(level, xt, x0))
  return network


def every_target(process):
  """A denoiser that gives each target its share of the rows, in turn, so that one program tries them all."""
  def denoise(xt, level, cond=None):
    share = lambda target, x: targets.denoiser(process, target, exact_network(process, target, level))(x, level, cond).x0
    parts = zip(TARGETS.values(), jnp.split(xt, len(TARGETS)), strict=True)
    return Estimate(jnp.concatenate([share(target, x) for target, x in parts]))
  return denoise


def carried(ends, x, high=20.0, low=-20.0):
  """(log density, z at the end) of N(0, sigma^2) carried along the flow of LAW, in numpy; `ends` as schedules.ends.

  On that flow xt / alpha - mean of a mode is in proportion to sqrt(variance + r^2), r = sigma / alpha.
  """
  variances, axes = LAW.modes
  near, far = np.exp(-min(ends[0], high)), np.exp(-max(ends[1], low))  # r^2 at the ends of the way
  stretch = np.sqrt((variances + near) / (variances + far))
  mean, x = np.asarray(LAW.mean) @ axes, np.asarray(x) @ axes
  latent = (mean + (x - mean) / stretch) / np.sqrt(1 + far)
  return stats.norm.logpdf(x, mean * (1 - stretch), stretch * np.sqrt(far)).sum(1), latent @ axes.T


def every_target_on(schedule):
  """(log densities [targets, B] of the points, what they should be [targets, B])"""
  process, x = Gaussian(schedule), np.tile(POINTS, (len(TARGETS), 1))
  def both(x):
    found = likelihood.log_density(process, every_target(process), keys(len(x)), x, integrator=RK4)
    tiny = jnp.finfo(jnp.result_type(float)).tiny
    return found.log_density, schedules.logsnr_of(schedule, jnp.array([tiny, 1.0]))
  found, ends = jax.jit(both)(x)
  return np.asarray(found, np.float64).reshape(len(TARGETS), -1), np.tile(carried(ends, POINTS)[0], (len(TARGETS), 1))


def check_every_target_on(schedule):
  """In nats a dimension: 1e-5 from the law that the ODE defines, 1e-4 from that of the data where all noise is reached."""
  found, model = every_target_on(schedule)
  print(f'{np.abs(found - model).max() / 2:.1e} from the model, {np.abs(found - TRUE).max() / 2:.1e} from the data')
  np.testing.assert_allclose(found, model, atol=2e-5)
  if schedule in REACHING_NOISE.values():
    np.testing.assert_allclose(found, np.tile(TRUE, (len(TARGETS), 1)), atol=2e-4)


@over('schedule', {name: ALL_SCHEDULES[name] for name in KINDS})
def test_the_log_density_of_every_target(schedule, x64):
  check_every_target_on(schedule)


@pytest.mark.slow
@over('schedule', {name: schedule for name, schedule in ALL_SCHEDULES.items() if name not in KINDS})
def test_the_log_density_of_every_target_on_the_other_schedules(schedule, x64):
  check_every_target_on(schedule)


@over('schedule', {name: ALL_SCHEDULES[name] for name in ('flow', 'laplace', 'monotone')})
def test_single_precision(schedule):
  """Within 5e-4 nats a dimension, `laplace` too, whose last 12 nats lie between the last two numbers before t = 1."""
  found, model = every_target_on(schedule)
  print(f'{np.abs(found - model).max() / 2:.1e} nats a dimension')
  np.testing.assert_allclose(found, model, atol=1e-3)


def test_a_part_of_the_way(x64):
  """What is scored is data with noise of variance exp(-high), under the prior at `low`."""
  def several(x):
    run = lambda high, low: likelihood.log_density(
      PROCESS, LAW.denoiser(PROCESS), keys(3), x, integrator=RK4, high=high, low=low)
    return [run(*part) for part in parts]
  parts = [(3.0, -4.0), (1.0, -20.0)]
  for found, part in zip(jax.jit(several)(POINTS), parts, strict=True):
    density, latent = carried((np.inf, -np.inf), POINTS, *part)
    np.testing.assert_allclose(found.log_density, density, atol=1e-6)
    np.testing.assert_allclose(found.latent, latent, atol=1e-6)
    assert found.each.shape == (3, 1) and int(found.calls) == 480


def mixture(size):
  """Three overlapping clouds, narrow to wide."""
  means = np.random.default_rng(size).normal(0, 1 / np.sqrt(size), (3, size))
  return oracles.Mixture([0.2, 0.5, 0.3], means, [0.1, 0.4, 1.0])


@pytest.mark.parametrize('size', [1, 2, 8, 64])
def test_mixtures_in_many_dimensions(size, x64):
  law = mixture(size)
  x = sample(law, 6, 3)
  found = score(PROCESS, law.denoiser(PROCESS), x, integrator=ode.adaptive() if size == 2 else RK4)
  off = np.abs(found.log_density - truth(law, x)) / size
  print(f'{off.max():.1e} nats a dimension, {found.calls} calls')
  assert off.max() < 1e-4


def test_a_mixture_in_64_dimensions_by_hutchinson(x64):
  """One probe an example: the mean over examples is within 4 standard errors of that of the true densities."""
  law = mixture(64)
  x = sample(law, 200, 3)
  found = score(PROCESS, law.denoiser(PROCESS), x, trace=likelihood.hutchinson())
  off = np.asarray(found.log_density - truth(law, x))
  print(f'{off.mean():.3f} nats, standard error {off.std() / np.sqrt(200):.3f}')
  assert abs(off.mean()) < 4 * off.std() / np.sqrt(200) < 0.5
  assert off.std() > 0.01


def correlated(size):
  root = np.random.default_rng(0).normal(0, 0.5 / np.sqrt(size), (size, size))
  return oracles.Gaussian(np.linspace(-0.5, 0.5, size), root @ root.T + 0.05 * np.eye(size))


def test_images_and_trees(x64):
  """A law under which all entries depend on each other, whatever the shape of the data."""
  law = correlated(12)
  x = sample(law, 3, 4)
  image = score(PROCESS, law.denoiser(PROCESS), x.reshape(3, 2, 2, 3))
  fold = lambda flat: {'a': flat[:, 0], 'b': [flat[:, 1:5].reshape(-1, 2, 2), flat[:, 5:]]}
  flatten = lambda tree: jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], 1)
  denoise = lambda x, level, cond: Estimate(fold(law.denoiser(PROCESS)(flatten(x), level).x0))
  tree = score(PROCESS, denoise, fold(x))
  for found in (image, tree):
    np.testing.assert_allclose(found.log_density, truth(law, x), atol=12e-4)
  np.testing.assert_allclose(flatten(tree.latent), image.latent.reshape(3, 12), atol=1e-9)


def test_conditions_belong_to_their_rows(x64):
  """Under the condition c the law is moved by c."""
  def denoise(x, level, cond):
    shifted = LAW.denoiser(PROCESS)(x - level.alpha * cond['shift'], level).x0
    return Estimate(shifted + cond['shift'])
  x, shift = sample(LAW, 4, 5), jnp.arange(8.0).reshape(4, 2) / 4
  found = score(PROCESS, denoise, x, cond={'shift': shift})
  np.testing.assert_allclose(found.log_density, truth(LAW, x - shift), atol=1e-3)


@over('trace', {'exact': likelihood.exact(), 'rademacher': likelihood.hutchinson(),
                'normal': likelihood.hutchinson(1, 'normal')})
def test_centred_clouds_are_scored_in_their_subspace(trace, x64):
  """The density of the coordinates in an orthonormal basis of the clouds without centre, of dimension (points - 1) axes."""
  process, count = Gaussian(SCHEDULES['cosine'], centred), 300
  law = oracles.Clouds([0.4, 0.6], np.array(centred(jax.random.normal(jax.random.key(6), (2, 4, 2)))), 0.3)
  x = sample(law, count, 7)
  def network(scaled, feature, cond):
    level = process.level(feature[0] / 1000)
    return law.denoiser(process)(scaled, level).x0 + 0.7  # which the projection takes away
  found = score(process, targets.denoiser(process, targets.x0(), network), x, trace=trace)
  basis = linalg.helmert(4)
  of_each = stats.norm.logpdf((basis @ np.asarray(x))[:, None], (basis @ law.templates)[None], law.std).sum((2, 3))
  off = np.asarray(found.log_density) - special.logsumexp(of_each, 1, b=law.weights)
  print(f'{off.mean():.4f} nats, {off.std():.4f} an example')
  assert abs(off.mean()) < 4 * off.std() / np.sqrt(count) + 1e-4
  if trace.exact:
    np.testing.assert_allclose(off, 0, atol=6e-4)


@over('trace', RANDOM)
def test_random_traces_are_unbiased_and_their_errors_honest(trace, x64):
  """The mean over all within 4 standard errors; of 16 probes an example, mean over standard error has Student's law."""
  law, count = correlated(8), 300
  x = jnp.broadcast_to(sample(law, 1, 8), (count, 8))
  each = np.asarray(score(PROCESS, law.denoiser(PROCESS), x, trace=trace).each)
  true = float(score(PROCESS, law.denoiser(PROCESS), x[:1]).log_density[0])
  assert each.shape == (count, 16)
  error = each.std() / np.sqrt(each.size)
  print(f'{each.mean() - true:.4f} nats, standard error {error:.4f}, {each.std():.3f} a probe')
  assert abs(each.mean() - true) < 4 * error < 0.5
  scores = (each.mean(1) - true) / (each.std(1, ddof=1) / 4)
  assert stats.kstest(scores, stats.t(15).cdf).pvalue > 1e-3


def test_rademacher_is_exact_for_a_jacobian_with_equal_diagonal(x64):
  """Every e has e^T e = n; normal probes have not."""
  x = jax.random.normal(jax.random.key(9), (5, 6))
  run = lambda trace: np.asarray(score(PROCESS, ENTRIES.denoiser(PROCESS), x, trace=trace).each)
  exact = run(likelihood.exact())
  np.testing.assert_allclose(run(likelihood.hutchinson(3)), np.repeat(exact, 3, 1), atol=1e-9)
  assert np.abs(run(likelihood.hutchinson(3, 'normal')) - exact).min() > 1e-3


def test_an_example_s_probes_are_its_own():
  """They follow its key, whatever else is in the batch."""
  law = correlated(8)
  x = sample(law, 5, 8)
  denoise, trace = law.denoiser(PROCESS), likelihood.hutchinson(2)
  run = jax.jit(lambda keys, x: likelihood.log_density(PROCESS, denoise, keys, x, trace=trace, integrator=RK4).each)
  whole, part = run(keys(5), x), run(keys(5)[2:4], x[2:4])
  np.testing.assert_allclose(whole[2:4], part, atol=1e-4)
  assert np.ptp(run(keys(5), jnp.tile(x[:1], (5, 1)))) > 0.1


def test_half_precision_data_are_scored_in_single():
  x = jnp.asarray(POINTS, jnp.bfloat16)
  run = lambda x: [likelihood.log_density(PROCESS, LAW.denoiser(PROCESS), keys(3), x, trace=trace, integrator=RK4).each
                   for trace in TRACES.values()]
  exact, *others = jax.jit(run)(x)
  np.testing.assert_allclose(exact[:, 0], truth(LAW, x.astype(jnp.float32)), atol=2e-3)
  assert all(each.dtype == jnp.float32 and np.isfinite(each).all() for each in (exact, *others))


@pytest.mark.parametrize('probes, law', [(0, 'normal'), (1, 'uniform')])
def test_bad_probes_get_a_sentence(probes, law):
  with pytest.raises(ValueError) as error:
    likelihood.hutchinson(probes, law)
  assert str(error.value) == ("hutchinson needs probes >= 1 and the law 'rademacher' or 'normal'; "
                              f'got {probes}, {law!r}.')


# One number with a density that varies within a bin.
LINE = oracles.Mixture([0.35, 0.65], [[-0.5], [0.4]], [0.15, 0.3])
REPEATS = 300


def density(x):
  return stats.norm.pdf(x, [-0.5, 0.4], [0.15, 0.3]) @ [0.35, 0.65]


def bin_of(value, levels):
  """The ends of its bin, whose middle is -1 + 2 value / (levels - 1)."""
  middle, half = -1 + 2 * value / (levels - 1), 1 / (levels - 1)
  return middle - half, middle + half


def least_bits(value, levels):
  """-log2 P(value), which no bound can beat."""
  low, high = (stats.norm.cdf(x, [-0.5, 0.4], [0.15, 0.3]) @ [0.35, 0.65] for x in bin_of(value, levels))
  return -np.log2(high - low)


def uniform_bits(value, levels):
  """E[-log2 p(x)] - log2 w for x uniform in its bin of width w, by quadrature."""
  low, high = bin_of(value, levels)
  return integrate.quad(lambda x: -np.log2(density(x)), low, high)[0] / (high - low) - np.log2(high - low)


def logistic_bits(moments, value, levels):
  """E[log2 q(u) - log2 p(x)] - log2 w for logit u ~ N(mean, std^2), by Gauss and Hermite's quadrature."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(60)
  logit = moments[0] + np.exp(moments[1]) * nodes
  u, (low, high) = special.expit(logit), bin_of(value, levels)
  log_q = stats.norm.logpdf(nodes) - moments[1] - np.log(u * (1 - u))
  values = log_q / np.log(2) - np.log2(density((low + (high - low) * u)[:, None]))
  return weights @ values / np.sqrt(2 * np.pi) - np.log2(high - low)


def measure(values, levels, denoiser=LINE.denoiser(PROCESS), **how):
  """Bits, compiled."""
  run = jax.jit(lambda keys, values: likelihood.bits(PROCESS, denoiser, keys, values, levels, integrator=RK4, **how))
  return np.asarray(run(keys(len(values), 11), values))


def check_bits(found, expected, least):
  """The mean of every row of `found` within 4 standard errors of what is expected, which is no less than the least."""
  mean, error = found.mean(1), found.std(1) / np.sqrt(found.shape[1])
  print(f'off {mean - expected}, standard errors {error}, above the least by {expected - least}')
  assert (np.abs(mean - expected) < 4 * error + 2e-4).all()
  assert (expected > np.array(least) - 1e-9).all() and (mean > np.array(least) - 4 * error - 2e-4).all()


@pytest.mark.parametrize('levels, values', [(2, [0, 1]), (17, [3, 8, 12]), (256, [60, 128, 180])])
def test_bits_are_the_expected_bits_of_the_density(levels, values, x64):
  """They bound -log2 P(value), and with 256 levels are within 1e-3 bits of it."""
  found = measure(np.repeat(values, REPEATS), levels)
  assert found.shape == (REPEATS * len(values), 1)
  expected, least = ([function(value, levels) for value in values] for function in (uniform_bits, least_bits))
  check_bits(found.reshape(len(values), REPEATS), np.array(expected), least)
  if levels == 256:
    np.testing.assert_allclose(expected, least, atol=2e-3)


def test_the_best_logistic_normal_noise_saves_bits(x64):
  """The moments of every value are those that need the fewest bits by quadrature."""
  levels, values = 5, np.array([1, 2, 3])
  best = np.array([optimize.minimize(logistic_bits, [0, 0], (value, levels), method='Nelder-Mead').x for value in values])
  table = jnp.asarray(np.concatenate([np.zeros((1, 2)), best]))
  dequantizer = likelihood.logistic_normal(lambda values: (table[values, 0], table[values, 1]))
  found = measure(np.repeat(values, 2000), levels, dequantizer=dequantizer).reshape(3, 2000)
  expected = np.array([logistic_bits(*each, levels) for each in zip(best, values, strict=True)])
  check_bits(found, expected, [least_bits(value, levels) for value in values])
  saved = np.array([uniform_bits(value, levels) for value in values]) - found.mean(1)
  print(f'saved {saved}')
  assert saved.mean() > 4 * np.sqrt(found.var(1).mean() / found.size)


@over('dequantizer', DEQUANTIZERS)
def test_the_law_of_dequantization_is_the_stated_one(dequantizer, x64):
  """u has its law; exp(log q) is that law's density, and integrates to one along the sorted draws."""
  u, log_q = map(np.asarray, dequantizer(keys(3000), jnp.zeros(3000, int)))
  law = stats.norm(0.3, np.exp(-0.2))
  flat = dequantizer is DEQUANTIZERS['uniform_noise']
  assert stats.kstest(u, stats.uniform.cdf if flat else lambda u: law.cdf(special.logit(u))).pvalue > 1e-3
  np.testing.assert_allclose(np.exp(log_q), 1 if flat else law.pdf(special.logit(u)) / (u * (1 - u)), rtol=1e-9)
  order = np.argsort(u)
  np.testing.assert_allclose(np.trapezoid(np.exp(log_q)[order], u[order]), 1, atol=5e-3)


@over('dequantizer', DEQUANTIZERS)
def test_noise_belongs_to_entries_and_examples(dequantizer):
  values = jnp.zeros((4, 2, 3), int)
  u, log_q = dequantizer(keys(4), values)
  assert u.shape == (4, 2, 3) and log_q.shape == (4,)
  assert len(np.unique(u)) == 24 and (u > 0).all() and (u < 1).all()
  np.testing.assert_array_equal(dequantizer(keys(4)[1:2], values[1:2])[0], u[1:2])


def test_bits_of_images_are_the_mean_over_entries():
  """In single precision, with entries that are independent of each other."""
  values = np.random.default_rng(0).integers(4, 15, (2, 2, 3))
  expected = lambda value: integrate.quad(lambda u: -stats.norm.logpdf((value + u - 0.5) / 8 - 1, 0.4, 0.6), 0, 1)[0]
  expected = np.mean([expected(value) for value in values.ravel()]) / np.log(2) - np.log2(1 / 8)
  found = measure(np.tile(values[None], (REPEATS, 1, 1, 1)), 17, ENTRIES.denoiser(PROCESS), trace=likelihood.hutchinson())
  error = found.std() / np.sqrt(REPEATS)
  print(f'{found.mean() - expected:.5f} bits an entry, standard error {error:.5f}')
  assert abs(found.mean() - expected) < 4 * error < 0.05


def test_draws_are_columns(x64):
  """[B, draws]: probes that are exact here do not add to them, and the draws differ."""
  values = np.arange(8).reshape(4, 2)
  one, two = (measure(values, 9, ENTRIES.denoiser(PROCESS), trace=likelihood.hutchinson(n), draws=3) for n in (1, 2))
  assert one.shape == two.shape == (4, 3)
  np.testing.assert_allclose(one, two, atol=1e-9)
  assert (np.abs(np.diff(one, axis=1)) > 1e-4).all()


def test_the_error_of_draws_holds_the_noise_that_probes_share(x64):
  """Over 100 repetitions with eight probes a draw the stated error is the spread that is seen, within 4 of its errors."""
  values = np.tile(np.arange(8) % 5, (4, 1))
  many, probes = np.repeat(values, 100, 0), likelihood.hutchinson(8)
  found = np.asarray(measure(many, 5, ENTRIES.denoiser(PROCESS), trace=probes, draws=2))
  each = found.reshape(4, 100, 2)
  seen = each.mean((0, 2)).std(ddof=1)
  stated = np.sqrt(np.mean(np.square(jax.vmap(likelihood.summary, 1)(jnp.asarray(each)).error_draws)))
  assert abs(stated / seen - 1) < 4 * np.sqrt(1 / 200 + 1 / 800)


@pytest.mark.parametrize('levels, draws', [(1, 1), (256, 0)])
def test_bad_levels_and_draws_get_a_sentence(levels, draws):
  with pytest.raises(ValueError) as error:
    likelihood.bits(PROCESS, ENTRIES.denoiser(PROCESS), keys(1), jnp.zeros(1, int), levels, draws=draws)
  assert str(error.value) == f'bits needs levels >= 2 and draws >= 1; got {levels} and {draws}.'


def test_the_errors_of_a_summary_cover_the_truth(x64):
  """Of 2000 experiments 95 % have the mean of the law within 2.01 errors (Student's, 49 degrees of freedom), and the mean
  over these very data within 1.98 errors of the draws; with one draw nothing is known of them."""
  data, noise = np.random.default_rng(0).normal(size=(2000, 50, 1)), np.random.default_rng(1).normal(size=(2000, 50, 4))
  mean, error, inner = jax.jit(jax.vmap(likelihood.summary))(3 + data + 1.5 * noise)
  np.testing.assert_allclose(mean, (3 + data + 1.5 * noise).mean((1, 2)), rtol=1e-9)
  for truth, width in ((3, 2.01 * error), (3 + data.mean((1, 2)), 1.98 * inner)):
    covered = np.mean(np.abs(mean - truth) < width)
    print(f'{covered:.3f} covered')
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)
  alone = likelihood.summary(jnp.asarray(data[0]))
  assert float(alone.error_draws) == 0
  np.testing.assert_allclose(alone.error, stats.sem(data[0, :, 0]), rtol=1e-9)
