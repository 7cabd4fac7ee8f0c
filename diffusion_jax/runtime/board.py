"""TensorBoard's event files. tensorboardX's own writer has a thread for them, which a full disk ends, and then the training
waits for it for ever: here an error in writing comes to who writes."""
import os
import socket
import time
from pathlib import Path

import numpy as np
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

FLUSH = 10.0  # seconds between two visits to the disk


class Board:
  """The event file of one start of a run. TensorBoard hides what the files before it have of steps after `start`."""

  def __init__(self, folder: Path, start: int):
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    self._file, self._flushed = RecordWriter(str(self.path)), time.monotonic()
    self._write(file_version='brain.Event:2')
    self._write(step=start + 1, session_log=SessionLog(status=SessionLog.START))

  def scalar(self, step: int, name: str, value: float) -> None:
    self._write(step=step, summary=scalar(name, value))

  def image(self, step: int, name: str, picture: np.ndarray) -> None:
    """A picture [height, width, 3], uint8."""
    self._write(step=step, summary=image(name, picture, dataformats='HWC'))

  def _write(self, **content) -> None:
    self._file.write(Event(wall_time=time.time(), **content).SerializeToString())
    if time.monotonic() - self._flushed > FLUSH:
      self._flushed = time.monotonic()
      self._file.flush()

  def close(self) -> None:
    self._file.close()
