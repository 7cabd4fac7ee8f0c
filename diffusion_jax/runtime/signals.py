"""SIGTERM and Ctrl-C: finish the step, save, leave."""
import signal


class Stop:
  """Within `with Stop() as stop`, stop.name is the name of the signal that came, or None. A second one acts at once."""

  def __init__(self):
    self.name = None
    self._before = {}

  def __enter__(self):
    self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _note(self, number, frame):
    self.name = signal.Signals(number).name
    self._restore()

  def __exit__(self, *error):
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
