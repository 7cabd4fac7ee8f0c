"""Kernel distance: squared maximum mean discrepancy of features (arXiv:1801.01401, sec. 4)."""
import numpy as np


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
  """Unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3 of features [N, D] and [M, D], over all pairs; may be below 0."""
  if min(len(a), len(b)) < 2:
    raise ValueError(f'MMD^2 needs two or more samples of each; got {len(a)} and {len(b)}.')
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
  def within(x):
    values = kernel(x, x)
    return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))
  return float(within(a) + within(b) - 2 * kernel(a, b).mean())
