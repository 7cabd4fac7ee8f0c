"""Times: densities that integrate to one, samples that follow them, and no trace of how the batch is cut."""
from collections import defaultdict, deque
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats
from scipy.special import expit, logit

from diffusion_jax.core import times
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.times import Adaptive, Times
from diffusion_jax.core.types import Draw
from tests.core.tables import ALL_SCHEDULES, SCHEDULES, TIMES, check_complete, draw

COUNT = 4000
COSINE, FLOW = (Gaussian(SCHEDULES[name]) for name in ('cosine', 'flow'))
ADAPTIVE = {'importance': times.importance()}
# Dense at both ends: laplace has much of its mass at 1 - t < 1e-6, karras at sigma_max = 80 that of lognormal at t < 0.1.
EDGES = np.unique(np.concatenate([[0], expit(np.linspace(-37, 36, 2001)), np.linspace(0, 1, 1001)]))
# The schedules on which a law is tried: laws of t do not ask for it, and shifts need one that ends at noise.
RANGES = ('linear', 'karras', 'flow', 'geometric')
ON = {'lognormal': (*RANGES, 'laplace', 'sigmoid', 'cauchy', 'discrete'), 'log_uniform': RANGES,
      'cosine_interpolated': RANGES, 'shift': ('cosine', 'path'), 'dimension_shift': ('flow',)}


def test_the_tables_are_complete():
  check_complete(times, Times, TIMES)
  check_complete(times, Adaptive, ADAPTIVE)


def follows(law, names):
  """The samples of a law are in (0, 1] and have its density, which integrates to 1."""
  middles = (EDGES[1:] + EDGES[:-1]) / 2
  def both(key, t):
    processes = {name: Gaussian(ALL_SCHEDULES[name]) for name in names}
    whole = Draw(key, jnp.arange(COUNT), COUNT)
    return {name: (law.sample(process, whole), law.density(process, t)) for name, process in processes.items()}
  for name, (t, density) in jax.jit(both)(jax.random.key(0), middles).items():
    t, mass = np.asarray(t), np.asarray(density) * np.diff(EDGES)
    assert abs(mass.sum() - 1) < 3e-3 and (mass >= 0).all(), name
    assert t.shape == (COUNT,) and (t > 0).all() and (t <= 1).all(), name
    assert stats.kstest(t, lambda at, mass=mass: np.interp(at, EDGES, np.append(0, np.cumsum(mass)))).pvalue > 1e-3, name


@pytest.mark.parametrize('name', [name for name in TIMES if name != 'discrete'])
def test_samples_follow_the_density(name, x64):
  follows(TIMES[name], ON.get(name, ('cosine',)))


@pytest.mark.parametrize('law', [
  times.lognormal(0.0, 6.0), times.log_uniform(1e-5, 1e5), times.cosine_interpolated(64, 256, 64)])
def test_a_law_wider_than_the_schedule_is_conditioned_on_its_range(law, x64):
  follows(law, ('karras', 'geometric'))


def levels(law, names):
  """The levels of COUNT samples of a law, in single precision, on some schedules."""
  def each(key):
    whole, processes = Draw(key, jnp.arange(COUNT), COUNT), {name: Gaussian(ALL_SCHEDULES[name]) for name in names}
    return {name: process.level(law.sample(process, whole)) for name, process in processes.items()}
  return jax.tree.map(lambda entry: np.asarray(entry, np.float64), jax.jit(each)(jax.random.key(0)))


def test_a_wide_lognormal_is_a_truncated_normal():
  ends = {'geometric': np.log([0.01, 50]), 'monotone': (-6.65, 2.5)}  # of log(sigma / alpha)
  for name, (_, alpha, sigma) in levels(times.lognormal(-1.0, 3.0), ends).items():
    (low, high), half = ends[name], np.log(sigma / alpha)
    assert stats.kstest(half, stats.truncnorm((low + 1) / 3, (high + 1) / 3, -1, 3).cdf).pvalue > 1e-3, name
    assert low - 1e-5 < half.min() and half.max() < high + 1e-5, name


