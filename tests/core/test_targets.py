"""Targets: round trips between value, x0 and noise, and the coefficients of the papers worked out by hand."""
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import grids, targets
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.targets import Target
from tests.core.tables import (
  ALL_SCHEDULES,
  DETERMINANTS,
  FEW,
  REACHING_NOISE,
  SCHEDULES,
  TARGETS,
  check_complete,
  close,
  keys,
  over,
  slopes,
)

T = np.linspace(0.0513, 0.9487, 8)  # no node of a table of betas, nor the middle, the kink of laplace
LEARNING = {'learned_variance': targets.learned_variance(targets.v())}


def test_the_table_is_complete():
  check_complete(targets, Target, {**TARGETS, **LEARNING})
  assert TARGETS.keys() == DETERMINANTS.keys()


def noised(process, t):
  """(level, x0, noise, xt) of one example for every t."""
  level = process.level(t)
  x0, noise = jax.random.normal(jax.random.key(0), (2, len(t), 3))
  return level, x0, noise, level.alpha[:, None] * x0 + level.sigma[:, None] * noise


@over('schedule', ALL_SCHEDULES)
@pytest.mark.parametrize('name', TARGETS)
def test_round_trip_and_determinant(schedule, name, x64):
  process, target = Gaussian(schedule), TARGETS[name]
  level, x0, noise, xt = noised(process, T)
  value = targets.value(process, target, level, x0, noise)
  estimate = targets.denoiser(process, target, lambda x, feature, cond: value)(xt, level)
  np.testing.assert_allclose(estimate.x0, x0, atol=1e-9)
  np.testing.assert_allclose(targets.noise_of(level, xt, estimate.x0), noise, atol=1e-9)
  d = DETERMINANTS[name](np.asarray(level.alpha), np.asarray(level.sigma), *slopes(schedule, T))
  np.testing.assert_allclose(targets.determinant(process, target, level), d, rtol=1e-6)


@over('schedule', FEW)
def test_velocity_is_the_rate_of_xt(schedule, x64):
  process, h = Gaussian(schedule), 1e-6
  level, x0, noise, _ = noised(process, T)
  at = lambda t: np.asarray(schedule(t)[0])[:, None] * x0 + np.asarray(schedule(t)[1])[:, None] * noise
  rate = (at(T + h) - at(T - h)) / (2 * h)
  np.testing.assert_allclose(
    targets.value(process, targets.velocity(), level, x0, noise), rate, rtol=1e-7, atol=1e-7)


def test_score_is_the_gradient_of_the_log_density(x64):
  process = Gaussian(SCHEDULES['cosine'])
  level, x0, noise, xt = noised(process, T)
  log_density = lambda x: -jnp.sum(((x - level.alpha[:, None] * x0) / level.sigma[:, None])**2) / 2
  np.testing.assert_allclose(
    targets.value(process, targets.score(), level, x0, noise), jax.grad(log_density)(xt), atol=1e-9)


@pytest.mark.parametrize('sigma', [0.01, 0.5, 2.0, 60.0])
def test_edm_has_the_coefficients_of_its_table_1(sigma, x64):
  """arXiv:2206.00364, table 1, right column, with sigma_data = 0.5."""
  c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(0.25 + sigma**2)
  c_in, c_noise = 1 / math.sqrt(0.25 + sigma**2), math.log(sigma) / 4
  process, x = Gaussian(SCHEDULES['karras']), jnp.array([[1.5, -3.0], [2.0, 0.1]])
  def network(scaled, feature, cond):
    np.testing.assert_allclose(scaled, c_in * x, rtol=1e-10)
    np.testing.assert_allclose(feature, [c_noise, c_noise], rtol=1e-10)
    return jnp.cos(x)
  denoise = targets.denoiser(process, targets.edm(0.5), network)
  np.testing.assert_allclose(denoise(x, process.level(sigma / 80)).x0, c_skip * x + c_out * np.cos(x), rtol=1e-9)


