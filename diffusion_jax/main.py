"""python -m diffusion_jax.main --config=configs/digits.py --workdir=runs/digits [--mode=MODE]

train trains, then samples and evaluates; typed again, it goes on where it stopped. sample and evaluate work from the
workdir alone; sample with --prompt="two red rings" and other flags of options.py makes the pictures that are asked for.
plan compiles a config for slices of TPUs, --topology=v5e:2x4,v5e:16x16, on a machine without one. benchmark times the
training step and the sampler here. --config.any.field=value overrides a field.
"""
import errno
import importlib
import sys
import traceback
from logging import getLogger
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from diffusion_jax import options

flags.DEFINE_enum('mode', 'train', ('train', 'sample', 'evaluate', 'plan', 'benchmark'), 'What to do.')
flags.DEFINE_string('workdir', None, 'The folder that holds all of a run.', required=True)
flags.DEFINE_string('topology', None, 'Slices of TPUs to plan for: v5e:2x4 or, several, v5e:2x4,v5e:16x16.')
flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, where no cluster is detected that says so.')
flags.DEFINE_integer('processes', None, 'How many processes the job has; 1: this one, whatever is detected.')
flags.DEFINE_integer('process', None, 'The number of this process, from 0.')
options.define()
config_flags.DEFINE_config_file('config', None, 'A file of configs/; without it that of the workdir.', lock_config=True)


def parse(argv: list[str]) -> list[str]:
  """Parse the flags, with --config first, which its overrides need. Where it is left out the workdir's config stands in."""
  named = lambda name: [word for word in argv[1:] if word.lstrip('-').startswith(name + '=')]
  config, workdir = named('config'), named('workdir')
  if not config and workdir and '--config' not in argv:
    folder = workdir[-1].partition('=')[2]
    if (Path(folder) / 'config.json').exists():
      config = [f'--config={Path(__file__).parent / "runtime" / "stored.py"}:{folder}']
  logging.set_verbosity(logging.WARNING)  # --verbosity=0 shows what JAX and Orbax have to say
  getLogger('asyncio').setLevel('CRITICAL')  # says an error of a save, which we say, once more for each array
  sys.argv[1:] = [*config, *(word for word in argv[1:] if word not in config)]  # where config_flags looks for overrides
  return app.parse_flags_with_usage(sys.argv)


def main(_: list[str]) -> None:
  values, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
  if values.config is None:
    sys.exit(f'ERROR: {workdir} holds no run. Train one first: python -m diffusion_jax.main --config=configs/digits.py '
             f'--workdir={workdir}')
  if '://' in values.workdir:
    sys.exit(f'ERROR: --workdir is {values.workdir!r}; it must be a folder of a disk. A bucket will not do: a checkpoint '
             'gets its name by renaming its folder.')
  if values.topology is not None and values.mode != 'plan':
    sys.exit(f'ERROR: --topology is for --mode=plan; the mode is {values.mode}.')
  from diffusion_jax.runtime import processes  # late, as the job: --help shall not wait for JAX
  try:
    asked = options.given(values)
    if asked and values.mode != 'sample':
      raise ValueError(f'--{next(iter(asked))} is for --mode=sample; the mode is {values.mode}.')
    words = {'plan': (values.topology,), 'sample': (asked,) if asked else ()}.get(values.mode, ())
    processes.start(values.coordinator, values.processes, values.process)
    job = importlib.import_module(f'diffusion_jax.jobs.{"generate" if asked else values.mode}')
    sys.exit(job.run(values.config, workdir, *words))
  except (ValueError, RuntimeError, FloatingPointError) as error:
    # What this package raises is a sentence for the user; what others raise needs its traceback.
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if Path(__file__).parent not in raised_in.parents:
      raise
    sys.exit(f'ERROR: {error}')
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    sys.exit(f'ERROR: {error.filename or workdir} cannot be written: {error.strerror}. Make room, then type the same '
             'command to go on from the newest checkpoint.')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
