"""Training agrees: with every target and weight a small network reaches the denoiser that is known."""
import numpy as np
import pytest

from experiments.targets_2d import sweep


@pytest.mark.slow
def test_every_target_and_weight_reaches_the_known_denoiser():
  rows = sweep.run()
  excess, error = sweep.table(rows, 'excess_nats'), sweep.table(rows, 'rms_x0')
  assert excess.shape == (9, 12) and np.isfinite(excess).all()
  assert excess.max() < 0.6 and error.max() < 0.45
  safe = [list(sweep.TARGETS).index(name) for name in ('v', 'velocity', 'edm')]
  assert excess[safe].max() < 0.1 and error[safe].max() < 0.1


def test_the_measure_of_the_error_is_zero_for_the_truth_and_large_for_the_mean():
  excess, error = sweep.compare(sweep.LAW.denoiser(sweep.PROCESS))
  assert excess == error == 0
  center = np.asarray(sweep.LAW.weights) @ np.asarray(sweep.LAW.means)
  truth = sweep.LAW.denoiser(sweep.PROCESS)
  excess, _ = sweep.compare(lambda xt, level: truth(xt, level)._replace(x0=0 * xt + center[None]))
  assert 150 < excess < 190
