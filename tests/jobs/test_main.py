"""The program as it is typed: a process of its own, killed, stopped, short of disk, or given nonsense."""
import resource
import signal
import time

import numpy as np
import pytest

from diffusion_jax.jobs import train
from tests.jobs.runs import ROOT, command, flags, losses, start, tiny, trained_state, wait_for_step

OFTEN = dict(checkpoint__every=1, train__steps=8)  # a save, or a part of one, at every instant


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The same run, never interrupted."""
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  train.run(tiny(**OFTEN), workdir)
  return workdir


def equal(workdir, other):
  for a, b in zip(trained_state(tiny(**OFTEN), workdir), trained_state(tiny(**OFTEN), other), strict=True):
    np.testing.assert_array_equal(a, b)
  assert losses(workdir) == losses(other)


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_sigterm_and_ctrl_c_save_and_leave(tmp_path, undisturbed, number):
  workdir = tmp_path / 'run'
  process = start(workdir, *flags(checkpoint__every=1000, train__steps=8))
  wait_for_step(process, 2)
  process.send_signal(number)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 128 + number
  assert f'{number.name} at step' in output and 'Type the same command' in output and 'Traceback' not in output
  train.run(tiny(checkpoint__every=1000, train__steps=8), workdir)
  equal(workdir, undisturbed)


def test_a_full_disk_is_said_and_the_run_goes_on_after_it(tmp_path):
  """A limit on the size of files stands for the full disk: writing fails in the same place."""
  status, output = command(tmp_path / 'run', *flags(), file_limit=30)
  assert status == 1
  assert '\nERROR: A checkpoint could not be saved' in output and 'There is no complete one' in output, output
  assert 'Finished' not in output and 'Task exception was never retrieved' not in output, output
  assert command(tmp_path / 'run', *flags())[0] == 0


def test_a_full_disk_that_the_log_meets_first_is_said(tmp_path):
  path = tmp_path / 'run' / 'metrics.jsonl'
  process = start(tmp_path / 'run', *flags(checkpoint__every=1000, train__steps=1000))
  wait_for_step(process, 1)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (path.stat().st_size + 1000,) * 2)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 1 and 'Traceback' not in output, output
  assert output.splitlines()[-1] == (f'ERROR: {path} cannot be written: File too large. Make room, then type the same '
                                     'command to go on from the newest checkpoint.')


def test_help_is_quick():
  began = time.perf_counter()
  process = start('unused', '--help', config=None)
  output, _ = process.communicate(timeout=60)
  assert '--mode' in output and '--config' in output
  assert time.perf_counter() - began < 3


SENTENCES = {
    'misspelt field': (['--config.train.stepz=3'], 'Did you mean "steps"'),
    'misspelt group': (['--config.trian.steps=3'], 'Did you mean "train"'),
    'illegal value': (['--config.train.steps=0'], 'ERROR: config.train.steps is 0; it must be 1 or more.'),
    'slice in another mode': (['--topology=v5e:2x4'], 'ERROR: --topology is for --mode=plan; the mode is train.'),
    'bucket': (['--workdir=gs://bucket/run'], "ERROR: --workdir is 'gs://bucket/run'; it must be a folder of a disk."),
    'unknown component': (['--config.solver=dimm()'], "Did you mean 'ddim'"),
}


@pytest.mark.parametrize('case', SENTENCES)
def test_bad_words_get_a_sentence_and_no_traceback(tmp_path, case):
  words, sentence = SENTENCES[case]
  status, output = command(tmp_path / 'run', *words)
  assert status == 1 and sentence in output, output
  assert case not in ('illegal value', 'slice in another mode', 'bucket') or 'Traceback' not in output


@pytest.mark.parametrize('mode', ['sample', 'evaluate', 'train'])
def test_an_empty_workdir_gets_a_sentence(tmp_path, mode):
  status, output = command(tmp_path / 'nothing', f'--mode={mode}', config=None)
  assert status == 1 and str(tmp_path / 'nothing') in output and '--config=configs/digits.py' in output, output
  assert not (tmp_path / 'nothing').exists()


def test_sample_and_overrides_from_the_workdir(tmp_path):
  """--mode=sample reads the config of the workdir, and takes overrides of it. A field that came since has its default."""
  assert command(tmp_path / 'run', *flags(train__steps=1))[0] == 0
  path = tmp_path / 'run' / 'config.json'
  path.write_text(path.read_text().replace(',\n    "nonfinite_most": 10', ''))
  words = '--mode=sample', '--config.sample.count=3', '--config.solver=heun()'
  status, output = command(tmp_path / 'run', *words, config=None)
  assert status == 0 and 'samples.png' in output, output
  assert f'The run in {tmp_path / "run"} is older than config.train.nonfinite_most, which is 10 now.' in output
  assert np.load(tmp_path / 'run' / 'samples' / 'samples.npz')['x'].shape == (3, 8, 8, 1)
  status, output = command(tmp_path / 'run', '--mode=sample', '--config.schedule=flow()', config=None)
  assert status == 1 and "config.schedule: 'cosine()' there, 'flow()' now" in output


def test_the_readme_commands_exist():
  text = (ROOT / 'README.md').read_text()
  assert 'bash run.sh\n' in text and 'bash run.sh test' in text
