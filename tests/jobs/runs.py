"""A tiny run, and what tests ask of it."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from configs import base
from diffusion_jax import run as runs
from diffusion_jax.method import SHARDING

ROOT = Path(__file__).parents[2]
NETWORK = 'UNet(channels=8, multipliers=(1,), blocks=1, attention=(False,), dropout=0.1)'
# The rules of method.SHARDING for small parameters: of all with 64 entries or more every device holds a part.
SMALL = {name: tuple((pattern, text.replace('fsdp()', 'fsdp(64)')) for pattern, text in rules)
         for name, rules in SHARDING.items()}
RULES = SMALL['UNet']
FIELDS = {'network': NETWORK, 'grid': 'uniform(4)', 'train.steps': 4, 'train.batch': 16, 'train.ema': (0.9, 0.99),
          'optimizer.warmup': 2, 'checkpoint.every': 2, 'log.every': 1, 'sample.count': 0, 'sample.batch': 16,
          'evaluate.count': 0, 'mesh': 'data=2'}


def tiny(**fields):
  """configs/base.py with FIELDS and then `fields`, whose names have __ for a dot."""
  config = base.get_config()
  config.update_from_flattened_dict(FIELDS | {name.replace('__', '.'): value for name, value in fields.items()})
  return config


def trained_state(config, workdir):
  """The leaves of the newest checkpoint, as numpy arrays."""
  this = runs.open_run(config, Path(workdir), read=False)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(runs.trained(this))]


def losses(workdir):
  """{step: loss} of metrics.jsonl, without a last line that was cut off."""
  lines = (Path(workdir) / 'metrics.jsonl').read_text().splitlines(keepends=True)
  whole = [json.loads(line) for line in lines if line.endswith('\n')]
  return {line['step']: line['loss'] for line in whole}


def samples(workdir):
  """samples.npz as a dict of arrays."""
  with np.load(Path(workdir) / 'samples' / 'samples.npz') as file:
    return dict(file)


def flags(**fields):
  """FIELDS and `fields` as command-line flags."""
  merged = FIELDS | {name.replace('__', '.'): value for name, value in fields.items()}
  return [f'--config.{name}={value}' for name, value in merged.items()]


def start(workdir, *words, config='configs/base.py', file_limit=None, **environment):
  """Start python -m diffusion_jax.main in a process of its own, which may write files of at most file_limit KiB."""
  config = [f'--config={config}'] if config else []
  command = [sys.executable, '-m', 'diffusion_jax.main', f'--workdir={workdir}', *words, *config]
  if file_limit:
    command = ['bash', '-c', f'ulimit -f {file_limit}; exec "$@"', 'bash', *command]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {'PYTHONUNBUFFERED': '1'} | environment)


def start_two(workdir, *words):
  """Start it as two processes of four devices each, over loopback."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  devices = dict(XLA_FLAGS='--xla_backend_optimization_level=0', JAX_NUM_CPU_DEVICES='4')
  return [start(workdir, *words, f'--coordinator={address}', '--processes=2', f'--process={i}', **devices)
          for i in range(2)]


def command(workdir, *words, **options):
  """Run it to its end: (exit status, all that it printed)."""
  process = start(workdir, *words, **options)
  output, _ = process.communicate(timeout=300)
  return process.returncode, output


def wait_for_step(process, step):
  """Read what the process prints until it has logged `step`, or ends."""
  for line in process.stdout:
    if line.startswith(f'step {step}/'):
      return
