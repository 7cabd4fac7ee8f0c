"""What a network is given of texts: their tokens, or what the frozen encoder of another run makes of them.

Both take rows {'tokens': [N, L], 'mask': [N, L]} of N texts and have the same `null`, `embed`, `keep` and `save`.
"""
import hashlib
import math
import shlex
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.build import build
from diffusion_jax.networks import embed, text
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime.checkpoints import read_sampled
from diffusion_jax.runtime.logs import say
from diffusion_jax.runtime.optimizers import chosen_ema
from diffusion_jax.runtime.sharding import name_of
from diffusion_jax.runtime.workdir import load_complete

ENCODER = 'text/encoder.npz'  # in the workdir, so that the run from which it was taken may go
BATCH = 32  # texts at once on each device
Rows = dict[str, np.ndarray]


class Lazy:
  """A float32 array of known shape that is made when it is read: a config is checked before anything is encoded."""

  def __init__(self, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
    self.shape, self.dtype, self._make = shape, np.dtype(np.float32), make

  def __len__(self):
    return self.shape[0]

  def __getitem__(self, index):
    return Lazy(np.broadcast_to(np.float32(0), self.shape)[index].shape, lambda: self._make()[index])

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self._make(), dtype)


@dataclass(frozen=True)
class Trained:
  """Texts as tokens, which an encoder in the network reads; `empty` is the row of the empty text."""
  empty: Rows

  @property
  def null(self) -> Rows:
    """The empty text, without the axis of the batch."""
    return {name: leaf[0] for name, leaf in self.empty.items()}

  def embed(self, rows: Rows) -> Rows:
    """What the network is given of some texts."""
    return rows

  def keep(self, rows: Rows) -> Rows:
    """The same of all training captions."""
    return rows

  def save(self, workdir: Path) -> None:
    """Write into the workdir what `embed` needs: nothing."""


@dataclass(frozen=True)
class Frozen:
  """Texts as {'sequence': [N, L, D], 'pooled': [N, P], 'mask': [N, L]}, float32, by an encoder that is not trained.

  `contents` are its parameters by their path, a 'digest' of them and of its definition, and, once it is saved, its null;
  without any, as for a plan, all that it says is 0. `like` are the shapes of the parameters, `sizes` those of what it says.
  """
  encode: Callable  # (params, tokens, mask) -> Encoded, compiled
  like: PyTree
  sizes: dict[str, tuple[int, ...]]
  contents: Mapping[str, np.ndarray]
  empty: Rows
  workdir: Path

  @cached_property
  def null(self) -> dict:
    """What it says of the empty text, without the axis of the batch."""
    if 'null/pooled' in self.contents:
      return {name: self.contents[f'null/{name}'] for name in self.sizes} | {'mask': self.empty['mask'][0]}
    return {name: leaf[0] for name, leaf in self.embed(self.empty).items()}

  def embed(self, rows: Rows) -> dict:
    """What it says of some texts, encoded when it is read; equal texts are encoded once."""
    @cache
    def encoded():
      if not self.contents:
        return {name: np.zeros((len(rows['mask']), *size), np.float32) for name, size in self.sizes.items()}
      both, back = np.unique(np.hstack([rows['tokens'], rows['mask']]), axis=0, return_inverse=True)
      tokens, mask = np.split(both, 2, 1)
      parts = list(self._batches(tokens, mask.astype(bool)))
      return {name: np.concatenate([part[name] for part in parts])[back.ravel()] for name in self.sizes}
    lazy = {name: Lazy((len(rows['mask']), *size), lambda name=name: encoded()[name]) for name, size in self.sizes.items()}
    return {**lazy, 'mask': rows['mask']}

  def keep(self, rows: Rows) -> Rows:
    """The same of all training captions, mapped from files that are written once.

    Their folder is named by a hash of all that they follow from: the encoder, its parameters, and the tokens, which are
    what the tokenizer makes of the texts.
    """
    name = hashlib.sha256(str(self.contents['digest']).encode() + rows['tokens'].tobytes() + rows['mask'].tobytes())
    folder = self.workdir / 'text' / f'captions_{name.hexdigest()[:16]}'
    if jax.process_index() == 0 and not folder.exists():
      self._write(folder, rows)
    while not folder.exists():  # the first process writes it
      time.sleep(0.1)
    kept = {name: np.load(folder / f'{name}.npy', mmap_mode='r').view(np.ndarray) for name in self.sizes}
    return {**kept, 'mask': rows['mask']}

  def save(self, workdir: Path) -> None:
    """Write the encoder and its null into the workdir, at once or not at all."""
    path = workdir / ENCODER
    if path.exists():
      return
    partial = path.with_name(path.name + '.partial')
    with partial.open('wb') as file:
      np.savez(file, **{**self.contents, **{f'null/{name}': np.asarray(self.null[name]) for name in self.sizes}})
    partial.replace(path)

  def _batches(self, tokens: np.ndarray, mask: np.ndarray) -> Iterator[Rows]:
    """What it says of the texts, BATCH a device of this process at a time: one program for any number of them."""
    mesh = meshes.make_mesh('data=-1', jax.local_devices())
    size, read = BATCH * mesh.size, lambda path, leaf: self.contents[name_of(path)].view(leaf.dtype)
    with jax.ensure_compile_time_eval():  # the null may be read first while a program that holds it is traced
      params = jax.device_put(jax.tree_util.tree_map_with_path(read, self.like), meshes.replicated(mesh))
    for first in range(0, len(tokens), size):
      index = np.minimum(np.arange(first, first + size), len(tokens) - 1)  # the last batch is filled up
      with jax.ensure_compile_time_eval():
        found = self.encode(params, *meshes.place((tokens[index], mask[index]), mesh))
      yield {name: meshes.gather(getattr(found, name))[:len(tokens) - first] for name in self.sizes}

  def _write(self, folder: Path, rows: Rows) -> None:
    """Write a file for each of `sizes` and give the folder its name when all of it is there."""
    count, partial = len(rows['mask']), folder.with_name(folder.name + '.partial')
    size = 4 * count * sum(map(math.prod, self.sizes.values()))
    say(f'Embedding {count:,} captions with the frozen encoder, once: {size / 2**20:,.1f} MiB in {folder}')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with ExitStack() as stack:
      files = {name: stack.enter_context((partial / f'{name}.npy').open('wb')) for name in self.sizes}
      for name, file in files.items():
        about = {'descr': '<f4', 'fortran_order': False, 'shape': (count, *self.sizes[name])}
        np.lib.format.write_array_header_1_0(file, about)
      for part in self._batches(rows['tokens'], rows['mask']):
        for name, file in files.items():
          file.write(np.ascontiguousarray(part[name]))
    partial.rename(folder)


