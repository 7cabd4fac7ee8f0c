"""What other people's samplers did (tests/goldens/make_solvers.py), and which solvers of ours their steps should equal.

A peer takes its first steps at lower orders and, if it lowers its order at last, the last ones too: a step of order k is
held to our row of order k. A last step to sigma = 0 is not a solver's but process.reverse's, the mean; LMS and PNDM alone
make one like the others.
"""
import json
from collections import defaultdict
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax import numpy as jnp

from diffusion_jax.core import betas, correctors, multistep, schedules, singlestep, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Level
from tests import oracles

with np.load(Path(__file__).parents[1] / 'goldens' / 'solvers.npz') as file:
  GOLDENS = dict(file)
RUNS = {run['name']: run for run in map(json.loads, GOLDENS['runs'])}
LAW = oracles.Gaussian(GOLDENS['mean'], GOLDENS['covariance'])
SIGMA_MAX = 5000.0
ALPHAS = np.sqrt(np.cumprod(np.append(1.0, 1 - betas.scaled_linear_betas())))
PROCESSES = {'ve': Gaussian(schedules.karras(SIGMA_MAX)), 'vp': Gaussian(betas.discrete(betas.scaled_linear_betas())),
             'flow': Gaussian(schedules.flow())}
TIMES = {'ve': lambda alpha, sigma: sigma / SIGMA_MAX, 'flow': lambda alpha, sigma: sigma,
         'vp': lambda alpha, sigma: np.interp(-alpha, -ALPHAS, np.linspace(0, 1, len(ALPHAS)))}


def told(solver, change):
  """A solver whose denoiser's estimates are changed."""
  step = lambda process, denoise, *rest: solver.step(process, lambda x, t: change(denoise(x, t)), *rest)
  return solver._replace(step=step)


clip = lambda estimate: estimate._replace(x0=jnp.clip(estimate.x0, -1, 1))
VARIANCE = (np.array(RUNS['diffusers/DDPM/learned_range/leading']['variance']) + 1) / 2  # of [-1, 1]
learned = lambda estimate: estimate._replace(variance=jnp.broadcast_to(VARIANCE, estimate.x0.shape))
churn = partial(correctors.churn, amount=4.0, steps=8, during=(0.1, 10.0), noise=1.003)
ON_LEVELS = {  # rows that read nothing but the two levels of a step, so that one program serves all frames
  'ancestral': solvers.ancestral(),
  'ancestral(large)': solvers.ancestral('large'),
  'ancestral(learned)': told(solvers.ancestral(), learned),
  'ddim': solvers.ddim(),
  'ddim(0.7)': solvers.ddim(0.7),
  'ddim(clip)': told(solvers.ddim(), clip),
  'ddim_inverse': solvers.ddim_inverse(),
  'euler_ancestral': solvers.euler_ancestral(),
  'euler_ancestral(0.6)': solvers.euler_ancestral(0.6),
  **{f'lms({order})': multistep.lms(order) for order in (1, 2, 3, 4)},
  **{f'deis({order})': multistep.deis(order, 'log_r') for order in (2, 3)},
  'dpm_2m': multistep.dpm_2m(),
  'dpm_2m(heun)': multistep.dpm_2m(kind='heun'),
  'dpm_2m(0.6)': multistep.dpm_2m(0.6),
  'dpm_2m(0.6, heun)': multistep.dpm_2m(0.6, 'heun'),
  'dpm_2m(1)': multistep.dpm_2m(1.0),
  'dpm_2m(1, heun)': multistep.dpm_2m(1.0, 'heun'),
  'dpm_3m': multistep.dpm_3m(),
  **{f'unipc({order}, b{h})': multistep.unipc(order, f'b{h}') for order in (1, 2, 3) for h in (1, 2)},
  'sa_solver(3, 3, 0)': multistep.sa_solver(3, 3, 0.0),
  'sa_solver(3, 3)': multistep.sa_solver(3, 3),
  'sa_solver(3, 4)': multistep.sa_solver(3, 4),
  'sa_solver(2, 2, 0, b1)': multistep.sa_solver(2, 2, 0.0, variant='b1'),
  'sa_solver(2, 2, 1, b1)': multistep.sa_solver(2, 2, variant='b1'),
  'sa_solver(during)': multistep.sa_solver(2, 2, 1.0, (0.2005, 0.8015), 'b1'),  # timesteps 200 to 800
  'ipndm': multistep.ipndm(),
  'pndm(heun)': multistep.pndm('heun'),
}
ON_SCHEDULES = {
  'euler': solvers.euler(),
  'heun': solvers.heun(),
  'churn(euler)': churn(solvers.euler()),
  'churn(heun)': churn(solvers.heun()),
  'churn(dpm2)': churn(singlestep.dpm2()),
  'dpm2': singlestep.dpm2(),
  'dpm2(0.6)': singlestep.dpm2(0.6),
  'dpm2(1)': singlestep.dpm2(1.0),
  'dpm_2s': singlestep.dpm_2s(),
  'dpm_2s(1)': singlestep.dpm_2s(1.0),
  'dpm_sde': singlestep.dpm_sde(),
  'dpm_sde(0.6, 0.4)': singlestep.dpm_sde(0.6, 0.4),
  'dpm_solver(2)': singlestep.dpm_solver(2),
  'dpm_solver(3)': singlestep.dpm_solver(3),
  'dpm_solver(3, 0.7)': singlestep.dpm_solver(3, 0.7),
  'pndm': multistep.pndm(),
}
OWN_END = ('lms', 'pndm', 'ipndm')


