"""Where images come from: scikit-learn's digits, TFDS, a folder.

A source has a length and gives {'x': uint8 [H, W, C], 'label': int32} for an index; one with captions gives 'captions', a
list of str, in place of the label; all of them are its `texts`, the first of each example its `prompts`.
"""
import csv
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from diffusion_jax.runtime.logs import first_line

Fit = Callable[[np.ndarray, str], np.ndarray]
SPLIT_SEED = 0  # of the fixed shuffle before a data set without splits of its own is split


class Splits(NamedTuple):
  """The training and the held-out source of a data set, and its number of classes (0: no labels)."""
  train: Any
  test: Any
  classes: int


class Arrays:
  """Images [N, H, W, C], uint8, with labels [N], in memory."""

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    self.images, self.labels = images, labels.astype(np.int32)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    return {'x': self.images[index], 'label': self.labels[index]}


class Prepared:
  """A TFDS data source whose images pass through `fit`; `about(example)` is what it says of them."""

  def __init__(self, source: Any, fit: Fit, name: str, about: Callable[[dict], dict]):
    self.source, self.fit, self.name, self.about = source, fit, name, about

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    example = self.source[int(index)]
    return {'x': self.fit(example['image'], self.name), **self.about(example)}


class Files:
  """Image files, with what is known about each. A file that cannot be read stops the run, or with skip=True the next one
  takes its place."""

  def __init__(self, paths: list[Path], about: list[dict], fit: Fit, mode: str, skip: bool):
    self.paths, self.about, self.fit, self.mode, self.skip = paths, about, fit, mode, skip
    self.skipped = set()

  def __len__(self):
    return len(self.paths)

  @property
  def texts(self) -> list[str]:
    return sorted({text for each in self.about for text in each['captions']})

  @property
  def prompts(self) -> list[str]:
    return [each['captions'][0] for each in self.about]

  def __getitem__(self, index):
    for offset in range(len(self.paths)):
      number = (index + offset) % len(self.paths)
      path = self.paths[number]
      try:
        with Image.open(path) as image:
          found = pixels(image, self.mode)
      except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = 'it is empty' if path.exists() and not path.stat().st_size else str(error)
        if not self.skip:
          raise ValueError(f'The image {path} cannot be read: {reason}. Remove it, or type '
                           '--config.data.bad_files=skip to leave such files out.') from error
        if path not in self.skipped:
          warnings.warn(f'The image {path} cannot be read and is left out: {reason}.', stacklevel=2)
          self.skipped.add(path)
      else:
        return {'x': self.fit(found, str(path)), **self.about[number]}
    raise ValueError(f'None of the {len(self.paths)} images, such as {self.paths[0]}, can be read.')


def digits(fit: Fit) -> Splits:
  """The 1,797 scanned digits of scikit-learn, 8x8, grey values 0 to 16 stretched to 0 to 255: 1,500 and 297."""
  from sklearn.datasets import load_digits
  data = load_digits()
  images = np.stack([fit(image[..., None], 'digits') for image in np.round(data.images / 16 * 255).astype(np.uint8)])
  train, test = _shuffled(len(images), 297)
  return Splits(Arrays(images[train], data.target[train]), Arrays(images[test], data.target[test]), 10)


def tfds(name: str, path: str, train: str, test: str, fit: Fit) -> Splits:
  """An image set of TensorFlow Datasets by name, prepared first where it is not. Reading needs no tensorflow.

  `path` is the folder of prepared sets; '' means TFDS_DATA_DIR or TFDS's default.
  """
  builder = _prepared(name, path)
  features = builder.info.features
  label = features['label'] if 'label' in features else None
  about = lambda example: {'label': np.int32(example.get('label', 0))}
  sources = [Prepared(builder.as_data_source(split=split), fit, name, about) for split in (train, test)]
  return Splits(*sources, getattr(label, 'num_classes', 0) or 0)


def _prepared(name: str, path: str) -> Any:
  """The builder of a TFDS set, prepared."""
  import tensorflow_datasets
  where = {'data_dir': path} if path else {}
  install = "pip install 'diffusion_jax[tfds]'"
  try:
    builder = tensorflow_datasets.builder(name, file_format='array_record', **where)
  except tensorflow_datasets.core.DatasetNotFoundError as error:
    raise ValueError(f'TFDS knows no set named {name!r} (config.data.name): {str(error).splitlines()[0]}') from error
  except ImportError as error:
    raise ValueError(f'The set {name!r} needs tensorflow ({error}): type {install}') from error
  if not builder.data_path.exists():
    elsewhere = 'or set TFDS_DATA_DIR or --config.data.path to the folder of a prepared copy.'
    if importlib.util.find_spec('tensorflow') is None:
      raise ValueError(f'{name} is not prepared in {builder.data_path}, and preparing it needs tensorflow: type {install}, '
                       + elsewhere)
    print(f'{name} is not prepared in {builder.data_path}: it is downloaded and prepared.', flush=True)
    try:
      builder.download_and_prepare()
    except Exception as error:  # any of TFDS, tensorflow and the network
      raise ValueError(f'{name} is not prepared in {builder.data_path} and could not be ({first_line(error)}): mend that, '
                       + elsewhere) from error
  return builder


def folder(path: str, holdout: int, fit: Fit, mode: str, skip: bool) -> Splits:
  """Images in sub-folders, one a class, or listed in metadata.csv with the columns file_name and label.

  `holdout` images, after a fixed shuffle, are held out. Without labels in metadata.csv there are no classes.
  """
  root = _root(path, 'a sub-folder of images for each class, or a metadata.csv with the columns file_name,label')
  table = root / 'metadata.csv'
  paths, names = _listed(table, 'label') if table.exists() else _sub_folders(root)
  if not paths:
    raise ValueError(f'{root} holds no images ({_EXAMPLES}) in sub-folders.')
  labels, classes = _numbers(names)
  return Splits(*_split(paths, [{'label': np.int32(label)} for label in labels], holdout, fit, mode, skip), classes)


