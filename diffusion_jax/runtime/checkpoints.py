"""Checkpoints: written by Orbax in a thread, with checksums; a damaged one is moved aside and the one before it used."""
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from diffusion_jax.runtime import manifest
from diffusion_jax.runtime.logs import first_line

PARTIAL = 'partial'
"""The sub-folder in which a checkpoint is written, and in which an old one is deleted. What a kill leaves in it is swept up
by the next save."""


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


class Checkpoints:
  """The checkpoints of a run in `folder`, one sub-folder a step, of which the newest `keep` stay.

  A sub-folder gets the name of its step by one rename, when all of it is written and its manifest too: whatever has a
  number for a name was complete once, and what is wrong with it now is damage.
  """

  def __init__(self, folder: Path, keep: int):
    self.folder = Path(folder).absolute()
    self.keep = keep
    # With these the processes wait for each other at the coordinator, not by a program on the devices: the thread that
    # saves must not put one between two steps of the training.
    everyone = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())),
                                                  barrier_sync_key_prefix='checkpoints')
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=everyone)
    self._orbax = ocp.Checkpointer(handler, multiprocessing_options=everyone)
    self._thread = ThreadPoolExecutor(1, 'save')
    self._pending: Future | None = None

  def save(self, step: int, state: Any) -> None:
    """Start to save, when the save before is complete; the training may go on, but not take the memory of `state`.

    Raises SaveError for the save before.
    """
    self.wait()
    self._pending = self._thread.submit(self._write, step, state)

  def wait(self) -> None:
    """Return when the last save is complete. Raises SaveError."""
    pending, self._pending = self._pending, None
    try:
      if pending:
        pending.result()
    except Exception as error:  # Orbax and TensorStore raise many types
      steps = self.steps()
      rest = f'The newest complete one is of step {steps[-1]}' if steps else 'There is no complete one'
      raise SaveError(f'A checkpoint could not be saved in {self.folder}: {first_line(error)}. {rest}. Make room, then '
                      'type the same command to go on from there.') from error

  def _write(self, step: int, state: Any) -> None:
    """In the thread: write, sum up, name, and delete what is older than the newest `keep`."""
    partial, first = self.folder / PARTIAL, jax.process_index() == 0
    if first:
      _sweep(partial)
      partial.mkdir(parents=True)
    self._orbax.save(partial / str(step), args=ocp.args.StandardSave(state))
    if first:
      manifest.write(partial / str(step))
      (partial / str(step)).rename(self.folder / str(step))
      for old in self.steps()[:-self.keep]:  # a kill must not leave half a folder with the name of a step
        (self.folder / str(old)).rename(partial / str(old))
      _sweep(partial)

  def steps(self) -> list[int]:
    """The steps that have a complete checkpoint, in order."""
    return _steps(self.folder)

  def restore(self, target: Any) -> Any | None:
    """The newest state whose checksums are right, on the shardings of `target` (jax.ShapeDtypeStruct), None without any.

    A damaged checkpoint is renamed to STEP.damaged with a warning that names the first damaged file, and the one before it
    is tried. Raises ValueError where there are checkpoints and none is whole, or where the newest whole one does not fit.
    """
    damaged = []
    for step in reversed(self.steps()):
      reason = manifest.damage(self.folder / str(step), jax.process_index(), jax.process_count())
      aside = self._free_name(step)
      if _any_process(bool(reason)):
        damaged.append(aside.name)
        self._set_aside(step, aside, reason or 'as another process found')
      else:
        return self._read(step, target)
    if damaged:
      raise ValueError(f'No checkpoint in {self.folder} can be read; the damaged ones are {", ".join(damaged)}. To start '
                       'anew, type another --workdir.')
    return None

  def _read(self, step: int, target: Any) -> Any:
    try:
      return self._orbax.restore(self.folder / str(step), args=ocp.args.StandardRestore(target))
    except Exception as error:  # any type, see above
      raise ValueError(
          f'The checkpoint {self.folder / str(step)} is whole, but this program cannot read it ({first_line(error)}). '
          'Take the versions in environment.json, or type another --workdir.') from error

  def _free_name(self, step: int) -> Path:
    aside, number = self.folder / f'{step}.damaged', 1
    while aside.exists():
      number += 1
      aside = self.folder / f'{step}.damaged{number}'
    return aside

  def _set_aside(self, step: int, aside: Path, reason: str) -> None:
    path, moved = self.folder / str(step), f'it is moved to {aside.name}'
    try:
      if jax.process_index() == 0:
        path.rename(aside)
    except OSError as error:
      moved = f'it cannot be moved aside ({error.strerror})'
    warnings.warn(f'The checkpoint {path} is damaged ({reason}); {moved} and the one before it is used.', stacklevel=3)

  def close(self) -> None:
    """Wait for the last save, and end the thread. Raises SaveError."""
    self.wait()
    self._thread.shutdown()
    self._orbax.close()


def read_part(folder: Path, *names: str) -> Any | None:
  """What lies under `names`, such as 'ema' and '0.999', in the newest state in `folder`, as numpy arrays; None where there
  is no state or it has no such part.

  The folder may be that of another run, even one that goes on: nothing in it is changed, and all processes read the step
  that the first of them found. Raises ValueError where the state is damaged.
  """
  step = _from_first(max(_steps(folder), default=-1))
  if step < 0:
    return None
  path = folder / str(step)
  reason = manifest.damage(path, jax.process_index(), jax.process_count())
  if _any_process(bool(reason)):
    raise ValueError(f'The checkpoint {path} is damaged ({reason or "as another process found"}). Sample that run, with '
                     '--mode=sample, which sets it aside and takes the one before it.')
  handler = ocp.PyTreeCheckpointHandler()
  part = handler.metadata(path).tree
  for name in names:
    part = part.get(name) if isinstance(part, dict) else None
  if part is None:
    return None
  wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
  how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), part)
  for name in reversed(names):
    wanted, how = {name: wanted}, {name: how}
  found = handler.restore(path, args=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True))
  for name in names:
    found = found[name]
  return found


def read_sampled(folder: Path, average: str, *names: str) -> Any | None:
  """What lies under `names` in the parameters of `average`, as optimizers.chosen_ema names them; else as `read_part`."""
  return read_part(folder, *(['params'] if average == '0.0' else ['ema', average]), *names)


def _steps(folder: Path) -> list[int]:
  return sorted(int(path.name) for path in folder.glob('*') if path.is_dir() and path.name.isdigit())


def _sweep(folder: Path) -> None:
  """Delete a folder, if it is there."""
  if folder.exists():
    shutil.rmtree(folder)


def _any_process(flag: bool) -> bool:
  """Whether the flag is set in any process; all of them come here before one leaves."""
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _from_first(number: int) -> int:
  """The number that the first process has; all of them come here before one leaves."""
  if jax.process_count() == 1:
    return number
  from jax.experimental import multihost_utils
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