def home(fields: ConfigDict, workdir: Path, read: bool) -> Path:
  """The workdir in which the encoder of config.text lies, with its tokenizer: the run's own, but where a run with
  config.text.frozen begins. Raises ValueError where that names no run of captions, or one with another encoder."""
  path = workdir / ENCODER
  if path.exists() or not fields.frozen:
    return workdir
  if (workdir / 'checkpoints').exists():
    raise ValueError(f'{path} does not exist: it is written when a run with config.text.frozen begins, and the one in '
                     f'{workdir} has begun. Bring it back, or type another --workdir.')
  if read:
    _check(fields)
  return Path(fields.frozen) if read else workdir


def open_frozen(fields: ConfigDict, home: Path, workdir: Path, empty: Rows) -> Frozen:
  """The frozen encoder of config.text that lies in `home`; nothing is compiled. Raises ValueError where it is not there."""
  try:
    encoder = build(fields.encoder, text.encoders(fields.vocabulary, fields.length))
  except ValueError as error:
    raise ValueError(f'config.text.encoder: {error}') from error
  like = jax.eval_shape(encoder.init, jax.random.key(0), **empty)['params']
  apply = lambda params, tokens, mask: jax.tree.map(
      lambda leaf: leaf.astype(np.float32), encoder.apply({'params': params}, tokens, mask))
  sizes = {name: leaf.shape[1:] for name, leaf in jax.eval_shape(apply, like, **empty)._asdict().items()}
  path = home / ENCODER
  contents = _stored(path) if path.exists() else {} if home == workdir else _take(fields, like)
  return Frozen(jax.jit(apply), like, sizes, contents, empty, workdir)


def _check(fields: ConfigDict) -> None:
  """Raise ValueError where config.text.frozen names no run of captions, or one whose config.text says otherwise."""
  run = Path(fields.frozen)
  if not (run / 'config.json').exists():
    raise _refusal(fields, 'where there is no run')
  there = load_complete(run)
  if there.task != 'captions':
    raise _refusal(fields, f'a run of the task {there.task!r}, which has no text encoder')
  names = ['encoder', 'length', 'vocabulary', *(['tokenizer'] if fields.tokenizer else [])]
  other = [name for name in names if fields[name] != there.text[name]]
  if other:
    lines = '\n'.join(f'  config.text.{name}: {there.text[name]!r} there, {fields[name]!r} here' for name in other)
    flags = ' '.join(f'--config.text.{name}={shlex.quote(str(there.text[name]))}' for name in other)
    raise ValueError(f'The encoder of config.text.frozen, {fields.frozen!r}, is another:\n{lines}\nType {flags}')


def _stored(path: Path) -> Mapping[str, np.ndarray]:
  """The arrays that `Frozen.save` wrote, each of which is read when it is asked for."""
  if not zipfile.is_zipfile(path):
    raise ValueError(f'{path} is not whole. Bring it back, or type another --workdir.')
  return np.load(path)


def _take(fields: ConfigDict, like: PyTree) -> Rows:
  """The parameters of its encoder that the run of config.text.frozen samples with, by their path, and their digest."""
  run = Path(fields.frozen)
  there = load_complete(run)
  found = read_sampled(run / 'checkpoints', chosen_ema(there.train.ema, there.sample.ema), *embed.ENCODER)
  if found is None:
    raise _refusal(fields, 'in whose checkpoints there is no text encoder')
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  if shapes(found) != shapes(like):
    raise _refusal(fields, f'whose encoder has other parameters than {fields.encoder} has today')
  flat = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
  digest = hashlib.sha256(f'{fields.encoder} {fields.vocabulary} {fields.length}'.encode())
  for name, leaf in flat.items():
    digest.update(f'{name} {leaf.dtype} {leaf.shape}'.encode() + leaf.tobytes())
  return {**flat, 'digest': np.array(digest.hexdigest())}


def _refusal(fields: ConfigDict, why: str) -> ValueError:
  return ValueError(f"config.text.frozen is {fields.frozen!r}, {why}. Type the workdir of a run that was trained on "
                    "captions, or '' to train the encoder with the network.")
