"""Two real processes with four devices each, over loopback, train and sample as one process with eight devices does."""
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax.jobs import train
from tests.jobs.runs import ROOT, losses, samples, tiny

FIELDS = dict(mesh='data=-1', sample__count=12, sample__batch=8, log__samples=2)
PROGRAM = '''
import sys
from pathlib import Path
import jax
jax.config.update('jax_num_cpu_devices', 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from diffusion_jax.jobs import train
from tests.jobs import runs, test_two_processes
train.run(runs.tiny(**test_two_processes.FIELDS), Path(sys.argv[3]))
'''


def free_port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
  address = f'localhost:{free_port()}'
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'} | {'PYTHONPATH': str(ROOT)}
  pair = [subprocess.Popen([sys.executable, '-c', PROGRAM, address, str(i), str(tmp_path / 'two')], cwd=ROOT, text=True,
                           env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
  outputs = [process.communicate(timeout=400)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], '\n'.join(outputs)
  train.run(tiny(**FIELDS), tmp_path / 'one')
  two, one = (losses(tmp_path / name) for name in ('two', 'one'))
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
  np.testing.assert_allclose(*(samples(tmp_path / name)['x'].astype(int) for name in ('two', 'one')), atol=1)
