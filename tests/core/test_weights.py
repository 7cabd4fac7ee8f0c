"""Weights, on squared errors of the noise, against the papers' formulas in their own spaces."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate, optimize, special, stats

from diffusion_jax.core import losses, targets, times, weights
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Draw, Learned
from diffusion_jax.core.weights import Weight
from tests.core.tables import ALL_SCHEDULES, ENTRIES, SCHEDULES, WEIGHTS, check_complete, keys

LOGSNR = np.linspace(-15, 15, 13)
SIGMA = np.exp(-LOGSNR / 2)  # on a path with alpha = 1, where an error of x0 is sigma times that of the noise
SNR = 1 / SIGMA**2
T = SIGMA / (1 + SIGMA)  # on the straight path, where an error of the velocity is that of the noise over 1 - t
DENSITY = np.linspace(0.1, 1, 13)
EXPECTED = {
  'constant': np.ones(13),
  'elbo': 1 / (2 * DENSITY),
  'snr': np.sqrt(SNR) * SIGMA**2,
  'truncated_snr': np.maximum(SNR, 1) * SIGMA**2,
  'min_snr': np.minimum(SNR, 5) * SIGMA**2,
  'soft_min_snr': SIGMA**2 / (SIGMA**2 + 1 / 5),
  'p2': 1 / np.sqrt(2 + SNR),
  'rectified_flow': 1 / (1 - T)**2,
  'logit_normal': stats.norm.pdf(np.log(T / (1 - T)), 0.3, 0.8) / (T * (1 - T)) / (1 - T)**2,
  'cosmap': 2 / (np.pi - 2 * np.pi * T + 2 * np.pi * T**2) / (1 - T)**2,
  'edm': (SIGMA**2 + 0.7**2) / (SIGMA * 0.7)**2 * SIGMA**2,
  'sigmoid': special.expit(1.5 - LOGSNR),
  'measure': special.expit(1.5 - LOGSNR) / DENSITY,
}


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_weight_is_the_paper_s(name, x64):
  np.testing.assert_allclose(WEIGHTS[name](jnp.array(LOGSNR), jnp.array(DENSITY)), EXPECTED[name], rtol=1e-9)


@pytest.mark.parametrize('name', WEIGHTS)
def test_a_weight_is_the_same_in_single_precision(name):
  weight = WEIGHTS[name](jnp.array(LOGSNR), jnp.array(DENSITY))
  np.testing.assert_allclose(weight, EXPECTED[name], rtol=1e-4)


def test_the_tables_are_complete():
  check_complete(weights, Weight, WEIGHTS)
  check_complete(weights, Learned, {'uncertainty': weights.uncertainty()})


@pytest.mark.parametrize('name, logsnr, value', [
  ('min_snr', np.log(20), 0.25), ('min_snr', np.log(2), 1.0), ('truncated_snr', np.log(0.25), 4.0),
  ('snr', np.log(16), 0.25), ('soft_min_snr', np.log(15), 0.25), ('p2', np.log(2), 0.5), ('edm', np.log(1 / 0.49), 2.0),
  ('rectified_flow', 2 * np.log(3), 16 / 9), ('cosmap', 0.0, 16 / np.pi)])
def test_weights_worked_out_by_hand(name, logsnr, value, x64):
  np.testing.assert_allclose(WEIGHTS[name](jnp.float64(logsnr), jnp.ones(())), value, rtol=1e-12)


@pytest.mark.parametrize('name, on_velocity', [
  ('rectified_flow', lambda t: np.ones_like(t)),
  ('logit_normal', lambda t: stats.norm.pdf(special.logit(t), 0.3, 0.8) / (t * (1 - t))),
  ('cosmap', lambda t: 2 / (np.pi * (1 - 2 * t + 2 * t**2)))])
def test_weights_of_the_velocity_of_flow(name, on_velocity, x64):
  """arXiv:2403.03206, sec. 3: the squares of the noise, weighted, are those of the velocity with the paper's density."""
  process = Gaussian(SCHEDULES['flow'])
  level = process.level(np.linspace(0.02, 0.98, 9))
  ratio = targets.determinant(process, targets.noise(), level) / targets.determinant(process, targets.velocity(), level)
  np.testing.assert_allclose(WEIGHTS[name](level.logsnr, level.t) * ratio**2, on_velocity(np.asarray(level.t)), rtol=1e-9)


def test_edm_makes_the_loss_of_its_network_even(x64):
  """The paper chose lambda(sigma) so that the weight of the raw output is 1: w (D_noise / D_edm)^2 = 1."""
  process = Gaussian(SCHEDULES['cosine'])
  level = process.level(jnp.linspace(0.1, 0.9, 5))
  ratio = targets.determinant(process, targets.noise(), level) / targets.determinant(process, targets.edm(0.7), level)
  np.testing.assert_allclose(weights.edm(0.7)(level.logsnr, level.t) * ratio**2, 1, rtol=1e-9)


