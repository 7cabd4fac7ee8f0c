"""Constraints, on Gaussian data: estimates against the true posterior, and samples against the law that they must have."""
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import constraints, grids, sampling, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate, Transform
from tests import oracles
from tests.core.tables import CONSTRAINTS, SCHEDULES, check_complete, check_moments, close, keys, over

PROCESS = Gaussian(SCHEDULES['cosine'])
PRIOR = oracles.Gaussian([0.3, -0.2, 0.5], [[0.8, 0.5, -0.2], [0.5, 0.9, 0.3], [-0.2, 0.3, 0.6]])
WHITE = oracles.Gaussian([0.3, -0.2, 0.5], (0.7**2 * np.eye(3)).tolist())
SEE, Y = np.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]]), np.array([0.9, -0.4])
KNOWN, VALUES = np.array([True, False, True]), np.array([1.1, 0.0, -0.2])
X = jax.random.normal(jax.random.key(0), (4, 3))
LEVELS = PROCESS.level(np.array([0.04, 0.4, 0.8, 0.999]))
see = lambda x0: x0 @ jnp.asarray(SEE.T, x0.dtype)


def precise():
  """X in double precision."""
  return X.astype(jnp.float64)


def estimate(x0):
  """The denoiser that always says x0."""
  return lambda x, level, cond: Estimate(x0)


def after(transform, x0):
  return transform(estimate(x0))(x0, PROCESS.level(0.5), None).x0


def test_the_table_is_complete():
  check_complete(constraints, Transform, CONSTRAINTS)


def test_clip():
  x = jnp.array([[-3.0, -0.2], [0.4, 5.0]])
  out = after(constraints.clip(0.4), {'a': x, 'b': -x})
  close(out, {'a': np.float32([[-0.4, -0.2], [0.4, 0.4]]), 'b': np.float32([[0.4, 0.2], [-0.4, -0.4]])})


def test_the_dynamic_threshold_is_an_example_s_percentile():
  """Each row of ten is scaled by its own ninth size, but for the row within the limit, which is clipped."""
  sizes = np.arange(1.0, 11.0, dtype=np.float32)
  x = sizes[None] * np.float32([[1], [-2], [0.1], [0.05]])
  out = after(constraints.dynamic_threshold(100 * 8 / 9, 0.6), {'a': jnp.asarray(x), 'b': jnp.ones((4, 1, 1))})
  rows = np.minimum(sizes, 9) / 9 * 0.6
  np.testing.assert_allclose(out['a'], [rows, -rows, rows, 0.05 * sizes], rtol=1e-5)
  np.testing.assert_allclose(out['b'], 0.6, rtol=1e-6)


@pytest.mark.parametrize('known', [KNOWN, np.broadcast_to(KNOWN, (4, 3))])
def test_replacing_leaves_the_unknown_alone(known):
  out = after(constraints.replace(VALUES, known), X)
  np.testing.assert_array_equal(out[:, ~KNOWN], X[:, ~KNOWN])
  np.testing.assert_array_equal(out[:, KNOWN], np.broadcast_to(np.float32(VALUES[KNOWN]), (4, 2)))


DOUBLED = np.concatenate([SEE, SEE, 0 * SEE])  # no full rank
TALL = np.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8], [0.5, 0.5, 0.5], [1.0, -2.0, 0.3]])
MATRICES = {'wide': (SEE, Y), 'doubled': (DOUBLED, np.concatenate([Y, Y, 0 * Y])),
            'contradictory': (DOUBLED, np.array([0.9, -0.4, 0.1, 0.3, 5.0, -2.0])),
            'tall': (TALL, np.array([0.9, -0.4, 0.3, 2.0]))}


@over('problem', MATRICES)
def test_ddnm_goes_to_the_nearest_estimate_that_agrees(problem, x64):
  """By singular values, in numpy; where the measurements contradict each other it agrees as well as can be."""
  matrix, y = problem
  out = np.asarray(after(constraints.ddnm(lambda x0: x0 @ matrix.T, y), precise()))
  nearest = np.linalg.lstsq(matrix, (y[None] - precise() @ matrix.T).T, rcond=1e-10)[0].T
  np.testing.assert_allclose(out - precise(), nearest, rtol=0, atol=1e-9)
  assert np.abs(nearest).max() > 0.1