class Peer(NamedTuple):
  """`rows` are ours for the peer's steps of order 1, 2, ..., '' where there is none; a single row is for all steps."""
  rows: tuple[str, ...]
  why: str = ''  # only some steps are compared, or none
  steps: slice = slice(None)  # that may be compared


def row(*names):
  return Peer(names)


STAGES = 'dpm_sde(share)'  # of test_a_singlestep_of_order_two_is_the_peer_s
HALF = 'At order 3 it takes half of the second derivative: test_the_peers_count_half_the_curve_at_order_three.'
IN_NOISE = 'Its polynomials are of the noise, ours of x0.'
LOWERS = 'It lowers its order at last.'
LAST_NOISE = 'It adds noise in the last step too.'
EXTRA = 'Its first steps have the extra term of order 2, its last ones lower their order.'
AHEAD = 'Where alpha < sigma it takes the noise that is seen ahead, ours the data.'
AT_GRID = 'The stages of its steps are at levels of the grid; ours are where the solver says.'
PEERS = {  # by the first pattern that fits a run's name
  'k_diffusion/euler/churn/*': row('churn(euler)'),
  'k_diffusion/euler/*': row('euler'),
  'k_diffusion/euler_ancestral/eta/*': row('euler_ancestral(0.6)'),
  'k_diffusion/euler_ancestral/*': row('euler_ancestral'),
  'k_diffusion/heun/churn/*': row('churn(heun)'),
  'k_diffusion/heun/*': row('heun'),
  'k_diffusion/dpm_2/churn/*': row('churn(dpm2)'),
  'k_diffusion/dpm_2/*': row('dpm2'),
  'k_diffusion/dpm_2_ancestral/eta/*': row('dpm2(0.6)'),
  'k_diffusion/dpm_2_ancestral/*': row('dpm2(1)'),
  **{f'k_diffusion/lms/{order}/*': row(f'lms({order})') for order in (1, 2, 3, 4)},
  'k_diffusion/dpmpp_2s_ancestral/ode/*': row('dpm_2s'),
  'k_diffusion/dpmpp_2s_ancestral/*': row('dpm_2s(1)'),
  'k_diffusion/dpmpp_2m/*': row('dpm_2m'),
  'k_diffusion/dpmpp_2m_sde/midpoint/*': row('dpm_2m(1)'),
  'k_diffusion/dpmpp_2m_sde/heun/*': row('dpm_2m(1, heun)'),
  'k_diffusion/dpmpp_2m_sde/eta/*': row('dpm_2m(0.6)'),
  'k_diffusion/dpmpp_2m_sde/ode/*': row('dpm_2m(heun)'),
  'k_diffusion/dpmpp_3m_sde/eta/*': Peer(('dpm_2m(0.6)', 'dpm_2m(0.6, heun)', ''), HALF),
  'k_diffusion/dpmpp_3m_sde/ode/*': Peer(('ddim', 'dpm_2m(heun)', ''), HALF),
  'k_diffusion/dpmpp_3m_sde/*': Peer(('ancestral', 'dpm_2m(1, heun)', ''), HALF),
  'k_diffusion/dpmpp_sde/eta/*': row('dpm_sde(0.6, 0.4)'),
  'k_diffusion/dpmpp_sde/ode/*': row('dpm_2s'),
  'k_diffusion/dpmpp_sde/*': row('dpm_sde'),
  'k_diffusion/dpm_fast/10/eta': Peer(('', '', 'dpm_solver(3, 0.7)'), 'Its last step adds no noise.'),
  'k_diffusion/dpm_fast/*': row('ddim', 'dpm_solver(2)', 'dpm_solver(3)'),
  'k_diffusion/dpm_adaptive/2': row('dpm_solver(2)'),
  'k_diffusion/dpm_adaptive/3/eta': Peer(('dpm_solver(3, 0.7)',), 'Its last step adds no noise.', slice(-1)),
  'k_diffusion/dpm_adaptive/*': row('dpm_solver(3)'),
  'diffusers/DDPM/fixed_large/linspace': row('ancestral(large)'),
  'diffusers/DDPM/*fixed_large/*': Peer(('ancestral(large)',), LAST_NOISE, slice(-1)),
  'diffusers/DDPM/learned_range/linspace': row('ancestral(learned)'),
  'diffusers/DDPM/learned_range/*': Peer(('ancestral(learned)',), LAST_NOISE, slice(-1)),
  'diffusers/DDPM/*': row('ancestral'),  # in 'clip' no estimate leaves [-1, 1]
  'diffusers/DDIM/clip/True': row('ddim(clip)'),
  'diffusers/DDIM/clip/False': Peer((), 'It clips x0 but not the noise, so that the two no longer make up x.'),
  **{f'diffusers/DDIM/{name}': row('ddim(0.7)') for name in ('0.7/*', 'zero_snr/v/0.7', 'v', 'x0')},
  'diffusers/DDIM/*': row('ddim'),
  'diffusers/DDIMInverse/ahead/leading': Peer(('ddim_inverse',), AHEAD, slice(5)),
  'diffusers/DDIMInverse/ahead/trailing': Peer(('ddim_inverse',), AHEAD, slice(4)),
  'diffusers/DDIMInverse/here/*': Peer(('ddim',), 'It starts at the data, where ddim divides by 0.', slice(1, None)),
  'diffusers/PNDM/plms/v': Peer((), 'It adds up predictions of v made at different levels, so is of order 1.'),
  'diffusers/PNDM/plms/*': row('pndm(heun)'),
  'diffusers/PNDM/prk/*': row('pndm'),
  'diffusers/IPNDM/all': Peer(('ipndm',), 'It starts at alpha = 0, where it divides by 1e-8.', slice(1, None)),
  'diffusers/IPNDM/without_first': row('ipndm'),
  'diffusers/DPMSolverMultistep/sde-dpmsolver/*': Peer((), IN_NOISE),
  'diffusers/*DPMSolverMultistep/sde*/1/*': row('ancestral'),
  'diffusers/*DPMSolverMultistep/sde*/2/heun*': row('ancestral', 'dpm_2m(1, heun)'),
  'diffusers/*DPMSolverMultistep/sde*/3/*': Peer(('ancestral', 'dpm_2m(1)', ''), HALF),
  'diffusers/*DPMSolverMultistep/sde*': row('ancestral', 'dpm_2m(1)'),
  'diffusers/*DPMSolverMultistep/*/1/*': row('ddim'),
  'diffusers/*DPMSolverMultistep/dpmsolver++/2/heun*': row('ddim', 'dpm_2m(heun)'),
  'diffusers/*DPMSolverMultistep/dpmsolver++/3/*': Peer(('ddim', 'dpm_2m', ''), HALF),
  'diffusers/*DPMSolverMultistep/dpmsolver++/*': row('ddim', 'dpm_2m'),
  'diffusers/DPMSolverMultistep/dpmsolver/2/heun/*': row('ddim', 'deis(2)'),
  'diffusers/DPMSolverMultistep/dpmsolver/3/*': Peer(('ddim', '', ''), IN_NOISE),
  'diffusers/DPMSolverMultistep/dpmsolver/*': Peer(('ddim', ''), IN_NOISE),
  'diffusers/DPMSolverSinglestep/dpmsolver*/1/*': row('ddim'),
  'diffusers/DPMSolverSinglestep/sde*/1/*': row('ancestral'),
  'diffusers/DPMSolverSinglestep/sde*/2/midpoint': row('ancestral', STAGES),
  'diffusers/DPMSolverSinglestep/sde*': Peer(('ancestral', '', ''), AT_GRID),
  **{f'diffusers/DPMSolverSinglestep/dpmsolver++/{name}': row('ddim', STAGES) for name in ('2/midpoint/*', 'v', 'flow')},
  'diffusers/DPMSolverSinglestep/*': Peer(('ddim', '', ''), AT_GRID),
  'diffusers/DEISMultistep/1/*': row('ddim'),
  'diffusers/DEISMultistep/2/*': row('ddim', 'deis(2)'),
  'diffusers/DEISMultistep/3/*': row('ddim', 'deis(2)', 'deis(3)'),
  'diffusers/UniPCMultistep/*noise/*': Peer((), IN_NOISE),
  **{f'diffusers/UniPCMultistep/{order}/predictor': row(*['ddim', 'dpm_2m', 'dpm_3m'][:order]) for order in (1, 2, 3)},
  'diffusers/UniPCMultistep/3/bh2/zero': Peer(('unipc(3, b2)',), LOWERS, slice(-2)),
  **{f'diffusers/UniPCMultistep/{order}/bh{h}/x0/min': Peer((f'unipc({order}, b{h})',), LOWERS, slice(1 - order))
     for order in (2, 3) for h in (1, 2)},
  **{f'diffusers/UniPCMultistep/{order}/bh{h}/*': row(f'unipc({order}, b{h})') for order in (1, 2, 3) for h in (1, 2)},
  'diffusers/UniPCMultistep/*': row('unipc(2, b2)'),
  'diffusers/SASolver/noise_prediction/*': Peer((), IN_NOISE),
  'diffusers/SASolver/data_prediction/*1/*': Peer((), 'Its corrector takes the new prediction alone.'),
  'diffusers/SASolver/data_prediction/2/0.0': Peer(('sa_solver(2, 2, 0, b1)',), LOWERS, slice(-1)),
  'diffusers/SASolver/data_prediction/2/1.0': Peer(('sa_solver(2, 2, 1, b1)',), LOWERS, slice(-1)),
  'diffusers/SASolver/v': Peer(('sa_solver(2, 2, 1, b1)',), LOWERS, slice(-1)),
  'diffusers/SASolver/default': Peer(('sa_solver(during)',), LOWERS, slice(-1)),
  'diffusers/SASolver/flow': row('sa_solver(2, 2, 0, b1)'),
  'diffusers/SASolver/data_prediction/3/0.0': Peer(('sa_solver(3, 3, 0)',), EXTRA, slice(2, -2)),
  'diffusers/SASolver/data_prediction/3/1.0': Peer(('sa_solver(3, 3)',), EXTRA, slice(2, -2)),
  'diffusers/SASolver/data_prediction/3_4/1.0': Peer(('sa_solver(3, 4)',), EXTRA, slice(2, -2)),
  'diffusers/*Euler*/churn': Peer((), 'It uses the answer of the network at the level before the churn.'),
  'diffusers/EulerAncestralDiscrete/*': row('euler_ancestral'),
  'diffusers/EulerDiscrete/*': row('euler'),
  'diffusers/EDMEuler/*': row('euler'),
  'diffusers/*HeunDiscrete/*': row('heun'),
  'diffusers/KDPM2Discrete/*': row('dpm2'),
  'diffusers/KDPM2AncestralDiscrete/*': row('dpm2(1)'),
  **{f'diffusers/LMSDiscrete/order/{order}': row(f'lms({order})') for order in (1, 2, 3)},
  'diffusers/LMSDiscrete/*': row('lms(4)'),
  'diffusers/DPMSolverSDE/*': row('dpm_sde'),
  'diffusers/FlowMatchEulerDiscrete/stochastic/*': Peer((), 'It draws all noise anew, round E[x0 | x].'),
  'diffusers/FlowMatchEulerDiscrete/inverted': Peer(('euler',), 'It starts at the data, where euler divides by 0.',
                                                    slice(1, None)),
  'diffusers/FlowMatchEulerDiscrete/*': row('euler'),
}


