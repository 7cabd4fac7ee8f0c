"""Schedules: the ends, the slopes and the inverse, against closed forms and finite differences in double precision."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import schedules
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Schedule
from tests.core.tables import REACHING_NOISE, SCHEDULES, check_complete, over, slopes

T = np.linspace(0.01, 0.99, 50)
ENDS = {'linear': (np.exp(-5.025), np.sqrt(1 - np.exp(-10.05))), 'cosine': (0, 1), 'flow': (0, 1), 'karras': (1, 80),
        'path': (0, 1)}


def test_the_table_is_complete():
  check_complete(schedules, Schedule, SCHEDULES)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_ends(name):
  alpha, sigma = SCHEDULES[name](jnp.array([0.0, 1.0]))
  np.testing.assert_array_equal((alpha[0], sigma[0]), (1, 0))
  if ENDS[name][0] == 0:
    np.testing.assert_array_equal((alpha[1], sigma[1]), ENDS[name])
  np.testing.assert_allclose((alpha[1], sigma[1]), ENDS[name], rtol=2e-6)


@over('schedule', SCHEDULES)
def test_logsnr_falls_strictly(schedule):
  assert (np.diff(schedules.logsnr_of(schedule, jnp.linspace(0, 1, 1001))) < 0).all()


@over('schedule', SCHEDULES)
def test_slopes_are_those_of_finite_differences(schedule, x64):
  ours = jax.jit(Gaussian(schedule).slopes)(jnp.array(T))
  np.testing.assert_allclose(ours, slopes(schedule, T), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('double', [False, True])
@over('schedule', SCHEDULES)
def test_slopes_are_never_nan(schedule, double):
  with jax.enable_x64(double):
    slope = np.array(jax.jit(Gaussian(schedule).slopes)(jnp.array([0.0, 1e-6, 1e-3, 0.5, 1 - 1e-6, 1.0])))
  assert not np.isnan(slope).any() and np.isfinite(slope[:, 1:]).all()


@over('schedule', SCHEDULES)
def test_logsnr_slope_is_that_of_finite_differences(schedule, x64):
  process, h = Gaussian(schedule), 1e-6
  expected = (schedules.logsnr_of(schedule, T + h) - schedules.logsnr_of(schedule, T - h)) / (2 * h)
  np.testing.assert_allclose(process.logsnr_slope(process.level(T)), expected, rtol=1e-6)


@over('schedule', SCHEDULES)
def test_the_inverse(schedule, x64):
  np.testing.assert_allclose(schedules.time_at(schedule, schedules.logsnr_of(schedule, T)), T, atol=1e-12)


@over('schedule', SCHEDULES)
def test_the_inverse_in_single_precision(schedule):
  np.testing.assert_allclose(schedules.time_at(schedule, schedules.logsnr_of(schedule, jnp.array(T))), T, atol=3e-6)


@over('schedule', SCHEDULES)
def test_the_inverse_beyond_the_ends_is_0_and_1(schedule):
  np.testing.assert_array_equal(schedules.time_at(schedule, jnp.array([jnp.inf, -jnp.inf])), [0, 1])


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


@over('schedule', SCHEDULES)
def test_any_shape_of_times(schedule):
  for shape in [(), (3,), (2, 3)]:
    assert [entry.shape for entry in jax.eval_shape(schedule, jnp.full(shape, 0.5))] == [shape, shape]


@over('schedule', REACHING_NOISE)
def test_nothing_of_the_data_is_left_at_the_end(schedule, x64):
  assert schedule(jnp.float64(1))[0] == 0


@pytest.mark.parametrize('call, sentence', [
  (lambda: schedules.linear(0.0, 1.0), 'linear needs 0 < beta_min <= beta_max; got beta_min=0.0, beta_max=1.0.'),
  (lambda: schedules.linear(2.0, 1.0), 'linear needs 0 < beta_min <= beta_max; got beta_min=2.0, beta_max=1.0.'),
  (lambda: schedules.karras(0.0), 'karras needs sigma_max > 0; got 0.0.'),
  (lambda: schedules.path(lambda t: -t, 0.0), 'path needs p > 0; got 0.0.'),
  (lambda: schedules.shift(schedules.flow(), -1.0), 'shift needs factor > 0; got -1.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
