"""Solvers, step by step, against the numbers of k-diffusion and diffusers (tests/goldens/make_solvers.py), in float64."""
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.core import betas, multistep, schedules, singlestep, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Level
from tests import oracles
from tests.core.tables import keys

with np.load(Path(__file__).parents[1] / 'goldens' / 'solvers.npz') as file:
  GOLDENS = dict(file)
RUNS = {run['name']: run for run in map(json.loads, GOLDENS['runs'])}
LAW = oracles.Gaussian(GOLDENS['mean'], GOLDENS['covariance'])
SIGMA_MAX = 80.0
PROCESSES = {'ve': Gaussian(schedules.karras(SIGMA_MAX)), 'vp': Gaussian(betas.discrete(betas.scaled_linear_betas()))}
SOLVERS = {
  'k_diffusion/euler/to_min': solvers.euler(),
  'k_diffusion/heun/to_min': solvers.heun(),
  'k_diffusion/dpm_2/to_min': singlestep.dpm2(),
  **{f'k_diffusion/lms/{order}/to_min': multistep.lms(order) for order in (1, 2, 3, 4)},
  'k_diffusion/dpmpp_2s_ancestral/ode/to_min': singlestep.dpm_2s(),
  'k_diffusion/dpmpp_2m/to_min': solvers.dpm_2m(),
  'k_diffusion/euler_ancestral/to_min': solvers.ddim(1.0),
  'k_diffusion/dpm_2_ancestral/to_min': singlestep.dpm2(1.0),
  'k_diffusion/dpm_2_ancestral/eta/to_min': singlestep.dpm2(0.6),
  'k_diffusion/dpmpp_2s_ancestral/to_min': singlestep.dpm_2s(1.0),
  'k_diffusion/dpmpp_2m_sde/midpoint/to_min': solvers.dpm_2m(1.0),
  'k_diffusion/dpmpp_2m_sde/eta/to_min': solvers.dpm_2m(0.6),
  **{f'diffusers/LMSDiscrete/order/{order}': multistep.lms(order) for order in (1, 2, 3)},
  **{f'diffusers/DEISMultistep/{order}/full': multistep.deis(order, 'log_r') for order in (1, 2, 3)},
  'diffusers/DPMSolverMultistep/dpmsolver++/2/midpoint/full': solvers.dpm_2m(),
}


@pytest.mark.parametrize('name', SOLVERS)
def test_every_step_is_the_peer_s(name, x64):
  """Through the levels that the peer took, with the noise that it drew; a last step to the data is not a solver's."""
  run, solver = RUNS[name], SOLVERS[name]
  process, xs = PROCESSES[run['frame']], GOLDENS['x'][slice(*run['x'])]
  denoise, x, memory = LAW.denoiser(process), jnp.asarray(xs[0]), solver.init(jnp.asarray(xs[0]))
  drawn = iter(GOLDENS['noise'][slice(*run['noise'])] if 'noise' in run else ())
  replay = lambda keys, like: jnp.asarray(next(drawn))
  taken = 0
  with mock.patch.object(solvers, 'normal', replay), mock.patch.object(singlestep, 'normal', replay):
    for row, expected in zip(GOLDENS['levels'][slice(*run['levels'])], xs[1:], strict=True):
      if row[3] == 0:
        break
      t, s = (place(run['frame'], process, *pair) for pair in (row[:2], row[2:]))
      x, memory = solver.step(process, denoise, keys(len(x)), x, t, s, memory)
      np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-9)
      taken += 1
  assert taken >= 7


def place(frame, process, alpha, sigma):
  """The level with these numbers; its time is that of the schedule."""
  t = sigma / SIGMA_MAX if frame == 've' else schedules.time_at(process.schedule, 2 * np.log(alpha / sigma))
  return Level(*(jnp.asarray(entry, jnp.float64) for entry in (t, alpha, sigma)))
