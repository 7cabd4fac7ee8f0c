"""The mathematics against the numbers of other people's code, made by tests/goldens/make_mathematics.py; in float64."""
import pathlib

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import betas, bounds, losses, schedules, targets, times, weights
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.times import Times
from diffusion_jax.core.types import Estimate
from tests.core.tables import TABLES, draw

GOLDENS = dict(np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'mathematics.npz'))
PRECONDITIONINGS = {
  'VP': (schedules.linear(0.1, 20.0), targets.vp()),
  'VE': (schedules.karras(100.0), targets.ve()),
  'iDDPM': (betas.discrete(TABLES['cosine_betas']), targets.iddpm()),
  'EDM': (schedules.karras(80.0), targets.edm(0.5)),
}
CHAINS = {'linear': betas.linear_betas(50, 0.002, 0.4), 'cosine': betas.cosine_betas(50)}
LAWS = {
  'diffusers/times/mode': lambda base: times.mode(1.29, base),
  'diffusers/times/logit_normal': lambda base: times.logit_normal(0.3, 0.8, base),
  'k_diffusion/times/log_normal': lambda base: times.lognormal(-1.2, 1.2, base),
  'k_diffusion/times/log_uniform': lambda base: times.log_uniform(0.02, 20.0, base),
  'k_diffusion/times/cosine_interpolated': lambda base: times.cosine_interpolated(256, 32, 256, base),
  'edm/losses/VE': lambda base: times.log_uniform(0.02, 100.0, base),
  'edm/losses/EDM': lambda base: times.lognormal(-1.2, 1.2, base),
}
NOISE_WEIGHTS = {
  'k_diffusion/weights/karras': weights.edm(0.5),
  'k_diffusion/weights/soft-min-snr': weights.soft_min_snr(4.0),  # gamma is 1 / sigma_data^2
  'k_diffusion/weights/snr': weights.snr(),
  'k_diffusion/weights/simple': weights.constant(),
  'edm/losses/VP': weights.constant(),
  'edm/losses/VE': weights.constant(),
  'edm/losses/EDM': weights.edm(0.5),
}


def given(u):
  """The law of times whose draws are these."""
  return Times(lambda process, draw: jnp.asarray(u), lambda process, t: jnp.ones_like(t), flat=True)


def sigma_of(schedule, t):
  """sigma / alpha, which is sigma where alpha = 1."""
  alpha, sigma = schedule(t)
  return sigma / alpha


@pytest.mark.parametrize('name', ['linear', 'scaled_linear', 'cosine', 'sigmoid', 'exponential', 'zero_snr'])
def test_betas_are_those_of_diffusers(name, x64):
  table = betas.exponential_betas() if name == 'exponential' else TABLES.get(name, TABLES.get(f'{name}_betas'))
  np.testing.assert_allclose(table, GOLDENS[f'diffusers/betas/{name}'], rtol=1e-10)
  alpha, sigma = betas.discrete(table)(np.arange(25, 1001, 25) / 1000)
  products = GOLDENS[f'diffusers/alphas_cumprod/{name}']
  np.testing.assert_allclose(alpha**2, products, rtol=1e-10, atol=1e-16)
  np.testing.assert_allclose(sigma**2, 1 - products, rtol=1e-10)


def test_snr_is_that_of_diffusers(x64):
  sigma = sigma_of(betas.discrete(TABLES['linear_betas']), np.arange(25, 1001, 25) / 1000)
  np.testing.assert_allclose(sigma**-2, GOLDENS['diffusers/snr/linear'], rtol=1e-10)


def test_cosmap_is_that_of_stable_diffusion_3_in_diffusers(x64):
  """Its weight is of errors of the velocity, which are those of the noise over 1 - t."""
  t, weight = GOLDENS['diffusers/weights/cosmap']
  ours = weights.cosmap()(schedules.logsnr_of(schedules.flow(), t), jnp.ones(len(t)))
  np.testing.assert_allclose(ours * (1 - t)**2, weight, rtol=1e-9)


@pytest.mark.parametrize('name', LAWS)
def test_times_are_drawn_as_in(name, x64):
  """From the same uniform numbers, on `flow`; diffusers gives t, the others sigma."""
  u, drawn = GOLDENS[name][:2]
  t = LAWS[name](given(u)).sample(Gaussian(schedules.flow()), draw(len(u)))
  np.testing.assert_allclose(t if 'diffusers' in name else sigma_of(schedules.flow(), t), drawn, rtol=1e-9)


def test_uniform_times_on_a_schedule_draw_noise_as_in_peers(x64):
  """v-diffusion is `trigonometric` with sigma_data = 0.5, cut off where sigma is 0.01 and 50."""
  low, high = 2 / np.pi * np.arctan(np.array([0.01, 50.0]) / 0.5)
  u, sigma = GOLDENS['k_diffusion/times/v_diffusion']
  np.testing.assert_allclose(sigma_of(schedules.trigonometric(0.5), low + u * (high - low)), sigma, rtol=1e-9)
  u, sigma, _ = GOLDENS['edm/losses/VP']
  np.testing.assert_allclose(sigma_of(schedules.linear(), 1 - u * (1 - 1e-5)), sigma, rtol=1e-9)
  u, sigma, _ = GOLDENS['edm/losses/VE']
  np.testing.assert_allclose(sigma_of(schedules.geometric(0.02, 100.0), u), sigma, rtol=1e-9)


