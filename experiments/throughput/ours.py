"""Our side of peers.py: the training step and the sampler of a config, as --mode=train and --mode=sample have them."""
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import cifar10
from diffusion_jax.jobs.benchmark import synthetic
from diffusion_jax.run import Run, chosen_params, make_sampler, new_state, open_run, trace_step
from diffusion_jax.runtime.packing import pack, unpack

NETWORK = 'UNet(channels=64, multipliers=(1, 2, 2), blocks=2, attention=(False, True, False), frequency_shift=1)'
STEPS = 50  # of DDIM


def config_of(batch: int, dtype: str) -> ConfigDict:
  """configs/cifar10.py with a network of 6.5 million parameters, without dropout, on one device."""
  config = cifar10.get_config()
  config.network = NETWORK if dtype == 'float32' else f'{NETWORK[:-1]}, dtype="{dtype}")'
  config.mesh, config.solver, config.grid = 'data=1', 'ddim()', f'uniform({STEPS})'
  config.train.batch = config.sample.batch = batch
  return config


def make_jobs(run: Run) -> dict:
  """{'train', 'sample'}: functions that do so many steps, or whole samplings, and return when they are done."""
  state, batch = new_state(run), synthetic(run)
  step, packed = trace_step(run, state, batch).lower().compile(), pack(state)
  sampler, index = make_sampler(run, run.config.transform), np.arange(run.config.sample.batch, dtype=np.int32)
  def train(count):
    nonlocal packed
    for _ in range(count):
      packed, metrics = step(packed, batch)
    jax.block_until_ready((packed, metrics))
  def sample(count):
    state = unpack(packed)
    for _ in range(count):
      x = sampler(chosen_params(run, state), state.extra, index)
    jax.block_until_ready(x)
  return {'train': train, 'sample': sample}


def serve(jobs: dict, about: dict) -> None:
  """Warm up, say so, then do what lines such as 'train 3' ask and answer with the seconds of one."""
  began = time.perf_counter()
  for job in jobs.values():
    job(1)
  print(json.dumps(about | {'ready_seconds': time.perf_counter() - began}), flush=True)
  for line in sys.stdin:
    name, count = line.split()
    began = time.perf_counter()
    jobs[name](int(count))
    print(json.dumps({'seconds': (time.perf_counter() - began) / int(count)}), flush=True)


def main(arguments: list[str]) -> None:
  _, batch, dtype = arguments
  run = open_run(config_of(int(batch), dtype), Path('nowhere'), read=False)
  params, _ = jax.eval_shape(run.method.init, jax.random.key(0))
  serve(make_jobs(run), {'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
                         'device': jax.devices()[0].device_kind, 'version': f'jax {jax.__version__}'})


if __name__ == '__main__':
  main(sys.argv)