def test_lognormal_is_lognormal_in_sigma_over_alpha():
  on = levels(times.lognormal(-0.5, 0.8), ('linear', 'karras', 'flow', 'laplace', 'discrete'))
  for name, (_, alpha, sigma) in on.items():
    assert stats.kstest(np.log(sigma / alpha), stats.norm(-0.5, 0.8).cdf).pvalue > 1e-3, name


U = np.linspace(0, 1, 10001)[1:-1]


def falling(values):
  """The distribution function of a falling function of a uniform number, from its values at U."""
  return lambda x: np.interp(x, values[::-1], 1 - U[::-1])


@pytest.mark.parametrize('law, statistic, cdf', [
  (times.logit_normal(0.3, 0.8), lambda level: logit(level.t), stats.norm(0.3, 0.8).cdf),
  (times.log_uniform(0.02, 20.0), lambda level: np.log(level.sigma / level.alpha),
   stats.uniform(np.log(0.02), np.log(1000)).cdf),
  (times.mode(1.29), lambda level: level.t, falling(1 - U - 1.29 * (np.cos(np.pi * U / 2)**2 - 1 + U))),
  (times.mode(-0.7), lambda level: level.t, falling(1 - U + 0.7 * (np.cos(np.pi * U / 2)**2 - 1 + U))),
  (times.cosmap(), lambda level: 1 - level.t, falling(1 / (np.tan(np.pi * U / 2) + 1))),
  (times.cosine_interpolated(128, 32, 256), lambda level: 2 * np.log(level.alpha / level.sigma), falling(
    U * (-2 * np.log(np.tan(np.pi * U / 2)) + 2 * np.log(32 / 128))
    + (1 - U) * (-2 * np.log(np.tan(np.pi * U / 2)) + 2 * np.log(256 / 128)))),
])
def test_a_law_is_the_paper_s(law, statistic, cdf):
  """In single precision, against scipy and the papers' quantiles."""
  (level,) = levels(law, ['flow']).values()
  assert stats.kstest(statistic(level), cdf).pvalue > 1e-3


@pytest.mark.parametrize('steps', [1, 50])
@pytest.mark.parametrize('base', [times.uniform(), times.stratified()])
def test_discrete_times_are_even_on_the_steps(base, steps):
  """Its density is that of the limit, 1."""
  law = times.discrete(steps, base)
  t = np.asarray(law.sample(COSINE, draw(COUNT)), np.float64)
  number = np.round(t * steps).astype(int)
  np.testing.assert_allclose(t, number / steps, rtol=1e-6)
  counts = np.bincount(number, minlength=steps + 1)
  assert len(counts) == steps + 1 and counts[0] == 0
  if steps > 1:
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
  np.testing.assert_array_equal(law.density(COSINE, jnp.asarray(t)), 1)


def test_lognormal_on_flow_is_logit_normal():
  t = np.linspace(0.05, 0.95, 19)
  expected = stats.norm.pdf(np.log(t / (1 - t)), 0.3, 0.9) / (t * (1 - t))
  for law in (times.lognormal(0.3, 0.9), times.logit_normal(0.3, 0.9)):
    np.testing.assert_allclose(law.density(FLOW, jnp.array(t)), expected, rtol=1e-4)


@pytest.mark.parametrize('law', [times.shift(times.uniform(), 3.0), times.dimension_shift(times.uniform(), 9 * 4096)])
def test_shift_on_flow_is_that_of_stable_diffusion_3(law, x64):
  """t' = 3 t / (1 + 2 t) (arXiv:2403.03206, eq. 23), whose inverse has the slope 3 / (3 - 2 t')^2."""
  t = np.asarray(times.uniform().sample(FLOW, draw(100)))
  np.testing.assert_allclose(law.sample(FLOW, draw(100)), 3 * t / (1 + 2 * t), atol=1e-9)
  np.testing.assert_allclose(law.density(FLOW, jnp.array(t)), 3 / (3 - 2 * t)**2, rtol=1e-9)


@pytest.mark.parametrize('name, factor', [
  ('linear', 2.0), ('karras', 2.0), ('geometric', 2.0), ('geometric', 0.5), ('polynomial', 0.5)])
