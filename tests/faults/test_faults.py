"""The short form of `python -m tests.faults`: a run that is disturbed ends, bit for bit, as the one that is not."""
import random
import subprocess
import sys

import pytest

from tests.faults.faults import FAULTS, suffer, undisturbed
from tests.jobs.runs import ROOT


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  return undisturbed(tmp_path_factory.mktemp('undisturbed') / 'run')


@pytest.mark.parametrize('name', ['kill -9 in mid-save', 'flipped bit'])
def test_a_disturbed_run_is_exact(tmp_path, reference, name):
  suffer(FAULTS[name], tmp_path / 'run', random.Random(0), reference)


@pytest.mark.slow
def test_thirty_rounds_are_exact():
  done = subprocess.run([sys.executable, '-m', 'tests.faults', '--rounds=30'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and '30 of 30 exact' in done.stdout, done.stdout + done.stderr