def captioned_folder(path: str, column: str, holdout: int, fit: Fit, mode: str, skip: bool) -> Splits:
  """Images listed in metadata.csv, with the columns file_name and `column`, their caption; a row for each of several.

  `holdout` images, after a fixed shuffle, are held out.
  """
  root = _root(path, f'a metadata.csv of the columns file_name,{column}')
  table = root / 'metadata.csv'
  if not table.exists():
    raise ValueError(f'{root} has no metadata.csv; images with captions need one, with the columns file_name,{column}.')
  found = {}
  for number, (path, text) in enumerate(zip(*_listed(table, column, needed=True), strict=True), 1):
    if not text.strip():
      raise ValueError(f'Row {number} of {table} has no {column}: give every row one.')
    found.setdefault(path, []).append(text)
  return Splits(*_split(list(found), [{'captions': texts} for texts in found.values()], holdout, fit, mode, skip), 0)


def captioned_tfds(name: str, path: str, train: str, test: str, feature: str, fit: Fit) -> Splits:
  """An image set of TensorFlow Datasets with captions: `feature` is a text or several, 'captions/text' the entry text of
  captions."""
  from tensorflow_datasets import decode
  builder, names = _prepared(name, path), feature.split('/')
  def texts(example):
    for each in names:
      if not isinstance(example, dict) or each not in example:
        raise ValueError(f'{name} has no feature {feature!r} (config.data.caption): it has '
                         f'{sorted(builder.info.features)}.')
      example = example[each]
    found = [text.decode() for text in np.ravel(example) if isinstance(text, bytes)]
    if not found:
      raise ValueError(f'An example of {name} has no text in {feature!r} (config.data.caption).')
    return found
  about = lambda example: {'captions': texts(example)}
  without = {'image': decode.SkipDecoding()}
  splits = [Prepared(builder.as_data_source(split=split), fit, name, about) for split in (train, test)]
  for source, split in zip(splits, (train, test), strict=True):
    found = [texts(example) for example in builder.as_data_source(split=split, decoders=without)]
    source.texts, source.prompts = sorted({text for each in found for text in each}), [each[0] for each in found]
  return Splits(*splits, 0)


def _root(path: str, needs: str) -> Path:
  root = Path(path)
  if not path or not root.is_dir():
    raise ValueError(f'config.data.path is {path!r}, which is not a folder: type --config.data.path=FOLDER with {needs}.')
  return root


def _split(paths: list[Path], about: list[dict], holdout: int, fit: Fit, mode: str, skip: bool) -> list[Files]:
  """The training and the held-out files, after a fixed shuffle."""
  if not 0 < holdout < len(paths):
    raise ValueError(f'There are {len(paths)} images; config.data.holdout is {holdout} and must be between 1 and '
                     f'{max(len(paths) - 1, 1)}.')
  return [Files([paths[i] for i in rows], [about[i] for i in rows], fit, mode, skip)
          for rows in _shuffled(len(paths), holdout)]


_EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
_EXAMPLES = ', '.join(_EXTENSIONS)


def _sub_folders(root: Path) -> tuple[list[Path], list[str]]:
  paths = sorted(path for path in root.glob('*/*') if path.suffix.lower() in _EXTENSIONS)
  return paths, [path.parent.name for path in paths]


def _listed(table: Path, column: str, needed: bool = False) -> tuple[list[Path], list[str]]:
  """The files of metadata.csv, and what `column` says of them."""
  with table.open(newline='', encoding='utf-8-sig') as file:
    reader = csv.DictReader(file)
    if not {'file_name', *([column] if needed else [])} <= set(reader.fieldnames or []):
      raise ValueError(f'{table} has the columns {reader.fieldnames}; it needs file_name, and {column}'
                       + ('.' if needed else ' for classes.'))
    rows = list(reader)
  return [table.parent / row['file_name'] for row in rows], [row.get(column) or '' for row in rows]


def _numbers(names: list[str]) -> tuple[list[int], int]:
  """Labels as numbers, and how many classes: numbers stay what they are, names are numbered in alphabetical order."""
  if not any(names):
    return [0] * len(names), 0
  if not all(names):
    raise ValueError(f'Row {names.index("") + 1} of metadata.csv has no label, others have: give every row one, or none.')
  if all(name.isdigit() for name in names):
    return [int(name) for name in names], max(map(int, names)) + 1
  order = {name: number for number, name in enumerate(sorted(set(names)))}
  return [order[name] for name in names], len(order)


def _shuffled(count: int, holdout: int) -> tuple[np.ndarray, np.ndarray]:
  order = np.random.default_rng(SPLIT_SEED).permutation(count)
  return order[:count - holdout], order[count - holdout:]


def pixels(image: Image.Image, mode: str) -> np.ndarray:
  """The upright image as uint8 [H, W, C] in PIL's mode 'L', 'RGB' or 'RGBA'; transparency becomes white where the mode
  has none, and 16 bits become 8. Raises ValueError for other depths."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I;16'):
    image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
  elif image.mode in ('I', 'F'):
    raise ValueError(f'its mode is {image.mode}, of 32 bits, and 8 or 16 bits are legal')
  if mode != 'RGBA' and (image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info):
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return to_array(image.convert(mode))


def to_picture(array: np.ndarray) -> Image.Image:
  """uint8 [H, W, C] as a picture; one channel is grey."""
  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def to_array(picture: Image.Image) -> np.ndarray:
  """A picture as uint8 [H, W, C]."""
  array = np.asarray(picture)
  return array if array.ndim == 3 else array[..., None]
