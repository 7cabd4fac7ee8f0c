"""Solvers of solvers, and those whose steps another test does not see: inverses, adaptive steps, large variances."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import correctors, multistep, sampling, singlestep, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate
from tests.core.tables import ENTRIES, LAW, SCHEDULES, keys

PROCESS = Gaussian(SCHEDULES['cosine'])


def test_no_churn_is_the_solver_itself():
  """Without an amount, and outside the levels that are churned, whatever S_noise."""
  x, t, s = jnp.array([[1.0, -2.0]]), PROCESS.level(0.6), PROCESS.level(0.5)
  step = lambda solver: solver.step(PROCESS, LAW.denoiser(PROCESS), keys(1), x, t, s, ())[0]
  plain, heun = step(solvers.heun()), solvers.heun()
  assert correctors.churn(heun, 0.0, noise=1.5) is heun
  np.testing.assert_allclose(step(correctors.churn(solvers.heun(), 40.0, 64, (3.0, 50.0))), plain, rtol=1e-6)
  assert np.abs(step(correctors.churn(solvers.heun(), 40.0, 64)) - plain).max() > 1e-2


@pytest.mark.parametrize('amount, gamma', [(6.4, 0.1), (1000.0, 2**0.5 - 1)])
def test_churn_starts_from_the_level_of_its_alg_2(amount, gamma):
  """x + sqrt(t'^2 - t^2) S_noise e, t' = (1 + gamma) t, where alpha = 1."""
  process, seen, count = Gaussian(SCHEDULES['karras']), [], 4000
  def step(process, denoise, keys, x, t, s, memory):
    seen.append(t)
    return x, memory
  x = correctors.churn(solvers.Solver(solvers.no_memory, step), amount, 64, (0.05, 50.0), 1.2).step(
    process, None, keys(count), jnp.full(count, 0.7), process.level(0.1), process.level(0.05), ())[0]
  sigma = (1 + gamma) * 8.0
  np.testing.assert_allclose(float(seen[0].sigma), sigma, rtol=1e-4)
  law = stats.norm(0.7, 1.2 * np.sqrt(sigma**2 - 64))
  assert stats.kstest(np.asarray(x, np.float64), law.cdf).pvalue > 1e-3


def test_langevin_moves_towards_the_law():
  """From a point far off at one level: its mean after a move is x + e score, its spread sqrt(2 e), e = 2 (snr sigma)^2."""
  still = solvers.Solver(solvers.no_memory, lambda process, denoise, keys, x, t, s, memory: (x, memory))
  s, count = PROCESS.level(0.5), 4000
  x = correctors.langevin(still, 1, 0.3).step(
    PROCESS, ENTRIES.denoiser(PROCESS), keys(count), jnp.full(count, 3.0), PROCESS.level(0.6), s, ())[0]
  alpha, sigma = float(s.alpha), float(s.sigma)
  e = 2 * (0.3 * sigma)**2
  score = -(3.0 - alpha * 0.4) / (alpha**2 * 0.36 + sigma**2)
  assert stats.kstest(np.asarray(x, np.float64), stats.norm(3.0 + e * score, np.sqrt(2 * e)).cdf).pvalue > 1e-3


@pytest.mark.parametrize('wrap', [correctors.churn, correctors.langevin])
def test_a_solver_with_a_memory_is_refused(wrap):
  with pytest.raises(ValueError, match=f'{wrap.__name__} needs a solver that remembers nothing and moves down'):
    wrap(multistep.unipc())
  with pytest.raises(ValueError, match='the one it got moves up'):
    wrap(solvers.ddim_inverse())


@pytest.mark.parametrize('iterations, error', [(1, 0.1), (4, 1e-3), (25, 1e-9)])
def test_ddim_leads_back_from_its_inverse(iterations, error, x64):
  """From data up to pure noise, alpha = 0, and back: as exactly as the iteration has converged."""
  x0, grid = jnp.array([[0.9, -1.1], [0.2, 0.4], [-1.5, 0.1]]), np.linspace(1, 0, 41)
  denoise = LAW.denoiser(PROCESS)
  walk = lambda solver, grid, start: sampling.sample(keys(3), PROCESS, solver, denoise, grid, (2,), start=start)
  noise = walk(solvers.ddim_inverse(iterations), grid[::-1], x0)
  gap = float(jnp.abs(walk(solvers.ddim(), grid, noise) - x0).max())
  print(f'{iterations} iterations: {gap:.1e}')
  assert gap < error


def test_the_inverse_of_ddim_converges_where_the_denoiser_is_sharp(x64):
  """For two far modes the iteration alone swings without end: its slope at the end of the step is below -1."""
  t, s, x = PROCESS.level(0.6), PROCESS.level(0.8), jnp.array([[0.05], [-0.3], [0.9]])
  denoise = lambda x, level: Estimate(4 * jnp.tanh(4 * level.alpha * x / level.sigma**2))  # data are -4 or 4
  ratio = s.sigma / t.sigma
  slope = jax.grad(lambda y: ((s.alpha - ratio * t.alpha) * denoise(y, s).x0).sum())(jnp.zeros(1))
  assert slope < -1
  step = lambda solver, x, t, s: solver.step(PROCESS, denoise, None, x, t, s, ())[0]
  there = step(solvers.ddim_inverse(12), x, t, s)
  np.testing.assert_allclose(step(solvers.ddim(), there, s, t), x, atol=1e-9)


@pytest.mark.parametrize('tolerance', [1e-3, 1e-6])
def test_dormand_prince_meets_its_tolerance_in_every_sample(tolerance, x64):
  """Against the exact flow of the Gaussian; and a sample is the same alone as beside harder ones."""
  x, t, s = jnp.array([[0.1, 0.2], [3.0, -2.5], [-6.0, 5.0]]), PROCESS.level(0.95), PROCESS.level(0.05)
  solver = singlestep.dormand_prince(tolerance, tolerance)
  run = jax.jit(lambda x: solver.step(PROCESS, LAW.denoiser(PROCESS), None, x, t, s, ())[0])
  found = run(x)
  assert (np.abs(found - LAW.flow_map(x, t, s)) < 10 * tolerance * (1 + np.abs(x))).all()
  np.testing.assert_allclose(run(x[:1]), found[:1], rtol=1e-13)


def test_the_large_variance_is_right_for_white_data():
  """p(xs | xt) = N(a xt, 1 - a^2), a = alpha_t / alpha_s, for data N(0, 1) under preserved variance."""
  t, s, count = PROCESS.level(0.8), PROCESS.level(0.3), 4000
  denoise = lambda x, level: Estimate(level.alpha * x)
  xs = solvers.ancestral('large').step(PROCESS, denoise, keys(count), jnp.full(count, 1.3), t, s, ())[0]
  a = float(t.alpha / s.alpha)
  assert stats.kstest(np.asarray(xs, np.float64), stats.norm(1.3 * a, np.sqrt(1 - a**2)).cdf).pvalue > 1e-3


def test_the_estimate_s_variance_is_taken_or_overridden():
  t, s, x = PROCESS.level(0.8), PROCESS.level(0.3), jnp.ones(4)
  says = lambda x, level: Estimate(0.5 * x, variance=jnp.full_like(x, 1.0))
  step = lambda variance, denoise: solvers.ancestral(variance).step(PROCESS, denoise, keys(4), x, t, s, ())[0]
  silent = lambda x, level: Estimate(0.5 * x)
  np.testing.assert_array_equal(step('estimate', says), step('large', silent))
  np.testing.assert_array_equal(step('small', says), step('estimate', silent))
  assert np.abs(step('estimate', says) - step('estimate', silent)).max() > 1e-2


def test_the_noise_of_sa_solver_is_that_of_the_sde(x64):
  """A first step at known data: e^(-tau^2 h) sigma_s of the noise stays, the rest is fresh (2309.05019, eq. 14)."""
  t, s, count, tau = PROCESS.level(0.7), PROCESS.level(0.5), 4000, 0.8
  x = jnp.full(count, 1.3)
  solver = multistep.sa_solver(3, 4, tau)
  xs = solver.step(PROCESS, lambda x, level: Estimate(jnp.full_like(x, 0.3)), keys(count), x, t, s, solver.init(x))[0]
  h = 0.5 * float(s.logsnr - t.logsnr)
  kept = np.exp(-tau**2 * h)
  mean = float(s.alpha) * 0.3 + float(s.sigma) * kept * (1.3 - float(t.alpha) * 0.3) / float(t.sigma)
  law = stats.norm(mean, float(s.sigma) * np.sqrt(1 - kept**2))
  assert stats.kstest(np.asarray(xs, np.float64), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize('call, sentence', [
  (lambda: solvers.ancestral('medium'), "ancestral has the variances 'estimate', 'small' and 'large'; got 'medium'."),
  (lambda: solvers.ddim_inverse(0), 'ddim_inverse needs iterations >= 1; got 0.'),
  (lambda: multistep.dpm_2m(kind='euler'), "dpm_2m has the kinds 'midpoint' and 'heun'; got 'euler'."),
  (lambda: multistep.unipc(3, 'bh2'), "unipc has the variants vary, b1, b2; got 'bh2'."),
  (lambda: multistep.pndm('euler'), "pndm has the starts 'rk' and 'heun'; got 'euler'."),
  (lambda: multistep.sa_solver(tau=-1.0),
   'sa_solver needs tau >= 0 and during=(low, high), 0 <= low < high <= 1; got -1.0, (0.0, 1.0).'),
  (lambda: multistep.sa_solver(3, 1), 'sa_solver has correctors of 2 to 5 predictions, or 0 for none; got 1.'),
  (lambda: correctors.churn(solvers.heun(), -1.0),
   'churn needs amount >= 0, steps >= 1, during=(low, high) with 0 <= low < high, and noise >= 0; got -1.0, 64, '
   '(0.05, 50.0), 1.003.'),
  (lambda: correctors.langevin(solvers.ddim(), 0), 'langevin needs corrections >= 1 and snr > 0; got 0, 0.16.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
