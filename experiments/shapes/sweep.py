"""What guidance does to coloured shapes: python -m experiments.shapes.sweep --workdir=runs/shapes

Accuracy, by the rule-based reader, against diversity over the scales of guidance, and how often a colour comes with and
without a negative prompt that names it. Writes results.csv and guidance.png beside this file.
"""
import itertools
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags, logging
from numpy.typing import NDArray

from diffusion_jax.metrics.share import share
from diffusion_jax.run import draw, make_sampler, open_run, trained
from diffusion_jax.runtime.workdir import load_complete, write_csv
from diffusion_jax.tasks import shapes

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

SCALES = (0.0, 1.0, 2.0, 3.0, 8.0)
COPIES = 4  # pictures of a prompt
BATCH = 100
COLOURLESS = ('a square', 'two rings', 'three crosses', 'two triangles on the left')
HERE = Path(__file__).parent


def drawn(workdir: str, prompts: list[str], scale: float, negative: str = '') -> NDArray[np.uint8]:
  """A picture for each prompt, each from noise of its own, by the run's own sampler but for the guidance."""
  config = load_complete(workdir)
  config.sample.prompts, config.sample.negative = tuple(prompts), negative
  run = open_run(config, Path(workdir), read=False)
  return draw(run, make_sampler(run, f'guide({scale}) | clip(1.0)'), trained(run), len(prompts), BATCH)


def spread(pictures: NDArray[np.uint8]) -> float:
  """Root mean square distance, in [-1, 1], of the pictures of one prompt, over all pairs and prompts."""
  groups = pictures.reshape(-1, COPIES, *pictures.shape[1:]).astype(float) / 127.5
  return float(np.sqrt(np.mean([(groups[:, i] - groups[:, j])**2 for i, j in itertools.combinations(range(COPIES), 2)])))


def real(prompts: list[str]) -> NDArray[np.uint8]:
  """COPIES pictures that are drawn for each prompt, which says all."""
  rng = np.random.default_rng(0)
  return np.stack([shapes.draw(shapes.said(prompt), 16, rng) for prompt in prompts for _ in range(COPIES)])


def scored(name: str, scale: float, found: NDArray[np.uint8], prompts: list[str]) -> dict:
  """A row of the table: the share of pictures that show each fact, and all of them with its interval."""
  scores = shapes.score(found, prompts)
  return {'what': name, 'guidance': scale, 'pictures': len(found), 'spread': spread(found),
          **{what: row['samples'] for what, row in scores.items()},
          **{f'all_{end}': scores['all'][end] for end in ('low', 'high')}}


def coloured(workdir: str, negative: str, scale: float, count: int) -> dict:
  """How many of the pictures of prompts that name no colour have each colour in one of their shapes."""
  found = drawn(workdir, [COLOURLESS[i % len(COLOURLESS)] for i in range(count)], scale, negative)
  seen = [{each.colour for each in shapes.read(picture)} for picture in found]
  shares = {colour: share([colour in colours for colours in seen]) for colour in shapes.COLOURS}
  named = {f'{colour}_{end}': row[end] for colour, row in shares.items() for end in ('samples', 'low', 'high')}
  return {'what': f'negative {negative!r}', 'guidance': scale, 'pictures': len(found), **named}


def plot(rows: list[dict], path: Path) -> None:
  """Accuracy against diversity, a point a scale."""
  figure, axis = plt.subplots(figsize=(5, 4), layout='constrained')
  guided = [row for row in rows if row['what'] == 'prompts']
  axis.plot([row['spread'] for row in guided], [row['all'] for row in guided], 'o-')
  for row in guided:
    axis.annotate(f'{row["guidance"]:g}', (row['spread'], row['all']), textcoords='offset points', xytext=(6, -4))
  held = next(row for row in rows if row['what'] == 'real')
  axis.plot(held['spread'], held['all'], '*', color='black', label='real pictures')
  axis.set(xlabel='diversity: distance between pictures of one prompt', ylabel='all four facts right')
  axis.legend()
  figure.savefig(path, dpi=100)
  plt.close(figure)


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # of Orbax
  workdir, count = flags.FLAGS.workdir, flags.FLAGS.count
  texts = shapes.Shapes(count // COPIES, 16, 2, unseen=False).prompts
  prompts = [text for text in texts for _ in range(COPIES)]
  rows = [scored('real', 1.0, real(texts), prompts)]
  rows += [scored('prompts', scale, drawn(workdir, prompts, scale), prompts) for scale in SCALES]
  rows += [coloured(workdir, negative, flags.FLAGS.scale, count) for negative in ('', *shapes.COLOURS)]
  write_csv(HERE / 'results.csv', rows)
  plot(rows, HERE / 'guidance.png')
  for row in rows:
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/shapes', 'A trained run of configs/shapes.py.')
  flags.DEFINE_integer('count', 200, 'Pictures a row.')
  flags.DEFINE_float('scale', 5.0, 'Guidance with a negative.')
  app.run(main)
