"""The README's Python is run, and what it says of it is measured."""
import re
from pathlib import Path

import numpy as np

from diffusion_jax.core import sampling, schedules
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate, example_keys
from tests import rows

README = Path(__file__).parents[1] / 'README.md'


def blocks():
  """The README's Python."""
  return re.findall(r'```python\n(.*?)```', README.read_text(), re.S)


def run_blocks():
  """All names that they define, but for the one that needs a trained run, which tests/test_generate.py runs."""
  names = {}
  for block in blocks():
    if 'diffusion_jax.generate' not in block:
      exec(block, names)
  return names


def test_the_schedule_preserves_variance_and_falls():
  alpha, sigma = run_blocks()['straight_logsnr']()(np.linspace(0.01, 1, 50, dtype=np.float32))
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-5)
  np.testing.assert_allclose(np.diff(2 * np.log(alpha / sigma)), -24 * 0.99 / 49, rtol=1e-3)


def test_the_sampler_has_order_two(x64):
  """On data N(0, 4) the flow map is exact: x_s = x_t sqrt(4 alpha_s^2 + sigma_s^2) / sqrt(4 alpha_t^2 + sigma_t^2)."""
  import jax
  process = Gaussian(schedules.cosine())
  variance = lambda level: 4 * level.alpha**2 + level.sigma**2
  denoiser = lambda x, level, cond: Estimate(4 * level.alpha / variance(level) * x)
  keys = example_keys(jax.random.key(0), jax.numpy.arange(1))
  def error(steps):
    grid = np.linspace(0.9, 0.1, steps + 1)
    end = sampling.sample(keys, process, run_blocks()['midpoint'](), denoiser, grid, (), start=jax.numpy.ones(1))
    return abs(end[0] - np.sqrt(variance(process.level(0.1)) / variance(process.level(0.9))))
  assert 1.8 < np.log2(error(20) / error(40)) < 2.2


def test_the_example_samples():
  x = run_blocks()['x']
  assert x.shape == (8, 2) and np.isfinite(x).all()


def test_functions_stay_under_twenty_lines():
  for block in blocks():
    assert block.count('\n') < 20


def test_the_table_of_rows_is_that_of_the_package():
  assert rows.render() in README.read_text(), 'Type python -m tests.rows.'
