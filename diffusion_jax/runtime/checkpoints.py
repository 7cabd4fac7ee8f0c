"""Checkpoints: saved in the background and atomically by Orbax; a damaged one is moved aside and the one before it used."""
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax.runtime.logs import first_line


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


class Checkpoints:
  """The checkpoints of a run in `folder`, one sub-folder a step, of which the newest `keep` stay."""

  def __init__(self, folder: Path, keep: int):
    self.folder = Path(folder).absolute()
    self.keep = keep
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, cleanup_tmp_directories=True, create=True)
    return ocp.CheckpointManager(self.folder, options=options)

  def save(self, step: int, state: Any) -> None:
    """Start to save; the training may go on, with donated buffers too. Raises SaveError, also for the save before."""
    self._guard(step, lambda: self._manager.save(step, args=ocp.args.StandardSave(state), force=True))

  def wait(self) -> None:
    """Return when the last save is complete. Raises SaveError."""
    self._guard(None, self._manager.wait_until_finished)

  def _guard(self, step: int | None, action) -> None:
    try:
      self._manager.check_for_errors()
      action()
    except Exception as error:  # Orbax and TensorStore raise many types
      good = [each for each in self.steps() if each != step]
      rest = f'The newest complete one is of step {good[-1]}' if good else 'There is no complete one'
      raise SaveError(f'A checkpoint could not be saved in {self.folder}: {first_line(error)}. {rest}. Make room, then '
                      'type the same command to go on from there.') from error

  def steps(self) -> list[int]:
    """The steps that have a complete checkpoint, in order."""
    return sorted(int(path.name) for path in self.folder.glob('*') if path.is_dir() and path.name.isdigit())

  def restore(self, target: Any) -> Any | None:
    """The newest state that can be read, on the shardings of `target` (jax.ShapeDtypeStruct); None if there is none.

    A damaged checkpoint is renamed to STEP.damaged with a warning, and the one before it is tried. Raises ValueError
    where there are checkpoints and none can be read.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))
      except Exception as error:  # any type, see above
        damaged.append(self._set_aside(step, error))
    if damaged:
      raise ValueError(f'No checkpoint in {self.folder} can be read; the damaged ones are {", ".join(damaged)}. To start '
                       'anew, type another --workdir.')
    return None

  def _set_aside(self, step: int, error: Exception) -> str:
    path, aside = self.folder / str(step), self.folder / f'{step}.damaged'
    number = 1
    while aside.exists():
      number += 1
      aside = self.folder / f'{step}.damaged{number}'
    warnings.warn(f'The checkpoint {path} is damaged ({first_line(error)}); it is moved to {aside.name} and the one '
                  'before it is used.', stacklevel=2)
    self.close()
    if jax.process_index() == 0:
      path.rename(aside)
    self._manager = self._open()  # Orbax remembers the steps it has seen
    return aside.name

  def close(self) -> None:
    self._manager.close()
