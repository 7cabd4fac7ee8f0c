"""Images with captions: coloured shapes, folders with a metadata.csv, TFDS sets; the condition is the text."""
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax.runtime import input as inputs
from diffusion_jax.runtime.workdir import write_json
from diffusion_jax.tasks import encoders, images, shapes, sources, tokenizers
from diffusion_jax.tasks.task import Task, stored

TOKENIZER, PROMPTS = 'text/tokenizer.json', 'text/prompts.json'  # in the workdir, so that sampling needs no data


def make_task(config: ConfigDict, read: bool, workdir: Path) -> Task:
  """The captions task of config.data and config.text.

  Samples are of config.sample.prompts in turn, or of the held-out captions. Raises ValueError where the config
  contradicts the data.
  """
  data, text, wanted = config.data, config.text, config.sample
  if wanted.labels or data.classes > 0:
    raise ValueError(f'config.sample.labels is {wanted.labels} and config.data.classes {data.classes}, but captions have '
                     'no classes: leave them empty and -1.')
  splits = load(config) if read else None
  home = encoders.home(text, workdir, read)
  tokenizer = find_tokenizer(text, home, None if text.frozen else splits)
  held_out = splits.test.prompts if read else stored(workdir, PROMPTS, ('',))
  prompts = list(wanted.prompts) or held_out
  def tokenize(texts, long='cut'):
    try:
      tokens, mask = tokenizer.encode(texts, text.length, long) if tokenizer else blank(len(texts), text.length)
    except ValueError as error:
      raise ValueError(f'config.text.length is {text.length} and config.text.long {text.long!r}: {error}') from error
    return {'tokens': tokens, 'mask': mask}
  empty = tokenize([''])
  encoder = encoders.open_frozen(text, home, workdir, empty) if text.frozen else encoders.Trained(empty)
  ask = lambda texts: {'text': encoder.embed(tokenize(texts, text.long))}
  titles = lambda index: [prompts[i % len(prompts)] for i in index]
  # What is sampled becomes tokens now, so that a text that is too long is said, or refused if it was typed, before all.
  asked, avoided = tokenize(prompts, text.long if wanted.prompts else 'cut'), tokenize([wanted.negative], text.long)
  captions = tokenize(splits.train.texts) if read else None
  def context(index):
    rows = lambda tokens, numbers: {'text': encoder.embed({name: leaf[numbers] for name, leaf in tokens.items()})}
    negative = {'negative': rows(avoided, np.zeros_like(index))} if wanted.negative else {}
    return {**rows(asked, index % len(prompts)), **negative}
  null = {'text': encoder.null}
  shape = (*data.size, data.channels)
  def save(folder):
    (folder / 'text').mkdir(exist_ok=True)
    if not (folder / TOKENIZER).exists():  # else it is the one that was read from there
      tokenizer.save(folder / TOKENIZER)
    encoder.save(folder)
    write_json(folder / PROMPTS, held_out)
  return Task(
      shape=shape,
      classes=0,
      null=null,
      summary=images.summarise(data, splits, 'captions') if read else '',
      row={'x': jax.ShapeDtypeStruct(shape, np.uint8),
           **{name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in null['text'].items()}},
      batches=lambda step, batch, process, processes: inputs.batches(
          splits.train, Captions(encoder.keep(captions), splits.train.texts).augment(data.flip), config.seed, batch, step,
          process, processes),
      encode=lambda rows: (images.encode(rows['x']), {'text': {name: rows[name] for name in null['text']}}),
      drawn=lambda keys, x0, cond: cond,
      context=context,
      ask=ask,
      titles=titles,
      decode=images.decode,
      render=images.render,
      examples=lambda split, most: examples(splits, split, most, lambda texts: encoder.embed(tokenize(texts))),
      metrics=lambda samples, titles: score(samples, titles, splits, config.evaluate.reference, data.source == 'shapes'),
      skipped=lambda: images.skipped(splits),
      save=save)


