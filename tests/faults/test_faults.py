"""The short form of `python -m tests.faults`: a run that is disturbed ends, bit for bit, as the one that is not."""
import random
import subprocess
import sys

import pytest

from diffusion_jax.jobs import train
from tests.faults.faults import FAULTS, FIELDS, suffer
from tests.jobs.runs import ROOT, tiny


def test_a_run_killed_in_mid_save_is_exact(tmp_path):
  train.run(tiny(**FIELDS), tmp_path / 'undisturbed')
  suffer(FAULTS['kill -9 in mid-save'], tmp_path / 'run', random.Random(0), tmp_path / 'undisturbed')


@pytest.mark.slow
def test_thirty_rounds_are_exact():
  done = subprocess.run([sys.executable, '-m', 'tests.faults', '--rounds=30'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and '30 of 30 exact' in done.stdout, done.stdout + done.stderr
