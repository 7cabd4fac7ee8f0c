"""Fréchet distance between Gaussians fitted to two sets of features (arXiv:1706.08500, eq. 6)."""
import numpy as np


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean [D], unbiased covariance [D, D]) of features [N, D], in float64. Raises ValueError for fewer than two."""
  if len(features) < 2:
    raise ValueError(f'A covariance needs two or more samples; got {len(features)}.')
  features = np.asarray(features, np.float64)
  return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
  """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [N, D] and [M, D]. Biased upwards for small N."""
  (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
  root = _root(cov_a)
  # (C_a C_b)^(1/2) has the eigenvalues of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
  cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
  return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _root(matrix: np.ndarray) -> np.ndarray:
  """The symmetric square root of a positive semi-definite matrix."""
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(values.clip(0))) @ vectors.T
