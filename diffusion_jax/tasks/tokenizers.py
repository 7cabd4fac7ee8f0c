"""Texts to numbered tokens and back, by the `tokenizers` library: one trained on the captions, or a published file."""
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from diffusion_jax.runtime.workdir import write_text

PADDING, START, END = '<pad>', '<start>', '<end>'
LONG = ('cut', 'refuse')


class Tokenizer(NamedTuple):
  """How texts become tokens: (start,) tokens, end, padding. `core` is that of the library."""
  core: tokenizers.Tokenizer
  end: int
  padding: int

  @property
  def size(self) -> int:
    """One more than the greatest token: the rows that an embedding needs."""
    return 1 + max(self.core.get_vocab().values())

  def encode(self, texts: Sequence[str], length: int, long: str = 'cut') -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [N, length] of N texts, and a mask that is true up to the end token.

    A text with more tokens, start and end counted, is cut before its end token, with a warning, or refused (ValueError)
    with long='refuse'. A special token written in a text is read as text. Raises ValueError for what is no list of texts.
    """
    if long not in LONG or length < 2:
      raise ValueError(f'encode got length={length}, long={long!r}; length must be at least 2 (start and end), and long '
                       f'one of {LONG}.')
    rows = self._rows(texts)
    _say([(text, len(row)) for text, row in zip(texts, rows, strict=True) if len(row) > length], length, long)
    tokens, mask = np.full((len(rows), length), self.padding, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
      row = row if len(row) <= length else [*row[:length - 1], self.end]
      tokens[i, :len(row)], mask[i, :len(row)] = row, True
    return tokens, mask

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of a row of tokens up to its end token; what `train` made gives back every text that was encoded whole.

    CLIP's and T5's files do not: they change spaces, and CLIP's writes all in small letters.
    """
    row = np.asarray(tokens).tolist()
    text = self.core.decode(row[:row.index(self.end)] if self.end in row else row)
    suffix = getattr(self.core.model, 'end_of_word_suffix', None)  # CLIP's '</w>'
    return text.replace(suffix, ' ').rstrip() if suffix else text

  def save(self, path: str | Path) -> None:
    """Write a tokenizer.json, from which `load` makes this tokenizer again."""
    write_text(Path(path), self.core.to_str(pretty=True))

  def _rows(self, texts):
    try:
      found = self.core.encode_batch(texts)
    except TypeError as error:
      kind = type(texts).__name__
      raise ValueError(f'encode got {texts!r:.100} ({kind}); it needs a list of texts, each a str of valid Unicode: '
                       "encode(['a panda on a bike'], length).") from error
    return [each.ids[:sum(each.attention_mask)] for each in found]  # without the padding to the longest of them


def train(captions: Iterable[str], vocabulary: int) -> Tokenizer:
  """A byte-level BPE (arXiv:1508.07909) of at most `vocabulary` tokens, the same for the same captions in any order.

  Its tokens are padding (0), start (1), end (2), the 256 bytes, and the most frequent pairs. Raises ValueError below 259.
  """
  special, alphabet = [PADDING, START, END], pre_tokenizers.ByteLevel.alphabet()
  least = len(special) + len(alphabet)
  if vocabulary < least:
    raise ValueError(f'train got vocabulary={vocabulary}; the {len(alphabet)} bytes and {len(special)} special tokens need '
                     f'{least}: give {least} or more.')
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  core.train_from_iterator(captions, trainers.BpeTrainer(
      vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
  core.post_processor = processors.TemplateProcessing(
      single=f'{START} $A {END}', special_tokens=[(token, core.token_to_id(token)) for token in (START, END)])
  return _complete(core, PADDING)


def load(path: str | Path, padding: str | None = None) -> Tokenizer:
  """The tokenizer of a tokenizer.json: one that was saved here, CLIP's, T5's, or another whose texts have an end token.

  `padding` is the token behind the end; where it is not given it is that of the file, else '<pad>' (T5), else the end
  token (CLIP; Stable Diffusion 2 and the second encoder of XL pad with '!'). Raises ValueError for a file that is
  missing, unreadable, or without such tokens.
  """
  legal = "Give the path of a tokenizer.json as the tokenizers library writes it, such as Tokenizer.save's, CLIP's or T5's."
  if not Path(path).is_file():
    raise ValueError(f'The tokenizer {str(path)!r} is not a file. {legal}')
  try:
    core = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises no other type
    raise ValueError(f'The tokenizer {path} cannot be read: {error}. {legal}') from error
  own = core.padding['pad_token'] if core.padding else PADDING
  core.no_padding()
  core.no_truncation()
  if not core.encode('a').special_tokens_mask[-1]:
    raise ValueError(f'The tokenizer {path} puts no end token behind a text. {legal}')
  if padding is not None and core.token_to_id(padding) is None:
    raise ValueError(f"The tokenizer {path} has no token {padding!r} to pad with. Give one of its own, such as '!'.")
  return _complete(core, padding or (own if core.token_to_id(own) is not None else None))


def _complete(core: tokenizers.Tokenizer, padding: str | None) -> Tokenizer:
  """The tokenizer of a core, whose file keeps its padding; where there is none the end token pads."""
  core.encode_special_tokens = True  # else a text could hold an end token
  end = core.encode('').ids[-1]
  padding = core.id_to_token(end) if padding is None else padding
  number = core.token_to_id(padding)
  core.enable_padding(pad_id=number, pad_token=padding)
  return Tokenizer(core, end, number)


def _say(found: list[tuple[str, int]], length: int, long: str) -> None:
  """Refuse texts that are too long, given as (text, its tokens), or say that they are cut."""
  if not found:
    return
  text, count = found[0]
  others = f' {len(found) - 1} more of these texts are too long.' if found[1:] else ''
  sentence = f'The text {text!r} has {count} tokens, start and end counted; {length} are legal.{others}'
  if long == 'refuse':
    raise ValueError(f"{sentence} Shorten it, or give long='cut'.")
  warnings.warn(f'{sentence} What is beyond is cut off.', stacklevel=3)