def test_a_shift_beyond_an_end_is_an_error(name, factor):
  """No t has the logsnr that the shift asks for; clamped to the end it would have a mass there and no density."""
  with pytest.raises(ValueError, match=f'shift by {factor} needs {"lower" if factor > 1 else "higher"} logsnr than the'):
    times.shift(times.uniform(), factor).sample(Gaussian(ALL_SCHEDULES[name]), draw(16))


def test_a_time_belongs_to_its_row():
  key, index = jax.random.key(0), jnp.arange(12)
  sample = jax.jit(lambda index: {name: law.sample(COSINE, Draw(key, index, 12)) for name, law in TIMES.items()})
  together = sample(index)
  for rows in (slice(0, 6), slice(6, 12), slice(1, None, 2)):
    for name, part in sample(index[rows]).items():
      # A last bit: XLA's log depends on the place in the vector.
      np.testing.assert_allclose(part, together[name][rows], atol=2e-7, err_msg=name)


@pytest.mark.parametrize('name', ['uniform', 'lognormal'])
def test_rows_are_independent_and_keys_differ(name):
  t, other = (np.asarray(TIMES[name].sample(COSINE, draw(COUNT, seed))) for seed in (0, 1))
  assert len(np.unique(t)) > 0.99 * COUNT
  for a, b in ((t[1:], t[:-1]), (t, other)):
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(COUNT)


BASED = {
  'discrete': partial(times.discrete, 9), 'mode': partial(times.mode, 0.8), 'lognormal': partial(times.lognormal, 0.4, 1.0),
  'log_uniform': partial(times.log_uniform, 0.02, 20.0), 'logit_normal': partial(times.logit_normal, 0.3, 0.8),
  'cosmap': times.cosmap, 'cosine_interpolated': partial(times.cosine_interpolated, 64, 32, 64)}


@pytest.mark.parametrize('name', BASED)
def test_every_law_can_be_spread_over_the_batch(name):
  """The variance of a batch's mean of t, of 16 rows: that of strata is of the order of 1 / 16 of independent rows."""
  def mean(key, base):
    return BASED[name](base=base).sample(FLOW, Draw(key, jnp.arange(16), 16)).mean()
  bases = times.uniform(), times.stratified(), times.antithetic()
  every = jax.jit(lambda keys: [jax.vmap(partial(mean, base=base))(keys) for base in bases])
  means = every(jax.random.split(jax.random.key(0), 400))
  alone, strata, pairs = (np.var(np.asarray(each, np.float64)) for each in means)
  assert strata < 0.15 * alone and pairs < 0.4 * alone
  np.testing.assert_allclose(np.mean(means[1]), np.mean(means[0]), atol=5 * np.sqrt(alone / 400))


@pytest.mark.parametrize('band', [(0.0, 1.0), (0.2, 0.6)])
def test_antithetic_pairs_lie_evenly_about_the_middle(band):
  t = np.asarray(times.antithetic(*band).sample(COSINE, draw(2 * COUNT)))
  np.testing.assert_allclose(t[::2] + t[1::2], sum(band), atol=2e-7)
  assert stats.kstest(t[::2], stats.uniform(band[0], band[1] - band[0]).cdf).pvalue > 1e-3
  assert len(np.unique(t[::2])) > 0.99 * COUNT


def test_the_logs_of_an_antithetic_lognormal_do_too():
  level = FLOW.level(times.lognormal(-0.4, 1.0, times.antithetic()).sample(FLOW, draw(100)))
  half = -0.5 * np.asarray(level.logsnr)
  np.testing.assert_allclose(half[::2] + half[1::2], -0.8, atol=1e-4)


@pytest.mark.parametrize('scale', [-1.0, -0.99, 0.0, 1.7519])
def test_the_times_of_mode_never_leave_the_schedule(scale):
  """At scale -1, t = sin^2(pi (1 - u) / 2) is as small as 1e-11; a sum of ones and cosines has no digits left there."""
  t = np.asarray(times.mode(scale).sample(FLOW, draw(2**17)))
  assert (t > 0).all() and (t <= 1).all()


