"""The trainer as its users have it: what it leaves behind, exact resume, devices, bad input."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import run as runs_module
from diffusion_jax.jobs import evaluate, sample, train
from diffusion_jax.runtime.workdir import load_config
from tests.jobs.runs import samples, tiny, trained_state


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A finished run of 4 steps with every output."""
  workdir = tmp_path_factory.mktemp('done')
  guided = 'guide(2.0) | clip(1.0)'
  config = tiny(sample__count=20, log__samples=2, evaluate__count=40, evaluate__batch=20, transform=guided,
                evaluate__transforms=('clip(1.0)', guided))
  assert train.run(config, workdir) == 0
  return workdir


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """A finished run of 4 steps with nothing but its checkpoints."""
  workdir = tmp_path_factory.mktemp('plain') / 'run'
  train.run(tiny(), workdir)
  return workdir


def test_all_files_are_there(done):
  for name in ('config.json', 'environment.json', 'metrics.jsonl', 'results.json', 'schedule.png', 'trajectory.png',
               'trajectory.gif', 'samples/samples.png', 'samples/samples.npz', 'samples/step_0000002.png'):
    assert (done / name).stat().st_size > 0, name
  assert list((done / 'tensorboard').iterdir())
  assert sorted(path.name for path in (done / 'checkpoints').iterdir()) == ['2', '4']


def test_results_have_their_provenance_and_their_floor(done):
  results = json.loads((done / 'results.json').read_text())
  assert [row['transform'] for row in results['scores']] == ['clip(1.0)', 'guide(2.0) | clip(1.0)']
  for row in results['scores']:
    assert (row['samples'], row['step'], row['solver'], row['ema'], row['seed']) == (40, 4, 'ddim()', '0.9', 0)
    for name in ('svm_accuracy', 'frechet_distance', 'kernel_distance', 'nearest_training_distance_median'):
      assert set(row[name]) == {'samples', 'held_out'}
  assert results['scores'][0]['svm_accuracy']['held_out'] > 0.9


def test_pictures_have_a_row_a_class(done):
  sheet = np.asarray(Image.open(done / 'samples' / 'samples.png'))
  assert sheet.shape == (10 * 34, 2 * 34, 3)  # 20 digits of 8x8, enlarged to 32 with a border
  with Image.open(done / 'trajectory.gif') as movie:
    assert movie.n_frames > 4


def test_a_finished_run_says_so_and_does_nothing(done, capsys):
  before = (done / 'metrics.jsonl').stat().st_mtime_ns
  assert train.run(load_config(done), done) == 0
  out = capsys.readouterr().out
  assert 'finished, at step 4' in out and str(done) in out
  assert (done / 'metrics.jsonl').stat().st_mtime_ns == before


def test_a_longer_run_that_was_killed_before_its_end_is_not_finished(tmp_path, capsys):
  """finished.json of the shorter run must not pass for that of the longer one."""
  train.run(tiny(train__steps=2), tmp_path)
  shorter = (tmp_path / 'finished.json').read_text()
  train.run(tiny(), tmp_path)
  (tmp_path / 'finished.json').write_text(shorter)
  capsys.readouterr()
  assert train.run(tiny(), tmp_path) == 0
  assert 'Finished at step 4' in capsys.readouterr().out
  assert json.loads((tmp_path / 'finished.json').read_text()) == {'step': 4}


def test_sample_and_evaluate_work_from_the_workdir_alone(done):
  config = load_config(done)
  first = samples(done)
  config.sample.count, config.sample.batch = 7, 3
  assert sample.run(config, done) == 0
  again = samples(done)
  # Sample i is the same picture for any count and any batch size, up to the order of float additions.
  np.testing.assert_allclose(again['x'].astype(int), first['x'][:7].astype(int), atol=1)
  np.testing.assert_array_equal(again['title'], list('0123456'))
  (done / 'results.json').unlink()
  assert evaluate.run(config, done) == 0
  assert json.loads((done / 'results.json').read_text())['scores']


def test_the_trajectory_ends_at_the_sample(done):
  this = runs_module.open_run(load_config(done), done, read=False)
  state = runs_module.trained(this)
  index = np.arange(8, dtype=np.int32)
  params = runs_module.chosen_params(this, state)
  end = runs_module.make_sampler(this, this.config.transform)(params, state.extra, index)
  xs, _ = runs_module.make_sampler(this, this.config.transform, keep=True)(params, state.extra, index)
  np.testing.assert_allclose(xs[-1], end, atol=1e-5)


def test_another_config_is_refused_with_the_fields_named(done):
  config = load_config(done)
  config.optimizer.rate, config.schedule = 0.5, 'flow()'
  with pytest.raises(ValueError, match=r'(?s)config.optimizer.rate: 0.001 there, 0.5 now.*config.schedule'):
    train.run(config, done)


