"""Tokenizers: every text comes back, long ones are cut or refused, and published files give transformers' tokens."""
import pathlib
import random
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from diffusion_jax.tasks import tokenizers

GOLDENS = dict(np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'text.npz'))
CAPTIONS = [f'{count} {colour} {shape}{"s" * (count != "a")} on the {side}'
            for count in ('a', 'two', 'three') for colour in ('red', 'green', 'blue')
            for shape in ('circle', 'square', 'café') for side in ('left', 'right')]
TEXTS = ['', ' ', 'a red circle', '<end> <pad>, <start>', '\x00\x7f', '  two\n\tspaces  ',
         'ÀÉÎ é\u0301 \u00a0', '😀👩‍👩‍👧 中文 العربية']


@pytest.fixture(scope='module')
def trained():
  """Every word of the captions is one token."""
  return tokenizers.train(CAPTIONS, 1000)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """The files that transformers wrote."""
  folder = tmp_path_factory.mktemp('published')
  for name in ('clip', 't5'):
    (folder / name).write_text(str(GOLDENS[f'tokenizer/{name}/file']))
  return folder


def unicode_text(draw, length):
  """Characters of all planes."""
  every = (chr(draw.randrange(0x110000)) for _ in iter(int, 1))
  legal = (each for each in every if unicodedata.category(each) != 'Cs')
  return ''.join(next(legal) for _ in range(length))


def test_every_text_comes_back(trained):
  draw = random.Random(0)
  texts = TEXTS + CAPTIONS + [unicode_text(draw, draw.randrange(1, 30)) for _ in range(200)]
  tokens, mask = trained.encode(texts, 200)
  assert tokens.shape == mask.shape == (len(texts), 200) and tokens.dtype == np.int32 and mask.dtype == bool
  assert [trained.decode(row) for row in tokens] == texts
  assert tokens.min() >= 0 and tokens.max() < trained.size


def test_a_row_is_start_tokens_end_and_padding(trained):
  tokens, mask = trained.encode(['', 'a red circle'], 12)
  np.testing.assert_array_equal(tokens[0], [1, 2] + [0] * 10)
  count = mask[1].sum()
  assert tokens[1, 0] == 1 and tokens[1, count - 1] == 2 and 2 not in tokens[1, :count - 1]
  assert not tokens[1, count:].any() and mask[1, :count].all() and count == 3 + len(' red circle'.split())
  assert len(trained.encode([], 5)[0]) == 0


def test_training_does_not_depend_on_the_order_of_captions(trained):
  shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
  assert tokenizers.train(iter(shuffled), 1000).core.to_str() == trained.core.to_str()
  assert tokenizers.train(CAPTIONS + ['a tortoise'], 1000).core.to_str() != trained.core.to_str()


def test_a_vocabulary_is_as_large_as_asked_unless_captions_are_few():
  assert tokenizers.train(CAPTIONS, 280).size == 280
  assert tokenizers.train(['aa'], 1000).size == 256 + 3 + 1
  assert tokenizers.train([], 259).size == 259
  with pytest.raises(ValueError, match='vocabulary=258; the 256 bytes and 3 special tokens need 259'):
    tokenizers.train(['aa'], 258)


@pytest.mark.parametrize('length', [2, 3, 6])
def test_a_long_text_is_cut_and_said_once(trained, length):
  text = 'two red squares on the left'
  whole = trained.encode([text], 99)[0][0]
  with pytest.warns(UserWarning, match=rf"The text '{text}' has 8 tokens.*; {length} are legal. 1 more") as seen:
    tokens, mask = trained.encode(['', text, text + 's'], length)
  assert len(seen) == 1 and seen[0].filename == __file__ and mask[1:].all()
  np.testing.assert_array_equal(tokens[1], [*whole[:length - 1], 2])


def test_a_long_text_is_refused(trained):
  with pytest.raises(ValueError, match="'a red circle' has 5 tokens.*; 4 are legal. Shorten it, or give long='cut'"):
    trained.encode(['a red circle'], 4, long='refuse')
  np.testing.assert_array_equal(trained.encode(['a red circle'], 5, long='refuse')[0][0, [0, -1]], [1, 2])


