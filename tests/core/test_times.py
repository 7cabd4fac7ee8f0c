"""Times: densities that integrate to one, samples that follow them, and no trace of how the batch is cut."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import times
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import Draw
from tests.core.tables import REACHING_NOISE, SCHEDULES, TIMES, check_complete, draw, over

COUNT = 8000


def test_the_table_is_complete():
  check_complete(times, Times, TIMES)


@pytest.mark.parametrize('name', TIMES)
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_samples_follow_the_density(name, schedule):
  if name == 'shift' and schedule not in REACHING_NOISE:
    pytest.skip('the shifted clock leaves these schedules: test_a_shift_beyond_the_end_is_an_error')
  process, law = Gaussian(SCHEDULES[schedule]), TIMES[name]
  # Half of the points are tiny: karras at sigma_max = 80 has nearly all of lognormal's mass at t < 0.1.
  edges = np.unique(np.concatenate([np.geomspace(1e-7, 1, 20001), np.linspace(0, 1, 20001)]))
  middles = (edges[1:] + edges[:-1]) / 2
  with jax.enable_x64(True):
    mass = np.asarray(law.density(process, middles)) * np.diff(edges)
  assert abs(mass.sum() - 1) < 1e-3 and (mass >= 0).all()
  t = np.asarray(law.sample(process, draw(COUNT)), np.float64)
  assert t.shape == (COUNT,) and (t > 0).all() and (t <= 1).all()
  assert stats.kstest(t, lambda at: np.interp(at, edges, np.append(0, np.cumsum(mass)))).pvalue > 1e-3


@over('schedule', SCHEDULES)
def test_lognormal_is_lognormal_in_sigma_over_alpha(schedule):
  process = Gaussian(schedule)
  level = process.level(times.lognormal(-0.5, 0.8).sample(process, draw(COUNT)))
  assert stats.kstest(np.log(np.float64(level.sigma) / np.float64(level.alpha)), stats.norm(-0.5, 0.8).cdf).pvalue > 1e-3


def test_lognormal_on_flow_is_logit_normal():
  process, t = Gaussian(SCHEDULES['flow']), np.linspace(0.05, 0.95, 19)
  expected = stats.norm.pdf(np.log(t / (1 - t)), 0.3, 0.9) / (t * (1 - t))
  np.testing.assert_allclose(times.lognormal(0.3, 0.9).density(process, jnp.array(t)), expected, rtol=1e-4)


def test_shift_on_flow_is_that_of_stable_diffusion_3():
  process, whole = Gaussian(SCHEDULES['flow']), draw(100)
  t = np.asarray(times.uniform().sample(process, whole))
  np.testing.assert_allclose(TIMES['shift'].sample(process, whole), 2 * t / (1 + t), atol=1e-6)


@pytest.mark.parametrize('schedule', ['linear', 'karras'])
def test_a_shift_beyond_the_end_is_an_error(schedule):
  """No t has the logsnr that the shift asks for; clamped to t = 1 it would have a mass there and no density."""
  with pytest.raises(ValueError, match='shift'):
    TIMES['shift'].sample(Gaussian(SCHEDULES[schedule]), draw(16))


@over('law', TIMES)
def test_a_time_belongs_to_its_row(law):
  process, whole = Gaussian(SCHEDULES['cosine']), draw(12)
  t = law.sample(process, whole)
  for rows in (slice(0, 6), slice(6, 12), slice(1, None, 3)):
    part = law.sample(process, Draw(whole.key, whole.index[rows], whole.total))
    np.testing.assert_allclose(part, t[rows], atol=2e-7)  # a last bit: XLA's log depends on the place in the vector


@pytest.mark.parametrize('name', ['uniform', 'lognormal', 'shift'])
def test_rows_are_independent_and_keys_differ(name):
  process = Gaussian(SCHEDULES['cosine'])
  t, other = (np.asarray(TIMES[name].sample(process, draw(COUNT, seed))) for seed in (0, 1))
  assert len(np.unique(t)) > 0.99 * COUNT
  for a, b in ((t[1:], t[:-1]), (t, other)):
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(COUNT)


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


@pytest.mark.parametrize('call, sentence', [
  (lambda: times.uniform(0.5, 0.5), 'times need 0 <= t_min < t_max <= 1; got t_min=0.5, t_max=0.5.'),
  (lambda: times.stratified(-0.1, 1.0), 'times need 0 <= t_min < t_max <= 1; got t_min=-0.1, t_max=1.0.'),
  (lambda: times.uniform(0.0, 1.1), 'times need 0 <= t_min < t_max <= 1; got t_min=0.0, t_max=1.1.'),
  (lambda: times.lognormal(0.0, 0.0), 'lognormal needs std > 0; got 0.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
