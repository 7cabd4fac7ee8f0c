"""Grids: ends, order, spacing, against the formulas of the papers in numpy."""
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import grids, schedules
from tests.core.tables import ALL_SCHEDULES, FEW, GRIDS, REACHING_NOISE, RISING_GRIDS, SCHEDULES, check_complete, over

SOME = {name: ALL_SCHEDULES[name] for name in (*FEW, 'geometric', 'laplace', 'discrete', 'monotone')}


def ratio(schedule, t):
  """sigma / alpha in double precision."""
  alpha, sigma = schedule(jnp.asarray(t))
  return np.asarray(sigma) / np.asarray(alpha)


def test_the_table_is_complete():
  check_complete(grids, grids.Grid, {**GRIDS, **RISING_GRIDS})


@over('schedule', SOME)
@over('grid', GRIDS)
def test_a_grid_falls_from_noise_to_data(grid, schedule):
  t = grid(schedule)
  assert isinstance(t, np.ndarray) and t.shape == (9,)
  assert t[-1] == 0 and t[0] <= 1 and (np.diff(t) < 0).all()


@over('schedule', FEW)
def test_uniform_steps(schedule):
  np.testing.assert_allclose(grids.uniform(4, 0.8)(schedule), [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-15)
  assert grids.uniform(4)(schedule)[0] == 1


@over('schedule', SOME)
def test_karras_has_the_sigmas_of_its_eq_5(schedule, x64):
  n, low, high, rho = 6, 0.02, 10.0, 5.0
  sigmas = [(high**(1 / rho) + i / (n - 1) * (low**(1 / rho) - high**(1 / rho)))**rho for i in range(n)]
  t = grids.karras(n, low, high, rho)(schedule)
  np.testing.assert_allclose(ratio(schedule, t[:-1]), sigmas, rtol=1e-8)
  np.testing.assert_allclose(ratio(schedule, t[[0, -2]]), [high, low], rtol=1e-8)
  assert len(t) == n + 1 and t[-1] == 0


def test_karras_on_karras_starts_at_its_end():
  np.testing.assert_allclose(grids.karras(5)(SCHEDULES['karras'])[[0, -2]] * 80, [80, 0.002], rtol=1e-5)


@over('schedule', FEW)
def test_logsnr_is_evenly_spaced(schedule, x64):
  t = grids.logsnr(5, -4.0, 8.0)(schedule)
  np.testing.assert_allclose(-2 * np.log(ratio(schedule, t[:-1])), [-4, -1, 2, 5, 8], atol=1e-9)
  assert len(t) == 6 and t[-1] == 0


@pytest.mark.parametrize('grid', [grids.shift(grids.uniform(8), 3.0), grids.dimension_shift(grids.uniform(8), 9 * 4096)])
def test_shift_on_flow_is_that_of_stable_diffusion_3(grid, x64):
  t = np.linspace(1, 0, 9)
  np.testing.assert_allclose(grid(SCHEDULES['flow']), 3 * t / (1 + 2 * t), atol=1e-12)


@over('schedule', REACHING_NOISE)
def test_shift_keeps_the_ends(schedule):
  t = grids.shift(grids.uniform(8), 3.0)(schedule)
  assert t[0] == 1 and t[-1] == 0 and (np.diff(t) < 0).all()


@pytest.mark.parametrize('name', ['linear', 'karras'])
def test_a_shift_beyond_the_end_is_an_error(name):
  """No t has the logsnr that the shift asks for; clamped to t = 1 the grid would stand still."""
  with pytest.raises(ValueError, match='shift'):
    grids.shift(grids.uniform(8), 3.0)(SCHEDULES[name])


def test_a_shift_beyond_the_start_is_an_error():
  """Several times would become 0, and a step from 0 to 0 divides by sigma = 0."""
  with pytest.raises(ValueError, match='shift by 0.5 takes times of the grid beyond the logsnr'):
    grids.shift(grids.uniform(64), 0.5)(SCHEDULES['geometric'])


@pytest.mark.parametrize('grid, name, sentence', [
  (grids.logsnr(8, -30.0, 9.0), 'linear', 'logsnr from -30 to 9 nats; the schedule begins, at t = 1, at -10'),
  (grids.karras(8, 0.002, 100.0), 'karras', 'logsnr from -9.21 to 12.43 nats; the schedule begins, at t = 1, at -8.764'),
])
def test_a_range_that_the_schedule_lacks_is_an_error(grid, name, sentence):
  with pytest.raises(ValueError, match=sentence):
    grid(SCHEDULES[name])


@pytest.mark.parametrize('call, sentence', [
  (lambda: grids.uniform(0), 'A grid needs at least 1 step; got 0.'),
  (lambda: grids.uniform(4, 1.5), 'A grid needs 0 < t_max <= 1; got 1.5.'),
  (lambda: grids.karras(4, 2.0, 1.0), 'karras needs 0 < sigma_min < sigma_max and rho > 0; got 2.0, 1.0, 7.0.'),
  (lambda: grids.karras(-1), 'A grid needs at least 1 step; got -1.'),
  (lambda: grids.logsnr(4, 3.0, 3.0), 'logsnr needs low < high; got low=3.0, high=3.0.'),
  (lambda: grids.logsnr(0), 'A grid needs at least 1 step; got 0.'),
  (lambda: grids.shift(grids.uniform(4), 0.0)(schedules.flow()), 'shift needs factor > 0; got 0.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence


def test_the_spacings_of_a_table_are_those_of_table_2():
  """arXiv:2305.08891, table 2, for 10 of 1000 steps; its numbers count from 1."""
  at = lambda grid: np.round(grid(SCHEDULES['flow'])[:-1] * 1000).astype(int).tolist()
  assert at(grids.leading(10, offset=0)) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
  assert at(grids.linspace(10)) == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
  assert at(grids.trailing(10)) == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


def test_beta_has_the_quantiles_of_scipy():
  u = np.linspace(1, 0, 9)
  np.testing.assert_allclose(grids.beta(8, 0.6, 0.9)(SCHEDULES['flow']), stats.beta.ppf(u, 0.6, 0.9), atol=1e-6)


def test_exponential_and_logsnr_are_one_grid():
  a, b = grids.exponential(6, 0.01, 50.0), grids.logsnr(6, -2 * np.log(50.0), -2 * np.log(0.01))
  np.testing.assert_allclose(a(SCHEDULES['flow']), b(SCHEDULES['flow']))


def test_quadratic_and_cosine_are_denser_near_the_data():
  u = np.linspace(1, 0, 5)
  np.testing.assert_allclose(grids.quadratic(4, 0.8)(SCHEDULES['flow']), 0.8 * u**2)
  np.testing.assert_allclose(grids.cosine(4)(SCHEDULES['flow']), 2 * np.sin(np.pi * u / 4)**2, atol=1e-15)


@pytest.mark.parametrize('call, sentence', [
  (lambda: grids.leading(1001), 'A table of 1000 steps has no grid of 1001.'),
  (lambda: grids.leading(10, 100, 50), 'The grid begins at number 140 of a table that ends at 99: lower the offset.'),
  (lambda: grids.beta(4, 0.0), 'beta needs alpha > 0 and beta > 0; got 0.0, 0.6.'),
  (lambda: grids.exponential(4, 2.0, 1.0), 'exponential needs 0 < sigma_min < sigma_max; got 2.0, 1.0.'),
])
def test_bad_spacings_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence


def test_jumps_walk_every_stretch_as_often_as_stated():
  """Seven times above 0 and stretches of two: from the data's end, each stretch is walked `repeats` times."""
  down = np.linspace(1, 0, 8)
  at = lambda length, repeats: np.round(grids.jumps(grids.uniform(7), length, repeats)(SCHEDULES['flow']) * 7).astype(int)
  assert at(2, 2).tolist() == [7, 6, 5, 7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 0]
  assert at(3, 3).tolist() == [7, 6, 5, 4, 7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1, 0]
  np.testing.assert_array_equal(grids.jumps(grids.uniform(7), 3, 1)(SCHEDULES['flow']), down)


def test_restart_goes_up_where_it_is_told():
  t = grids.restart(grids.uniform(10), 0.22, 0.5, 3, 2)(SCHEDULES['flow'])
  again = [0.5, 0.4, 0.3, 0.2]
  np.testing.assert_allclose(t, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, *again, *again, 0.1, 0], atol=1e-12)


@pytest.mark.parametrize('call, sentence', [
  (lambda: grids.jumps(grids.uniform(4), 0), 'jumps needs length >= 1 and repeats >= 1; got 0, 10.'),
  (lambda: grids.jumps(grids.uniform(7))(SCHEDULES['flow']), 'jumps of 10 steps do not fit into the 6 steps of this grid'),
  (lambda: grids.restart(grids.uniform(4), 0.5, 0.2),
   'restart needs 0 < low < high <= 1, steps >= 1 and repeats >= 0; got 0.5, 0.2, 4, 2.'),
  (lambda: grids.restart(grids.uniform(2), 0.1, 0.2)(SCHEDULES['flow']), 'restart finds no time of the grid near low=0.1'),
])
def test_bad_ways_up_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value).startswith(sentence)
