"""Every config, shrunk, trains two steps, saves, restores and samples."""
import importlib
import os
import re

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.jobs import sample, train
from diffusion_jax.run import open_run
from diffusion_jax.runtime.workdir import flatten, load_config
from tests.jobs.runs import ROOT

PARAMETERS = {'cifar10': 35_746_307, 'imagenet_64': 295_904_454 + 768, 'imagenet_256': 553_838_086 + 1024}
OWN = ('digits', 'shapes')  # sources that need no files
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def load(name):
  return importlib.import_module(f'configs.{name}').get_config()


def stand_in(config, folder):
  """The same config with sixty-four random images, in two classes or with captions, where it reads files."""
  if config.data.source in OWN:
    return config
  config.data.source, config.data.holdout, config.data.path = 'folder', 16, str(folder)
  size, channels = config.data.size, config.data.channels
  rng = np.random.default_rng(0)
  for i in range(64):
    path = folder / 'ab'[i % 2] / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)
  if config.task == 'captions':
    lines = [f'{path.relative_to(folder)},picture {path.stem}' for path in sorted(folder.glob('*/*'))]
    (folder / 'metadata.csv').write_text('\n'.join(['file_name,text', *lines]))
  return config


def shrunk(config, folder):
  """The same config with a small network, few steps and random images."""
  config.network = re.sub(r'\bchannels=\d+', 'channels=8', re.sub(r'head_channels=\d+', 'head_channels=8', config.network))
  config.network = re.sub(r'\bblocks=\d+', 'blocks=1', config.network)
  config.grid = re.sub(r'(uniform|linspace)\(\d+', r'\1(3', config.grid)
  config.train.steps, config.train.batch, config.log.samples, config.mesh = 2, 8, 0, 'data=1'
  config.sample.count = config.sample.batch = 4
  config.evaluate.count = config.evaluate.batch = 8
  config.data.count, config.data.holdout = 40, 10
  config.evaluate.transforms = config.evaluate.transforms[-1:]
  return stand_in(config, folder)


@pytest.mark.slow  # test_train.py and test_generate.py train a small run of each task
@pytest.mark.parametrize('name', NAMES)
def test_config_trains_saves_restores_and_samples(name, tmp_path):
  assert train.run(shrunk(load(name), tmp_path / 'images'), tmp_path / 'run') == 0
  assert sample.run(load_config(tmp_path / 'run'), tmp_path / 'run') == 0
  assert (tmp_path / 'run' / 'results.json').exists()


@pytest.mark.parametrize('name', NAMES)
def test_config_is_sound_at_full_size(name, tmp_path):
  """Everything that it names is built, and its network and sampler are traced; nothing is compiled. A published network
  has its published size (see tests/networks/test_unet.py; a null class more)."""
  this = open_run(stand_in(load(name), tmp_path / 'images'), tmp_path / 'run', read=True)
  params, _ = jax.eval_shape(this.method.init, jax.random.key(0))
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert size == PARAMETERS.get(name, size)


@pytest.mark.parametrize('name', NAMES)
def test_config_has_its_header_and_only_known_fields(name):
  assert flatten(load(name)).keys() == flatten(load('base')).keys()
  header = importlib.import_module(f'configs.{name}').__doc__
  if name != 'base':
    for word in ('paper', 'COMMAND', 'hardware', 'hours', 'expected'):
      assert re.search(rf'^{word}\s+\S', header, re.M), f'configs/{name}.py has no line for {word}'


@pytest.mark.parametrize('name', NAMES)
def test_configs_do_not_import_jax(name):
  assert 'jax' not in (ROOT / 'configs' / f'{name}.py').read_text().replace('diffusion_jax', '')


@pytest.mark.skipif('TFDS_DATA_DIR' not in os.environ, reason='set TFDS_DATA_DIR to a folder with fashion_mnist prepared')
def test_fashion_mnist_is_read_from_prepared_files(tmp_path):
  this = open_run(load('fashion_mnist'), tmp_path / 'run', read=True)
  assert this.config.data.classes == 10 and '60,000 training' in this.task.summary
  rows = next(this.task.batches(0, 8, 0, 1))
  assert rows['x'].shape == (8, 28, 28, 1) and rows['x'].dtype == np.uint8 and rows['x'].std() > 30