def pattern_of(name):
  return next((pattern for pattern in PEERS if fnmatchcase(name, pattern)), None)


def held_to(name):
  """The row that each step of a run is held to: 'mean' for process.reverse, '' for none."""
  run, peer = RUNS[name], PEERS[pattern_of(name)]
  settled, steps, most = run.get('settled', {}), run['steps'], len(peer.rows)
  ends = GOLDENS['levels'][slice(*run['levels'])][:, 3]
  lowers = settled.get('lower_order_final', False) and steps < 15
  def one(i):
    if not peer.rows or i not in range(steps)[peer.steps]:
      return ''
    if ends[i] == 0 and not peer.rows[0].startswith(OWN_END):
      return 'mean'
    left = steps - i if lowers or settled.get('euler_at_final') and i == steps - 1 else most
    order = settled['orders'][i] if 'orders' in settled else min(i + 1, left)
    return peer.rows[min(order, most) - 1]
  return [one(i) for i in range(steps)]


HELD = {name: held_to(name) for name in RUNS}


def levels_of(name):
  """The levels at which the steps start and end, two lists."""
  rows, frame = GOLDENS['levels'][slice(*RUNS[name]['levels'])], RUNS[name]['frame']
  place = lambda alpha, sigma: Level(TIMES[frame](alpha, sigma), alpha, sigma)
  return [place(*row[:2]) for row in rows], [place(*row[2:]) for row in rows]


