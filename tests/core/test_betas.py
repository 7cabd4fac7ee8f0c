"""Tables of betas, and the schedule that a table is, against products in exact arithmetic and the laws of the tables."""
from decimal import Decimal, localcontext

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import special

from diffusion_jax import build
from diffusion_jax.core import betas, schedules
from diffusion_jax.core.betas import Betas
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Schedule
from tests.core.tables import DISCRETE, TABLES, check_complete, over


def exact(table):
  """(alpha, sigma) at every step, [2, T + 1], by products with 60 digits."""
  with localcontext() as context:
    context.prec = 60
    products = [Decimal(1)]
    for beta in table:
      products.append(products[-1] * (1 - Decimal(float(beta))))
    return np.array([[float(product.sqrt()), float((1 - product).sqrt())] for product in products]).T


def steps_of(table):
  return np.arange(len(table) + 1) / len(table)


def test_the_tables_are_complete():
  check_complete(betas, Betas, TABLES)
  check_complete(betas, Schedule, DISCRETE)


@over('table', TABLES)
def test_every_step_is_exact(table, x64):
  np.testing.assert_allclose(betas.discrete(table)(steps_of(table)), exact(table), rtol=1e-12)


@over('table', TABLES)
def test_every_step_has_its_digits_in_single_precision(table):
  """But for the last alpha of cosine_betas, 5e-5, which is interpolated from one 30 times as large: hence atol."""
  alpha, sigma = np.asarray(jax.jit(betas.discrete(table))(steps_of(table).astype(np.float32)), np.float64)**2
  np.testing.assert_allclose(alpha, exact(table)[0]**2, rtol=5e-7, atol=1e-14)
  np.testing.assert_allclose(sigma, exact(table)[1]**2, rtol=5e-7)


@over('table', TABLES)
def test_a_time_that_is_off_by_its_last_digit_moves_little(table):
  """XLA divides by a constant by multiplying with its inverse: half of all i / 1000 are not the nearest float32."""
  alpha, sigma = jax.jit(lambda i: betas.discrete(table)(i / len(table)))(jnp.arange(len(table) + 1))
  np.testing.assert_allclose(alpha, exact(table)[0], atol=5e-7)  # the steepest slope, 6, times 2^-24
  np.testing.assert_allclose(sigma, exact(table)[1], rtol=5e-7)


@over('table', TABLES)
def test_alpha_is_linear_between_two_steps_and_the_variance_is_preserved(table, x64):
  alpha, sigma = betas.discrete(table)(steps_of(table)[1:] - 0.25 / len(table))
  np.testing.assert_allclose(alpha, 0.25 * exact(table)[0, :-1] + 0.75 * exact(table)[0, 1:], rtol=1e-10)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)


@over('table', TABLES)
def test_sigma_has_its_digits_within_the_first_step(table):
  """There 1 - alpha = share (1 - sqrt(1 - beta_1)), and sigma^2 = (1 - alpha) (1 + alpha)."""
  share = np.array([1e-6, 1e-3, 0.1, 0.5, 0.999])
  lost = share * -np.expm1(0.5 * np.log1p(-table[0]))
  _, sigma = betas.discrete(table)((share / len(table)).astype(np.float32))
  np.testing.assert_allclose(sigma, np.sqrt(lost * (2 - lost)), rtol=1e-6)


@over('table', TABLES)
def test_logsnr_falls_strictly(table, x64):
  t = jnp.linspace(0, 1, 2311)
  assert (np.diff(jax.jit(lambda t: schedules.logsnr_of(betas.discrete(table), t))(t)) < 0).all()


@over('table', TABLES)
def test_slopes_are_those_of_straight_lines_of_alpha(table, x64):
  """sigma^2 = 1 - alpha^2 has the slope sigma' = -alpha alpha' / sigma."""
  before, after = exact(table)[0, :-1], exact(table)[0, 1:]
  ours = jax.jit(Gaussian(betas.discrete(table)).slopes)(jnp.asarray(steps_of(table)[1:] - 0.25 / len(table)))
  alpha, slope = 0.25 * before + 0.75 * after, len(table) * (after - before)
  np.testing.assert_allclose(ours, [slope, -alpha * slope / np.sqrt(1 - alpha**2)], rtol=1e-9)


@over('table', TABLES)
def test_slopes_are_finite_at_the_steps_in_single_precision(table):
  """But for that of sigma at 0, which grows like the root of t."""
  t = np.concatenate([steps_of(table), [1e-9, 1 - 1e-6]]).astype(np.float32)
  alpha_slope, sigma_slope = map(np.asarray, jax.jit(Gaussian(betas.discrete(table)).slopes)(t))
  assert np.isfinite(alpha_slope).all() and (alpha_slope < 0).all()
  assert np.isfinite(sigma_slope[1:]).all() and sigma_slope[0] == np.inf


def test_linear_and_scaled_linear_are_evenly_spaced_in_beta_and_in_its_root():
  for table, ends in [(betas.linear_betas(7, 0.1, 0.4), (0.1, 0.4)), (np.sqrt(betas.scaled_linear_betas(7)), None)]:
    np.testing.assert_allclose(table[[0, -1]], ends or np.sqrt([0.00085, 0.012]), rtol=1e-12)
    np.testing.assert_allclose(np.diff(table), (table[-1] - table[0]) / 6, rtol=1e-12)


def test_sigmoid_is_evenly_spaced_in_the_logit_of_its_share():
  share = (betas.sigmoid_betas(25, 0.1, 0.3) - 0.1) / 0.2
  np.testing.assert_allclose(special.logit(share), np.arange(-6, 6.1, 0.5), atol=1e-10)