@pytest.mark.parametrize('band', [(0.0, 1.0), (0.2, 0.6)])
def test_stratified_times_are_evenly_spaced(band):
  process, law = Gaussian(SCHEDULES['cosine']), times.stratified(*band)
  width, low = band[1] - band[0], band[0]
  t = np.sort(law.sample(process, draw(16)))
  np.testing.assert_allclose(np.diff(np.append(t, t[0] + width)), width / 16, atol=1e-6)
  assert low < t[0] and t[-1] <= band[1]
  assert (np.sort(law.sample(process, draw(16, 1))) != t).all()


def test_the_band_is_kept_and_its_upper_end_is_reached():
  law, process = times.uniform(0.1, 0.9), Gaussian(SCHEDULES['cosine'])
  t = np.asarray(law.sample(process, draw(COUNT)))
  assert 0.1 < t.min() < 0.102 and 0.898 < t.max() <= 0.9
  np.testing.assert_allclose(law.density(process, jnp.array([0.05, 0.5, 0.95])), [0, 1.25, 0], rtol=1e-6)


@pytest.fixture
def known():
  """An importance law of 6 steps whose history holds known losses, and their root mean squares."""
  law, rng = times.importance(6, 4, 0.06), np.random.default_rng(0)
  losses = rng.gamma(2.0, size=(4, 6)) * np.arange(1, 7)**2
  state = law.init()
  for row in losses:
    state = law.update(state, jnp.arange(1, 7) / 6, jnp.asarray(row, jnp.float32))
  return law, state, np.sqrt(np.mean(losses**2, 0))


def test_importance_is_in_proportion_to_the_root_mean_square_of_the_losses(known):
  """arXiv:2102.09672, sec. 3.3, with a share of 0.06 that stays uniform."""
  law, state, root = known
  chances = 0.94 * root / root.sum() + 0.01
  np.testing.assert_allclose(law.times(state).density(COSINE, jnp.arange(1, 7) / 6), 6 * chances, rtol=1e-5)
  t = np.asarray(law.times(state).sample(COSINE, draw(COUNT)))
  assert stats.chisquare(np.bincount(np.round(6 * t).astype(int), minlength=7)[1:], COUNT * chances).pvalue > 1e-3


def test_importance_changes_the_variance_and_not_the_mean(known):
  law, state, root = known
  drawn = law.times(state)
  t = drawn.sample(COSINE, draw(COUNT))
  loss = root[np.round(6 * np.asarray(t)).astype(int) - 1]
  weighted = loss / np.asarray(drawn.density(COSINE, t))
  assert abs(weighted.mean() - root.mean()) < 4 * weighted.std() / np.sqrt(COUNT)
  assert weighted.std() < 0.1 * root.std()


def test_importance_is_uniform_until_every_step_has_its_history():
  law = times.importance(5, 4)
  state = law.init()
  for _ in range(3):
    state = law.update(state, jnp.arange(1, 6) / 5, jnp.arange(5.0))
  state = law.update(state, jnp.arange(1, 5) / 5, jnp.full(4, 9.0))  # step 5 has one less
  np.testing.assert_allclose(law.times(state).density(COSINE, jnp.arange(1, 6) / 5), 1, rtol=1e-6)
  counts = np.bincount(np.round(5 * np.asarray(law.times(state).sample(COSINE, draw(COUNT)))).astype(int), minlength=6)
  assert counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > 1e-3


@pytest.mark.parametrize('loss', [np.inf, np.nan])
def test_importance_survives_a_loss_that_is_not_finite(loss):
  law, t = times.importance(3, 2), np.float32([1, 2, 3, 1, 2, 3]) / 3
  update, density = jax.jit(law.update), jax.jit(lambda state: law.times(state).density(COSINE, jnp.asarray(t[:3])))
  state = update(law.init(), t, jnp.ones(6))
  state = update(state, t, jnp.array([1.0, loss, 1, 1, 1, 1]))
  np.testing.assert_allclose(density(state), 1, rtol=1e-6)
  state = update(state, t, jnp.array([1.0, 4, 1, 1, 4, 1]))
  np.testing.assert_allclose(density(state), [0.5, 2, 0.5], rtol=2e-3)


