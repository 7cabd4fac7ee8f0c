"""The benchmark: its arithmetic against counts made in another way, what it leaves behind, and what it refuses."""
import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from diffusion_jax import run as runs
from diffusion_jax.jobs import benchmark
from tests.jobs.runs import tiny
from tests.jobs.test_plan import analytic


@pytest.fixture
def cache():
  """A benchmark compiles anew; the tests after it shall not."""
  before = jax.config.jax_enable_compilation_cache
  yield
  jax.config.update('jax_enable_compilation_cache', before)


def quick(**fields):
  return tiny(**{'benchmark__seconds': 0.01, 'benchmark__repeats': 3, **fields})


def test_a_row(cache, tmp_path, capsys):
  config = quick()
  benchmark.store(tmp_path, SimpleNamespace(config=config, mesh=SimpleNamespace(size=1)), {'another': 'column'}, {})
  assert benchmark.run(config, tmp_path) == 0
  before, row = csv.DictReader((tmp_path / 'benchmark.csv').read_text().splitlines())
  assert (before['another'], before['train_tflops'], row['another'], row['devices']) == ('column', '', '', '2')
  found = json.loads((tmp_path / 'benchmark.json').read_text())
  this = runs.open_run(config, Path('nowhere'), read=True)
  train, sample = found['train'], found['sample']
  assert 1e9 * train['gflop_a_device'] == pytest.approx(analytic(this) / 2)
  for part, flops in ((train, analytic(this) / 2), (sample, 1e9 * sample['gflop_a_device'])):
    assert part['images_per_second'] * part['ms']['median'] == pytest.approx(16 * 1e3)
    assert part['tflops'] * part['ms']['median'] == pytest.approx(flops / 1e9)
    assert part['ms']['least'] <= part['ms']['median'] <= part['ms']['most']
    assert part['mfu_of_measured_peak'] == pytest.approx(part['tflops'] / found['measured_peak_tflops'])
  assert 0 < train['dispatch_host_ms']['median'] <= train['dispatch_ms']['median']
  assert found['save_ms']['most'] > 0 and 'real_over_synthetic' in train
  assert sorted(path.name for path in tmp_path.iterdir()) == ['benchmark.csv', 'benchmark.json']
  said = capsys.readouterr().out
  assert 'images/s' in said and 'a save blocks' in said and str(tmp_path / 'benchmark.csv') in said


def test_a_synthetic_batch_is_a_batch_of_training():
  this = runs.open_run(quick(), Path('nowhere'), read=True)
  found, shapes = benchmark.synthetic(this), runs.batch_shapes(this)
  assert {name: (rows.shape, rows.dtype, rows.sharding) for name, rows in found.items()} == {
      name: (leaf.shape, leaf.dtype, leaf.sharding) for name, leaf in shapes.items()}
  assert found['index'].tolist() == list(range(16)) and found['x'].std() > 60


def test_blocks_alternate_and_last_about_as_long_as_they_are_asked_to():
  order = []
  def slow(seconds):
    def work(count):
      order.append((seconds, count))
      time.sleep(seconds * count)
    return work
  this = SimpleNamespace(config=quick(benchmark__seconds=0.1))
  first, second = benchmark.timed(this, slow(0.001), slow(0.1))
  assert [seconds for seconds, _ in order] == [0.001, 0.001, 0.1, 0.1] + 3 * [0.001, 0.1]
  assert all(count > 1 for seconds, count in order[4:] if seconds == 0.001)
  assert min(first) >= 0.001 and min(second) >= 0.1 and len(first) == len(second) == 3


def test_a_spread_by_hand():
  assert benchmark.spread([0.5, 0.25, 4.0], 2.0) == {'median': 1.0, 'least': 0.5, 'most': 8.0}


@pytest.mark.parametrize('fields, sentence', [
    ({'benchmark__repeats': 0}, 'legal are more than 0, and 1 or more'),
    ({'benchmark__seconds': 0.0}, 'legal are more than 0, and 1 or more'),
    ({'benchmark__real': False}, 'type --config.data.classes=10')])
def test_what_cannot_be_timed_gets_a_sentence(cache, fields, sentence, tmp_path):
  with pytest.raises(ValueError, match=sentence):
    benchmark.run(tiny(**fields), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
