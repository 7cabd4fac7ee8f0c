"""Schedules: the ends, the slopes and the inverse, against closed forms and finite differences in double precision."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate, stats
from scipy.special import expit

from diffusion_jax.core import schedules
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Learned, Schedule
from tests.core.tables import ALL_SCHEDULES, LEARNED, REACHING_NOISE, SCHEDULES, TABLES, check_complete, slopes

T = np.linspace(0.0113, 0.9871, 50)  # no node of a table of betas, nor the middle, where the slope of laplace has a kink
# (alpha, sigma) at t = 1: the integrals of the rates are 10.05, (0.85 + sqrt(0.85 * 12) + 12) / 3 and 12.
LAST = np.prod(1 - TABLES['linear_betas'])
ENDS = {
  'linear': (np.exp(-5.025), np.sqrt(1 - np.exp(-10.05))),
  'scaled_linear': (np.exp(-2.673957), np.sqrt(1 - np.exp(-5.347914))),
  'exponential': (np.exp(-6), np.sqrt(1 - np.exp(-12))),
  'sub_vp': (np.exp(-5.025), 1 - np.exp(-10.05)),
  'trigonometric': (0, 0.5),
  'polynomial': (1e-5, np.sqrt(1 - 1e-10)),
  'geometric': (1, 50),
  'karras': (1, 80),
  'discrete': (np.sqrt(LAST), np.sqrt(1 - LAST)),
  'monotone': (np.sqrt(expit(-5)), np.sqrt(expit(5))),
  **dict.fromkeys(('cosine', 'cosine(0.008)', 'sigmoid', 'flow', 'laplace', 'cauchy', 'path'), (0, 1)),
  'discrete(zero_snr)': (0, 1),
}
# The logsnr just after t = 0 of those that jump there.
STARTS = {'geometric': -2 * np.log(0.01), 'polynomial': np.log((1 - 1e-5)**2 / (1e-5 * (2 - 1e-5))), 'monotone': 13.3}


def each(function, t):
  """function(schedule, t) for every kind of schedule, compiled as one."""
  every = jax.jit(lambda t: {name: function(schedule, t) for name, schedule in ALL_SCHEDULES.items()})
  return jax.tree.map(np.asarray, every(t))


def test_the_tables_are_complete():
  check_complete(schedules, Schedule, SCHEDULES)
  check_complete(schedules, Learned, LEARNED)
  assert ENDS.keys() == ALL_SCHEDULES.keys()


@pytest.mark.parametrize('double', [False, True])
def test_the_ends_are_as_stated(double):
  with jax.enable_x64(double):
    for name, (alpha, sigma) in each(lambda schedule, t: schedule(t), jnp.array([0.0, 1.0])).items():
      assert (alpha[0], sigma[0]) == (1, 0), name
      np.testing.assert_allclose((alpha[1], sigma[1]), ENDS[name], rtol=2e-6, err_msg=name)


def test_where_a_schedule_jumps_to_the_data(x64):
  for name, (first, last) in each(lambda schedule, t: schedules.ends(schedule), 0.0).items():
    alpha, sigma = ENDS[name]
    np.testing.assert_allclose(last, 2 * np.log(alpha / sigma) if alpha else -np.inf, rtol=1e-6, err_msg=name)
    if name in STARTS:
      np.testing.assert_allclose(first, STARTS[name], rtol=1e-6, err_msg=name)
    else:
      assert first > 60, name


def test_logsnr_falls_strictly():
  """Where it is finite: that of cauchy leaves single precision within 0.002 of both ends."""
  t = jnp.linspace(0, 1, 1001)
  for name, logsnr in each(schedules.logsnr_of, t).items():
    inside = np.isfinite(logsnr)
    assert inside[3:-3].all() and (np.diff(logsnr[inside]) < 0).all(), name
    np.testing.assert_array_equal(logsnr[~inside], np.where(t < 0.5, np.inf, -np.inf)[~inside], err_msg=name)


def test_slopes_are_those_of_finite_differences(x64):
  def both(schedule, t):
    process = Gaussian(schedule)
    return schedule(t), process.slopes(t), slopes(schedule, t), process.logsnr_slope(process.level(t))
  for name, ((alpha, sigma), ours, (falls, rises), logsnr_slope) in each(both, jnp.array(T)).items():
    np.testing.assert_allclose(ours, [falls, rises], rtol=1e-7, atol=1e-8, err_msg=name)
    np.testing.assert_allclose(logsnr_slope, 2 * (falls / alpha - rises / sigma), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('double', [False, True])
def test_slopes_are_finite_inside_and_never_nan(double):
  """At the ends they may be infinite in truth: alpha of `sigmoid` falls like sqrt(1 - t)."""
  with jax.enable_x64(double):
    t = jnp.array([0.0, 1e-6, 1e-3, 0.5, 1 - 1e-6, 1.0])
    for name, slope in each(lambda schedule, t: jnp.stack(Gaussian(schedule).slopes(t)), t).items():
      assert not np.isnan(slope).any() and np.isfinite(slope[:, 1:-1]).all(), name


@pytest.mark.parametrize('double, tolerance', [(False, 3e-6), (True, 1e-12)])
def test_the_inverse(double, tolerance):
  there_and_back = lambda schedule, t: schedules.time_at(schedule, schedules.logsnr_of(schedule, t))
  with jax.enable_x64(double):
    for name, t in each(there_and_back, jnp.array(T)).items():
      np.testing.assert_allclose(t, T, atol=tolerance, err_msg=name)


def test_the_inverse_beyond_the_ends_is_0_and_1():
  for name, t in each(schedules.time_at, jnp.array([jnp.inf, -jnp.inf])).items():
    np.testing.assert_array_equal(t, [0, 1], err_msg=name)
  np.testing.assert_array_equal(schedules.time_at(SCHEDULES['geometric'], np.array([20.0, -20.0])), [0, 1])


def integrated(rate):
  """int_0^t rate, by quadrature."""
  return np.array([integrate.quad(rate, 0, t, epsabs=1e-13)[0] for t in T])


@pytest.mark.parametrize('schedule, rate', [
  (schedules.linear(), lambda t: 0.1 + 19.9 * t),
  (schedules.linear(0.4, 7.0), lambda t: 0.4 + 6.6 * t),
  (schedules.scaled_linear(), lambda t: (np.sqrt(0.85) * (1 - t) + np.sqrt(12) * t)**2),
  (schedules.scaled_linear(0.3, 20.0), lambda t: (np.sqrt(0.3) * (1 - t) + np.sqrt(20) * t)**2),
  (schedules.exponential(5.0), lambda t: 5.0),
])
def test_a_rate_of_noise_integrates_to_the_schedule(schedule, rate, x64):
  """dx = -rate x / 2 dt + sqrt(rate) dW: alpha = exp(-int rate / 2), sigma^2 = 1 - alpha^2 (arXiv:2011.13456, eq. 29)."""
  total = integrated(rate)
  np.testing.assert_allclose(schedule(jnp.array(T)), [np.exp(-total / 2), np.sqrt(1 - np.exp(-total))], rtol=1e-9)


def test_the_variance_of_sub_vp_solves_its_equation(x64):
  """d sigma^2 / dt = -rate sigma^2 + rate (1 - exp(-2 int rate)) (arXiv:2011.13456, eq. 27)."""
  rate = lambda t: 0.1 + 19.9 * t
  lost = lambda t: 1 - np.exp(-2 * (0.1 * t + 9.95 * t**2))
  solved = integrate.solve_ivp(lambda t, v: rate(t) * (lost(t) - v), (0, 1), [0.0], 'DOP853', T, rtol=1e-11, atol=1e-13)
  alpha, sigma = schedules.sub_vp()(jnp.array(T))
  np.testing.assert_allclose(sigma**2, solved.y[0], rtol=1e-7)
  np.testing.assert_allclose(alpha, np.exp(-integrated(rate) / 2), rtol=1e-9)


def naive_sigmoid(start, end, temperature):
  """alpha^2 as arXiv:2301.10972, alg. 1, has it."""
  low, high = expit(start / temperature), expit(end / temperature)
  return (high - expit((start + T * (end - start)) / temperature)) / (high - low)


@pytest.mark.parametrize('schedule, squares', [
  (schedules.cosine(), np.cos(np.pi * T / 2)**2),
  (schedules.cosine(0.008), (np.cos(np.pi / 2 * (T + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008))**2),
  (schedules.cosine(0.2), (np.cos(np.pi / 2 * (T + 0.2) / 1.2) / np.cos(np.pi / 2 * 0.2 / 1.2))**2),
  (schedules.sigmoid(), naive_sigmoid(-3, 3, 1)),
  (schedules.sigmoid(0.0, 3.0, 0.3), naive_sigmoid(0, 3, 0.3)),
  (schedules.polynomial(), (0.99998 * (1 - T**2) + 1e-5)**2),
  (schedules.polynomial(3.0, 1e-3), (0.998 * (1 - T**3) + 1e-3)**2),
])
def test_the_variance_preserving_schedules_of_the_papers(schedule, squares, x64):
  np.testing.assert_allclose(np.square(schedule(jnp.array(T))), [squares, 1 - squares], rtol=1e-9, atol=1e-13)


def test_the_other_schedules_of_the_papers(x64):
  t = jnp.array(T)
  angle = np.pi * T / 2
  np.testing.assert_allclose(schedules.trigonometric(0.5)(t), [np.cos(angle), 0.5 * np.sin(angle)], rtol=1e-12)
  np.testing.assert_allclose(schedules.karras(70.0)(t), [np.ones(50), 70 * T], rtol=1e-12)
  np.testing.assert_allclose(schedules.flow()(t), [1 - T, T], rtol=1e-12)
  alpha, sigma = schedules.geometric(0.02, 30.0)(t)
  np.testing.assert_allclose(np.log(sigma), np.interp(T, [0, 1], np.log([0.02, 30])), rtol=1e-12)
  np.testing.assert_array_equal(alpha, 1)


def test_sigma_data_keeps_the_variance(x64):
  alpha, sigma = schedules.trigonometric(0.5)(jnp.array(T))
  np.testing.assert_allclose(alpha**2 * 0.5**2 + sigma**2, 0.5**2, rtol=1e-12)


@pytest.mark.parametrize('schedule, law', [
  (schedules.laplace(), stats.laplace(0.0, 0.5)), (schedules.laplace(-1.0, 0.8), stats.laplace(-1.0, 0.8)),
  (schedules.cauchy(), stats.cauchy(0.0, 1.0)), (schedules.cauchy(0.7, 0.3), stats.cauchy(0.7, 0.3))])
def test_the_logsnr_of_a_uniform_time_has_the_law_of_the_name(schedule, law):
  """Also quantile by quantile: logsnr falls, so that t is the mass above it."""
  u = np.random.default_rng(0).uniform(0.01, 0.99, 4000)
  logsnr = np.asarray(schedules.logsnr_of(schedule, jnp.asarray(u)), np.float64)
  assert stats.kstest((law.cdf(logsnr) - 0.01) / 0.98, stats.uniform.cdf).pvalue > 1e-3
  np.testing.assert_allclose(logsnr, law.ppf(1 - u), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('p', [1.0, 1.5, 2.0, 3.0])
def test_a_path_has_its_norm_and_its_logsnr(p, x64):
  logsnr = lambda t: 8 - 20 * t**3
  alpha, sigma = map(np.asarray, schedules.path(logsnr, p)(jnp.array(T)))
  np.testing.assert_allclose(alpha**p + sigma**p, 1, rtol=1e-12)
  np.testing.assert_allclose(2 * np.log(alpha / sigma), logsnr(T), rtol=1e-12)


def test_a_learned_schedule_falls_between_its_ends_whatever_its_parameters(x64):
  rng, learned = np.random.default_rng(0), schedules.monotone(16)
  inner = {name: 3 * rng.normal(size=(50, *leaf.shape)) for name, leaf in learned.init(jax.random.key(0))['inner'].items()}
  t = jnp.append(jnp.linspace(0, 1, 101)[1:], 1e-300)
  ends = {'high': jnp.float64(7), 'low': jnp.float64(-3)}
  one = lambda inner: schedules.logsnr_of(learned.bind({'ends': ends, 'inner': inner}), t)
  values = np.asarray(jax.jit(jax.vmap(one))(inner))
  assert (np.diff(values[:, :-1]) < 0).all()
  np.testing.assert_allclose(values[:, -2:], np.tile([-3, 7], (50, 1)), rtol=1e-12)


@pytest.mark.parametrize('double', [False, True])
def test_the_ends_are_exact_at_any_parameters(double):
  """The sines and sigmoids of an end cancel only up to rounding: these were 1 - 6e-8 or 1 + 1e-6."""
  made = [schedules.cosine(offset) for offset in (0.0105, 0.0125, 0.0135, 0.0165, 0.0175)]
  made += [schedules.sigmoid(-6.0, 2.0, temperature) for temperature in (0.1, 0.3, 0.9, 1.1)]
  with jax.enable_x64(double):
    for alpha, sigma in [schedule(jnp.array([0.0, 1.0])) for schedule in made]:
      assert (alpha[0], sigma[0], alpha[1]) == (1, 0, 0) and abs(sigma[1] - 1) < 2e-6


@pytest.mark.parametrize('name, p', [('cosine', 2.0), ('flow', 1.0)])
def test_path_rebuilds_a_schedule_from_its_logsnr(name, p, x64):
  rebuilt = schedules.path(partial(schedules.logsnr_of, SCHEDULES[name]), p)
  t = jnp.concatenate([jnp.array([0.0, 1e-9, 1.0]), jnp.array(T)])
  np.testing.assert_allclose(rebuilt(t), SCHEDULES[name](t), atol=1e-14)


def test_path_with_finite_ends_starts_at_the_data():
  alpha, sigma = schedules.path(lambda t: 10 - 20 * t)(jnp.array([0.0, 0.5, 1.0]))
  np.testing.assert_allclose(alpha, [1, np.sqrt(0.5), (1 + np.exp(10))**-0.5], rtol=1e-5)
  np.testing.assert_allclose(sigma, [0, np.sqrt(0.5), (1 + np.exp(-10))**-0.5], rtol=1e-5)


def test_linear_is_the_limit_of_the_betas_of_ddpm():
  """arXiv:2006.11239: beta from 1e-4 to 0.02 in 1000 steps; the product of 1 - beta is alpha^2."""
  products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  alpha, _ = schedules.linear()(jnp.arange(1, 1001) / 1000)
  np.testing.assert_allclose(alpha, np.sqrt(products), atol=3e-3)


@pytest.mark.parametrize('factor', [0.5, 3.0])
def test_shift_on_flow_is_that_of_stable_diffusion_3(factor, x64):
  t = np.append(T, [0, 1])
  expected = factor * t / (1 + (factor - 1) * t)
  np.testing.assert_allclose(schedules.shift(schedules.flow(), factor)(t), expected, atol=1e-12)


@pytest.mark.parametrize('factor', [0.5, 4.0])
def test_shift_on_cosine_is_that_of_simple_diffusion(factor, x64):
  shifted = schedules.logsnr_of(schedules.cosine(), schedules.shift(schedules.cosine(), factor)(T))
  np.testing.assert_allclose(shifted, -2 * np.log(np.tan(np.pi * T / 2)) - 2 * np.log(factor), atol=1e-9)


@pytest.mark.parametrize('size, base, factor', [(1024**2, 256**2, 4.0), (16 * 16 * 768, 4096, 48**0.5), (64, 64, 1.0)])
def test_dimension_factor(size, base, factor):
  """A mean of `size` numbers with noise sigma is as wrong as that of `base` numbers with noise sigma / factor."""
  assert schedules.dimension_factor(size, base) == pytest.approx(factor, rel=1e-12)


def test_any_shape_of_times():
  for shape in [(), (3,), (2, 3)]:
    out = jax.eval_shape(lambda t: [schedule(t) for schedule in ALL_SCHEDULES.values()], jnp.full(shape, 0.5))
    assert {entry.shape for pair in out for entry in pair} == {shape}


def test_nothing_of_the_data_is_left_at_the_end(x64):
  for name, schedule in REACHING_NOISE.items():
    assert schedule(jnp.float64(1))[0] == 0, name


def test_every_schedule_is_a_way_from_data_to_noise():
  for name, schedule in ALL_SCHEDULES.items():
    schedules.check(schedule, name)


@pytest.mark.parametrize('schedule, sentence', [
  (lambda t: (1 - t / 2, jnp.where(t > 0.5, 0.75 - t / 2, t)),
   'mine must have a logsnr that falls from t = 0 to t = 1; from t = 0.500 to t = 0.501'),
  (lambda t: (1 - 0 * t, jnp.minimum(t, 0.25)), 'mine must have a logsnr that falls .* from t = 0.250 to t = 0.251'),
  (lambda t: (jnp.where(t < 0.9, 1 - t, 0), jnp.where(t < 0.9, t, 0)), 'to t = 0.900 it goes from .* to nan'),
  (lambda t: (1 - 0.5 * t, 0.01 + t), r'mine starts at \(alpha, sigma\) = \(1, 0.01\); t = 0 is the data, \(1, 0\).'),
  (lambda t: (0.5 * (1 - t), t), r'mine starts at \(alpha, sigma\) = \(0.5, 0\); t = 0 is the data'),
  (lambda t: (1 - t, jnp.sqrt(t * (0.9 - t))), 'mine has an alpha or sigma that is negative or not finite'),
  (lambda t: (1 - 1.5 * t, t), 'mine has an alpha or sigma that is negative or not finite'),
  (lambda t: (1 - t, jnp.tan(jnp.pi * t / 2) / 0), 'mine has an alpha or sigma that is negative or not finite'),
  (schedules.path(lambda t: jnp.log(0.7 - t)), 'mine has an alpha or sigma that is negative or not finite'),
])
def test_what_is_no_way_from_data_to_noise_gets_a_sentence(schedule, sentence):
  with pytest.raises(ValueError, match=sentence):
    schedules.check(schedule, 'mine')


@pytest.mark.parametrize('call, sentence', [
  (lambda: schedules.linear(0.0, 1.0), 'linear needs 0 < beta_min <= beta_max; got beta_min=0.0, beta_max=1.0.'),
  (lambda: schedules.linear(2.0, 1.0), 'linear needs 0 < beta_min <= beta_max; got beta_min=2.0, beta_max=1.0.'),
  (lambda: schedules.sub_vp(2.0, 1.0), 'sub_vp needs 0 < beta_min <= beta_max; got beta_min=2.0, beta_max=1.0.'),
  (lambda: schedules.scaled_linear(0.0), 'scaled_linear needs 0 < beta_min <= beta_max; got beta_min=0.0, beta_max=12.0.'),
  (lambda: schedules.exponential(0.0), 'exponential needs rate > 0; got 0.0.'),
  (lambda: schedules.cosine(-0.1), 'cosine needs offset >= 0; got -0.1.'),
  (lambda: schedules.trigonometric(0.0), 'trigonometric needs sigma_data > 0; got 0.0.'),
  (lambda: schedules.sigmoid(3.0, -3.0), 'sigmoid needs start < end and temperature > 0; got 3.0, -3.0, 1.0.'),
  (lambda: schedules.polynomial(2.0, 0.5), 'polynomial needs power > 0 and 0 < precision < 0.5; got 2.0, 0.5.'),
  (lambda: schedules.geometric(1.0, 1.0), 'geometric needs 0 < sigma_min < sigma_max; got 1.0, 1.0.'),
  (lambda: schedules.karras(0.0), 'karras needs sigma_max > 0; got 0.0.'),
  (lambda: schedules.laplace(0.0, 0.0), 'laplace needs scale > 0; got 0.0.'),
  (lambda: schedules.cauchy(0.0, -1.0), 'cauchy needs scale > 0; got -1.0.'),
  (lambda: schedules.path(lambda t: -t, 0.0), 'path needs p > 0; got 0.0.'),
  (lambda: schedules.monotone(0), 'monotone needs hidden >= 1 and low < high; got hidden=0, high=13.3, low=-5.0.'),
  (lambda: schedules.shift(schedules.flow(), -1.0), 'shift needs factor > 0; got -1.0.'),
  (lambda: schedules.dimension_factor(0, 4096),
   'A dimension shift needs size >= 1 and base >= 1, numbers an example; got 0 and 4096.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
