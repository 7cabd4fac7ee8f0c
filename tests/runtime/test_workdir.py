"""The folder of a run: its config comes back as it was, changes are named, files are whole or absent."""
import importlib.metadata
import json
import platform
import re
import subprocess
import threading
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from diffusion_jax.runtime import stored, workdir


def opened(path, **fields):
  """A run in `path`, of configs/base.py with `fields`."""
  config = base.get_config()
  config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
  workdir.open_workdir(config, path)
  return config


def same(a, b):
  """Equal in values and types, all the way down."""
  if isinstance(a, tuple):
    return type(b) is tuple and len(a) == len(b) and all(map(same, a, b))
  return type(a) is type(b) and a == b


def test_a_config_comes_back_as_it_was(tmp_path):
  config = opened(tmp_path)
  config.unlock()
  config.extra = ConfigDict({'none': None, 'tiny': 1e-8, 'whole': 1.0, 'zero': 0, 'yes': True, 'empty': (),
                             'deep': ((1,), (2.0,)), 'text': 'guide(2.0) | "é"\n', 'inner': {'a': 1}})
  workdir.write_json(tmp_path / 'config.json', config.to_dict())
  before, after = workdir.flatten(config), workdir.flatten(workdir.load_config(tmp_path))
  assert list(before) == list(after)
  assert [name for name in before if not same(before[name], after[name])] == []
  assert after['extra.inner.a'] == 1 and after['data.size'] == (8, 8) and after['train.ema'] == (0.999,)


def test_opening_again_changes_nothing(tmp_path):
  opened(tmp_path / 'deep' / 'er')
  before = (tmp_path / 'deep' / 'er' / 'config.json').read_text()
  opened(tmp_path / 'deep' / 'er')
  assert (tmp_path / 'deep' / 'er' / 'config.json').read_text() == before
  assert sorted(path.name for path in (tmp_path / 'deep' / 'er').iterdir()) == ['config.json', 'environment.json']


def test_a_workdir_without_a_run_gets_a_sentence(tmp_path):
  for path in (tmp_path, tmp_path / 'missing'):
    with pytest.raises(ValueError, match=rf'{path}/config.json does not exist: there is no run in this workdir. Train'):
      workdir.load_config(path)


def test_other_fields_are_named(tmp_path):
  opened(tmp_path)
  with pytest.raises(ValueError) as error:
    opened(tmp_path, seed=1, optimizer__rate=0.5, data__size=(8, 16), train__steps=9)
  lines = str(error.value).splitlines()
  assert lines[0] == f'The run in {tmp_path} has another config:'
  assert lines[1:4] == ['  config.data.size: (8, 8) there, (8, 16) now',
                        '  config.optimizer.rate: 0.001 there, 0.5 now',
                        '  config.seed: 0 there, 1 now']
  assert lines[4].startswith('To continue it, leave these as they were (only train.steps, ')
  assert lines[4].endswith('type another --workdir.')
  assert workdir.load_config(tmp_path).seed == 0  # what is there stays


def rewrite(path, change):
  """Change config.json by hand, into what another version would have left."""
  content = json.loads((path / 'config.json').read_text())
  change(content)
  (path / 'config.json').write_text(json.dumps(content))


def test_a_field_that_came_since_has_its_default(tmp_path):
  opened(tmp_path, train__batch=64)
  rewrite(tmp_path, lambda content: [content['data'].pop('flip'), content.pop('log'), content['sample'].pop('count')])
  config = stored.get_config(str(tmp_path))
  expected = base.get_config()
  expected.train.batch = 64
  assert same(tuple(workdir.flatten(config).items()), tuple(workdir.flatten(expected).items()))
  younger = {'data.flip': False, 'log.every': 50, 'log.samples': 0, 'sample.count': 100}
  assert workdir.check_resumable(config, tmp_path) == younger
  config.sample.count = 7  # resumable, so that it may differ from the default
  assert workdir.check_resumable(config, tmp_path) == younger | {'sample.count': 7}
  config.data.flip = True  # not what the run was trained with
  with pytest.raises(ValueError, match=r'config.data.flip: no such field there, True now\nTo continue it'):
    workdir.check_resumable(config, tmp_path)


