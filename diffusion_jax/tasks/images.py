"""Images with or without classes: digits, TFDS sets, folders."""
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax.metrics.classifier import fit_svm
from diffusion_jax.metrics.frechet import frechet_distance
from diffusion_jax.metrics.kid import kernel_distance
from diffusion_jax.metrics.neighbours import nearest_distances
from diffusion_jax.runtime import input as inputs
from diffusion_jax.tasks import sources
from diffusion_jax.tasks.task import Task

FEATURE_SIZE = 8  # pixels a side of the images in whose space distances are taken
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


def make_task(data: ConfigDict, reference: int, seed: int, labels: tuple[int, ...], read: bool) -> Task:
  """The image task of config.data.

  `reference` caps the training images that scores use, `labels` are those to sample (() for all in turn). Raises
  ValueError where the config contradicts the data.
  """
  fit_of(data)
  splits = load(data) if read else None
  classes = splits.classes if data.classes == -1 and read else data.classes
  if read:
    check_labels(splits, classes)
  if labels and not classes:
    raise ValueError(f'config.sample.labels is {labels}, but this run has no classes: leave it empty.')
  height, width = data.size
  augment = flip if data.flip else None
  def context(index):
    chosen = np.asarray(labels or range(max(classes, 1)), np.int32)
    if classes and not ((0 <= chosen) & (chosen < classes)).all():
      raise ValueError(f'config.sample.labels is {labels}; this run has the classes 0 to {classes - 1}.')
    return {'label': chosen[index % len(chosen)]} if classes else None
  def ask(prompts):
    for prompt in prompts:
      if (prompt not in map(str, range(classes))) if classes else prompt:
        legal = f'a class from 0 to {classes - 1}' if classes else 'nothing: this run has no classes'
        raise ValueError(f'The prompt {prompt!r} is none that this run knows; it can be asked for {legal}.')
    return {'label': np.array(prompts, np.int32)} if classes else None
  return Task(
      shape=(height, width, data.channels),
      classes=classes,
      null={'label': np.int32(classes)} if classes else None,
      summary=summarise(data, splits, f'{classes} classes' if classes else 'no classes') if read else '',
      row={'x': jax.ShapeDtypeStruct((height, width, data.channels), np.uint8),
           'label': jax.ShapeDtypeStruct((), np.int32)},
      batches=lambda step, batch, process, processes: inputs.batches(
          splits.train, augment, seed, batch, step, process, processes),
      encode=lambda rows: (encode(rows['x']), {'label': rows['label']} if classes else None),
      drawn=lambda keys, x0, cond: cond,
      context=context,
      ask=ask,
      titles=lambda index: [str(label) for label in context(index)['label']] if classes else [''] * len(index),
      decode=decode,
      render=render,
      examples=lambda split, most: _read(splits.train if split == 'train' else splits.test, most),
      metrics=lambda samples, titles: score(samples, titles, splits, classes, reference),
      skipped=lambda: skipped(splits),
      save=lambda folder: None)


def load(data: ConfigDict) -> sources.Splits:
  """Open the data set that config.data.source names; its first example is read, so that a contradiction shows at once."""
  fit = fit_of(data)
  if data.source == 'digits':
    splits = sources.digits(fit)
  elif data.source == 'tfds':
    splits = sources.tfds(data.name, data.path, data.train, data.test, fit)
  elif data.source == 'folder':
    splits = sources.folder(data.path, data.holdout, fit, MODES[data.channels], data.bad_files == 'skip')
  else:
    raise ValueError(f"config.data.source is {data.source!r}; legal are 'digits', 'tfds' and 'folder'.")
  splits.train[0]
  return splits


def fit_of(data: ConfigDict) -> sources.Fit:
  """`fit_to` for config.data. Raises ValueError where its fields on images are illegal."""
  if data.channels not in MODES:
    raise ValueError(f'config.data.channels is {data.channels}; images have 1, 3 or 4.')
  if data.bad_files not in ('stop', 'skip'):
    raise ValueError(f"config.data.bad_files is {data.bad_files!r}; legal are 'stop' and 'skip'.")
  return fit_to(tuple(data.size), data.channels, data.resize)


def fit_to(size: tuple[int, int], channels: int, resize: str) -> sources.Fit:
  """A function that brings an image [H, W, C] to `size`: 'crop' cuts the middle to the aspect first, 'stretch' does not,
  'none' raises ValueError for any other size."""
  if resize not in ('crop', 'stretch', 'none'):
    raise ValueError(f"config.data.resize is {resize!r}; legal are 'crop', 'stretch' and 'none'.")
  height, width = size
  def fit(image, name):
    if image.shape[2] != channels:
      raise ValueError(f'{name} has images of {image.shape[2]} channels, config.data.channels is {channels}: type '
                       f'--config.data.channels={image.shape[2]}')
    if image.shape[:2] == size:
      return image
    if resize == 'none':
      raise ValueError(f'{name} has an image of {image.shape[0]}x{image.shape[1]} pixels, config.data.size is {size}: '
                       "type --config.data.resize=crop, or 'stretch', or another size.")
    picture = sources.to_picture(image)
    box = None
    if resize == 'crop':
      scale = min(picture.height / height, picture.width / width)
      high, wide = height * scale, width * scale
      top, left = (picture.height - high) / 2, (picture.width - wide) / 2
      box = (left, top, left + wide, top + high)
    return sources.to_array(picture.resize((width, height), Image.Resampling.LANCZOS, box))
  return fit


