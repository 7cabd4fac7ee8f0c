"""How often something is true, and how sure the count makes of it."""
from collections.abc import Sequence

import numpy as np


def share(values: Sequence[bool]) -> dict[str, float]:
  """The share of truths, with Wilson's score interval of 95 % (J. Am. Stat. Assoc. 22:209, 1927)."""
  count, z = len(values), 1.959964
  p = float(np.mean(values))
  middle, half = p + z**2 / (2 * count), z * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
  low, high = ((middle + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
  return {'samples': p, 'low': float(low), 'high': float(high), 'count': count}
