"""The scores of drawn emoji, where the answer is known."""
import csv
import importlib
import os

import numpy as np
import pytest
from PIL import Image

from configs import emoji_small
from diffusion_jax.runtime.workdir import open_workdir
from diffusion_jax.tasks.task import make_task
from experiments.emoji import score

GREY = {'light': 220, 'medium-light': 180, 'medium': 140, 'medium-dark': 100, 'dark': 60}  # a picture of each tone


def drawn_as(monkeypatch, picture_of):
  """Let score.score find what picture_of(name) gives in place of what a run draws."""
  monkeypatch.setattr(score, 'open_run', lambda config, workdir, read: config)
  monkeypatch.setattr(score, 'make_sampler', lambda run, transform: None)
  monkeypatch.setattr(score, 'trained', lambda run: None)
  monkeypatch.setattr(score, 'draw', lambda run, *_: np.stack([picture_of(name) for name in run.sample.prompts]))


def test_what_a_name_says():
  names = {'waving hand: medium-dark skin tone': ('medium-dark', 'waving hand'), 'waving hand': ('', 'waving hand'),
           'woman: light skin tone, red hair': ('light', 'woman, red hair'), 'woman: red hair': ('', 'woman, red hair'),
           'kiss: woman, man, dark skin tone, light skin tone': ('', 'kiss, woman, man'),
           'kiss: medium skin tone, medium skin tone': ('medium', 'kiss'), 'dark skin tone': ('', 'dark skin tone')}
  assert {name: (score.tone(name), score.thing(name)) for name in names} == names
  assert score.most_alike('man bouncing ball', ['ball', 'woman bouncing ball', 'man']) == 1


def test_ranks_on_a_line():
  real = np.array([[0.0], [10.0], [20.0], [21.0]])
  assert score.ranks(np.array([[1.0], [10.0], [20.9], [2.0]]), real).tolist() == [0, 0, 1, 3]


def test_scores_count_those_that_are_kept_and_say_a_tone():
  real = np.array([[0.0], [10.0], [20.0], [21.0]])
  names = ['hand: dark skin tone', 'hand: light skin tone', 'cat', 'dog']
  judge = lambda x, kept: score.judge(np.array(x)[:, None], names, real, np.array(kept), np.array([[5.0]]),
                                      lambda x: np.where(x[:, 0] < 15, 'dark', 'light'))
  every = judge([1.0, 9.0, 20.9, 2.0], [True] * 4)
  assert (every['found']['samples'], every['among five']['samples'], every['found']['count']) == (0.5, 1, 4)
  assert (every['skin tone']['samples'], every['skin tone']['count'], every['distance']) == (0.5, 2, 4)
  animals = judge([1.0, 9.0, 20.9, 2.0], [False, False, True, True])
  assert (animals['found']['samples'], animals['found']['count'], animals['skin tone']) == (0, 2, None)
  assert animals['distance'] == (15.9 + 3) / 2
  assert '| 0.00 (0.00 to 0.66), n = 2 |' in score.table([animals])
  assert score.flat(animals)['found count'] == 2 and 'skin tone' not in score.flat(animals)


def test_real_pictures_are_found_and_the_sheet_shows_them(tmp_path, monkeypatch):
  rng, pictures = np.random.default_rng(0), {}
  for thing in ('hand', 'ear', 'nose', 'woman', 'man', 'baby', 'foot', 'elf'):
    for tone, grey in GREY.items():
      pictures[f'{thing}: {tone} skin tone'] = (grey + rng.integers(-20, 20, (16, 16, 3))).astype(np.uint8)
  with (tmp_path / 'metadata.csv').open('w', newline='') as file:
    csv.writer(file).writerows([('file_name', 'text'), *((f'{i}.png', name) for i, name in enumerate(pictures))])
  for i, picture in enumerate(pictures.values()):
    Image.fromarray(picture).save(tmp_path / f'{i}.png')
  config = emoji_small.get_config()
  config.data.path, config.data.size, config.data.holdout = str(tmp_path), (16, 16), 12
  open_workdir(config, tmp_path / 'run')
  drawn_as(monkeypatch, lambda name: pictures.get(name, np.zeros((16, 16, 3), np.uint8)))
  rows, sheet = score.score(tmp_path / 'run')
  by_kind = {(row['pictures'], row['names']): row for row in rows}
  drawn, held, real = (by_kind[kind] for kind in (('drawn', 'training'), ('drawn', 'held out'), ('real', 'held out')))
  assert drawn['found']['samples'] == held['found']['samples'] == held['skin tone']['samples'] == 1
  assert drawn['found']['count'] == 28 and drawn['distance'] == 0 < held['distance'] == real['distance']
  assert by_kind['looked up', 'held out']['found']['samples'] < 0.5
  score.plot(sheet, tmp_path / 'sheet.png')
  assert len(sheet) == 12 and (tmp_path / 'sheet.png').stat().st_size < 300_000
  for kind, _, picture in sheet:
    assert (picture[:, :16] == picture[:, 16:]).all() and picture.any() == ('invented' not in kind)


real = pytest.mark.skipif('EMOJI_DIR' not in os.environ, reason='set EMOJI_DIR to the folder of emoji and metadata.csv')


@real
@pytest.mark.parametrize('name', ['emoji', 'emoji_small'])
def test_no_name_is_cut(name):
  config = importlib.import_module(f'configs.{name}').get_config()
  config.data.path = os.environ['EMOJI_DIR']
  make_task(config, True)  # a warning is an error here


@real
def test_the_rows_without_a_run_are_those_of_the_readme(tmp_path, monkeypatch):
  config = emoji_small.get_config()
  config.data.path = os.environ['EMOJI_DIR']
  open_workdir(config, tmp_path)
  drawn_as(monkeypatch, lambda name: np.zeros((32, 32, 3), np.uint8))
  rows, _ = score.score(tmp_path)
  readme = (score.HERE / 'README.md').read_text()
  for line in score.table(rows).splitlines():
    assert line in readme or line.startswith('| drawn')