@pytest.mark.parametrize('harm', ['half of a file', 'a flipped bit', 'empty folder'])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(plain, tmp_path, harm):
  workdir = tmp_path / 'run'
  shutil.copytree(plain, workdir)
  newest = workdir / 'checkpoints' / '4'
  big = max((path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  content = bytearray(big.read_bytes())
  if harm == 'half of a file':
    big.write_bytes(content[:len(content) // 2])
  elif harm == 'a flipped bit':
    content[len(content) // 2] ^= 1
    big.write_bytes(content)
  else:
    shutil.rmtree(newest)
    newest.mkdir()
  with pytest.warns(UserWarning, match=r'checkpoints/4 is damaged .* moved to 4.damaged'):
    train.run(tiny(), workdir)
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['2', '4', '4.damaged']
  for a, b in zip(trained_state(tiny(), workdir), trained_state(tiny(), plain), strict=True):
    np.testing.assert_array_equal(a, b)


def test_non_finite_steps_stop_or_are_skipped(tmp_path):
  """A rate of 1e30 makes the parameters, and so the next loss, overflow."""
  fields = dict(optimizer__rate=1e30, optimizer__clip=0.0, optimizer__warmup=1, train__nonfinite_most=3)
  with pytest.raises(FloatingPointError, match=r'Step 3 has loss .*, the 1\. in a row .*the worst layer is .*/kernel'):
    train.run(tiny(**fields), tmp_path / 'stop')
  train.run(tiny(train__nonfinite='skip', sample__ema=0.0, **fields), tmp_path / 'skip')
  lines = [json.loads(line) for line in (tmp_path / 'skip' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['skipped'] for line in lines] == [0, 0, 1, 2]
  # Two of them are in the checkpoint, so that the count goes on over a resume.
  with pytest.raises(FloatingPointError, match=r'Step 6 has loss .*, the 4\. in a row'):
    train.run(tiny(train__nonfinite='skip', train__steps=9, **fields), tmp_path / 'skip')


BAD = {
    'network': ("UNet(chanels=8)", "unexpected keyword argument 'chanels'"),
    'schedule': ('cosin()', "Did you mean 'cosine'"),
    'target': ('x1()', "'x1' is unknown"),
    'solver': ('ddim(2.0)', 'ddim needs 0 <= eta <= 1; got 2.0'),
    'times': ('uniform(1.0, 0.0)', 'times need 0 <= t_min'),
    'transform': ('guide(2.0) | clipp()', "Did you mean 'clip'"),
    'train__batch': (15, 'config.train.batch is 15, which 2 devices cannot share evenly: choose a multiple of 2'),
    'train__accumulate': (3, '2 devices, in config.train.accumulate=3 parts, cannot share evenly: choose a multiple of 6'),
    'mesh': ('data=99', 'this job has 8 devices'),
    'sharding': ((('middle', 'fsdp()'),), "config.sharding has no rule for params/backbone/"),
    'sample__ema': (0.5, 'config.sample.ema is 0.5; this run keeps'),
    'data__classes': (5, 'label 9 is out of range: type --config.data.classes=10'),
    'data__channels': (3, 'type --config.data.channels=1'),
    'train__nonfinite': ('ignore', "legal are 'stop' and 'skip'"),
    'train__nonfinite_most': (-1, 'config.train.nonfinite_most is -1; it must be 0 or more'),
    'optimizer__name': ('sgd', "config.optimizer.name is 'sgd'; legal are ['adamw', 'muon']"),
    'optimizer__decay': ('linear', "legal are 'cosine' and 'constant'"),
}


@pytest.mark.parametrize('field', BAD)
def test_bad_fields_get_a_sentence_before_anything_is_written(tmp_path, field):
  value, sentence = BAD[field]
  with pytest.raises(ValueError) as error:
    train.run(tiny(**{field: value}), tmp_path / 'run')
  assert sentence in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_size_that_the_network_cannot_halve_is_refused(tmp_path):
  network = 'UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(False, False))'
  with pytest.raises(ValueError, match=r'UNet with 2 levels and patch=1 needs sizes divisible by \(2, 2\); got \(9, 9\)'):
    train.run(tiny(network=network, data__size=(9, 9)), tmp_path / 'run')


def test_a_singular_grid_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"config.target 'noise\(\)' is singular at t=1"):
    train.run(tiny(target='noise()', space='noise()'), tmp_path / 'run')


def test_guidance_without_dropped_conditions_is_refused(tmp_path):
  with pytest.raises(ValueError, match='config.train.drop=0.0'):
    train.run(tiny(train__drop=0.0, transform='guide(2.0)'), tmp_path / 'run')


def test_sampling_is_one_compiled_program(done):
  """100 digits at 64 steps: one trace, one executable, used again by the second call."""
  import jax
  config = load_config(done)
  config.grid, config.mesh = 'uniform(64)', 'data=1'
  this = runs_module.open_run(config, done, read=False)
  state = runs_module.trained(this)
  program = jax.jit(runs_module.sampling_program(this, 'clip(1.0)'))
  index = np.arange(100, dtype=np.int32)
  for _ in range(2):
    out = program(state.params, state.extra, index, this.task.context(index))
  assert program._cache_size() == 1
  assert out.shape == (100, 8, 8, 1) and np.isfinite(out).all()
  text = program.lower(state.params, state.extra, index, this.task.context(index)).as_text()
  assert text.count('stablehlo.while') >= 1 and 'custom_call @xla_python' not in text  # no call back to the host