def check_labels(splits: sources.Splits, classes: int) -> None:
  """Raise ValueError if the data have more classes than the config, where all labels are at hand."""
  if classes and splits.classes > classes:
    raise ValueError(f'The data have labels from 0 to {splits.classes - 1}, config.data.classes is {classes}, so label '
                     f'{splits.classes - 1} is out of range: type --config.data.classes={splits.classes}')
  if classes and not splits.classes:
    raise ValueError(f'The data have no labels, config.data.classes is {classes}: type --config.data.classes=0')


def flip(example: dict, rng: np.random.Generator) -> dict:
  """Mirror the image left to right, every second time."""
  return {**example, 'x': example['x'][:, ::-1]} if rng.random() < 0.5 else example


def encode(x):
  """uint8 0..255 to float -1..1."""
  return x.astype(jnp.float32) / 127.5 - 1


def decode(x) -> np.ndarray:
  """Float -1..1 to uint8, rounding (x + 1) / 2 * 255 to the nearest."""
  return np.round((np.clip(np.asarray(x, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def render(images: np.ndarray, columns: int) -> np.ndarray:
  """A grid of uint8 images [N, H, W, C], enlarged to at least 32 pixels a side, on white: [height, width, 3]."""
  factor = max(1, -(-32 // min(images.shape[1:3])))
  tiles = [sources.pixels(sources.to_picture(image), 'RGB') for image in images]
  tiles = [np.pad(tile.repeat(factor, 0).repeat(factor, 1), ((1, 1), (1, 1), (0, 0)), constant_values=255)
           for tile in tiles]
  tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
  return np.concatenate([np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)], 0)


def features(images: np.ndarray) -> np.ndarray:
  """Images [N, H, W, C], uint8, as pixels in [-1, 1] averaged down to at most 8x8: [N, D]. Digits are left as they are."""
  size = tuple(min(FEATURE_SIZE, side) for side in images.shape[1:3])
  x = images.astype(np.float64) / 127.5 - 1
  for axis, side in enumerate(size, 1):
    weights = _averaging(x.shape[axis], side)
    x = np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)
  return x.reshape(len(x), -1)


def score(samples: np.ndarray, labels: list[str], splits: sources.Splits, classes: int, reference: int) -> dict[str, Any]:
  """Scores of uint8 samples beside those of held-out data. Distances compare equally many samples and held-out images."""
  train, test = _read(splits.train, reference), _read(splits.test, min(len(samples), reference))
  real, held, drawn = features(train['x']), features(test['x']), features(samples)
  count = min(len(held), len(drawn))
  pair = lambda measure: {'samples': measure(drawn[:count]), 'held_out': measure(held[:count])}
  scores = {
      'feature_space': f'pixels in [-1, 1] averaged to at most {FEATURE_SIZE}x{FEATURE_SIZE}, {real.shape[1]} dimensions',
      'training_images': len(real), 'count_of_distances': count,
      'frechet_distance': pair(lambda x: frechet_distance(x, real)),
      'kernel_distance': pair(lambda x: kernel_distance(x, real)),
      'nearest_training_distance_median': {'samples': float(np.median(nearest_distances(drawn, real))),
                                           'held_out': float(np.median(nearest_distances(held, real)))}}
  if classes:
    predict = fit_svm(real, train['label'])
    scores['svm_accuracy'] = {'samples': float(np.mean(predict(drawn) == np.array(labels, int))),
                              'held_out': float(np.mean(predict(held) == test['label']))}
  return scores


def _averaging(old: int, new: int) -> np.ndarray:
  """The matrix [new, old] whose rows average equal spans of `old` entries, parts of entries too."""
  edges = np.linspace(0, old, new + 1)
  overlap = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
  return overlap.clip(0) * new / old


def _read(source: Any, most: int) -> dict[str, np.ndarray]:
  """The images of at most `most` examples, with their labels where they have some."""
  examples = chosen(source, most)
  return {name: np.stack([each[name] for each in examples]) for name in ('x', 'label') if name in examples[0]}


def chosen(source: Any, most: int) -> list[dict]:
  """At most `most` examples, after a fixed shuffle where there are more."""
  rows = np.arange(len(source))
  if len(rows) > most:
    rows = np.random.default_rng(sources.SPLIT_SEED).permutation(len(rows))[:most]
  return [source[int(i)] for i in rows]


def skipped(splits: sources.Splits | None) -> int:
  """Files that could not be read and were left out so far."""
  return sum(len(getattr(split, 'skipped', ())) for split in (splits.train, splits.test)) if splits else 0


def summarise(data: ConfigDict, splits: sources.Splits, kinds: str) -> str:
  name = data.name or data.path or data.source
  return (f'{name}: {len(splits.train):,} training and {len(splits.test):,} held-out images of '
          f'{data.size[0]}x{data.size[1]}x{data.channels}, {kinds}')
