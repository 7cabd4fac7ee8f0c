"""Weights, on squared errors of the noise, against the papers' formulas in their own spaces."""
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate, special

from diffusion_jax.core import losses, targets, times, weights
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.weights import Weight
from tests.core.tables import SCHEDULES, WEIGHTS, check_complete, draw

LOGSNR = np.linspace(-8, 8, 9)
SIGMA = np.exp(-LOGSNR / 2)  # on a path with alpha = 1, where an error of x0 is sigma times that of the noise
SNR = 1 / SIGMA**2
DENSITY = np.linspace(0.1, 1, 9)
EXPECTED = {
  'constant': np.ones(9),
  'min_snr': np.minimum(SNR, 5) * SIGMA**2,
  'edm': (SIGMA**2 + 0.7**2) / (SIGMA * 0.7)**2 * SIGMA**2,
  'sigmoid': special.expit(1.5 - LOGSNR),
  'measure': special.expit(1.5 - LOGSNR) / DENSITY,
}


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_weight_is_the_paper_s(name):
  np.testing.assert_allclose(WEIGHTS[name](jnp.array(LOGSNR), jnp.array(DENSITY)), EXPECTED[name], rtol=2e-5)


def test_the_table_is_complete():
  check_complete(weights, Weight, WEIGHTS)


def test_edm_makes_the_loss_of_its_network_even(x64):
  """The paper chose lambda(sigma) so that the weight of the raw output is 1: w (D_noise / D_edm)^2 = 1."""
  process = Gaussian(SCHEDULES['cosine'])
  level = process.level(jnp.linspace(0.1, 0.9, 5))
  ratio = targets.determinant(process, targets.noise(), level) / targets.determinant(process, targets.edm(0.7), level)
  np.testing.assert_allclose(weights.edm(0.7)(level.logsnr, level.t) * ratio**2, 1, rtol=1e-9)


@pytest.mark.parametrize('schedule', ['cosine', 'flow'])
@pytest.mark.parametrize('law', [times.uniform(), times.stratified(), times.lognormal(0.0, 1.5)])
def test_a_measure_does_not_depend_on_the_times(law, schedule):
  """E_t[w / p f(logsnr)] is the integral of w f over logsnr: the loss of a network whose residual has the square f."""
  process, count = Gaussian(SCHEDULES[schedule]), 8000
  f = lambda logsnr: np.exp(-(logsnr - 0.5)**2 / 6)
  def network(xt, feature, cond):  # x0 is 0, so that xt / sigma is the noise
    level = process.level(feature / 1000)
    return (xt.T / level.sigma[None] + jnp.exp(-(level.logsnr - 0.5)**2 / 12)[None]).T
  loss = losses.regression(process, targets.noise(), law, WEIGHTS['measure'], targets.noise())
  values = np.asarray(loss(network, draw(count), jnp.zeros((count, 2))), np.float64)
  expected, _ = integrate.quad(lambda logsnr: special.expit(1.5 - logsnr) * f(logsnr), -30, 30)
  assert np.isfinite(values).all()
  assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(count)
  assert values.std() / np.sqrt(count) < 0.02 * expected
