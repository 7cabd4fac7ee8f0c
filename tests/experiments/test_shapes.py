"""The exact denoiser of coloured shapes against a sum over all pictures, one by one."""
import itertools

import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.tasks import shapes
from experiments.shapes import exact


def pictures(facts):
  """All pictures of the facts, [N, D] in [-1, 1], with the probability of each: places and numbers are as likely."""
  found = []
  added, apart, _ = exact.places()
  fits = exact.allowed(facts)
  for group, number in zip(*np.nonzero(fits), strict=True):
    sets = [chosen for chosen in itertools.combinations(range(65), number + 1)
            if all(apart[group, i, j] for i, j in itertools.combinations(chosen, 2))]
    found += [(-1 + added[group, list(chosen)].sum(0), 1 / len(sets)) for chosen in sets]
  values, weights = zip(*found, strict=True)
  return np.array(values), np.array(weights) / fits.sum()


@pytest.mark.parametrize('facts', [
    shapes.Facts('red', 'ring', 'left', 1), shapes.Facts('blue', 'cross', 'bottom', 2),
    shapes.Facts('white', 'square', 'top', 3), shapes.Facts('white', 'square', 'left', None),
    shapes.Facts('green', None, 'right', None)], ids=str)
@pytest.mark.parametrize(('alpha', 'sigma'), [(0.2, 0.98), (0.6, 0.8), (0.98, 0.2)])
def test_the_exact_mean_is_the_sum_over_all_pictures(x64, facts, alpha, sigma):
  rng, fits = np.random.default_rng(0), exact.allowed(facts)
  values, weights = pictures(facts)
  x = alpha * values[rng.integers(len(values))] + sigma * rng.normal(size=values.shape[1])
  logs = np.log(weights) - ((x - alpha * values)**2).sum(-1) / (2 * max(sigma, 0.8 * alpha)**2)
  chances = np.exp(logs - logs.max())
  expected = chances @ values / chances.sum()
  np.testing.assert_allclose(exact.exact_mean(jnp.asarray(x), alpha, sigma, fits), expected, rtol=0, atol=1e-9)


def test_pictures_that_are_drawn_are_those_of_the_sum():
  """And none of them oftener than their number says, by the chi-squared law of 65 places."""
  facts, rng = shapes.Facts('red', 'square', 'left', 1), np.random.default_rng(0)
  values, _ = pictures(facts)
  drawn = np.array([shapes.draw(facts, 16, rng).reshape(-1) / 127.5 - 1 for _ in range(2000)])
  which = np.array([np.flatnonzero((np.abs(values - each) < 1e-6).all(-1)).item() for each in drawn])
  counts = np.bincount(which, minlength=65)
  assert ((counts - 2000 / 65)**2 / (2000 / 65)).sum() < 105  # p = 0.001
