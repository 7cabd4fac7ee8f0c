"""The captions task: texts as tokens, what the workdir keeps of the data, and sentences for bad input."""
import csv

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from configs import base
from diffusion_jax.tasks import captions, tokenizers
from diffusion_jax.tasks.task import make_task

TEXTS = [['a cat'], ['red'], ['a panda on a bike', 'ein Panda auf dem Rad'], ['Ωmega 🐼'], ['five'], ['six']]


def config(**fields):
  """A captions config, with `fields` of data or with names such as text__length."""
  result = base.get_config()
  result.task, result.data.source, result.data.size, result.data.channels = 'captions', 'shapes', (16, 16), 3
  result.data.count, result.data.holdout, result.evaluate.reference = 60, 20, 40
  full = {name.replace('__', '.') if '__' in name else f'data.{name}': value for name, value in fields.items()}
  result.update_from_flattened_dict(full)
  return result


def folder(root, texts=TEXTS, columns=('file_name', 'text')):
  """images/ and metadata.csv; image i is all 10 i."""
  (root / 'images').mkdir(parents=True)
  for i in range(len(texts)):
    Image.fromarray(np.full((16, 16, 3), 10 * i, np.uint8)).save(root / 'images' / f'{i}.png')
  with (root / 'metadata.csv').open('w', newline='', encoding='utf-8') as file:
    csv.writer(file).writerows([columns, *((f'images/{i}.png', text) for i, each in enumerate(texts) for text in each)])
  return dict(source='folder', path=str(root), holdout=2, text__length=24)


@pytest.fixture(scope='module')
def task():
  return make_task(config(), True)


def tokenizer_of(config):
  return captions.find_tokenizer(config.text, captions.Path('nowhere'), captions.load(config))