class Captions:
  """The captions of a training set, encoded, of which each example has one drawn whenever it is read."""

  def __init__(self, encoded: dict[str, np.ndarray], texts: list[str]):
    self.encoded, self.number = encoded, {text: i for i, text in enumerate(texts)}

  def augment(self, flip: bool):
    """The example with one of its captions, encoded; and mirrored every second time, if `flip`."""
    def choose(example, rng):
      texts = example.pop('captions')
      number = self.number[texts[rng.integers(len(texts))]]
      example |= {name: value[number] for name, value in self.encoded.items()}
      return images.flip(example, rng) if flip else example
    return choose


def load(config: ConfigDict) -> sources.Splits:
  """Open the data set that config.data.source names; its first example is read, so that a contradiction shows at once."""
  data, fit = config.data, images.fit_of(config.data)
  if data.source == 'shapes':
    if data.flip:
      raise ValueError('config.data.flip is True, but a mirrored shape is on the other side than its caption says: type '
                       '--config.data.flip=False')
    if data.size[0] != data.size[1] or data.channels != 3:
      raise ValueError(f'Shapes are drawn on coloured squares; config.data.size is {data.size}, config.data.channels '
                       f'{data.channels}: type (16, 16) and 3.')
    splits = sources.Splits(shapes.Shapes(data.count, data.size[0], 0, unseen=False),
                            shapes.Shapes(data.holdout, data.size[0], 1, unseen=True), 0)
  elif data.source == 'tfds':
    splits = sources.captioned_tfds(data.name, data.path, data.train, data.test, data.caption, fit)
  elif data.source == 'folder':
    splits = sources.captioned_folder(data.path, data.caption, data.holdout, fit, images.MODES[data.channels],
                                      data.bad_files == 'skip')
  else:
    raise ValueError(f"config.data.source is {data.source!r}; with captions are 'shapes', 'tfds' and 'folder'.")
  splits.train[0]
  return splits


def find_tokenizer(text: ConfigDict, workdir: Path, splits: sources.Splits | None) -> tokenizers.Tokenizer | None:
  """The tokenizer of the run, else that of config.text.tokenizer, else one trained on the captions.

  None where there is neither a run nor data, as for a plan: there texts are blank.
  """
  there = workdir / TOKENIZER
  if there.exists() or text.tokenizer:
    tokenizer = tokenizers.load(there if there.exists() else text.tokenizer)
  elif splits:
    try:
      tokenizer = tokenizers.train(splits.train.texts, text.vocabulary)
    except ValueError as error:
      raise ValueError(f'config.text.vocabulary: {error}') from error
  elif (workdir / 'config.json').exists():
    raise ValueError(f'{there} does not exist: it was written when the run began. Type the command of its training again.')
  else:
    return None
  if tokenizer.size > text.vocabulary:
    raise ValueError(f'The tokenizer has {tokenizer.size} tokens and config.text.vocabulary is {text.vocabulary}: type '
                     f'--config.text.vocabulary={tokenizer.size}')
  return tokenizer


def blank(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Texts of one token, for shapes."""
  return np.zeros((count, length), np.int32), np.arange(length)[None].repeat(count, 0) < 1


def examples(splits: sources.Splits, split: str, most: int, encode: Any) -> dict[str, np.ndarray]:
  """The images and first captions, encoded, of at most `most` examples."""
  rows = images.chosen(splits.train if split == 'train' else splits.test, most)
  encoded = encode([each['captions'][0] for each in rows])
  return {'x': np.stack([each['x'] for each in rows]), **{name: np.asarray(value) for name, value in encoded.items()}}


def score(samples: np.ndarray, prompts: list[str], splits: sources.Splits, reference: int, rule: bool) -> dict[str, Any]:
  """Scores of uint8 samples beside those of held-out data; by `rule`, whether shapes are what the prompts say."""
  scores = images.score(samples, None, splits, 0, reference)
  if rule:
    held = [splits.test[i] for i in range(min(len(splits.test), len(samples)))]
    real = shapes.score(np.stack([each['x'] for each in held]), [each['captions'][0] for each in held])
    for name, value in shapes.score(samples, prompts).items():
      scores[name] = {**value, 'held_out': real[name]['samples'] if name in real else None}
  return scores