def test_what_is_no_list_of_texts_is_refused(trained):
  for texts in ('a red circle', [3], ['\udc80']):
    with pytest.raises(ValueError, match='needs a list of texts, each a str of valid Unicode'):
      trained.encode(texts, 8)
  for fields in ({'length': 1}, {'length': 8, 'long': 'wrap'}):
    with pytest.raises(ValueError, match='length must be at least 2'):
      trained.encode(['a'], **fields)


def test_a_saved_tokenizer_is_the_same(trained, tmp_path):
  trained.save(tmp_path / 'tokenizer.json')
  loaded = tokenizers.load(tmp_path / 'tokenizer.json')
  assert (loaded.end, loaded.padding, loaded.size) == (trained.end, trained.padding, trained.size)
  for one, two in zip(loaded.encode(TEXTS, 60), trained.encode(TEXTS, 60), strict=True):
    np.testing.assert_array_equal(one, two)
  assert [loaded.decode(row) for row in loaded.encode(TEXTS, 60)[0]] == TEXTS


@pytest.mark.parametrize('name', ['clip', 't5'])
@pytest.mark.filterwarnings('ignore:The text')
def test_a_published_file_gives_the_tokens_of_transformers(name, published):
  tokenizer = tokenizers.load(published / name)
  golden = lambda part: GOLDENS[f'tokenizer/{name}/{part}']
  tokens, mask = tokenizer.encode([str(text) for text in golden('texts')], golden('tokens').shape[1])
  np.testing.assert_array_equal(tokens, golden('tokens'))
  np.testing.assert_array_equal(mask, golden('mask'))
  assert tokenizer.decode(tokens[0]) == '' and tokenizer.decode(tokens[1]) == 'a panda on a bike'


def test_padding_may_be_another_token_and_stays_so(published, tmp_path):
  """Stable Diffusion 2 pads CLIP's tokens with '!'."""
  tokenizer = tokenizers.load(published / 'clip', padding='!')
  tokenizer.save(tmp_path / 'again')
  for each in (tokenizer, tokenizers.load(tmp_path / 'again')):
    tokens, mask = each.encode(['a panda'], 9)
    ours, theirs = tokens[~mask], GOLDENS['tokenizer/clip/tokens'][0, -1]
    assert set(ours) == {each.core.token_to_id('!')} and theirs not in ours
    assert each.decode(tokens[0]) == 'a panda'
  with pytest.raises(ValueError, match="has no token '<nothing>' to pad with"):
    tokenizers.load(published / 'clip', padding='<nothing>')


@pytest.mark.parametrize('direction', ['left', 'right'])
def test_what_a_file_says_of_lengths_does_not_count(direction, published, tmp_path):
  """Some published files cut and pad by themselves; their padding token is kept."""
  core = Tokenizer.from_file(str(published / 'clip'))
  core.enable_truncation(4)
  core.enable_padding(direction=direction, length=20, pad_token='!', pad_id=core.token_to_id('!'))
  core.save(str(tmp_path / 'file'))
  ours, expected = tokenizers.load(tmp_path / 'file'), tokenizers.load(published / 'clip', padding='!')
  assert (ours.end, ours.padding) == (expected.end, expected.padding)
  for one, two in zip(*(each.encode(['', 'a panda on a bike'], 9) for each in (ours, expected)), strict=True):
    np.testing.assert_array_equal(one, two)


def test_a_bad_file_gets_a_sentence(tmp_path):
  (tmp_path / 'bad.json').write_text('{"version"')
  Tokenizer(models.BPE({'a': 0}, [])).save(str(tmp_path / 'bare.json'))
  for name, said in (('none.json', 'is not a file'), ('', 'is not a file'), ('bad.json', 'cannot be read: EOF'),
                     ('bare.json', 'puts no end token behind a text')):
    with pytest.raises(ValueError, match=f'(?s){tmp_path / name}.*{said}.*Give the path of a tokenizer.json'):
      tokenizers.load(tmp_path / name)
