"""The laws of the inverse methods, as the experiment's README says them."""
import csv

import numpy as np
import pytest

from experiments.inverse import table


def test_the_claims_hold_in_a_few_steps():
  rows = [table.measure(row, samples=0) for row in table.every_row() if row.steps == 100]
  distances = {row['method']: row['w2'] for row in rows}
  assert distances['exact estimate'] < 0.03 < distances['replace, jumps x 20'] < 0.05 < distances['replace']
  assert np.isinf(distances['dps, std 0.05']) and 0.1 < distances['dps, std 0.1'] < distances['replace']


def test_pigdm_is_exact_for_white_data_alone_and_samples_follow():
  measured = lambda row, samples: table.measure(row._replace(steps=50), samples)
  white, correlated = 'noisy means, white', 'noisy means'
  floor = measured(table.exact(white), 0)['w2']
  assert abs(measured(table.pigdm(white), 0)['w2'] - floor) < 1e-6
  floor, ours = measured(table.exact(correlated), 0)['w2'], measured(table.pigdm(correlated), 1000)
  assert ours['w2'] > floor + 0.05 and ours['sampled_errors'] < 4


def test_the_distance_of_normal_laws():
  """Of N(m, a^2) and N(n, b^2) on each of two axes: the root of the sum of (m - n)^2 + (a - b)^2."""
  one, other = (table.oracles.Gaussian(np.array(mean), np.diag(np.square(stds)))
                for mean, stds in (((0.0, 1.0), (1.0, 0.0)), ((0.5, 1.0), (3.0, 2.0))))
  assert abs(table.distance(one, other) - np.sqrt(0.25 + 4 + 4)) < 1e-9


@pytest.mark.slow
def test_the_table_is_that_of_the_package():
  with open(table.HERE / 'results.csv') as file:
    written = list(csv.DictReader(file))
  for row, before in zip(table.every_row(), written, strict=True):
    now = table.measure(row)
    assert now['method'] == before['method'] and not now['sampled_errors'] > 4
    for name in ('mean_error', 'std_ratio', 'w2'):
      np.testing.assert_allclose(now[name], float(before[name]), atol=2e-4)