@pytest.mark.parametrize('steps', [20, 1000])
def test_cosine_has_the_products_of_its_paper_up_to_the_largest_beta(steps):
  table = betas.cosine_betas(steps)
  products = np.cos(np.pi / 2 * (steps_of(table) + 0.008) / 1.008)**2
  np.testing.assert_allclose(exact(table)[0, :-1]**2, products[:-1] / products[0], rtol=1e-10)
  assert table[-1] == 0.999 and table[:-1].max() < 0.999
  assert betas.cosine_betas(steps, largest=0.05).max() == 0.05


def test_exponential_has_one_beta_and_the_products_of_its_rate():
  table = betas.exponential_betas(40, 8.0)
  np.testing.assert_allclose(table, 1 - np.exp(-0.2), rtol=1e-12)
  np.testing.assert_allclose(exact(table)[0], np.exp(-4 * steps_of(table)), rtol=1e-12)


@pytest.mark.parametrize('name', ['linear_betas', 'scaled_linear_betas', 'cosine_betas', 'exponential_betas'])
def test_zero_snr_is_a_straight_line_of_alpha_that_ends_at_0(name):
  before, after = exact(TABLES[name])[0, 1:], exact(betas.zero_snr(TABLES[name]))[0, 1:]
  np.testing.assert_allclose(after[[0, -1]], [before[0], 0], rtol=1e-14)
  np.testing.assert_allclose(after, before[0] * (before - before[-1]) / (before[0] - before[-1]), rtol=1e-9)
  assert betas.zero_snr(TABLES[name])[-1] == 1


def test_zero_snr_of_a_table_that_ends_at_0_is_that_table():
  np.testing.assert_allclose(betas.zero_snr(TABLES['zero_snr']), TABLES['zero_snr'], rtol=1e-12)


def test_all_data_are_lost_at_the_end_of_zero_snr_in_single_precision_too():
  alpha, sigma = betas.discrete(TABLES['zero_snr'])(jnp.ones(()))
  assert (alpha, sigma) == (0, 1)


@pytest.mark.parametrize('steps', [1, 2, 1000])
def test_a_table_with_more_and_smaller_steps_comes_near_its_continuous_limit(steps, x64):
  """The schedules of schedules.py are limits: alpha of `exponential` agrees at every step, however few there are."""
  t = np.arange(steps + 1) / steps
  table = betas.exponential_betas(steps, 3.0)
  np.testing.assert_allclose(betas.discrete(table)(t), schedules.exponential(3.0)(jnp.asarray(t)), rtol=1e-11)


@pytest.mark.parametrize('limit, make', [
  (schedules.linear(), lambda steps: betas.linear_betas(steps, 0.1 / steps, 20 / steps)),
  (schedules.scaled_linear(), lambda steps: betas.scaled_linear_betas(steps, 0.85 / steps, 12 / steps)),
])
def test_tables_tend_to_their_continuous_limit_at_first_order(limit, make, x64):
  t = jnp.linspace(0, 1, 101)
  errors = [np.abs(betas.discrete(make(steps))(t)[0] - limit(t)[0]).max() for steps in (1000, 10000)]
  assert errors[0] < 3e-3 and 8 < errors[0] / errors[1] < 12


def test_a_config_can_name_a_table_within_a_schedule():
  names = {**build.rows(betas, Betas), **build.rows(betas, Schedule)}
  schedule = build.build('discrete(zero_snr(scaled_linear_betas(1000)))', names)
  t = np.linspace(0, 1, 7)
  np.testing.assert_array_equal(schedule(t), DISCRETE['discrete(zero_snr)'](t))


@pytest.mark.parametrize('shape', [(), (3,), (2, 3)])
def test_any_shape_of_times(shape):
  schedule = betas.discrete(TABLES['linear_betas'])
  assert [(entry.shape, entry.dtype) for entry in schedule(np.full(shape, 0.5))] == [(shape, jnp.float32)] * 2


AXIS = 'A table of betas is one axis of 1 or more numbers; got the shape '
OUTSIDE = 'betas must lie in (0, 1), but for a last one of 1; beta '


@pytest.mark.parametrize('call, sentence', [
  (lambda: betas.discrete(np.array([0.1, 0.0, 0.2])), OUTSIDE + '2 of 3 is 0.'),
  (lambda: betas.discrete(np.array([0.1, 1.0, 0.2])), OUTSIDE + '2 of 3 is 1.'),
  (lambda: betas.discrete(np.array([0.1, 1.5])), OUTSIDE + '2 of 2 is 1.5.'),
  (lambda: betas.discrete(np.array([-0.1, 0.5])), OUTSIDE + '1 of 2 is -0.1.'),
  (lambda: betas.discrete(np.array([0.1, np.nan])), OUTSIDE + '2 of 2 is nan.'),
  (lambda: betas.discrete(np.full((2, 2), 0.1)), AXIS + '(2, 2).'),
  (lambda: betas.discrete(np.array(0.1)), AXIS + '().'),
  (lambda: betas.discrete(np.array([])), AXIS + '(0,).'),
  (lambda: betas.zero_snr(np.array([0.1])),
   'zero_snr needs 2 betas or more: the first step keeps its alpha, the last gets 0.'),
  (lambda: betas.linear_betas(0), 'A table of betas needs 1 step or more; got 0.'),
  (lambda: betas.cosine_betas(-5), 'A table of betas needs 1 step or more; got -5.'),
  (lambda: betas.linear_betas(10, 0.0, 0.5), OUTSIDE + '1 of 10 is 0.'),
  (lambda: betas.exponential_betas(10, 0.0), OUTSIDE + '1 of 10 is 0.'),
])
def test_a_bad_table_gets_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
