"""Distances to the nearest training example: samples much nearer than held-out data are memorised."""
import numpy as np


def nearest_distances(queries: np.ndarray, references: np.ndarray, block: int = 256) -> np.ndarray:
  """The Euclidean distance of each query [N, D] to its nearest reference [M, D]: [N]."""
  queries, references = np.asarray(queries, np.float64), np.asarray(references, np.float64)
  squares = np.square(references).sum(1)
  def nearest(rows):
    return (np.square(rows).sum(1)[:, None] + squares - 2 * rows @ references.T).min(1)
  parts = [nearest(queries[i:i + block]) for i in range(0, len(queries), block)]
  return np.sqrt(np.concatenate(parts).clip(0))
