"""Two real processes with four devices each, over loopback, train and sample as one with eight does, and stop together."""
import signal

import numpy as np
import pytest

from diffusion_jax.jobs import train
from tests.jobs.runs import RULES, command, flags, losses, samples, start_two, tiny, trained_state, wait_for_step

FIELDS = dict(mesh='data=-1', sample__count=12, sample__batch=8, log__samples=2)


def ends(pair):
  """(exit statuses, outputs) of processes that end."""
  outputs = [process.communicate(timeout=400)[0] for process in pair]
  return [process.returncode for process in pair], outputs


@pytest.mark.slow
@pytest.mark.parametrize('mesh, parts', [('data=-1', 1), ('fsdp=-1', 2), ('data=2,fsdp=-1,tensor=2', 1), ('tensor=-1', 4)])
def test_two_processes_are_one(tmp_path, mesh, parts):
  """In the last of them every device of both feeds and computes the same rows."""
  fields = FIELDS | dict(mesh=mesh, train__accumulate=parts, sharding=RULES)
  status, outputs = ends(start_two(tmp_path / 'two', *flags(**fields)))
  assert status == [0, 0], '\n'.join(outputs)
  train.run(tiny(**FIELDS | dict(mesh='data=1')), tmp_path / 'one')
  two, one = (losses(tmp_path / name) for name in ('two', 'one'))
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
  np.testing.assert_allclose(*(samples(tmp_path / name)['x'].astype(int) for name in ('two', 'one')), atol=1)


@pytest.mark.slow
def test_two_processes_share_the_embeddings_of_a_frozen_encoder(tmp_path):
  """The first of them writes the files, the other waits; the null is the same in the programs of both."""
  fields = FIELDS | dict(task='captions', data__source='shapes', data__size=(16, 16), data__channels=3, data__count=40,
                         data__holdout=8, text__encoder='CLIPText(width=16, layers=1, heads=2)', text__length=32,
                         transform='guide(2.0) | clip(1.0)', log__samples=0)
  train.run(tiny(**fields | dict(mesh='data=1', train__steps=2, sample__count=0)), tmp_path / 'source')
  fields['text__frozen'] = str(tmp_path / 'source')
  status, outputs = ends(start_two(tmp_path / 'two', *flags(**fields)))
  assert status == [0, 0], '\n'.join(outputs)
  assert outputs[0].count('Embedding') == 1 and 'Embedding' not in outputs[1]
  train.run(tiny(**fields | dict(mesh='data=1')), tmp_path / 'one')
  two, one = (losses(tmp_path / name) for name in ('two', 'one'))
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
  np.testing.assert_allclose(*(samples(tmp_path / name)['x'].astype(int) for name in ('two', 'one')), atol=1)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_back(tmp_path):
  """2 x 4 devices with an eighth of the state each, then one device, then eight, then 2 x 4: the losses of one device."""
  whole = FIELDS | dict(sharding=RULES, train__steps=8, sample__count=0, log__samples=0)
  for steps, mesh in ((2, None), (4, 'data=1'), (6, 'fsdp=8'), (8, None)):
    fields = whole | dict(train__steps=steps, mesh=mesh or 'fsdp=-1')
    if mesh:
      train.run(tiny(**fields), tmp_path / 'run')
    else:
      status, outputs = ends(start_two(tmp_path / 'run', *flags(**fields)))
      assert status == [0, 0], '\n'.join(outputs)
  train.run(tiny(**whole | dict(mesh='data=1')), tmp_path / 'one')
  assert list(losses(tmp_path / 'run')) == list(range(1, 9))
  np.testing.assert_allclose(*(list(losses(tmp_path / name).values()) for name in ('run', 'one')), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_on_one_process_stops_both_at_one_step(tmp_path):
  """It comes to the process that writes no logs; both save, leave, and go on to what the undisturbed pair ends with."""
  fields = dict(mesh='data=-1', train__steps=100, checkpoint__every=1000)
  pair = start_two(tmp_path / 'run', *flags(**fields))
  wait_for_step(pair[0], 5)
  pair[1].send_signal(signal.SIGTERM)
  status, outputs = ends(pair)
  assert status == [128 + signal.SIGTERM] * 2, '\n'.join(outputs)
  assert 'SIGTERM at step' in outputs[0] and 'Traceback' not in ''.join(outputs)
  assert 5 < max(losses(tmp_path / 'run')) < 100
  for workdir in ('run', 'undisturbed'):
    assert ends(start_two(tmp_path / workdir, *flags(**fields)))[0] == [0, 0]
  config = tiny(**fields)
  for a, b in zip(*(trained_state(config, tmp_path / name) for name in ('run', 'undisturbed')), strict=True):
    np.testing.assert_array_equal(a, b)
  assert losses(tmp_path / 'run') == losses(tmp_path / 'undisturbed')


@pytest.mark.parametrize('words, sentence', [
    (['--processes=2', '--process=0'], 'ERROR: --coordinator missing. Type all of --coordinator=HOST:PORT'),
    (['--process=0'], '--coordinator and --processes missing'),
    (['--coordinator=here', '--processes=2', '--process=0'], "--coordinator is 'here'; it must be HOST:PORT"),
    (['--coordinator=here:1', '--processes=2', '--process=2'], '--process is 2; with --processes=2 it must be from 0 to 1'),
])
def test_half_of_the_flags_gets_a_sentence(tmp_path, words, sentence):
  status, output = command(tmp_path / 'run', *words)
  assert status == 1 and sentence in output and 'Traceback' not in output, output