def evaluate(process, law, weight, network, x0):
  """The losses of noise prediction, compiled; the network is a function of (xt, level)."""
  loss = losses.regression(process, targets.noise(), law, weight, targets.noise())
  at_level = lambda xt, feature, cond: network(xt, process.level(feature / 1000))
  whole = jax.jit(lambda key, x0: loss(at_level, Draw(key, jnp.arange(len(x0)), len(x0)), x0, None, None))
  return np.asarray(whole(jax.random.key(0), x0), np.float64)


@pytest.mark.parametrize('law, schedule', [
  (times.uniform(), 'cosine'), (times.lognormal(0.0, 1.5), 'flow'), (times.cosine_interpolated(), 'laplace')])
def test_a_measure_does_not_depend_on_the_times(law, schedule):
  """E_t[w / p f(logsnr)] is the integral of w f over logsnr: the loss of a network whose residual has the square f."""
  f = lambda logsnr: np.exp(-(logsnr - 0.5)**2 / 6)
  def network(xt, level):  # x0 is 0, so that xt / sigma is the noise
    return (xt.T / level.sigma[None] + jnp.exp(-(level.logsnr - 0.5)**2 / 12)[None]).T
  values = evaluate(Gaussian(SCHEDULES[schedule]), law, WEIGHTS['measure'], network, jnp.zeros((8000, 2)))
  expected, _ = integrate.quad(lambda logsnr: special.expit(1.5 - logsnr) * f(logsnr), -30, 30)
  assert np.isfinite(values).all()
  assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(8000)
  assert values.std() / np.sqrt(8000) < 0.02 * expected


@pytest.mark.parametrize('law, schedule', [
  (times.stratified(0.05, 0.95), 'cosine'), (times.log_uniform(0.05, 20.0), 'flow'),
  (times.uniform(0.05, 0.95), 'monotone')])
def test_elbo_is_the_integral_of_the_least_error_over_snr(law, schedule):
  """arXiv:2107.00630, eq. 17: 1/2 int mmse d snr, for N(m, v) 1/2 log((1 + v snr_0) / (1 + v snr_1)) nats an entry."""
  process = Gaussian(ALL_SCHEDULES[schedule])
  x0 = ENTRIES.mean + ENTRIES.std * jax.vmap(lambda key: jax.random.normal(key, (16,)))(keys(8000, 1))
  exact = lambda xt, level: targets.noise_of(level, xt, ENTRIES.denoiser(process)(xt, level).x0)
  values = evaluate(process, law, weights.elbo(), exact, x0)
  band = process.level(np.array([1 / 21, 20 / 21] if schedule == 'flow' else [0.05, 0.95]))  # sigma / alpha from 0.05 to 20
  first, last = np.asarray(band.logsnr, np.float64)
  expected = 0.5 * (np.log1p(0.36 * np.exp(first)) - np.log1p(0.36 * np.exp(last)))
  assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(8000)
  assert values.std() / np.sqrt(8000) < 0.02 * expected


def test_a_learned_uncertainty_becomes_the_log_of_the_mean_loss(x64):
  """The minimum of E[loss / exp(u) + u] (arXiv:2312.02696, eq. 21), in which u is linear, so that it is the only one."""
  learned, logsnr, rng = weights.uncertainty(64), np.linspace(-10, 10, 60), np.random.default_rng(0)
  curve = np.sin(logsnr / 3) - 0.2 * logsnr
  spread = rng.gamma(2.0, 0.5, (400, 60))
  loss = np.exp(curve) * spread / spread.mean(0)
  start = learned.init(jax.random.key(0))
  np.testing.assert_array_equal(learned.bind(start)(jnp.array([-np.pi, 0.0, 40.0])), 0)
  def objective(params):
    u = learned.bind(params)(jnp.asarray(logsnr))
    return jnp.mean(loss * jnp.exp(-u)[None] + u[None])
  slope = jax.jit(jax.value_and_grad(objective))
  found = optimize.minimize(slope, np.zeros(64), jac=True, options={'gtol': 1e-7, 'maxiter': 2000})
  u = np.asarray(learned.bind(jnp.asarray(found.x))(jnp.asarray(logsnr)))
  np.testing.assert_allclose(u, curve, atol=0.02)
  np.testing.assert_allclose(found.fun, 1 + curve.mean(), rtol=1e-3)


def test_an_uncertainty_is_a_smooth_function_of_any_shape():
  learned = weights.uncertainty(16)
  u = learned.bind(jax.random.normal(jax.random.key(0), (16,)))
  assert u(jnp.ones((2, 3))).shape == (2, 3) and u(jnp.ones(())).shape == ()
  np.testing.assert_allclose(u(jnp.array([1.0, 1.001])), u(jnp.ones(())), atol=0.02)


@pytest.mark.parametrize('call, sentence', [
  (lambda: weights.logit_normal(0.0, 0.0), 'logit_normal needs std > 0; got 0.0.'),
  (lambda: weights.uncertainty(0), 'uncertainty needs features >= 1; got 0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence


def test_the_uncertainty_of_pure_noise_and_of_data_is_finite():
  u = weights.uncertainty(8).bind(jnp.ones(8))(jnp.array([-jnp.inf, -40.0, 40.0, jnp.inf]))
  np.testing.assert_allclose(u[::3], u[1:3])
  assert np.isfinite(u).all()
