"""What a person sees of a run: a table at the start, progress, metrics.jsonl and TensorBoard."""
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from diffusion_jax.runtime.board import Board
from diffusion_jax.runtime.workdir import write_text


class Log:
  """Scalars and images of a run. Only the first process writes; the others hold a Log that does nothing.

  `scalars` is called with the metrics of a step right after the next step was dispatched, so that reading them waits for
  nothing that the devices have not finished. Raises OSError with the name of a file that cannot be written.
  """

  def __init__(self, workdir: Path, start: int, steps: int, every: int, batch: int):
    self.every, self.batch, self.steps = every, batch, steps
    self.active = jax.process_index() == 0
    self._since, self._last = time.perf_counter(), start
    if self.active:
      self._path = workdir / 'metrics.jsonl'
      self._file = _continue(self._path, start)
      self._board = Board(workdir / 'tensorboard', start)
      self._bar = tqdm(total=steps, initial=start, unit='step', disable=not sys.stderr.isatty(), dynamic_ncols=True)

  def scalars(self, step: int, metrics: dict, always: bool = False) -> None:
    """Log the metrics of the step that ended as number `step`, if it is one of every `every`, the last, or `always`."""
    if not self.active:
      return
    self._bar.update(step - self._bar.n)
    if step % self.every and step != self.steps and not always:
      return
    now = time.perf_counter()
    rate = (step - self._last) * self.batch / max(now - self._since, 1e-9)
    self._since, self._last = now, step
    values = {name: float(value) for name, value in metrics.items()} | {'images_per_second': rate}
    with _named(self._path):
      self._file.write(json.dumps({'step': step, **values}) + '\n')
      self._file.flush()
    with _named(self._board.path):
      for name, value in values.items():
        self._board.scalar(step, name, value)
    left = (self.steps - step) * self.batch / max(rate, 1e-9)
    shown = f'loss {values["loss"]:.4f}, {rate:.0f} images/s'
    if self._bar.disable:
      print(f'step {step}/{self.steps}: {shown}, {left:.0f} s left', flush=True)
    else:
      self._bar.set_postfix_str(shown)

  def image(self, step: int, name: str, picture: np.ndarray, seconds: float = 0.0) -> None:
    """Log a picture [height, width, 3], uint8, whose making took `seconds`, which do not count as training."""
    if self.active:
      self._since += seconds
      with _named(self._board.path):
        self._board.image(step, name, picture)

  def __enter__(self):
    return self

  def __exit__(self, kind, *error):
    if self.active:
      self._bar.close()
      with suppress(OSError) if kind else _named(self._path):  # what is raised already comes first
        self._file.close()
      with suppress(OSError) if kind else _named(self._board.path):
        self._board.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
  """Give an error in writing the name of the file, which write() does not say."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error


def _continue(path: Path, start: int):
  """Open for appending, without the lines of steps after `start`, which a run that was killed had logged and will again."""
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  complete = [line for line in lines if line.endswith('}\n') and json.loads(line)['step'] <= start]
  write_text(path, ''.join(complete))
  return path.open('a')


def table(rows: dict[str, str]) -> None:
  """Print two columns, on the first process."""
  if jax.process_index() == 0:
    width = max(map(len, rows))
    print('\n'.join(f'{name:<{width}}  {value}' for name, value in rows.items()), flush=True)


def first_line(error: Exception) -> str:
  """The first line of an error of another library, or its type, for a sentence of ours."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def say(text: str) -> None:
  """Print a line, on the first process."""
  if jax.process_index() == 0:
    tqdm.write(text)