@pytest.mark.parametrize('name', NOISE_WEIGHTS)
def test_a_weight_is_that_of(name, x64):
  sigma, weight = GOLDENS[name][-2:]
  ours = NOISE_WEIGHTS[name](-2 * jnp.log(sigma), jnp.ones(len(sigma)))
  np.testing.assert_allclose(ours, weight, rtol=1e-9)


@pytest.mark.parametrize('name', PRECONDITIONINGS)
def test_a_preconditioned_denoiser_is_that_of_edm_s_code(name, x64):
  """EDM's x is xt / alpha. The iDDPM column is told the number of the nearest step: all sigmas are those of a step."""
  schedule, target = PRECONDITIONINGS[name]
  sigma, c_skip, c_out, c_in, c_noise = GOLDENS[f'edm/{name}']
  process, seen = Gaussian(schedule), []
  level = process.level_at(-2 * jnp.log(sigma))
  x, prediction = np.random.default_rng(0).normal(size=(2, len(sigma), 3))
  network = lambda *arguments: seen.append(arguments) or jnp.asarray(prediction)
  x0 = targets.denoiser(process, target, network)(level.alpha[:, None] * x, level).x0
  np.testing.assert_allclose(x0, c_skip[:, None] * x + c_out[:, None] * prediction, rtol=1e-6)
  np.testing.assert_allclose(seen[0][0], c_in[:, None] * x, rtol=1e-6)
  np.testing.assert_allclose(seen[0][1], c_noise, rtol=1e-6)


@pytest.mark.parametrize('std', ['0.005', '0.05', '0.5'])
def test_discretized_is_the_mass_of_a_bin_and_near_adm_s_approximation(std, x64):
  x, mean, variance, approximate, exact = GOLDENS[f'adm/decoder/{std}']
  left = np.where(x == -1, -np.inf, x - 1 / 255)
  right = np.where(x == 1, np.inf, x + 1 / 255)
  mass = stats.norm(mean, np.sqrt(variance)).cdf(right) - stats.norm(mean, np.sqrt(variance)).cdf(left)
  nats = bounds.discretized(256)(*map(jnp.asarray, (x, mean, variance)))
  np.testing.assert_allclose(nats, -np.log(mass), rtol=1e-9)
  np.testing.assert_allclose(nats, exact, rtol=1e-9)
  likely = mass > np.exp(-7)  # its relative error grows without end in the tails
  np.testing.assert_allclose(nats[likely], approximate[likely], atol=0.01)


def chain(table):
  """(process, level, x0, xt, network output) of ADM's goldens. Its t is ours in steps, less 1; its noise is given."""
  x0, noise, out = (jnp.asarray(GOLDENS[f'adm/{name}']) for name in ('x0', 'noise', 'out'))
  class Given(Gaussian):
    def noise(self, keys, like):
      return noise
  process = Given(betas.discrete(CHAINS[table]))
  level = process.level((GOLDENS['adm/t'] + 1) / 50)
  return process, level, x0, process.corrupt(draw(8).keys, x0, level)[0], out


@pytest.mark.parametrize('table', CHAINS)
def test_a_step_of_the_bound_is_adm_s(table, x64):
  np.testing.assert_allclose(CHAINS[table], GOLDENS[f'adm/{table}/betas'], rtol=1e-10)
  process, level, x0, xt, out = chain(table)
  def bits(variance_of):
    network = lambda xt, feature, cond: out
    estimate = targets.denoiser(process, targets.learned_variance(targets.noise()), network)(xt, level)
    estimate = Estimate(estimate.x0, variance_of(estimate))
    return losses.mean(lambda nats: nats / np.log(2), bounds.step_term(
      process, bounds.discretized(256), estimate, x0, xt, level, 50))
  kinds = {'FIXED_SMALL': lambda estimate: None, 'FIXED_LARGE': lambda estimate: jnp.ones_like(x0),
           'LEARNED_RANGE': lambda estimate: estimate.variance}
  ours = jax.jit(lambda: {kind: bits(variance_of) for kind, variance_of in kinds.items()})()
  for kind in kinds:
    rows = slice(2, 8) if kind == 'FIXED_LARGE' else slice(0, 8)  # there ADM has another variance at the first step
    np.testing.assert_allclose(ours[kind][rows], GOLDENS[f'adm/{table}/{kind}'][rows], rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize('table', CHAINS)
def test_the_prior_term_of_the_bound_is_adm_s_with_our_prior(table, x64):
  process, _, x0, _, _ = chain(table)
  bits = process.prior_divergence(x0, process.level(1.0)).mean((1, 2, 3)) / np.log(2)
  np.testing.assert_allclose(bits, GOLDENS[f'adm/{table}/prior'], rtol=1e-6)


@pytest.mark.parametrize('table', CHAINS)
def test_hybrid_and_its_gradient_are_adm_s(table, x64):
  process, level, x0, _, out = chain(table)
  loss = bounds.hybrid(
    process, targets.learned_variance(targets.noise()), given(level.t), weights.constant(), targets.noise(), steps=50)
  values, pull = jax.vjp(jax.jit(lambda out: loss(lambda xt, feature, cond: out, draw(8), x0)), out)
  np.testing.assert_allclose(values, GOLDENS[f'adm/{table}/hybrid'], rtol=1e-6)
  gradient, = pull(jnp.ones(8))
  np.testing.assert_allclose(gradient, GOLDENS[f'adm/{table}/gradient'], rtol=1e-6, atol=1e-12)
