"""What can befall a run: each fault strikes a running or a killed one, and leaves a workdir in which the same command is
typed again."""
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.jobs.runs import command, flags, losses, start, start_two, tiny, trained_state, wait_for_step

STEPS = 16
FIELDS = dict(train__steps=STEPS, checkpoint__every=2, checkpoint__keep=3)
PAIR = FIELDS | dict(mesh='data=-1')


class Fault(NamedTuple):
  """`strike(workdir, rng)` returns what the run, or the next one, must say of it ('' for a kill, of which nobody can), and
  whether the next command says it."""
  strike: Callable[[Path, random.Random], tuple[str, bool]]
  processes: int = 1
  own_disk: bool = False  # needs a file system of its own


class Outcome(NamedTuple):
  """Of one round; `used` is the checkpoint from which the run went on, `lost` how many logged steps it had to do again,
  `in_save` whether the blow fell while a checkpoint was written or deleted."""
  said: str
  used: int
  lost: int
  in_save: bool


def newest(workdir: Path) -> list[int]:
  """The steps that have a checkpoint, the newest first."""
  steps = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  return sorted(steps, reverse=True)


def started(workdir: Path, rng: random.Random, first: int = 1):
  """A run that has logged a random step, `first` or later."""
  process = start(workdir, *flags(**FIELDS))
  wait_for_step(process, rng.randrange(first, STEPS - 3))
  return process


def end(process, status: int | None = None) -> str:
  """What a process printed until its end, which must have this status if one is given."""
  output, _ = process.communicate(timeout=400)
  assert status in (None, process.returncode), f'It ended with {process.returncode}:\n{output}'
  return output


def kill(workdir, rng):
  process = started(workdir, rng)
  time.sleep(rng.uniform(0, 0.3))
  process.kill()
  end(process)
  return '', False


def kill_in_save(workdir, rng):
  """At a random instant after a checkpoint has been begun, and before it has its name: what is left proves it."""
  process, partial = started(workdir, rng), workdir / 'checkpoints' / 'partial'
  while process.poll() is None:
    if partial.exists():
      time.sleep(rng.uniform(0, 0.1))
      process.send_signal(signal.SIGSTOP)
      if partial.exists():
        break
      process.send_signal(signal.SIGCONT)
  assert process.poll() is None, 'The run ended before it could be struck.'
  process.kill()
  end(process)
  assert partial.exists()
  return '', False


def terminate(workdir, rng):
  process = started(workdir, rng)
  process.send_signal(signal.SIGTERM)
  output = end(process, 128 + signal.SIGTERM)
  assert 'SIGTERM at step' in output, output
  return 'SIGTERM', False


def disk_full(workdir, rng):
  """The rest of the disk is taken while the run goes on, and given back when it has ended."""
  process = started(workdir, rng, 5)
  filler = workdir.parent / 'filler'
  try:
    with filler.open('wb', buffering=0) as file:
      while file.write(bytes(1 << 12)):
        pass
  except OSError:
    pass
  output = end(process, 1)
  filler.unlink()
  assert '\nERROR: ' in output and 'No space left on device' in output, output
  return 'No space left on device', False


def file_limit(workdir, rng):
  """Files may grow no further: the error comes in the middle of a write."""
  process = started(workdir, rng, 5)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
  output = end(process, 1)
  assert 'ERROR: A checkpoint could not be saved' in output, output
  return 'A checkpoint could not be saved', False


def read_only(workdir, rng):
  kill(workdir, rng)
  subprocess.run(['mount', '-o', 'remount,ro', workdir.parent], check=True)
  output = end(start(workdir, *flags(**FIELDS)), 1)
  subprocess.run(['mount', '-o', 'remount,rw', workdir.parent], check=True)
  assert 'cannot be written: Read-only file system' in output and 'Traceback' not in output, output
  return 'Read-only file system', False


def truncate(path, rng):
  os.truncate(path, rng.randrange(1, max(2, path.stat().st_size)))