def test_rows_are_an_image_with_one_of_its_captions(tmp_path):
  fields = config(**folder(tmp_path / 'a'))
  task, tokenizer = make_task(fields, True), tokenizer_of(fields)
  stream, seen = task.batches(0, 8, 0, 1), []
  for _ in range(40):
    rows = next(stream)
    assert set(rows) == {'x', 'tokens', 'mask', 'index'} and rows['x'].shape == (8, 16, 16, 3)
    for image, tokens, mask in zip(rows['x'], rows['tokens'], rows['mask'], strict=True):
      text = tokenizer.decode(tokens)
      assert text in TEXTS[image[0, 0, 0] // 10] and mask.sum() == len(tokenizer.encode([text], 24)[1].nonzero()[0])
      seen.append(text)
  both = [seen.count(text) for text in TEXTS[2]]
  assert sum(both) > 50 and chisquare(both).pvalue > 1e-3


def test_the_empty_prompt_is_the_null(task):
  tokenizer = tokenizer_of(config())
  tokens, mask = tokenizer.encode([''], 16)
  np.testing.assert_array_equal(task.null['text']['tokens'], tokens[0])
  np.testing.assert_array_equal(task.null['text']['mask'], mask[0])
  assert mask.sum() == 2


def test_prompts_are_sampled_in_turn_and_the_negative_goes_beside():
  task = make_task(config(sample__prompts=('a red ring', 'two squares'), sample__negative='blue'), True)
  tokenizer, index = tokenizer_of(config()), np.array([0, 1, 4, 5])
  cond = task.context(index)
  assert [tokenizer.decode(row) for row in cond['text']['tokens']] == ['a red ring', 'two squares'] * 2
  assert [tokenizer.decode(row) for row in cond['negative']['text']['tokens']] == ['blue'] * 4
  assert task.titles(index) == ['a red ring', 'two squares'] * 2


def test_without_prompts_the_held_out_captions_are_sampled(task):
  held = captions.load(config()).test
  assert task.titles(np.arange(30)) == [*held.prompts, *held.prompts[:10]]
  assert 'negative' not in task.context(np.arange(3))
  rows = task.examples('held_out', 20)
  tokenizer = tokenizer_of(config())
  assert [tokenizer.decode(row) for row in rows['tokens']] == held.prompts
  np.testing.assert_array_equal(rows['x'][3], held[3]['x'])


def test_sampling_needs_the_workdir_alone(tmp_path):
  fields = config(**folder(tmp_path / 'data'))
  there, run = make_task(fields, True), tmp_path / 'run'
  run.mkdir()
  there.save(run)
  (run / 'config.json').write_text('{}')
  (tmp_path / 'data').rename(tmp_path / 'gone')
  task, index = make_task(fields, False, run), np.arange(5)
  assert task.titles(index) == there.titles(index)
  for name in ('tokens', 'mask'):
    np.testing.assert_array_equal(task.context(index)['text'][name], there.context(index)['text'][name])
  (run / captions.TOKENIZER).rename(run / 'away')
  with pytest.raises(ValueError, match='tokenizer.json does not exist: it was written when the run began'):
    make_task(fields, False, run)
  (run / 'away').rename(run / captions.TOKENIZER)
  (run / captions.PROMPTS).unlink()
  with pytest.raises(ValueError, match='prompts.json does not exist'):
    make_task(fields, False, run)


def test_the_tokenizer_of_the_run_is_kept_when_it_goes_on(tmp_path):
  """Other captions would give another; the run's own counts."""
  fields = config()
  make_task(fields, True).save(tmp_path)
  more = config(**folder(tmp_path / 'data'))
  first, again = tokenizer_of(fields), captions.find_tokenizer(more.text, tmp_path, captions.load(more))
  np.testing.assert_array_equal(again.encode(['two squares'], 24)[0], first.encode(['two squares'], 24)[0])
  assert (tokenizer_of(more).encode(['two squares'], 24)[0] != first.encode(['two squares'], 24)[0]).any()


def test_a_plan_has_the_shapes_without_texts():
  planned, real = make_task(config(), False), make_task(config(), True)
  assert planned.row == real.row
  for ours, theirs in zip(planned.context(np.arange(3))['text'].values(), real.context(np.arange(3))['text'].values(),
                          strict=True):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype


def test_scores_read_the_shapes(task):
  held = captions.load(config()).test
  samples = np.stack([held[i]['x'] for i in range(20)])
  scores = task.metrics(samples, held.prompts)
  assert scores['colour'] == scores['colour'] | {'samples': 1.0, 'held_out': 1.0}
  assert task.metrics(samples, ['a ring'] * 20)['shape']['samples'] < 1
  assert scores['nearest_training_distance_median']['samples'] == scores['nearest_training_distance_median']['held_out']


def test_a_file_with_another_vocabulary_is_taken_or_refused(tmp_path):
  path = tmp_path / 'tokenizer.json'
  tokenizers.train(['two squares'], 300).save(path)
  task = make_task(config(text__tokenizer=str(path), text__length=40, sample__prompts=('two squares',)), True)
  assert task.context(np.arange(1))['text']['mask'].sum() < 13
  with pytest.raises(ValueError, match=r'has \d+ tokens and config.text.vocabulary is 100: type --config.text.vocabulary='):
    make_task(config(text__tokenizer=str(path), text__vocabulary=100), True)


@pytest.mark.parametrize('fields, sentence', [
  ({'source': 'digits'}, "config.data.source is 'digits'; with captions are 'shapes', 'tfds' and 'folder'"),
  ({'size': (16, 24)}, 'Shapes are drawn on coloured squares; config.data.size is (16, 24)'),
  ({'channels': 1}, 'config.data.channels 1'),
  ({'flip': True}, 'a mirrored shape is on the other side than its caption says'),
  ({'sample__labels': (3,)}, 'captions have no classes'),
  ({'classes': 10}, 'captions have no classes'),
  ({'text__vocabulary': 100}, 'config.text.vocabulary: train got vocabulary=100'),
  ({'text__tokenizer': 'nowhere.json'}, "The tokenizer 'nowhere.json' is not a file"),
  ({'text__long': 'refuse', 'sample__prompts': ('a ring', 'a red ring ' * 9)}, "Shorten it, or give long='cut'"),
  ({'text__long': 'drop'}, "long='drop'"),
  ({'text__length': 1}, 'config.text.length is 1'),
])
def test_bad_input_gets_a_sentence(fields, sentence):
  with pytest.raises(ValueError) as error:
    make_task(config(**fields), True)
  assert sentence in str(error.value)


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said():
  with pytest.warns(UserWarning, match=r"The text 'a red ring a red.* What is beyond is cut off"):
    task = make_task(config(sample__prompts=('a red ring ' * 9,)), True)
  assert task.context(np.arange(1))['text']['mask'].all()


def test_a_row_without_a_caption_gets_a_sentence(tmp_path):
  with pytest.raises(ValueError, match='Row 2 of .*metadata.csv has no text: give every row one'):
    make_task(config(**folder(tmp_path / 'a', [['red'], [' '], ['blue']])), True)


@pytest.mark.parametrize('columns, sentence', [
  (('file', 'text'), 'it needs file_name, and text'), (('file_name', 'caption'), 'it needs file_name, and text')])
def test_a_table_without_its_columns_gets_a_sentence(tmp_path, columns, sentence):
  with pytest.raises(ValueError, match=sentence):
    make_task(config(**folder(tmp_path / 'a', columns=columns)), True)


def test_a_folder_without_a_table_gets_a_sentence(tmp_path):
  with pytest.raises(ValueError, match='has no metadata.csv; images with captions need one'):
    make_task(config(source='folder', path=str(tmp_path)), True)


def test_another_column_can_be_the_caption(tmp_path):
  fields = folder(tmp_path / 'a', columns=('file_name', 'keywords'))
  held = captions.load(config(**fields, caption='keywords')).test
  assert set(held.prompts) <= {each[0] for each in TEXTS}
