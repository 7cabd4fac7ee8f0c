"""Strict settings for the whole suite: no silent broadcasting between ranks, shapes checked, eight fake devices."""
import mmap
import os
import tempfile
from pathlib import Path

import jaxlib

os.environ['JAX_PLATFORMS'] = 'cpu'
if 'PYTEST_XDIST_WORKER' not in os.environ:  # a worker has the environment of the process that started it
  # Eight devices; and programs that are compiled fast rather than well, because the suite compiles more than it computes.
  _flags = ' --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  # The older way of making code for fusions takes two thirds of the time. A flag that jaxlib does not know ends a process.
  with open(Path(jaxlib.__file__).with_name('libjax_common.so'), 'rb') as _file:
    with mmap.mmap(_file.fileno(), 0, access=mmap.ACCESS_READ) as _library:
      _flags += ' --xla_cpu_use_fusion_emitters=false' * (_library.find(b'xla_cpu_use_fusion_emitters') >= 0)
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + _flags
  # Compiled programs are shared by the workers of a run and the processes that they start: half of them are alike. A folder
  # in JAX_COMPILATION_CACHE_DIR keeps them for the next run.
  _cache = tempfile.TemporaryDirectory(prefix='diffusion_jax_tests_')
  os.environ['XDG_CACHE_HOME'] = _cache.name
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(os.environ['XDG_CACHE_HOME'], 'compiled'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
install_import_hook('diffusion_jax.core', 'beartype.beartype')


@pytest.fixture
def x64():
  """Double precision within a test."""
  with jax.enable_x64(True):
    yield
