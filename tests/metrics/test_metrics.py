"""Metrics against closed forms, scipy and scikit-learn."""
from math import comb

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import binomtest
from sklearn.metrics.pairwise import polynomial_kernel

from diffusion_jax.metrics.classifier import fit_svm
from diffusion_jax.metrics.frechet import frechet_distance, moments
from diffusion_jax.metrics.kid import kernel_distance
from diffusion_jax.metrics.neighbours import nearest_distances
from diffusion_jax.metrics.share import share


def whitened(count, dimensions, seed):
  """Features with mean 0 and unbiased covariance 1, up to rounding."""
  x = np.random.default_rng(seed).normal(size=(count, dimensions))
  x -= x.mean(0)
  return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False).reshape(dimensions, dimensions))).T


def test_frechet_of_gaussians_on_a_line():
  """(m_a - m_b)^2 + (s_a - s_b)^2."""
  a, b = 3 + 0.5 * whitened(50, 1, 0), -1 + 2 * whitened(31, 1, 1)
  assert frechet_distance(a, b) == pytest.approx(4**2 + 1.5**2, rel=1e-9)


def test_frechet_of_commuting_covariances():
  """Along common axes the standard deviations are subtracted; a rotation of both sets changes nothing."""
  rng = np.random.default_rng(2)
  std_a, std_b, mean = rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5), rng.normal(size=5)
  a, b = whitened(40, 5, 3) * std_a, whitened(60, 5, 4) * std_b + mean
  rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
  expected = (mean**2).sum() + ((std_a - std_b)**2).sum()
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
  assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-9)


def test_frechet_against_scipy():
  rng = np.random.default_rng(5)
  a, b = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8)) for _ in range(2))
  root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
  expected = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
  assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('count', [100, 5])
def test_frechet_of_a_set_to_itself_is_zero(count):
  """Also where the covariance is singular, as of 5 samples in 8 dimensions."""
  a = np.random.default_rng(6).normal(size=(count, 8)).astype(np.float32)
  assert abs(frechet_distance(a, a)) < 1e-6
  assert frechet_distance(a, a + 1) == pytest.approx(8, rel=1e-5)


def test_moments_are_unbiased_and_need_two():
  mean, covariance = moments(np.array([[0.0, 1.0], [2.0, 5.0]], np.float32))
  np.testing.assert_allclose(mean, [1, 3])
  np.testing.assert_allclose(covariance, [[2, 4], [4, 8]])
  assert covariance.dtype == np.float64
  with pytest.raises(ValueError, match='two or more samples; got 1'):
    moments(np.zeros((1, 3)))


def test_kernel_distance_against_scikit_learn():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(7, 4)), rng.normal(size=(9, 4)) + 0.5
  kernel = lambda x, y: polynomial_kernel(x, y, degree=3, gamma=1 / 4, coef0=1)
  off = lambda matrix: matrix[~np.eye(len(matrix), dtype=bool)].mean()
  expected = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()
  assert kernel_distance(a.astype(np.float32), b) == pytest.approx(expected, rel=1e-5)
  with pytest.raises(ValueError, match='two or more samples of each; got 7 and 1'):
    kernel_distance(a, b[:1])


def gaussian_moments(mean, std):
  """E[x^k], k = 0..3."""
  return np.array([1, mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])


@pytest.mark.parametrize('mean, std', [(0.0, 1.0), (0.4, 1.0), (-0.2, 1.5)])
def test_kernel_distance_is_unbiased(mean, std):
  """Against N(0, 1) in one dimension, E k(x, y) = sum_k C(3, k) E[x^k] E[y^k]; 0 for the same law."""
  rng = np.random.default_rng(1)
  gap = gaussian_moments(mean, std) - gaussian_moments(0.0, 1.0)
  expected = sum(comb(3, k) * gap[k]**2 for k in range(4))
  draws = [kernel_distance(mean + std * rng.normal(size=(20, 1)), rng.normal(size=(30, 1))) for _ in range(3000)]
  assert abs(np.mean(draws) - expected) < 4 * np.std(draws) / np.sqrt(len(draws))
  assert np.min(draws) < 0  # a biased estimate never is


@pytest.mark.parametrize('block', [1, 7, 256])
def test_nearest_distances_against_scipy(block):
  rng = np.random.default_rng(2)
  queries, references = rng.normal(size=(20, 6)), rng.normal(size=(33, 6))
  expected = cdist(queries, references).min(1)
  np.testing.assert_allclose(nearest_distances(queries, references, block), expected, rtol=1e-9)


def test_nearest_distance_of_a_copy_is_zero():
  x = np.random.default_rng(3).uniform(-1, 1, (10, 64)).astype(np.float32)
  np.testing.assert_allclose(nearest_distances(x, x[::-1]), 0, atol=1e-6)


def test_svm_tells_two_blobs_and_a_ring_apart():
  rng = np.random.default_rng(4)
  blobs = np.concatenate([rng.normal(size=(50, 2)) * 0.3 + shift for shift in (-2, 2)])
  angles = rng.uniform(0, 2 * np.pi, 100)
  ring = 8 * np.stack([np.cos(angles), np.sin(angles)], 1)  # no straight line does this
  labels = np.repeat([3, 7, 9], [50, 50, 100])
  predict = fit_svm(np.concatenate([blobs, ring]), labels)
  np.testing.assert_array_equal(predict(np.array([[-2.0, -2], [2, 2], [8, 0], [0, -8], [-5.7, 5.7]])), [3, 7, 9, 9, 9])


def test_the_interval_is_wilson_s():
  for values in ([True] * 30, [True] * 7 + [False] * 20, [False] * 5):
    row, law = share(values), binomtest(sum(values), len(values)).proportion_ci(method='wilson')
    np.testing.assert_allclose([row['low'], row['high']], [law.low, law.high], atol=1e-6)
