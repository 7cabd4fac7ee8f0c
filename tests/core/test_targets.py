"""Targets: round trips between value, x0 and noise, and the coefficients of the papers worked out by hand."""
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import grids, targets
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.targets import Target
from tests.core.tables import DETERMINANTS, SCHEDULES, TARGETS, check_complete, keys, over, slopes

T = np.linspace(0.05, 0.95, 7)


def test_the_table_is_complete():
  check_complete(targets, Target, TARGETS)
  assert TARGETS.keys() == DETERMINANTS.keys()


def noised(process, t):
  """(level, x0, noise, xt) of one example for every t."""
  level = process.level(t)
  x0, noise = jax.random.normal(jax.random.key(0), (2, len(t), 3))
  return level, x0, noise, level.alpha[:, None] * x0 + level.sigma[:, None] * noise


@over('schedule', SCHEDULES)
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


@over('schedule', SCHEDULES)
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


def test_edm_on_any_schedule_is_the_paper_s_at_xt_over_alpha(x64):
  network = lambda scaled, feature, cond: jnp.sin(scaled + feature[:, None])
  flow, exploding = Gaussian(SCHEDULES['flow']), Gaussian(SCHEDULES['karras'])
  level, x = flow.level(0.75), jnp.array([[1.5, -3.0]])  # sigma / alpha = 3
  here = targets.denoiser(flow, targets.edm(0.5), network)(x, level)
  there = targets.denoiser(exploding, targets.edm(0.5), network)(x / 0.25, exploding.level(3 / 80))
  np.testing.assert_allclose(here.x0, there.x0, rtol=1e-9)


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
  ('noise', 'cosine'), ('score', 'flow'), ('velocity', 'path'), ('edm', 'flow'), ('noise', 'path')])
def test_a_grid_at_a_singular_point_is_an_error(target, schedule):
  process = Gaussian(SCHEDULES[schedule])
  with pytest.raises(ValueError, match=r'my target is singular at t=1 \(alpha=0, sigma=1\), which the grid contains'):
    targets.check_grid(process, TARGETS[target], np.array([1.0, 0.5, 0.0]), 'my target')


@over('schedule', SCHEDULES)
@pytest.mark.parametrize('name', TARGETS)
def test_a_grid_that_avoids_the_singular_points_is_not(schedule, name):
  targets.check_grid(Gaussian(schedule), TARGETS[name], grids.uniform(64, 0.99)(schedule))


@over('schedule', SCHEDULES)
@pytest.mark.parametrize('name', ['v', 'x0'])
def test_v_and_x0_go_all_the_way(schedule, name):
  targets.check_grid(Gaussian(schedule), TARGETS[name], grids.uniform(64)(schedule))


def test_edm_needs_a_spread():
  with pytest.raises(ValueError, match='edm needs sigma_data > 0; got 0.0.'):
    targets.edm(0.0)
