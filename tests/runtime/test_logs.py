"""metrics.jsonl: what is written, and that a resumed run neither repeats nor leaves broken lines."""
import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.runtime.logs import Log, say, table


def write(workdir, start, stop, steps=10, every=1):
  """Log the steps start + 1 .. stop, with a loss of 100 * start + step."""
  with Log(workdir, start, steps, every, 4) as log:
    for step in range(start + 1, stop + 1):
      log.scalars(step, {'loss': jnp.asarray(100.0 * start + step), 'skipped': np.int32(0)})


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir):
  return [(line['step'], line['loss']) for line in lines(workdir)]


def test_every_nth_step_and_the_last_are_logged(tmp_path, capsys):
  write(tmp_path, 0, 10, every=4)
  assert losses(tmp_path) == [(4, 4.0), (8, 8.0), (10, 10.0)]
  assert all(set(line) == {'step', 'loss', 'skipped', 'images_per_second'} for line in lines(tmp_path))
  assert all(line['images_per_second'] > 0 for line in lines(tmp_path))
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == 3 and printed[0].startswith('step 4/10: loss 4.0000, ')


def test_lines_are_on_the_disk_at_once(tmp_path):
  with Log(tmp_path, 0, 10, 1, 4) as log:
    log.scalars(1, {'loss': 0.5})
    assert losses(tmp_path) == [(1, 0.5)]


def test_a_step_can_be_logged_out_of_turn(tmp_path):
  with Log(tmp_path, 0, 100, 50, 4) as log:
    log.scalars(7, {'loss': 0.5}, always=True)
    log.scalars(8, {'loss': 0.5})
  assert losses(tmp_path) == [(7, 0.5)]


def test_an_error_in_the_run_closes_the_files(tmp_path):
  with pytest.raises(FloatingPointError, match='step 2'):
    with Log(tmp_path, 0, 10, 1, 4) as log:
      log.scalars(1, {'loss': 0.5})
      raise FloatingPointError('step 2')
  assert losses(tmp_path) == [(1, 0.5)]


@contextmanager
def file_limit(size):
  """Within it no file grows beyond `size` bytes: the same error, in the same places, as that of a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_run_with_the_name_of_the_file(tmp_path):
  with pytest.raises(OSError) as error, file_limit(200):
    write(tmp_path, 0, 10)
  assert (error.value.strerror, error.value.filename) == ('File too large', str(tmp_path / 'metrics.jsonl'))
  write(tmp_path, 1, 10)  # with room again, from the checkpoint of step 1
  assert [line['step'] for line in lines(tmp_path)] == list(range(1, 11))


def test_a_board_that_cannot_be_written_stops_the_run(tmp_path, monkeypatch):
  """It is the larger of the two, and a run without scalars of its own has pictures."""
  picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  with pytest.raises(OSError, match='File too large: .*tensorboard/events.out.tfevents'), file_limit(5000):
    with Log(tmp_path, 0, 100, 50, 4) as log:
      log.image(1, 'sheet', picture)


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
  """A session that starts at step 4 purges the steps from 4 on of the files before it."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog
  write(tmp_path, 0, 7)
  write(tmp_path, 3, 10)
  def events(path):
    content, start = path.read_bytes(), 0
    while start < len(content):  # length, its checksum, the event, its checksum
      size = int.from_bytes(content[start:start + 8], 'little')
      yield Event.FromString(content[start + 12:start + 12 + size])
      start += size + 16
  first, second = (list(events(path)) for path in sorted((tmp_path / 'tensorboard').iterdir()))
  assert [(events[1].step, events[1].session_log.status) for events in (first, second)] == [
      (1, SessionLog.START), (4, SessionLog.START)]
  loss = lambda events: [(e.step, e.summary.value[0].simple_value) for e in events[2:] if e.summary.value[0].tag == 'loss']
  assert loss(first) == [(step, step) for step in range(1, 8)]
  assert loss(second) == [(step, 300 + step) for step in range(4, 11)]


@pytest.mark.parametrize('start', [0, 3, 7, 8])
def test_going_on_drops_the_lines_of_later_steps(tmp_path, start):
  write(tmp_path, 0, 7)
  write(tmp_path, start, 10)
  again = [(step, 100.0 * start + step) for step in range(start + 1, 11)]
  assert losses(tmp_path) == [(step, float(step)) for step in range(1, min(start, 7) + 1)] + again
  assert not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize('cut', [1, 2, 20, 40])
def test_going_on_drops_a_line_that_was_cut_off(tmp_path, cut):
  """A kill in the middle of the line of step 7, of which the newest checkpoint may well know."""
  write(tmp_path, 0, 7)
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-cut])
  write(tmp_path, 7, 9)
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 8, 9]


def test_values_that_are_not_finite_can_be_read(tmp_path):
  with Log(tmp_path, 0, 10, 1, 4) as log:
    log.scalars(1, {'loss': jnp.nan})
  write(tmp_path, 1, 2)
  assert np.isnan(lines(tmp_path)[0]['loss']) and lines(tmp_path)[1]['step'] == 2


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
  with Log(tmp_path, 0, 1, 1, 4) as log:
    log.scalars(1, {'loss': 0.5})
    log.image(1, 'sheet', np.zeros((8, 8, 3), np.uint8))
  content = b''.join(path.read_bytes() for path in (tmp_path / 'tensorboard').iterdir())
  for tag in (b'loss', b'images_per_second', b'sheet', b'PNG'):
    assert tag in content


def test_pictures_do_not_count_as_training(tmp_path):
  with Log(tmp_path, 0, 10, 1, 4) as log:
    log.image(1, 'sheet', np.zeros((8, 8, 3), np.uint8), seconds=-1000.0)  # as if training had taken 1,000 s longer
    log.scalars(1, {'loss': 0.5})
  assert lines(tmp_path)[0]['images_per_second'] == pytest.approx(4 / 1000, rel=0.05)


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('jax.process_index', lambda: 1)
  write(tmp_path / 'run', 0, 3)
  say('hello')
  table({'a': 'b'})
  assert not (tmp_path / 'run').exists() and capsys.readouterr().out == ''


def test_table_and_say(capsys):
  table({'mesh': '8', 'parameters': '35,746,307'})
  say('Done.')
  assert capsys.readouterr().out == 'mesh        8\nparameters  35,746,307\nDone.\n'
