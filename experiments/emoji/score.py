"""Does a run draw what a name says? python -m experiments.emoji.score --workdir=runs/emoji_small

Draws 100 emoji of the training set and 100 that were held out by their names, as the run samples, and finds each among the
real pictures of these names. The data are read where the run's config.json says. Writes results.csv and samples.png beside
this file and prints the table of README.md. Under 3 minutes of two CPU cores.
"""
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from diffusion_jax.metrics.classifier import fit_svm
from diffusion_jax.metrics.neighbours import nearest_distances
from diffusion_jax.metrics.share import share
from diffusion_jax.run import draw, make_sampler, open_run, trained
from diffusion_jax.runtime.workdir import load_complete, write_csv
from diffusion_jax.tasks import captions, images, sources

COUNT = 100  # names of each split
SHOWN = 4  # of each kind, on the sheet: the first ones
INVENTED = 'panda on a bike', 'blue apple', 'cat astronaut', 'robot with crown'
TONE = re.compile('[:,] ((?:medium-)?(?:light|dark)|medium) skin tone')
HERE = Path(__file__).parent


def tone(name: str) -> str:
  """The skin tone that a name says; '' where it says none, or several."""
  found = set(TONE.findall(name))
  return found.pop() if len(found) == 1 else ''


def thing(name: str) -> str:
  """A name without its skin tones."""
  return TONE.sub('', name).replace(':', ',')


def most_alike(name: str, names: list[str]) -> int:
  """The number of the name that shares the most words: the intersection over the union."""
  words = lambda text: set(re.findall(r'[\w-]+', text))
  overlap = lambda other: len(words(name) & words(other)) / len(words(name) | words(other))
  return int(np.argmax([overlap(other) for other in names]))


def ranks(x: np.ndarray, real: np.ndarray) -> np.ndarray:
  """How many of the real features [N, D] are nearer to each of x [N, D] than its own: [N]."""
  distances = np.linalg.norm(x[:, None] - real[None], axis=-1)
  return (distances < np.diag(distances)[:, None]).sum(1)


def judge(x: np.ndarray, names: list[str], real: np.ndarray, kept: np.ndarray, training: np.ndarray,
          read: Callable) -> dict:
  """The scores of pictures that were made from names, as features x [N, D], beside the real pictures of these names.

  Those `kept` [N] count, each sought among all. `read` says the skin tone of features.
  """
  tones = np.array([tone(name) for name in names])
  rank, said = ranks(x, real)[kept], kept & (tones != '')
  return {'found': share(rank < 1), 'among five': share(rank < 5),
          'skin tone': share(read(x[said]) == tones[said]) if said.any() else None,
          'distance': float(np.median(nearest_distances(x[kept], training)))}


def chance(names: list[str]) -> dict:
  """The scores of one of the real pictures by lot, and of the one skin tone that is right most often."""
  said = [tone(name) for name in names if tone(name)]
  return {'pictures': 'chance', 'names': 'held out', 'found': 1 / len(names), 'among five': 5 / len(names),
          'skin tone': max(map(said.count, said)) / len(said), 'distance': None}


def score(workdir: Path) -> tuple[list[dict], list[tuple[str, str, np.ndarray]]]:
  """The rows of the table, and what the sheet shows: (kind, name, two pictures side by side)."""
  config = load_complete(workdir)
  splits = captions.load(config)
  pixels, held_pixels = (np.stack([source[i]['x'] for i in range(len(source))]) for source in (splits.train, splits.test))
  asked, held = splits.train.prompts[:COUNT], splits.test.prompts[:COUNT]
  drawn, held_drawn, *invented = draw_names(config, workdir, asked, held, INVENTED, INVENTED)

  training, real, known = images.features(pixels), images.features(held_pixels[:COUNT]), splits.train.prompts
  tones, things = np.array([tone(name) for name in known]), set(map(thing, known))
  read = fit_svm(training[tones != ''], tones[tones != ''])
  seen = np.array([thing(name) in things for name in held])
  every = {'held out': seen | ~seen}
  parts = {**every, 'held out, known in another skin tone': seen, 'held out, new': ~seen}
  def judged(pictures, x, kinds):
    return [{'pictures': pictures, 'names': kind, **judge(x, held, real, kept, training, read)}
            for kind, kept in kinds.items() if kept.any()]
  rows = [{'pictures': 'drawn', 'names': 'training',
           **judge(images.features(drawn), asked, training[:COUNT], np.ones(len(asked), bool), training, read)},
          *judged('drawn', images.features(held_drawn), parts),
          *judged('looked up', training[[most_alike(name, known) for name in held]], parts),
          *judged('real', real, every), chance(held)]

  pair = lambda kind, names, left, right: [
      (kind, name, np.concatenate(both, 1)) for name, *both in zip(names[:SHOWN], left, right, strict=False)]
  return rows, [*pair('training: real, drawn', asked, pixels, drawn),
                *pair('held out: real, drawn', held, held_pixels, held_drawn),
                *pair('invented: two drawn', INVENTED, *invented)]


def draw_names(config: ConfigDict, workdir: Path, *lists: Sequence[str]) -> list[np.ndarray]:
  """A picture for each name of the lists, uint8 [N, H, W, C] a list, each from noise of its own."""
  names = config.sample.prompts = tuple(itertools.chain(*lists))
  run = open_run(config, workdir, read=False)
  samples = draw(run, make_sampler(run, config.transform), trained(run), len(names), -(-len(names) // 2))
  return np.split(samples, np.cumsum([len(each) for each in lists])[:-1])


def flat(row: dict) -> dict:
  """A row of results.csv: a share with its interval and count in four columns."""
  cells = {}
  for name, value in row.items():
    if isinstance(value, dict):
      cells |= {name: value['samples'], **{f'{name} {part}': value[part] for part in ('low', 'high', 'count')}}
    elif value is not None:
      cells[name] = value
  return {name: f'{cell:.4f}' if isinstance(cell, float) else cell for name, cell in cells.items()}


def table(rows: list[dict]) -> str:
  """The rows in Markdown, as README.md has them."""
  def cell(value):
    if isinstance(value, dict):
      return '{samples:.2f} ({low:.2f} to {high:.2f}), n = {count}'.format(**value)
    return '' if value is None else f'{value:.2f}' if isinstance(value, float) else value
  lines = [list(rows[0]), ['---'] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def plot(sheet: list[tuple[str, str, np.ndarray]], path: Path) -> None:
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(len(sheet) // SHOWN, SHOWN, figsize=(12, 5), layout='constrained')
  for axis, (kind, name, pixels) in zip(axes.flat, sheet, strict=True):
    axis.imshow(sources.to_picture(pixels))
    axis.set_title(name, fontsize=8)
    axis.set(xticks=[], yticks=[])
    if axis in axes[:, 0]:
      axis.set_ylabel(kind, fontsize=8)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    sys.exit(f'This takes flags alone; got {arguments[1:]}.')
  logging.set_verbosity(logging.WARNING)  # of Orbax
  rows, sheet = score(Path(flags.FLAGS.workdir))
  write_csv(HERE / 'results.csv', [flat(row) for row in rows])
  plot(sheet, HERE / 'samples.png')
  print(table(rows))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/emoji_small', 'A trained run of configs/emoji.py or emoji_small.py.')
  app.run(main)