@pytest.mark.parametrize('target, sigma, c_out, c_in, c_noise', [
  (targets.vp(), 0.75, -0.75, 0.8, 999 * 0.75 / 80),
  (targets.vp(500), 2.4, -2.4, 1 / 2.6, 499 * 0.03),
  (targets.ve(), 2.0, 2.0, 1.0, 0.0),
  (targets.ve(), 80.0, 80.0, 1.0, 3.6888794541139363),  # log 40
  (targets.iddpm(), 2.4, -2.4, 1 / 2.6, 29.0),  # t = 0.03 is step 30 of 1000, counted from 0
  (targets.iddpm(500), 0.75, -0.75, 0.8, 4.0),  # t = 0.009375 is nearest to step 5 of 500
  (targets.iddpm(), 1e-5, -1e-5, (1 + 1e-10)**-0.5, 0.0),
])
def test_the_other_columns_of_table_1(target, sigma, c_out, c_in, c_noise, x64):
  """arXiv:2206.00364, table 1: VP, VE and iDDPM, with c_skip = 1, on a schedule with alpha = 1 and sigma = 80 t."""
  process, x = Gaussian(SCHEDULES['karras']), jnp.array([[1.5, -3.0], [2.0, 0.1]])
  def network(scaled, feature, cond):
    np.testing.assert_allclose(scaled, c_in * x, rtol=1e-10)
    np.testing.assert_allclose(feature, [c_noise, c_noise], rtol=1e-10, atol=1e-12)
    return jnp.cos(x)
  estimate = targets.denoiser(process, target, network)(x, process.level(sigma / 80))
  np.testing.assert_allclose(estimate.x0, x + c_out * np.cos(x), rtol=1e-9)


@pytest.mark.parametrize('name', ['edm', 've', 'vp', 'iddpm'])
def test_preconditioning_on_any_schedule_is_the_paper_s_at_xt_over_alpha(name, x64):
  target = TARGETS[name]
  if name != 'edm':  # the features of VP and iDDPM are steps of the schedule at hand
    target = target._replace(feature=lambda level: -level.logsnr)
  network = lambda scaled, feature, cond: jnp.sin(scaled + feature[:, None])
  flow, exploding = Gaussian(SCHEDULES['flow']), Gaussian(SCHEDULES['karras'])
  level, x = flow.level(0.75), jnp.array([[1.5, -3.0]])  # sigma / alpha = 3
  here = targets.denoiser(flow, target, network)(x, level)
  there = targets.denoiser(exploding, target, network)(x / 0.25, exploding.level(3 / 80))
  np.testing.assert_allclose(here.x0, there.x0, rtol=1e-9)


@pytest.mark.parametrize('name', ['vp', 'iddpm'])
def test_networks_of_variance_preserving_noise_see_xt_as_it_is(name, x64):
  for schedule in ('linear', 'cosine', 'discrete', 'monotone'):
    level = Gaussian(ALL_SCHEDULES[schedule]).level(jnp.array(T))
    np.testing.assert_allclose(TARGETS[name].scale(level), 1, rtol=1e-12, err_msg=schedule)


@pytest.mark.parametrize('steps', [50, 1000, 4000])
def test_the_features_of_iddpm_are_the_numbers_of_the_steps(steps):
  """In single precision too, at all of t = i / steps."""
  level = Gaussian(SCHEDULES['cosine']).level(jnp.arange(1, steps + 1) / steps)
  np.testing.assert_array_equal(targets.iddpm(steps).feature(level), np.arange(steps))


def test_a_learned_variance_is_the_second_half_of_the_output(x64):
  """v in [-1, 1] says where the log variance lies between its bounds: (v + 1) / 2 (arXiv:2102.09672, eq. 15)."""
  process, plain = Gaussian(SCHEDULES['cosine']), targets.v()
  x = {'a': jax.random.normal(jax.random.key(0), (4, 3)), 'b': jax.random.normal(jax.random.key(1), (4, 5, 2))}
  place = {'a': jnp.linspace(-1, 1, 3), 'b': jnp.array([-1.0, 0.5])}
  join = lambda leaf, place: jnp.concatenate([jnp.cos(leaf), jnp.broadcast_to(place, leaf.shape)], -1)
  twice = lambda x, feature, cond: {name: join(x[name], place[name]) for name in x}
  level = process.level(jnp.full(4, 0.3))
  both = targets.denoiser(process, targets.learned_variance(plain), twice)(x, level)
  alone = targets.denoiser(process, plain, lambda x, feature, cond: jax.tree.map(jnp.cos, x))(x, level)
  close(both.x0, alone.x0, rtol=1e-12)
  np.testing.assert_allclose(both.variance['a'], np.tile([0, 0.5, 1], (4, 1)), atol=1e-12)
  np.testing.assert_allclose(both.variance['b'], np.broadcast_to([0, 0.75], (4, 5, 2)), atol=1e-12)
  assert alone.variance is None and not plain.learns_variance