def test_a_field_that_is_gone_is_named(tmp_path):
  config = opened(tmp_path)
  rewrite(tmp_path, lambda content: content['train'].update(old=3))
  for now in (config, stored.get_config(str(tmp_path))):
    with pytest.raises(ValueError, match=r'(?s)config.train.old: 3 there, no such field now.* Where train.old did not '
                                         r'matter, delete it from .*config.json; else take the commit in environment'):
      workdir.check_resumable(now, tmp_path)


def test_without_base_py_nothing_is_filled_in(tmp_path, monkeypatch):
  """A package that was installed without configs/ cannot know what is new."""
  config = opened(tmp_path)
  rewrite(tmp_path, lambda content: content['data'].pop('flip'))
  monkeypatch.setattr(workdir, '__file__', str(tmp_path / 'a' / 'b' / 'c'))
  assert 'flip' not in stored.get_config(str(tmp_path)).data
  with pytest.raises(ValueError, match='config.data.flip: no such field there, False now'):
    workdir.check_resumable(config, tmp_path)


def test_resumable_fields_may_change(tmp_path):
  opened(tmp_path)
  changes = dict(train__steps=5, log__every=1, log__samples=2, checkpoint__every=3, checkpoint__keep=9, sample__count=1,
                 sample__labels=(1,), evaluate__count=2, evaluate__transforms=('guide(1.0)',), solver='ddim(1.0)',
                 grid='uniform(4)', transform='clip(2.0)', mesh='data=1')
  opened(tmp_path, **changes)
  assert workdir.flatten(workdir.load_config(tmp_path))['evaluate.transforms'] == ('guide(1.0)',)


def test_a_new_workdir_is_free(tmp_path):
  workdir.check_resumable(base.get_config(), tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('below', ['', 'run'])
def test_a_workdir_that_cannot_be_written_gets_a_sentence(tmp_path, below):
  path = tmp_path / 'file' / below
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=rf'The workdir {path} cannot be written: .+\. Type another --workdir'):
    opened(path)


def test_write_json_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  workdir.write_json(path, {'a': 1})
  whole = Path.write_text
  def full(self, text):
    whole(self, text[:4])
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(Path, 'write_text', full)
  with pytest.raises(OSError, match='No space left'):
    workdir.write_json(path, {'a': 2})
  assert json.loads(path.read_text()) == {'a': 1}


def test_a_reader_never_sees_half_a_file(tmp_path):
  path, stop, seen = tmp_path / 'a.json', threading.Event(), []
  content = lambda i: {'number': i, 'text': [i] * 5000}
  workdir.write_json(path, content(0))
  def read():
    while not stop.is_set():
      text = path.read_text()
      seen.append(text.endswith('}\n') and len(text) > 5000)
  reader = threading.Thread(target=read)
  reader.start()
  for i in range(1, 60):
    workdir.write_json(path, content(i))
  stop.set()
  reader.join()
  assert len(seen) > 5 and all(seen)
  assert [each.name for each in tmp_path.iterdir()] == ['a.json']


def test_environment(tmp_path):
  opened(tmp_path)
  found = json.loads((tmp_path / 'environment.json').read_text())
  assert (found['packages']['jax'], found['python']) == (jax.__version__, platform.python_version())
  for name in ('diffusion_jax', 'flax', 'optax', 'orbax-checkpoint', 'numpy'):
    assert found['packages'][name] == importlib.metadata.version(name)
  assert (found['processes'], len(found['devices'])) == (1, 8)
  assert found['command']
  checkout = (Path(workdir.__file__).parents[2] / '.git').exists()
  assert re.fullmatch(r'[0-9a-f]{40}\+?' if checkout else '', found['commit'])


def test_without_git_there_is_no_commit(monkeypatch):
  def missing(*words, **options):
    raise FileNotFoundError('git')
  monkeypatch.setattr(subprocess, 'run', missing)
  assert workdir.commit() == ''