def test_ddnm_of_means_of_blocks_gives_every_pixel_what_its_block_lacks():
  """Super-resolution: A^+ of a mean over 2 x 2 pixels repeats it."""
  x0 = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
  y = jax.random.normal(jax.random.key(2), (3, 4, 4, 2))
  shrink = lambda x0: x0.reshape(-1, 4, 2, 4, 2, 2).mean((2, 4))
  lacks = np.repeat(np.repeat(y - shrink(x0), 2, 1), 2, 2)
  np.testing.assert_allclose(after(constraints.ddnm(shrink, y), x0), x0 + lacks, atol=1e-5)


def test_ddnm_of_a_mask_replaces(x64):
  ours = after(constraints.ddnm(lambda x0: jnp.where(KNOWN[None], x0, 0.0), np.where(KNOWN, VALUES, 0.0)), precise())
  np.testing.assert_allclose(ours, after(constraints.replace(VALUES, KNOWN), precise()), atol=1e-9)


def test_the_solution_has_a_derivative(x64):
  """d ddnm(x0) / d x0 is the projection onto what is not seen."""
  slope = jax.jacrev(lambda x0: after(constraints.ddnm(see, Y), x0[None])[0])(precise()[0])
  np.testing.assert_allclose(slope, np.eye(3) - np.linalg.pinv(SEE) @ SEE, atol=1e-9)


def test_conjugate_gradients_solve_badly_scaled_systems(x64):
  random = np.random.default_rng(0)
  roots = random.normal(size=(4, 6, 6)) * 10.0**np.linspace(-1, 1, 6)[None, None]
  matrices, b = roots @ roots.transpose(0, 2, 1), random.normal(size=(4, 6)) * np.array([[1e-6], [1.0], [1e6], [0.0]])
  z = jax.jit(partial(constraints.conjugate_gradients, lambda z: jnp.einsum('bij,bj->bi', matrices, z)))(b)
  np.testing.assert_allclose(z, np.linalg.solve(matrices, b[..., None])[..., 0], rtol=1e-6)


@pytest.mark.parametrize('std', [0.0, 0.4])
def test_pigdm_is_the_true_posterior_for_white_data(std, x64):
  """E[x0 | xt, y], to the limit of pure noise, where it is E[x0 | y]; for correlated data it is off."""
  run = lambda prior: jax.jit(constraints.pigdm(see, Y, std, 0.7)(prior.denoiser(PROCESS)))
  level = PROCESS.level(np.array([0.04, 0.4, 0.8, 1.0]))
  truth = lambda prior: prior.given(SEE, Y, std).denoiser(PROCESS)(precise(), level).x0
  np.testing.assert_allclose(run(WHITE)(precise(), level, None).x0, truth(WHITE), rtol=0, atol=1e-9)
  assert np.abs(run(PRIOR)(X, level, None).x0 - truth(PRIOR)).max() > 0.05


@pytest.mark.parametrize('t', [0.1, 0.5, 0.9])
def test_dps_lacks_the_variance_of_the_estimate(t, x64):
  """p(y | xt) = N(A x0hat, std^2 + A Var[x0 | xt] A^T): with that variance in place of std^2 it would be exact."""
  level, row, std = PROCESS.level(t), SEE[:1], 0.3
  alpha, sigma = float(level.alpha), float(level.sigma)
  left = np.linalg.inv(np.linalg.inv(PRIOR.covariance) + (alpha / sigma)**2 * np.eye(3))
  right = float(np.sqrt(std**2 + (row @ left @ row.T)[0, 0]))
  one = lambda x0: x0 @ row.T
  def run(x):
    return [constraints.dps(one, Y[:1], s)(PRIOR.denoiser(PROCESS))(x, level, None).x0 for s in (right, std)]
  exact, plain = jax.jit(run)(precise())
  truth = PRIOR.given(row, Y[:1], std).denoiser(PROCESS)(precise(), level).x0
  np.testing.assert_allclose(exact, truth, rtol=0, atol=1e-9)
  assert np.abs(plain - truth).max() > 0.01


