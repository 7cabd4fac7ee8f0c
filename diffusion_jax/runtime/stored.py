"""The config file of a run that exists: --config=diffusion_jax/runtime/stored.py:WORKDIR reads WORKDIR/config.json."""
from pathlib import Path

from diffusion_jax.runtime import workdir as workdirs


def get_config(workdir):
  return workdirs.load_complete(Path(workdir))