@pytest.mark.parametrize('steps, history, batch', [(4, 3, 16), (30, 5, 16), (1000, 10, 64)])
def test_the_history_is_that_of_a_queue(steps, history, batch):
  """The last losses of each step, in the order of the rows, also where a batch has a step more often than it is long."""
  rng, law = np.random.default_rng(1), times.importance(steps, history)
  state, update = law.init(), jax.jit(law.update)
  queues, counts = defaultdict(partial(deque, maxlen=history)), np.zeros(steps)
  for i in range(12):
    step, losses = rng.integers(steps, size=batch), np.float32(rng.uniform(1, 2, batch))
    state = update(state, jnp.asarray((step + 1) / steps, jnp.float32), jnp.asarray(losses))
    for a, b in zip(step, losses, strict=True):
      queues[a].append(b)
      counts[a] += 1
    np.testing.assert_array_equal(state['count'], counts)
    for a, row in enumerate(np.asarray(state['losses'])):
      np.testing.assert_array_equal(np.sort(row[row > 0]), np.sort(queues[a]), err_msg=f'batch {i}, step {a}')


@pytest.mark.parametrize('call, sentence', [
  (lambda: times.uniform(0.5, 0.5), 'times need 0 <= t_min < t_max <= 1; got t_min=0.5, t_max=0.5.'),
  (lambda: times.stratified(-0.1, 1.0), 'times need 0 <= t_min < t_max <= 1; got t_min=-0.1, t_max=1.0.'),
  (lambda: times.uniform(0.0, 1.1), 'times need 0 <= t_min < t_max <= 1; got t_min=0.0, t_max=1.1.'),
  (lambda: times.discrete(0), 'discrete needs steps >= 1; got 0.'),
  (lambda: times.lognormal(0.0, 0.0), 'lognormal needs std > 0; got 0.0.'),
  (lambda: times.logit_normal(0.0, -1.0), 'logit_normal needs std > 0; got -1.0.'),
  (lambda: times.log_uniform(2.0, 2.0), 'log_uniform needs 0 < sigma_min < sigma_max; got 2.0, 2.0.'),
  (lambda: times.mode(-1.01), 'mode needs -1 <= scale <= 2 / (pi - 2) = 1.7519, between which t falls with u; got -1.01.'),
  (lambda: times.mode(1.76), 'mode needs -1 <= scale <= 2 / (pi - 2) = 1.7519, between which t falls with u; got 1.76.'),
  (lambda: times.cosine_interpolated(0), 'cosine_interpolated needs sizes in pixels, 1 or more; got 0, 32, 64.'),
  (lambda: times.cosine_interpolated(64, 64, 2),
   'cosine_interpolated needs low < 23.14 high, or logsnr would rise; got low=64, high=2.'),
  (lambda: times.dimension_shift(times.uniform(), 0),
   'A dimension shift needs size >= 1 and base >= 1, numbers an example; got 0 and 4096.'),
  (lambda: times.importance(0), 'importance needs steps >= 1, history >= 1 and 0 < floor <= 1; got 0, 10, 0.001.'),
  (lambda: times.importance(10, 10, 0.0), 'importance needs steps >= 1, history >= 1 and 0 < floor <= 1; got 10, 10, 0.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence


def test_a_base_that_is_not_uniform_gets_a_sentence():
  law = times.lognormal(-1.2, 1.2, times.uniform(0.1, 0.9))
  with pytest.raises(ValueError, match=r'The base of a law is uniform on \(0, 1\)'):
    law.sample(Gaussian(SCHEDULES['flow']), draw(4))


def test_the_density_of_a_shift_is_finite_at_the_ends():
  law = times.shift(times.uniform(), 2.0)
  density = law.density(Gaussian(SCHEDULES['flow']), jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(density, [0.5, 2.0], rtol=2e-2)  # t' = 2 t / (1 + t): dt / dt' is 1/2 and 2