STEPS = grids.uniform(24)(PROCESS.schedule)
JUMPS = grids.jumps(grids.uniform(24), 6, 3)(PROCESS.schedule)
PICK = np.eye(3)[KNOWN]
put, project = oracles.affine_ddnm(PICK, VALUES[KNOWN]), oracles.affine_ddnm(SEE, Y)
pseudo = oracles.affine_pigdm(SEE, Y, 0.3, 0.9)
WALKS = {  # (transform, the same by hand, grid, eta)
  'replace': (constraints.replace(VALUES, KNOWN), put, STEPS, 1.0),
  'repaint': (constraints.replace(VALUES, KNOWN), put, JUMPS, 1.0),
  'ddnm': (constraints.ddnm(see, Y), project, STEPS, 1.0),
  'ddnm(eta)': (constraints.ddnm(see, Y), project, STEPS, 0.5),
  'dps': (constraints.dps(see, Y, 0.6), oracles.affine_dps(SEE, Y, 0.6), STEPS, 1.0),
  'pigdm': (constraints.pigdm(see, Y, 0.3, 0.9), pseudo, STEPS, 1.0),
  'pigdm(ddim)': (constraints.pigdm(see, Y, 0.3, 0.9), pseudo, STEPS, 0.0),
}


@over('walk', WALKS)
def test_samples_have_the_law_that_follows_step_by_step(walk):
  """For Gaussian data every step is affine, so the law of the samples is normal and known, wrong as it may be."""
  transform, by_hand, grid, eta = walk
  solver = solvers.ancestral() if eta == 1 else solvers.ddim(eta)
  denoise = transform(PRIOR.denoiser(PROCESS))
  x = jax.jit(lambda keys: sampling.sample(keys, PROCESS, solver, denoise, grid, (3,)))(keys(4000))
  law = PRIOR.walk(PROCESS, grid, by_hand, eta)
  check_moments(x, law.mean, law.covariance)
  if by_hand is put:
    np.testing.assert_array_equal(np.asarray(x)[:, KNOWN], np.broadcast_to(np.float32(VALUES[KNOWN]), (4000, 2)))
  if by_hand is project:
    np.testing.assert_allclose(see(x), np.broadcast_to(Y, (4000, 2)), atol=1e-5)


def test_a_walk_by_hand_ends_at_the_truth():
  """Many steps: without a constraint at the prior, and with the true posterior's estimate at the posterior. What is left
  is a share of 1 / steps."""
  grid = grids.uniform(2000)(PROCESS.schedule)
  truth = PRIOR.given(SEE, Y, 0.3)
  for law, walked in ((PRIOR, PRIOR.walk(PROCESS, grid)), (PRIOR, PRIOR.walk(PROCESS, grid, eta=0.0)),
                      (truth, truth.walk(PROCESS, grid)),
                      (WHITE.given(SEE, Y, 0.3), WHITE.walk(PROCESS, grid, oracles.affine_pigdm(SEE, Y, 0.3, 0.7)))):
    np.testing.assert_allclose(walked.mean, law.mean, atol=4e-3)
    np.testing.assert_allclose(walked.covariance, law.covariance, atol=4e-3)


@over('transform', {
  'replace': constraints.replace(VALUES, KNOWN), 'ddnm': constraints.ddnm(see, Y), 'dps': constraints.dps(see, Y, 0.3),
  'pigdm': constraints.pigdm(see, Y), 'pigdm(std)': constraints.pigdm(see, Y, 0.3)})
def test_estimates_are_finite_from_noise_to_data(transform):
  level = PROCESS.level(jnp.array([1.0, 1 - 1e-6, 1e-4, 0.0]))
  assert np.isfinite(jax.jit(transform(PRIOR.denoiser(PROCESS)))(X, level, None).x0).all()


@pytest.mark.parametrize('call, sentence', [
  (lambda: constraints.clip(0.0), 'clip needs limit > 0; got 0.0.'),
  (lambda: constraints.dynamic_threshold(0.0), 'dynamic_threshold needs 0 < percentile <= 100; got 0.0.'),
  (lambda: constraints.dynamic_threshold(101.0), 'dynamic_threshold needs 0 < percentile <= 100; got 101.0.'),
  (lambda: constraints.dynamic_threshold(limit=-1.0), 'dynamic_threshold needs limit > 0; got -1.0.'),
  (lambda: constraints.replace(VALUES, KNOWN.astype(np.float32)),
   'replace needs known of bools, True where the value is known; got float32. Write known != 0.'),
  (lambda: constraints.dps(see, Y, 0.0), 'dps needs std > 0; got 0.0.'),
  (lambda: constraints.dps(see, Y, 0.3, float('nan')), 'energy needs a finite scale; got nan.'),
  (lambda: constraints.pigdm(see, Y, -0.1), 'pigdm needs std >= 0; got -0.1.'),
  (lambda: constraints.pigdm(see, Y, 0.1, 0.0), 'pigdm needs data_std > 0; got 0.0.'),
])
def test_bad_arguments_get_a_sentence(call, sentence):
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == sentence
