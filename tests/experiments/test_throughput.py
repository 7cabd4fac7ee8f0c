"""The account by layer counts every product of the step."""
from pathlib import Path

import pytest
from jax import numpy as jnp

from diffusion_jax import run as runs
from diffusion_jax.runtime.products import products, total
from experiments.throughput import layers
from experiments.throughput.ours import config_of


@pytest.mark.slow
def test_the_layers_have_the_flops_of_the_step():
  """But for two gradients that a step does not take, to the images and to the embedding of times."""
  run = runs.open_run(config_of(2, 'float32'), Path('nowhere'), read=False)
  step = total(list(products(runs.trace_step(run, runs.state_shapes(run), runs.batch_shapes(run)).jaxpr)))
  found = layers.network_layers(run)
  counted = sum(layers.flops(*layers.both(*layers.layer(*key, jnp.float32))) * count for key, count in found.items())
  images = 2 * 2 * 64 * 3 * (3 * 32 - 2)**2  # of 3 taps a place at the border has 2
  assert counted - step == images + 2 * 2 * 64 * 256
  assert sum(count for (kind, *_), count in found.items() if kind == 'attention') == 6