def empty(path, rng):
  os.truncate(path, 0)


def delete(path, rng):
  path.unlink()


def flip(path, rng):
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def damage(harm):
  """Harm a random file of the newest checkpoint of a run that was killed with two of them."""
  def strike(workdir, rng):
    process = started(workdir, rng, 8)
    while len(newest(workdir)) < 2 and process.poll() is None:
      time.sleep(0.01)
    process.kill()
    end(process)
    step = workdir / 'checkpoints' / str(newest(workdir)[0])
    path = rng.choice(sorted(path for path in step.rglob('*') if path.is_file() and path.stat().st_size > 1))
    harm(path, rng)
    # A manifest that is harmed is named, or, if it is still one, the file of which it says something else.
    return ('is damaged (' + ('' if path.name == 'manifest.json' else str(path.relative_to(step)))), True
  return strike


def kill_one_of_two(workdir, rng):
  """The other must not go on alone: it ends with an error, by itself."""
  pair = start_two(workdir, *flags(**PAIR))
  wait_for_step(pair[0], rng.randrange(1, STEPS - 6))
  struck = rng.randrange(2)
  pair[struck].kill()
  began = time.monotonic()
  for process in pair:
    end(process)
  assert pair[1 - struck].returncode != 0
  return f'the other ended after {time.monotonic() - began:.0f} s', False


FAULTS = {
    'kill -9': Fault(kill), 'kill -9 in mid-save': Fault(kill_in_save), 'flipped bit': Fault(damage(flip)),
    'SIGTERM': Fault(terminate), 'truncated file': Fault(damage(truncate)), 'disk full': Fault(disk_full, own_disk=True),
    'emptied file': Fault(damage(empty)), 'read-only workdir': Fault(read_only, own_disk=True),
    'deleted file': Fault(damage(delete)), 'file size limit': Fault(file_limit),
    'one of two killed': Fault(kill_one_of_two, processes=2)}


def undisturbed(workdir: Path, processes: int = 1) -> Path:
  """The same run, to which nothing happens."""
  typed_again(workdir, processes)
  return workdir


def typed_again(workdir: Path, processes: int) -> str:
  """The command, to its end. What it, or its first process, printed."""
  if processes == 2:
    outputs = [end(process, 0) for process in start_two(workdir, *flags(**PAIR))]
    return outputs[0]
  status, output = command(workdir, *flags(**FIELDS))
  assert status == 0 and f'Finished at step {STEPS}' in output, output
  return output


def suffer(fault: Fault, workdir: Path, rng: random.Random, reference: Path) -> Outcome:
  """Strike, type the same command again, and raise AssertionError unless all is as in the run that was not disturbed."""
  said, later = fault.strike(workdir, rng)
  left, logged, in_save = newest(workdir), max(losses(workdir), default=0), (workdir / 'checkpoints' / 'partial').exists()
  expected = ([0, *reversed(left)])[-2 if later else -1]
  output = typed_again(workdir, fault.processes)
  assert not later or said in output, output
  found = f'Going on from step {expected}.' if expected else 'Starting a new run'
  assert found in output, f'{found!r} was expected of {left}:\n{output}'
  assert bool(list((workdir / 'checkpoints').glob('*.damaged'))) == later
  config = tiny(**(PAIR if fault.processes == 2 else FIELDS))
  for ours, theirs in zip(*(trained_state(config, folder) for folder in (workdir, reference)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert losses(workdir) == losses(reference)
  return Outcome(said, expected, logged - expected, in_save)


def can_mount() -> bool:
  """Whether this user may mount a file system."""
  return os.getuid() == 0 and not subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode


@contextmanager
def own_disk(folder: Path):
  """A small file system in memory."""
  folder.mkdir()
  subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=48m', 'tmpfs', folder], check=True)
  try:
    yield folder
  finally:
    subprocess.run(['umount', folder], check=True)
    shutil.rmtree(folder)
