"""SIGTERM and Ctrl-C: finish the step, save, leave."""
import os
import signal

import jax
from jax.experimental import multihost_utils


class Stop:
  """Within `with Stop() as stop`, stop.name is the name of the signal that came, or None. A second one acts at once.

  In a job of several processes JAX itself waits for SIGTERM: where it comes to one of them, stop.name is set in all of
  them, at the same step, a second or so later. Ctrl-C counts as SIGTERM there.
  """

  def __init__(self):
    self.name = None
    self._shared = jax.distributed.is_initialized()
    self._before = {}

  def __enter__(self):
    numbers = (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT)
    self._before = {number: signal.signal(number, self._note) for number in numbers}
    return self

  def look(self, step: int) -> None:
    """To be called once in every step, with its number, by all processes (20 microseconds)."""
    if self._shared and multihost_utils.reached_preemption_sync_point(step):
      self.name = 'SIGTERM'

  def _note(self, number, frame):
    if self._shared:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.name = signal.Signals(number).name
    self._restore()

  def __exit__(self, *error):
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
