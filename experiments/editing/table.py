"""How good are edits of pictures? python -m experiments.editing.table --workdir=runs/shapes --trained=runs/shapes_edit

Coloured shapes are drawn by rule, so the true law of what a hole may hold is known: pictures of the same caption are drawn
until they agree with what is around it. Writes a table, as CSV, and a picture of strength, inpainting, outpainting and
likeness beside this file, and prints the tables of README.md.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging
from PIL import Image
from scipy import ndimage

from diffusion_jax.generate import load
from diffusion_jax.runtime.workdir import load_complete, write_csv
from diffusion_jax.tasks import shapes

HERE = Path(__file__).parent
SIDE, HOLE, DRAWS = 16, 8, 16  # DRAWS: samples of each hole
GUIDED = 'guide(3.0, during=(0.0, 0.8)) | clip(1.0)'  # where places are decided, guidance draws too many shapes
STEPS = 'uniform(25)'
STRENGTHS = 0.0, 0.4, 0.6, 0.8, 1.0
SHOWN = 6  # pictures of each method on a sheet, the first ones


class Example(NamedTuple):
  """A held-out picture, uint8, with all that there is to say of it, and a hole over its first shape."""
  picture: np.ndarray
  facts: shapes.Facts
  hole: np.ndarray  # bool [SIDE, SIDE]

  @property
  def text(self) -> str:
    return shapes.caption(self.facts)


def examples(count: int) -> list[Example]:
  """The first held-out pictures of pairs of colour and kind that were trained on."""
  source = shapes.Shapes(count, SIDE, 1, unseen=False)
  found = []
  for i in range(count):
    row = source[i]
    first, hole = shapes.read(row['x'])[0], np.zeros((SIDE, SIDE), bool)
    top, left = (min(max((low + high - HOLE) // 2, 0), SIDE - HOLE)
                 for low, high in ((first.top, first.bottom), (first.left, first.right)))
    hole[top:top + HOLE, left:left + HOLE] = True
    found.append(Example(row['x'], shapes.said(row['captions'][0]), hole))
  return found


def by_rule(example: Example) -> np.ndarray:
  """DRAWS pictures of the caption that agree with the example outside its hole, [DRAWS, SIDE, SIDE, 3]: the true law."""
  rng, found = np.random.default_rng(0), []
  while len(found) < DRAWS:
    picture = shapes.draw(example.facts, SIDE, rng)
    if (picture == example.picture)[~example.hole].all():
      found.append(picture)
  return np.stack(found)


def nearest_fill(example: Example) -> np.ndarray:
  """The hole filled with the nearest known pixel."""
  rows, columns = ndimage.distance_transform_edt(example.hole, return_distances=False, return_indices=True)
  return example.picture[rows, columns][None]


def mean_fill(example: Example) -> np.ndarray:
  """The hole filled with the mean of the known pixels."""
  mean = example.picture[~example.hole].mean(0).round().astype(np.uint8)
  return np.where(example.hole[..., None], mean, example.picture)[None]


def guided(workdir: str, grid: str | None = None) -> Callable:
  """The pictures of a run, guided as GUIDED says, on a grid of its own or that of the run."""
  config = load_complete(workdir)
  config.transform, config.grid = GUIDED, grid or config.grid
  return load(workdir, config)


def filler(workdir: str, grid: str, inpaint: str) -> Callable[[Example], np.ndarray]:
  """The hole filled by a run, DRAWS times, on a grid of its own."""
  generate = guided(workdir, grid)
  def fill(example):
    found = generate([example.text], image=example.picture, mask=example.hole, inpaint=inpaint, count=DRAWS)
    return np.stack([each.pixels for each in found])
  return fill


def seam(pictures: np.ndarray, hole: np.ndarray) -> float:
  """The mean absolute difference, of 255, between neighbours of which one is in the hole."""
  x, steps = pictures.astype(float), []
  for axis in (0, 1):
    across = np.diff(hole.astype(int), axis=axis) != 0
    steps.append(np.abs(np.diff(x, axis=axis + 1))[:, across].ravel())
  return float(np.concatenate(steps).mean())


def judge(method: str, found: list[np.ndarray], rows: list[Example]) -> dict:
  """The scores of the pictures [draws, SIDE, SIDE, 3] that a method found for each example.

  PSNR is that of their mean, in the hole, over all examples.
  """
  pairs = list(zip(found, rows, strict=True))
  in_hole = lambda pictures, row: pictures[..., row.hole, :].astype(float)
  error = np.mean([(in_hole(each.mean(0), row) - in_hole(row.picture, row))**2 for each, row in pairs])
  reads = [([set(shapes.read(picture)) for picture in each], set(shapes.read(row.picture))) for each, row in pairs]
  return {'method': method,
          'PSNR of the mean': 10 * np.log10(255**2 / error) if error else np.inf,
          'right': np.mean([all(shapes.right(picture, row.facts).values()) for each, row in pairs for picture in each]),
          'truth among them': np.mean([truth in each for each, truth in reads]),
          'seam': np.mean([seam(each, row.hole) for each, row in pairs]),
          'known pixels off by': max(np.abs(each.astype(int) - row.picture)[:, ~row.hole].max() for each, row in pairs)}


def inpainting(rows: list[Example]) -> tuple[list[dict], np.ndarray]:
  """The table of all fills, and a sheet: the picture, the hole, and one sample of each method, a column an example."""
  plain, trained = flags.FLAGS.workdir, flags.FLAGS.trained
  methods = {'drawn by rule': by_rule, 'mean of the known': mean_fill, 'nearest known': nearest_fill,
             'replace()': filler(plain, STEPS, 'replace()'),
             'replace(), RePaint': filler(plain, f'jumps({STEPS}, 5, 4)', 'replace()'),
             'pigdm()': filler(plain, STEPS, 'pigdm()'), 'dps(0.1)': filler(plain, STEPS, 'dps(0.1)'),
             'trained to inpaint': filler(trained, STEPS, 'replace()')}
  real = [row.picture[None] for row in rows]
  table, sheet = [judge('the picture itself', real, rows)], [real, [np.where(row.hole[..., None], 90, row.picture)[None]
                                                                    for row in rows]]
  for method, fill in methods.items():
    found = [fill(row) for row in rows]
    table.append(judge(method, found, rows))
    sheet.append(found)
    print(table[-1], flush=True)
  return table, tiles(sheet)


def another(facts: shapes.Facts) -> shapes.Facts:
  """The same with the next colour."""
  colours = list(shapes.COLOURS)
  return facts._replace(colour=colours[(colours.index(facts.colour) + 1) % len(colours)])


def led(way: str, row: Example) -> dict:
  """The fields by which a picture is inverted and not noised: what it shows is its source."""
  return {'source': row.text, 'solver': 'ddim()'} if way == 'inverted' else {}


def strength(rows: list[Example]) -> tuple[list[dict], np.ndarray]:
  """How far a picture of the same prompt goes, and what an edit of the colour changes, at each strength.

  Without a source the image is noised; with it, it is led there by the inverse of DDIM, and back by DDIM.
  """
  generate, table, sheet = guided(flags.FLAGS.workdir), [], [[row.picture[None] for row in rows]]
  distance = lambda a, b: np.sqrt(np.mean((a.astype(float) - b)**2)) / 127.5
  boxes = lambda picture: {each[2:] for each in shapes.read(picture)}
  for way, strengths in (('noised', STRENGTHS), ('inverted', STRENGTHS[1:-1])):
    for value in strengths:
      fields = [{'image': row.picture, 'strength': value, **led(way, row)} for row in rows]
      back = {'guidance': 1.0} if way == 'inverted' else {}
      same = [generate([row.text], **each, **back)[0].pixels for each, row in zip(fields, rows, strict=True)]
      edits = [generate([shapes.caption(another(row.facts))], **each)[0].pixels
               for each, row in zip(fields, rows, strict=True)]
      shown = [shapes.right(picture, another(row.facts)) for picture, row in zip(edits, rows, strict=True)]
      table.append({'way': way, 'strength': value,
                    'distance': np.mean([distance(a, row.picture) for a, row in zip(same, rows, strict=True)]),
                    'new colour': np.mean([each['colour'] for each in shown]),
                    'all asked for': np.mean([all(each.values()) for each in shown]),
                    'same boxes': np.mean([boxes(a) == boxes(row.picture) for a, row in zip(edits, rows, strict=True)])})
      print(table[-1], flush=True)
      sheet.append([each[None] for each in edits])
  return table, tiles(sheet)


def outpainting(rows: list[Example]) -> tuple[list[dict], np.ndarray]:
  """Pictures on a canvas of twice the width: do they keep their shapes, and what comes beside them?"""
  table, sheet = [], []
  for method, workdir in (('replace()', flags.FLAGS.workdir), ('trained to inpaint', flags.FLAGS.trained)):
    generate = guided(workdir)
    found = [generate([row.text], image=row.picture, outpaint=(0, 0, SIDE, 0))[0].pixels for row in rows]
    reads = [set(shapes.read(each)) for each in found]
    kinds = [{shape[:2] for shape in each} for each in reads]
    table.append({'method': method,
                  'keeps its shapes': np.mean([set(shapes.read(row.picture)) <= each
                                               for each, row in zip(reads, rows, strict=True)]),
                  'all of its colour and kind': np.mean([each == {(row.facts.shape, row.facts.colour)}
                                                         for each, row in zip(kinds, rows, strict=True)]),
                  'shapes added': np.mean([len(each) - row.facts.count for each, row in zip(reads, rows, strict=True)]),
                  'known pixels off by': max(np.abs(each[:, :SIDE].astype(int) - row.picture).max()
                                             for each, row in zip(found, rows, strict=True))})
    print(table[-1], flush=True)
    sheet.append([each[None] for each in found])
  return table, tiles(sheet)


def likeness(rows: list[Example]) -> tuple[list[dict], np.ndarray]:
  """How often a picture shows what its reference shows: without and with it, and with prompts that say a part of it, or
  another colour, which is then the one that is looked for."""
  place = lambda facts: shapes.caption(facts._replace(colour=None, shape=None))
  prompts = {'nothing': (lambda facts: '', lambda facts: facts), 'position, count': (place, lambda facts: facts),
             'all, another colour': (lambda facts: shapes.caption(another(facts)), another)}
  generate, table, sheet = guided(flags.FLAGS.trained), [], [[row.picture[None] for row in rows]]
  for said, (prompt, wanted) in prompts.items():
    for reference in (False, True):
      given = [{'reference': row.picture} if reference else {} for row in rows]
      found = [np.stack([each.pixels for each in generate([prompt(row.facts)], count=DRAWS, **fields)])
               for fields, row in zip(given, rows, strict=True)]
      shown = [shapes.right(picture, wanted(row.facts)) for each, row in zip(found, rows, strict=True) for picture in each]
      table.append({'said': said, 'reference': 'yes' if reference else 'no',
                    **{what: np.mean([each[what] for each in shown]) for what in shapes.WHAT}})
      print(table[-1], flush=True)
      sheet.append(found)
  return table, tiles(sheet)


def tiles(sheet: list[list[np.ndarray]]) -> np.ndarray:
  """The first picture of the first examples, a row a method, fourfold and a pixel apart."""
  frame = lambda picture: np.pad(picture, ((1, 1), (1, 1), (0, 0)), constant_values=128)
  rows = [np.concatenate([frame(found[0].astype(np.uint8)) for found in row[:SHOWN]], 1) for row in sheet]
  return np.concatenate(rows).repeat(4, 0).repeat(4, 1)


def markdown(table: list[dict]) -> str:
  cell = lambda value: f'{value:.3g}' if isinstance(value, float) else str(value)
  lines = [table[0].keys(), ['---'] * len(table[0]), *(map(cell, row.values()) for row in table)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # of Orbax
  rows = examples(flags.FLAGS.pictures)
  for study in (strength, inpainting, outpainting, likeness):
    table, sheet = study(rows)
    write_csv(HERE / f'{study.__name__}.csv', table)
    Image.fromarray(sheet).save(HERE / f'{study.__name__}.png')
    print(markdown(table))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/shapes', 'A trained run of configs/shapes.py.')
  flags.DEFINE_string('trained', 'runs/shapes_edit', 'A trained run of configs/shapes_edit.py.')
  flags.DEFINE_integer('pictures', 16, 'How many held-out pictures are edited in each way.')
  app.run(main)
