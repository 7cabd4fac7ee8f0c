"""--mode=evaluate: scores of the samples of a trained run, each beside that of held-out data, and its bits per entry."""
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.core import likelihood
from diffusion_jax.core.types import example_keys
from diffusion_jax.method import make_likelihood
from diffusion_jax.run import (
  Run,
  chosen_ema,
  chosen_params,
  draw,
  make_sampler,
  open_run,
  provenance,
  shared,
  trained,
)
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime import workdir as workdirs
from diffusion_jax.runtime.logs import say, table
from diffusion_jax.runtime.step import State


def run(config: ConfigDict, workdir: Path) -> int:
  this = open_run(config, workdir, read=True)
  write(this, trained(this))
  say(f'The scores are in\n  {workdir / "results.json"}')
  return 0


def write(this: Run, state: State) -> Path:
  """Score config.evaluate.count samples for each of config.evaluate.transforms, and config.evaluate.bits images, into
  results.json and on the screen."""
  c = this.config
  if not c.evaluate.count and not c.evaluate.bits:
    raise ValueError('config.evaluate.count and config.evaluate.bits are 0: there is nothing to evaluate.')
  results = []
  for transform in c.evaluate.transforms if c.evaluate.count else ():
    samples = draw(this, make_sampler(this, transform), state, c.evaluate.count, c.evaluate.batch)
    scores = this.task.metrics(samples, this.task.titles(np.arange(c.evaluate.count)))
    results.append({**provenance(this, state, c.evaluate.count, transform), **scores})
    show = lambda value: f'{"-":>10}' if value is None else f'{value:10.4f}'
    pairs = {name: value for name, value in scores.items() if isinstance(value, dict)}
    say(f'\nScores of {c.evaluate.count} samples, {transform}, {c.solver} on {c.grid}, EMA {results[-1]["ema"]}, seed '
        f'{c.sample.seed}')
    table({'': f'{"samples":>10} {"held out":>10}',
           **{name: f'{value["samples"]:10.4f} {show(value["held_out"])}' for name, value in pairs.items()}})
  bits = bits_per_entry(this, state) if c.evaluate.bits else None
  path = this.workdir / 'results.json'
  if jax.process_index() == 0:
    workdirs.write_json(path, {'commit': workdirs.commit(), 'data': this.task.summary, 'skipped_files': this.task.skipped(),
                               'scores': results, 'likelihood': bits})
  return path


def bits_per_entry(this: Run, state: State) -> dict:
  """Bits per entry, by the probability-flow ODE, of at most config.evaluate.bits held-out and training images, given their
  classes: the model's code length of an 8-bit value."""
  c = this.config
  program = jax.jit(_bits_program(this))
  found = {}
  for split in ('held_out', 'train'):
    rows = this.task.examples(split, c.evaluate.bits)
    count = len(rows['x'])
    batch = shared(this, min(c.evaluate.batch, count))
    parts = []
    for first in range(0, count, batch):
      index = np.minimum(np.arange(first, first + batch), count - 1)  # the last batch is filled up; the surplus is cut off
      part = {'index': index.astype(np.int32), **{name: value[index] for name, value in rows.items()}}
      parts.append(meshes.gather(program(chosen_params(this, state), state.extra, meshes.place(part, this.mesh))))
    values = np.concatenate(parts)[:count]
    mean, error, _ = map(float, likelihood.summary(values))
    found[split] = {'bits': mean, 'standard_error': error, 'images': count}
  say(f'\nBits per entry, {c.evaluate.integrator}, {c.evaluate.trace}, uniform dequantization, EMA {chosen_ema(c)}')
  show = lambda row: f'{row["bits"]:10.4f} +- {row["standard_error"]:.4f} ({row["images"]} images)'
  table({name: show(row) for name, row in found.items()})
  return {'step': int(state.step), 'ema': chosen_ema(c), 'seed': c.sample.seed, 'integrator': c.evaluate.integrator,
          'trace': c.evaluate.trace, 'dequantization': 'uniform', **found}


def _bits_program(this: Run) -> Callable:
  """(params, extra, rows) -> bits [B, 1]; the noise of an image follows from config.sample.seed and its number."""
  trace, integrator = make_likelihood(this.config)
  def program(params, extra, rows):
    _, cond = this.task.encode(rows)
    keys = example_keys(jax.random.key(this.config.sample.seed), rows['index'])
    return likelihood.bits(this.method.process(params), this.method.denoiser(params, extra), keys, rows['x'].astype(int),
                           256, cond, trace=trace, integrator=integrator)
  return program
