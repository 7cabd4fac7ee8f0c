"""--mode=evaluate: scores of the samples of a trained run, each beside that of held-out data."""
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.run import Run, draw, make_sampler, open_run, provenance, trained
from diffusion_jax.runtime import workdir as workdirs
from diffusion_jax.runtime.logs import say, table
from diffusion_jax.runtime.step import State


def run(config: ConfigDict, workdir: Path) -> int:
  this = open_run(config, workdir, read=True)
  write(this, trained(this))
  say(f'The scores are in\n  {workdir / "results.json"}')
  return 0


def write(this: Run, state: State) -> Path:
  """Score config.evaluate.count samples for each of config.evaluate.transforms, into results.json and on the screen."""
  c = this.config
  if c.evaluate.count < 2:
    raise ValueError(f'config.evaluate.count is {c.evaluate.count}; scores need 2 samples or more.')
  results = []
  for transform in c.evaluate.transforms:
    samples = draw(this, make_sampler(this, transform), state, c.evaluate.count, c.evaluate.batch)
    scores = this.task.metrics(samples, this.task.context(np.arange(c.evaluate.count)))
    results.append({**provenance(this, state, c.evaluate.count, transform), **scores})
    pairs = {name: value for name, value in scores.items() if isinstance(value, dict)}
    say(f'\nScores of {c.evaluate.count} samples, {transform}, {c.solver} on {c.grid}, EMA {results[-1]["ema"]}, seed '
        f'{c.sample.seed}')
    table({'': f'{"samples":>10} {"held out":>10}',
           **{name: f'{value["samples"]:10.4f} {value["held_out"]:10.4f}' for name, value in pairs.items()}})
  path = this.workdir / 'results.json'
  if jax.process_index() == 0:
    workdirs.write_json(path, {'commit': workdirs.commit(), 'data': this.task.summary, 'skipped_files': this.task.skipped(),
                               'scores': results})
  return path