def draws_of(name):
  """The draws of each step, [steps, 2, 3, 2]; two of one path are made independent."""
  run, drawn = RUNS[name], defaultdict(list)
  noise = np.zeros((run['steps'], 2, 3, 2))
  if 'noise' not in run:
    return noise
  stretch = run['options'].get('s_noise', 1.0) if 'ancestral' in name else 1.0
  for z, (step, *way) in zip(*(GOLDENS[key][slice(*run[key])] for key in ('noise', 'draws')), strict=True):
    drawn[int(step)].append((stretch * z, *way))
  for i, ((first, start, middle), *second) in drawn.items():
    noise[i, 0] = first
    for whole, _, end in second:
      noise[i, 1] = apart(first, whole, start, middle, end)
  return noise


def apart(first, whole, start, middle, end):
  """The draw that with the first, of a path from start to middle (sigma / alpha), makes up that of the path to the end."""
  share = (start - middle) / (start - end)
  return (whole - np.sqrt(share) * first) / np.sqrt(1 - share)


def steps_of(name):
  """For each step (the state before it, the levels t and s, the draws, the state before it as the peer corrected it)."""
  run, (starts, ends) = RUNS[name], levels_of(name)
  xs = GOLDENS['x'][slice(*run['x'])][:-1]
  corrected = GOLDENS['x'][slice(*run['corrected'])] if 'corrected' in run else xs
  return list(zip(xs, starts, ends, draws_of(name), corrected, strict=True))


STEPS = {name: steps_of(name) for name in RUNS}