def test_edm_stays_finite_where_no_data_are_left():
  process = Gaussian(SCHEDULES['cosine'])
  level = process.level(jnp.ones(2))
  estimate = targets.denoiser(process, targets.edm(0.5), lambda x, feature, cond: x)(jnp.ones((2, 3)), level)
  np.testing.assert_allclose(estimate.x0, 0.5, rtol=1e-6)  # c_skip = 0, c_out = sigma_data, c_in = 1


@pytest.mark.parametrize('shape', [(), (4,)])
def test_the_network_gets_one_feature_an_example(shape):
  process, seen = Gaussian(SCHEDULES['cosine']), []
  network = lambda x, feature, cond: seen.append((x, feature, cond)) or jax.tree.map(jnp.zeros_like, x)
  x = {'a': jax.random.normal(keys(1)[0], (4, 3)), 'b': jnp.ones((4, 2, 2))}
  level, cond = process.level(jnp.full(shape, 0.25)), {'label': jnp.arange(4)}
  estimate = targets.denoiser(process, targets.v(), network)(x, level, cond)
  np.testing.assert_array_equal(seen[0][1], np.full(4, 250.0))
  np.testing.assert_array_equal(seen[0][2]['label'], np.arange(4))
  np.testing.assert_allclose(estimate.x0['b'], np.full((4, 2, 2), np.cos(np.pi / 8)), rtol=1e-6)


@pytest.mark.parametrize('target, schedule', [
  ('noise', 'cosine'), ('score', 'flow'), ('velocity', 'path'), ('edm', 'flow'), ('noise', 'path'), ('vp', 'cosine'),
  ('ve', 'flow'), ('iddpm', 'discrete(zero_snr)'), ('noise', 'sigmoid')])
def test_a_grid_at_a_singular_point_is_an_error(target, schedule):
  process = Gaussian(ALL_SCHEDULES[schedule])
  with pytest.raises(ValueError, match=r'my target is singular at t=1 \(alpha=0, sigma=1\), which the grid contains'):
    targets.check_grid(process, TARGETS[target], np.array([1.0, 0.5, 0.0]), 'my target')


@pytest.mark.parametrize('name', [*FEW, 'geometric', 'laplace', 'sigmoid', 'cauchy', 'discrete'])
def test_a_grid_that_avoids_the_singular_points_is_not(name):
  """cauchy comes as near to the noise as 1e-6 at t = 0.989."""
  process, grid = Gaussian(ALL_SCHEDULES[name]), grids.uniform(64, 0.98)(ALL_SCHEDULES[name])
  for kind, target in TARGETS.items():
    targets.check_grid(process, target, grid, kind)


@over('schedule', REACHING_NOISE)
def test_v_and_x0_go_all_the_way(schedule):
  for name in ('v', 'x0'):
    targets.check_grid(Gaussian(schedule), TARGETS[name], grids.uniform(64)(schedule), name)


@over('schedule', FEW)
def test_a_learned_variance_is_as_singular_as_its_target(schedule):
  targets.check_grid(Gaussian(schedule), LEARNING['learned_variance'], grids.uniform(64)(schedule))


@pytest.mark.parametrize('call, sentence', [
  (lambda: targets.edm(0.0), 'edm needs sigma_data > 0; got 0.0.'),
  (lambda: targets.vp(1), 'vp needs 2 steps or more; got 1.'),
  (lambda: targets.iddpm(0), 'iddpm needs 2 steps or more; got 0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
