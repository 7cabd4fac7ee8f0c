"""The chips of a TPU slice on a machine without one, for ahead-of-time compilation."""
import importlib.util
import os

import jax

from diffusion_jax.runtime.logs import first_line

KINDS = ('v4', 'v5e', 'v5p', 'v6e')


def open_topology(name: str) -> list[jax.Device]:
  """The devices, one a chip, of a slice such as 'v5e:16x16'; they can be compiled for and compute nothing.

  Raises ValueError where the name is none or libtpu is not installed.
  """
  kind, _, _ = name.partition(':')
  if kind not in KINDS:
    raise ValueError(f'The topology {name!r} is none that can be planned for: legal are {", ".join(KINDS)} with the chips '
                     'along each axis, such as v5e:16x16, v6e:4x4, v5p:4x4x4.')
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError("A plan is compiled by libtpu, which is not installed: type pip install -e '.[plan]'")
  alone = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
           'TPU_WORKER_HOSTNAMES': 'localhost'}  # libtpu asks no server for its slice, and takes no lock on chips
  for variable, value in alone.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies
  one_a_chip = {'chip_config_name': 'megacore'} if kind == 'v4' else {}  # else a v4 chip is two devices
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name, **one_a_chip).devices
  except Exception as error:  # jax.errors.JaxRuntimeError, of a text of libtpu's
    raise ValueError(f'The topology {name!r} cannot be opened: {first_line(error)}') from error
