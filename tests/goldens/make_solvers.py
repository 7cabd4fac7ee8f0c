"""Makes solvers.npz, the trajectories of other people's samplers, which our solvers are held to.

Run by hand, in the environment that make_mathematics.py describes:

  /tmp/gold/bin/python tests/goldens/make_solvers.py

The network is the exact denoiser of x0 ~ N(`mean`, `covariance`), in the form that the peer wants. Every peer computes in
float64: where its code asks torch or numpy for float32 by name, it gets float64 (a watch over torch found no
float32 left).

All runs are rows of a few arrays; `runs` holds one JSON string a run, whose [a, b] are slices of rows:
  x       [rows, 3, 2]  the state at the start and after every step: steps + 1 rows
  levels  [rows, 4]     (alpha_t, sigma_t, alpha_s, sigma_s) of every step from t to s, the last one too. `chain` is false
                        where a step does not begin at the level at which the one before it ended.
  calls   [rows, 4]     (step, timestep, alpha, sigma) of every call of the network; a timestep of -1 is not known
  noise   [rows, 3, 2]  the draws in their order
  draws   [rows, 3]     (step, sigma, sigma_next) of each draw: what k-diffusion and DPMSolverSDE asked for, sigma and
                        sigma_hat of a churn of k-diffusion, else sigma_t and sigma_s of the step
`name`, `peer`, `sampler`, `steps`, `options` and `step_options` say what ran, `prediction` what the network gave,
`settled` the options as the peer settled them. `frame`: x = alpha x0 + sigma noise with 'vp' alpha^2 + sigma^2 = 1,
'flow' alpha + sigma = 1, 've' alpha = 1. `corrected` [a, b] are rows of x: what a predictor-corrector made of the state
at the start of every step before it took the step. `variance` [2] is what the network gave for learned variances, in [-1,
1] for learned_range. `noise_from` (k-diffusion): 'normal' draws, a Brownian 'path', or 'churn'. `tau`: of SASolver.
`trials` (dpm_adaptive): (error, the next width in -log sigma, accepted).

What is odd, or WRONG by law (measured on this Gaussian), in k_ = k-diffusion 0.1.1.post1 and d_ = diffusers 0.42.1:
  * k_ noise: euler, heun and dpm_2 draw at every step, churn or not; dpm_fast and dpm_adaptive at eta = 0 too (not
    stored).
  * k_ path: the Brownian path of the *_sde samplers runs in sigma: the two draws of a step of dpmpp_sde correlate by
    sqrt((sigma_t - sigma_mid) / (sigma_t - sigma_s)). Each is divided by sqrt(sigma_t - sigma_s), so has variance 1.
  * k_ last step: to sigma = 0 all give the denoiser's answer; to another sigma the multistep ones keep their order.
  * k_ dpm_fast: ends at sigma_min, never at 0. With eta its goal is cut off at sigma_min, so that its last step (that of
    dpm_adaptive too) takes no noise: an ODE step.
  * k_ dpm_adaptive: one error for the whole batch: a sample depends on its neighbours. Accepts errors up to about 1.9
    (accept_safety 0.81), may stop 1e-5 short in log sigma.
  * d_ float32: sigmas are rounded to float32 in set_timesteps, and the state of many in step; not here (see above).
  * d_ start: init_noise_sigma of the 've' ones is sigma for linspace and trailing, sqrt(sigma^2 + 1) for leading and
    EDM*. Here these runs start from the true law of their first level, those of k_ from noise of sigma_max.
  * d_ spacing: for n steps DDPM, DDIM and the 've' ones have the n timesteps of linspace(0, 999, n), with 0; DPM, DEIS,
    UniPC and SA have linspace(0, 999, n + 1) without 0, and 'leading' by 1000 // (n + 1). The 've' ones do not round:
    they interpolate sigma / alpha between timesteps ('interpolated').
  * d_ timesteps: of Karras, exponential, beta and flow grids are rounded or cut to integers in DPM, DEIS, UniPC, SA
    (Karras: KDPM2), their sigmas are not: a real network hears another level than the one used. Here it hears the one
    used. use_lu_lambdas is the exponential grid. Stepping begins at the second of two equal timesteps.
  * d_ DDPM: the last step adds noise unless its timestep is 0: 1e-10 for fixed_small (a clamp at 1e-20), sqrt(1 -
    alphas_cumprod[t]) for fixed_large, between them for learned_range. fixed_large_log gives NaN (the root of a
    logarithm). 'learned' takes the output for a variance, not for its logarithm. fixed_small_log is fixed_small.
  * d_ DDIM: steps by 1000 // n whatever the next timestep is: with linspace, or n that does not divide 1000, a step does
    not begin where the last one ended (chain is false), and the last may end at t = 0 in spite of set_alpha_to_one. With
    set_alpha_to_one False and steps_offset 0 the last step goes nowhere: the noise of t = 0 stays. When x0 is clipped the
    noise is not, unless use_clipped_model_output.
  * d_ DDIMInverse: the pipelines ask the network at the level where the step ends ('ahead'); 'here' asks it where the
    step begins.
  * d_ PNDM: PLMS: the first step is Heun's, two calls; then Adams-Bashforth 2, 3, 4 with the coefficients of equal steps;
    the network is asked again after the corrected first step. PRK: three Runge-Kutta steps, then order 4. With v it adds
    up v of different levels and converts the sum at one of them: order 1 ('plms/v'). With linspace it takes wrong levels.
    It ends at t = 0 by default (set_alpha_to_one False), with offset 0 by a step that goes nowhere.
  * d_ IPNDM: its first level has alpha = 0, where it divides by 1e-8 and so takes x0 = 0 whatever the network says: order
    1 from end to end ('without_first' starts after it). Coefficients of equal steps on steps that are not: about order 2.
  * d_ zero SNR: alpha is 0 in DDPM and DDIM (NaN with epsilon), 2^-12 in DPM, UniPC, Euler; DEIS, Singlestep, SA, PNDM
    have no such option.
  * d_ DPM: lower_order_final holds for fewer than 15 steps only (all but '16'). A last sigma of 0 makes the last step of
    order 1 in any case, so does euler_at_final. dpmsolver refuses a last sigma of 0. solver_type does nothing at order 3
    of Multistep. sde-dpmsolver of order 3 is not written (UnboundLocalError).
  * d_ SDE++ 3: WRONG: Multistep has -0.5 for +0.5 in the factor of D2 (k_ dpmpp_3m_sde is right; they are 0.27 apart in
    10 steps); the same slip in Singlestep 3/heun gives 5 times the std, however many steps.
  * d_ Singlestep: cycles of orders 1, 2, 3 (settled: orders): a step of order k starts anew from the state k levels
    before, x holds the stages too. sde: every stage draws its own noise over overlapping intervals, so that order 2 is
    further off (std 0.93 of 1 in 20 steps, 0.98 in 80) than order 1 (0.96, 0.99), and order 3 more (0.89, 0.97). Steps
    that the order does not divide, or a last sigma of 0, turn lower_order_final on for good, in the config too.
  * d_ DEIS, SA: know no final_sigmas_type: they end at t = 0, not at 0. With Karras, exponential, beta or flow sigmas the
    last sigma comes twice: a step of no length, and the noise stays (sigma 0.25 for '2/flow'). So for sigma_min in EDM*
    and, on such grids, in UniPC.
  * d_ UniPC: x are the predictions; their correction comes with the next call (`corrected`), that of the last never. The
    predictor of order 2 and the corrector of order 1 have the fixed factor 1/2. NaN at a last sigma of 0 for bh1, for
    predict_x0 False and, above order 1, for lower_order_final False. Flow sigmas begin at 1 - 1e-6; in DPM, DEIS, SA at
    0.999, before the shift.
  * d_ SA: corrector_order counts the new node too: predictor p with corrector p + 1 and tau = 0 is UniPC p with bh1. tau
    is 1 for 200 <= t <= 800 by default, else 0. A correction takes the noise of its prediction. Order 2 has an extra
    term.
  * d_ churn: WRONG in Euler and EDMEuler: noise is added after the network was asked, and its answer at (x, sigma) is
    used at (x_hat, sigma_hat). Vanishes slowly at a fixed s_churn (4: std 1.11, 1.03, 1.00 of 1 in 20, 80, 320 steps),
    never at a fixed share of the sigma (0.4 a step: 1.15; EDM: 0.84, and the mean 0.1 off). With v Euler converts by
    sigma. FlowMatchHeun has the same lines; FlowMatchEuler takes s_churn and ignores it.
  * d_ 2 stages: Heun, KDPM2, DPMSolverSDE, FlowMatchHeun: one step for two calls, the last has one; 'sample' is refused
    by KDPM2, DPMSolverSDE, EulerAncestral. EulerAncestral draws for the last step too (times 0).
  * d_ EDM: sigma_data enters the network alone. EDMDPM: sde of order 3 is not written, 'sample' is refused in step.
  * d_ flow: FlowMatch shifts twice: its least sigma, shifted already, is shifted again (0.0089; once is 0.0030, at shift
    3). DPM with sigma_min ends at the sigma / alpha of the betas, taken for a flow sigma. stochastic_sampling is WRONG:
    it draws all noise anew round E[x0 | x]; std 0.54, 0.64, 0.68 of 1 in 10, 40, 160 steps.

Not run: dynamic thresholding; learned variances in the DPM ones, which cut the output at 3 channels; solver_p of UniPC.
"""
import collections
import importlib.metadata
import json
import pathlib
import sys
import warnings
from unittest import mock

import diffusers
import k_diffusion
import numpy as np
import torch
from make_mathematics import double

MEAN = torch.tensor([0.6, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.21], [0.21, 0.3]], dtype=torch.float64)
VARIANCE = torch.tensor([-0.3, 0.45], dtype=torch.float64)
BATCH = 3
SETTLED = ('solver_order', 'predictor_order', 'corrector_order', 'lower_order_final', 'euler_at_final', 'final_sigmas_type',
           'set_alpha_to_one', 'algorithm_type', 'solver_type')
TABLE = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}  # of Stable Diffusion
LEADING = {'timestep_spacing': 'leading', 'steps_offset': 1}
TRAILING = {'timestep_spacing': 'trailing'}
LINSPACE = {'timestep_spacing': 'linspace'}
V, X0, FLOW = ({'prediction_type': name} for name in ('v_prediction', 'sample', 'flow_prediction'))
ZERO_SNR = {'rescale_betas_zero_snr': True, **TRAILING}


def estimates(x, alpha, sigma):
  """E[x0 | x] and E[noise | x] of x = alpha x0 + sigma noise."""
  far = (x - alpha * MEAN) @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(len(MEAN)))
  return MEAN + alpha * far @ COVARIANCE, sigma * far


def predict(kind, frame, x, alpha, sigma, sigma_data=0.5):
  """What a network of this kind gives for x at the level."""
  x0, noise = estimates(x, alpha, sigma)
  if kind.startswith('edm'):
    scale = (sigma**2 + sigma_data**2)**0.5
    raw = (x0 - (sigma_data / scale)**2 * x) * scale / (sigma * sigma_data)
    return -raw if kind == 'edm_v_prediction' else raw
  if kind == 'v_prediction':
    scale = (alpha**2 + sigma**2)**-0.5
    return scale * (alpha * noise - sigma * x0)
  return {'epsilon': noise, 'sample': x0, 'flow_prediction': noise - x0}[kind]


class Rows:
  """The arrays of the file, grown run by run."""
  def __init__(self):
    self.arrays, self.runs = collections.defaultdict(list), []

  def add(self, name, rows):
    """Append rows and return where they lie."""
    array = self.arrays[name]
    rows = [np.asarray(row) for row in rows]
    wrong = [row.dtype for row in rows if row.dtype != np.float64]
    assert not wrong, wrong
    array += rows
    return [len(array) - len(rows), len(array)]

  def close(self, run, **entries):
    """Append a finished run."""
    levels = np.asarray([[float(value) for value in row] for row in run.levels])
    assert len(run.states) == len(levels) + 1, (entries, len(run.states), len(levels))
    assert not np.all(levels == levels.astype('f4')), entries
    slices = {'x': self.add('x', run.states), 'levels': self.add('levels', levels)}
    slices['calls'] = self.add('calls', [np.array([float(value) for value in row]) for row in run.calls])
    if run.draws:
      noise, draws = zip(*run.draws, strict=True)
      slices |= {'noise': self.add('noise', noise),
                 'draws': self.add('draws', [np.array([float(value) for value in row]) for row in draws])}
    if run.corrected:
      slices['corrected'] = self.add('x', run.corrected)
    assert all(np.isfinite(self.arrays[name][i]).all() for name, (a, b) in slices.items()
               for name in ['x' if name == 'corrected' else name] for i in range(a, b)), entries
    chain = bool(np.array_equal(levels[1:, :2], levels[:-1, 2:]))
    assert entries['name'] not in [each['name'] for each in self.runs], entries['name']
    self.runs.append({**entries, 'chain': chain, **slices})


class Run:
  """What one run leaves behind."""
  def __init__(self):
    self.states, self.levels, self.calls, self.draws, self.corrected = [], [], [], [], []

  def draw(self, step, noise, sigma, sigma_next):
    self.draws.append((noise, (step, sigma, sigma_next)))
    return noise


# k-diffusion -----------------------------------------------------------------------------------------------------------

CHURN = {'s_churn': 4.0, 's_tmin': 0.1, 's_tmax': 10.0, 's_noise': 1.003}
SAMPLERS = [  # name, sampler, options, its noise
  ('euler', 'euler', {}, None),
  ('euler/churn', 'euler', CHURN, 'churn'),
  ('euler_ancestral', 'euler_ancestral', {}, 'normal'),
  ('euler_ancestral/eta', 'euler_ancestral', {'eta': 0.6, 's_noise': 1.01}, 'normal'),
  ('heun', 'heun', {}, None),
  ('heun/churn', 'heun', CHURN, 'churn'),
  ('dpm_2', 'dpm_2', {}, None),
  ('dpm_2/churn', 'dpm_2', CHURN, 'churn'),
  ('dpm_2_ancestral', 'dpm_2_ancestral', {}, 'normal'),
  ('dpm_2_ancestral/eta', 'dpm_2_ancestral', {'eta': 0.6}, 'normal'),
  *[(f'lms/{order}', 'lms', {'order': order}, None) for order in (1, 2, 3, 4)],
  ('dpmpp_2s_ancestral', 'dpmpp_2s_ancestral', {}, 'normal'),
  ('dpmpp_2s_ancestral/ode', 'dpmpp_2s_ancestral', {'eta': 0.0}, 'normal'),
  ('dpmpp_2m', 'dpmpp_2m', {}, None),
  ('dpmpp_2m_sde/midpoint', 'dpmpp_2m_sde', {'solver_type': 'midpoint'}, 'path'),
  ('dpmpp_2m_sde/heun', 'dpmpp_2m_sde', {'solver_type': 'heun'}, 'path'),
  ('dpmpp_2m_sde/eta', 'dpmpp_2m_sde', {'solver_type': 'midpoint', 'eta': 0.6}, 'path'),
  ('dpmpp_2m_sde/ode', 'dpmpp_2m_sde', {'solver_type': 'heun', 'eta': 0.0}, 'path'),
  ('dpmpp_3m_sde', 'dpmpp_3m_sde', {}, 'path'),
  ('dpmpp_3m_sde/eta', 'dpmpp_3m_sde', {'eta': 0.6}, 'path'),
  ('dpmpp_3m_sde/ode', 'dpmpp_3m_sde', {'eta': 0.0}, 'path'),
  ('dpmpp_sde', 'dpmpp_sde', {}, 'path'),
  ('dpmpp_sde/normal', 'dpmpp_sde', {}, 'normal'),
  ('dpmpp_sde/eta', 'dpmpp_sde', {'eta': 0.6, 'r': 0.4}, 'path'),
  ('dpmpp_sde/ode', 'dpmpp_sde', {'eta': 0.0}, 'path'),
]
SIGMA_MIN, SIGMA_MAX = 0.03, 20.0


def network(run):
  """The denoiser that k-diffusion calls."""
  def denoise(x, sigma):
    run.calls.append([max(len(run.states) - 1, 0), -1.0, 1.0, sigma[0]])
    return estimates(x, 1.0, sigma[0])[0]
  return denoise


def k_diffusion_run(rows, name, sampler, options, kind, sigmas):
  """One sampler on a grid."""
  torch.manual_seed(0)
  run, start, seen = Run(), sigmas[0] * torch.randn(BATCH, len(MEAN)), {}
  def callback(info):  # comes after the first call of the network in a step
    run.states.append(seen['x'] if kind == 'churn' else info['x'])
    run.calls[-1][0] = len(run.states) - 1
    if kind == 'churn':
      run.draw(len(run.states) - 1, seen['noise'], info['sigma'], info['sigma_hat'])
  def like(x, randn_like=torch.randn_like):
    seen.update(x=x, noise=randn_like(x))
    return seen['noise']
  extra = {}
  if kind in ('normal', 'path'):
    tree = k_diffusion.sampling.BrownianTreeNoiseSampler(start, sigmas[sigmas > 0].min(), sigmas.max(), seed=1)
    inner = tree if kind == 'path' else lambda *_, randn=torch.randn: randn(BATCH, len(MEAN))
    extra['noise_sampler'] = lambda a, b: run.draw(len(run.states) - 1, inner(a, b), a, b)
  with mock.patch.object(torch, 'randn_like', like if kind == 'churn' else torch.randn_like):
    function = getattr(k_diffusion.sampling, f'sample_{sampler}')
    run.states.append(function(network(run), start, sigmas, callback=callback, disable=True, **options, **extra))
  run.levels = [(1.0, t, 1.0, s) for t, s in zip(sigmas[:-1], sigmas[1:], strict=True)]
  rows.close(run, name=f'k_diffusion/{name}', peer='k_diffusion', sampler=f'sample_{sampler}', steps=len(sigmas) - 1,
             options=options, prediction='sample', frame='ve', noise_from=kind)


def dpm_fast_run(rows, name, calls, eta):
  """DPM-Solver-fast, which makes its own grid for a number of calls."""
  torch.manual_seed(0)
  run, start, sigmas = Run(), SIGMA_MAX * torch.randn(BATCH, len(MEAN)), []
  def callback(info):
    run.states.append(info['x'])
    run.calls[-1][0] = len(run.states) - 1
    sigmas.append(info['sigma'])
  def sampler(a, b):
    noise = torch.randn(BATCH, len(MEAN))
    return run.draw(len(run.states) - 1, noise, a, b) if eta else noise
  end = k_diffusion.sampling.sample_dpm_fast(
    network(run), start, SIGMA_MIN, SIGMA_MAX, calls, callback=callback, disable=True, eta=eta, noise_sampler=sampler)
  run.states.append(end)
  sigmas.append(torch.tensor(SIGMA_MIN))
  run.levels = [(1.0, t, 1.0, s) for t, s in zip(sigmas[:-1], sigmas[1:], strict=True)]
  orders = collections.Counter(int(call[0]) for call in run.calls)
  rows.close(run, name=f'k_diffusion/dpm_fast/{name}', peer='k_diffusion', sampler='sample_dpm_fast', steps=len(sigmas) - 1,
             options={'n': calls, 'eta': eta}, settled={'orders': [orders[i] for i in range(len(sigmas) - 1)]},
             prediction='sample', frame='ve', noise_from='normal' if eta else None)


def dpm_adaptive_run(rows, name, **options):
  """DPM-Solver-12 and 23. `trials` are (error, step that is tried next in -log sigma, accepted); levels are those kept."""
  torch.manual_seed(0)
  run, start, sigmas, trials = Run(), SIGMA_MAX * torch.randn(BATCH, len(MEAN)), [torch.tensor(SIGMA_MAX)], []
  run.states.append(start)
  def callback(info):
    accepted = info['n_accept'] == len(sigmas)
    trials.append([float(info['error']), float(info['h']), accepted])
    if accepted:
      run.states.append(info['x'])
      sigmas.append(info['sigma'])
  def sampler(a, b):
    noise = torch.randn(BATCH, len(MEAN))
    return run.draw(len(run.states) - 1, noise, a, b) if options.get('eta') else noise
  k_diffusion.sampling.sample_dpm_adaptive(
    network(run), start, SIGMA_MIN, SIGMA_MAX, callback=callback, disable=True, noise_sampler=sampler, **options)
  run.levels = [(1.0, t, 1.0, s) for t, s in zip(sigmas[:-1], sigmas[1:], strict=True)]
  rows.close(run, name=f'k_diffusion/dpm_adaptive/{name}', peer='k_diffusion', sampler='sample_dpm_adaptive',
             steps=len(sigmas) - 1, options=options, prediction='sample', frame='ve', trials=trials,
             noise_from='normal' if options.get('eta') else None)


def k_diffusion_runs(rows):
  grid = k_diffusion.sampling.get_sigmas_karras(8, SIGMA_MIN, SIGMA_MAX)
  for name, sampler, options, kind in SAMPLERS:
    k_diffusion_run(rows, f'{name}/to_zero', sampler, options, kind, grid)
    k_diffusion_run(rows, f'{name}/to_min', sampler, options, kind, grid[:-1])
  for calls in (9, 10, 11):
    dpm_fast_run(rows, f'{calls}', calls, 0.0)
  dpm_fast_run(rows, '10/eta', 10, 0.7)
  dpm_adaptive_run(rows, '2', order=2)
  dpm_adaptive_run(rows, '3', order=3)
  dpm_adaptive_run(rows, '3/rejects', order=3, rtol=0.01, atol=0.001, h_init=2.0)
  dpm_adaptive_run(rows, '3/pid', order=3, pcoeff=0.2, icoeff=0.7, dcoeff=0.1)
  dpm_adaptive_run(rows, '3/eta', order=3, eta=0.7)


# diffusers: where a scheduler calls the network and where its steps lead -------------------------------------------------

Plan = collections.namedtuple('Plan', 'levels calls')  # calls are (step, alpha, sigma)


def place(alpha_cumprod):
  return torch.sqrt(alpha_cumprod), torch.sqrt(1 - alpha_cumprod)


def straight(levels):
  """One call a step, at its start."""
  return Plan([(*t, *s) for t, s in zip(levels[:-1], levels[1:], strict=True)],
              [(i, *level) for i, level in enumerate(levels[:-1])])


def paired(levels, middles):
  """Two calls a step, at its start and at `middles`, but for the last step, which has one."""
  plan = straight(levels)
  both = [call for i, start in enumerate(plan.calls[:-1]) for call in (start, (i, *middles[i]))]
  return Plan(plan.levels, [*both, plan.calls[-1]])


def ratio(sigmas):
  return [(torch.ones(()), sigma) for sigma in sigmas]


def ddpm_plan(scheduler):
  return straight([*(place(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps), place(torch.ones(()))])


def ddim_plan(scheduler):
  """It steps by 1000 // steps, whatever the next timestep is."""
  table, stride = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // scheduler.num_inference_steps
  at = lambda t: place(table[t] if t >= 0 else scheduler.final_alpha_cumprod)
  return Plan([(*at(t), *at(t - stride)) for t in scheduler.timesteps],
              [(i, *at(t)) for i, t in enumerate(scheduler.timesteps)])


def inverse_plan(scheduler, ahead):
  """`ahead`: the network is asked at the level where the step ends, as the pipelines of diffusers do."""
  table, stride = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // scheduler.num_inference_steps
  at = lambda t: place(table[t] if t >= 0 else scheduler.initial_alpha_cumprod)
  return Plan([(*at(t - stride), *at(t)) for t in scheduler.timesteps],
              [(i, *at(t if ahead else t - stride)) for i, t in enumerate(scheduler.timesteps)])


def pndm_plan(scheduler):
  """Two calls for the first step, or four for the first three."""
  table, stride = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // scheduler.num_inference_steps
  at = lambda t: place(table[t] if t >= 0 else scheduler.final_alpha_cumprod)
  times = list(scheduler.timesteps)
  owner = [max(i - 1, 0) for i in range(len(times))] if scheduler.config.skip_prk_steps else (
    [i // 4 if i < 12 else i - 9 for i in range(len(times))])
  first = [times[owner.index(step)] for step in range(owner[-1] + 1)]
  if scheduler.config.skip_prk_steps:
    first[0] = times[0]
  return Plan([(*at(t), *at(t - stride)) for t in first], [(i, *at(t)) for i, t in zip(owner, times, strict=True)])


def ipndm_plan(scheduler):
  return straight(list(zip(scheduler.alphas, scheduler.betas, strict=True)))


def indexed_plan(scheduler):
  return straight([scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in scheduler.sigmas])


def ratio_plan(scheduler):
  return straight(ratio(scheduler.sigmas))


def flow_plan(scheduler):
  return straight([(1 - sigma, sigma) for sigma in scheduler.sigmas])


def heun_plan(scheduler, levels=ratio):
  sigmas = torch.cat([scheduler.sigmas[:-1:2], scheduler.sigmas[-1:]])
  levels = levels(sigmas)
  return paired(levels, levels[1:])


def flow_heun_plan(scheduler):
  return heun_plan(scheduler, lambda sigmas: [(1 - sigma, sigma) for sigma in sigmas])


def kdpm2_plan(scheduler):
  return paired(ratio(scheduler.sigmas[::2]), ratio(scheduler.sigmas_interpol[1::2]))


def kdpm2_ancestral_plan(scheduler):
  return paired(ratio(scheduler.sigmas[::2]), ratio(scheduler.sigmas_interpol[0::2]))


def sde_plan(scheduler):
  sigmas = torch.cat([scheduler.sigmas[:-1:2], scheduler.sigmas[-1:]])
  return paired(ratio(sigmas), ratio(torch.sqrt(sigmas[:-1] * sigmas[1:])))


PLANS = {
  'DDPM': ddpm_plan, 'DDIM': ddim_plan, 'PNDM': pndm_plan, 'IPNDM': ipndm_plan, 'DEISMultistep': indexed_plan,
  'DDIMInverse': lambda scheduler: inverse_plan(scheduler, False), 'DPMSolverMultistep': indexed_plan,
  'DPMSolverSinglestep': indexed_plan, 'UniPCMultistep': indexed_plan, 'SASolver': indexed_plan, 'DPMSolverSDE': sde_plan,
  'EulerDiscrete': ratio_plan, 'EulerAncestralDiscrete': ratio_plan, 'HeunDiscrete': heun_plan, 'LMSDiscrete': ratio_plan,
  'KDPM2Discrete': kdpm2_plan, 'KDPM2AncestralDiscrete': kdpm2_ancestral_plan, 'EDMEuler': ratio_plan,
  'EDMDPMSolverMultistep': indexed_plan, 'FlowMatchEulerDiscrete': flow_plan, 'FlowMatchHeunDiscrete': flow_heun_plan,
}


def prediction_of(sampler, scheduler):
  if sampler.startswith('FlowMatch'):
    return 'flow_prediction'
  if sampler == 'IPNDM':
    return 'v_prediction'
  return ('edm_' if sampler.startswith('EDM') else '') + scheduler.config.prediction_type


def settle(scheduler):
  settled = {key: scheduler.config[key] for key in SETTLED if key in scheduler.config}
  return settled | ({'orders': scheduler.order_list} if hasattr(scheduler, 'order_list') else {})


def diffusers_run(rows, name, sampler, steps=10, step=None, plan=None, skip=0, tau=None, **options):
  """One scheduler. `skip` leaves out its first timesteps, `tau` is the constant of SASolver's noise."""
  torch.manual_seed(0)
  cls = getattr(diffusers, f'{sampler}Scheduler')
  extra = {} if tau is None else {'tau_func': lambda t: tau}
  scheduler = cls(**options, **extra)
  scheduler.set_timesteps(steps)
  levels, calls = (plan or PLANS[sampler])(scheduler)
  levels, calls = levels[skip:], [(call[0] - skip, *call[1:]) for call in calls[skip:]]
  kind = prediction_of(sampler, scheduler)
  flow = sampler.startswith('FlowMatch') or options.get('use_flow_sigmas')
  frame = 'flow' if flow else 've' if all(level[0] == 1 for level in levels) else 'vp'
  root = torch.linalg.cholesky(levels[0][0]**2 * COVARIANCE + levels[0][1]**2 * torch.eye(len(MEAN)))
  run, x = Run(), levels[0][0] * MEAN + torch.randn(BATCH, len(MEAN)) @ root.T
  run.states, run.levels, now = [x], levels, {}
  def draw(shape, generator=None, device=None, dtype=None, layout=None):
    return run.draw(now['step'], torch.randn(shape, dtype=dtype), *levels[now['step']][1::2])
  if sampler == 'DPMSolverSDE':
    positive = scheduler.sigmas[scheduler.sigmas > 0]
    tree = k_diffusion.sampling.BrownianTreeNoiseSampler(x, positive.min(), positive.max(), seed=1)
    scheduler.noise_sampler = lambda a, b: run.draw(now['step'], tree(a, b), a, b)
  with mock.patch.object(sys.modules[cls.__module__], 'randn_tensor', draw, create=True):
    for i, (t, call) in enumerate(zip(scheduler.timesteps[skip:], calls, strict=True)):
      now['step'] = call[0]
      if hasattr(scheduler, 'scale_model_input'):
        scheduler.scale_model_input(x, t)  # some count their steps here
      out = predict(kind, frame, x, *call[1:])
      if options.get('variance_type', '').startswith('learned'):
        out = torch.cat([out, VARIANCE.expand_as(out)], 1)
      x = scheduler.step(out, t, x, **(step or {})).prev_sample
      run.calls.append((call[0], t, *call[1:]))
      if sampler in ('UniPCMultistep', 'SASolver'):
        run.corrected.append(scheduler.last_sample)
      if i + 1 == len(calls) or calls[i + 1][0] != call[0]:
        run.states.append(x)
  more = {} if tau is None else {'tau': tau}
  if options.get('variance_type', '').startswith('learned'):
    more['variance'] = VARIANCE.tolist()
  rows.close(run, name=f'diffusers/{sampler}/{name}', peer='diffusers', sampler=f'{sampler}Scheduler', steps=len(levels),
             options=options, step_options=step or {}, settled=settle(scheduler), prediction=kind, frame=frame, **more)


# diffusers: the runs ----------------------------------------------------------------------------------------------------

SPACINGS = {'leading': LEADING, 'trailing': TRAILING, 'linspace': LINSPACE}
SIGMA_ENDS = {'zero': {'final_sigmas_type': 'zero'}, 'min': {'final_sigmas_type': 'sigma_min'}}
KARRAS, FULL = {'use_karras_sigmas': True}, {'lower_order_final': False}


def first_order_runs(run):
  """DDPM, DDIM and its inverse, PNDM, IPNDM."""
  ddpm, ddim = {**TABLE, 'clip_sample': False}, {**TABLE, 'clip_sample': False, 'set_alpha_to_one': True}
  for spacing, options in SPACINGS.items():
    for variance in ('fixed_small', 'fixed_large', 'learned_range'):
      run(f'{variance}/{spacing}', 'DDPM', variance_type=variance, **ddpm, **options)
    for eta in (0.0, 0.7):
      run(f'{eta}/{spacing}', 'DDIM', step={'eta': eta}, **ddim, **options)
  run('0.0/trailing/7', 'DDIM', steps=7, step={'eta': 0.0}, **ddim, **TRAILING)
  run('fixed_small_log', 'DDPM', variance_type='fixed_small_log', **ddpm, **LEADING)
  run('v', 'DDPM', **ddpm, **LINSPACE, **V)
  run('x0', 'DDPM', **ddpm, **LINSPACE, **X0)
  run('zero_snr/v', 'DDPM', **ddpm, **ZERO_SNR, **V)
  run('zero_snr/fixed_large/v', 'DDPM', variance_type='fixed_large', **ddpm, **ZERO_SNR, **V)
  run('zero_snr/x0', 'DDPM', **ddpm, **ZERO_SNR, **X0)
  run('clip', 'DDPM', **TABLE, **LINSPACE)
  run('v', 'DDIM', step={'eta': 0.7}, **ddim, **TRAILING, **V)
  run('x0', 'DDIM', step={'eta': 0.7}, **ddim, **TRAILING, **X0)
  run('zero_snr/v/0.0', 'DDIM', **ddim, **ZERO_SNR, **V)
  run('zero_snr/v/0.7', 'DDIM', step={'eta': 0.7}, **ddim, **ZERO_SNR, **V)
  run('zero_snr/x0/0.0', 'DDIM', **ddim, **ZERO_SNR, **X0)
  run('alpha_0/offset_1', 'DDIM', **TABLE, clip_sample=False, set_alpha_to_one=False, **LEADING)
  run('alpha_0/offset_0', 'DDIM', **TABLE, clip_sample=False, set_alpha_to_one=False, timestep_spacing='leading')
  for clipped in (False, True):
    run(f'clip/{clipped}', 'DDIM', step={'use_clipped_model_output': clipped}, **TABLE, **TRAILING)
  for spacing, options in (('leading', LEADING), ('trailing', TRAILING)):
    run(f'here/{spacing}', 'DDIMInverse', **ddim, **options)
    run(f'ahead/{spacing}', 'DDIMInverse', plan=lambda scheduler: inverse_plan(scheduler, True), **ddim, **options)
  run('here/v', 'DDIMInverse', **ddim, **LEADING, **V)
  for one in (False, True):
    for skip in (True, False):
      run(f'{"plms" if skip else "prk"}/{"one" if one else "alpha_0"}', 'PNDM', skip_prk_steps=skip, set_alpha_to_one=one,
          **TABLE, **LEADING)
  run('plms/trailing', 'PNDM', skip_prk_steps=True, set_alpha_to_one=True, **TABLE, **TRAILING)
  run('plms/offset_0', 'PNDM', skip_prk_steps=True, set_alpha_to_one=False, **TABLE, timestep_spacing='leading')
  run('prk/offset_0', 'PNDM', skip_prk_steps=False, set_alpha_to_one=False, **TABLE, timestep_spacing='leading')
  run('plms/v', 'PNDM', skip_prk_steps=True, set_alpha_to_one=True, **TABLE, **LEADING, **V)
  run('all', 'IPNDM')
  run('without_first', 'IPNDM', skip=1)


def dpm_solver_runs(run):
  """DPM-Solver, ++, SDE, multistep and singlestep; DEIS."""
  multi, single = 'DPMSolverMultistep', 'DPMSolverSinglestep'
  orders = [(1, 'midpoint'), (2, 'midpoint'), (2, 'heun'), (3, 'midpoint')]
  for order, kind in orders:
    tag, options = f'{order}/{kind}', {**TABLE, 'solver_order': order, 'solver_type': kind}
    for end, sigmas in SIGMA_ENDS.items():
      for algorithm in ('dpmsolver++', 'sde-dpmsolver++'):
        run(f'{algorithm}/{tag}/{end}', multi, algorithm_type=algorithm, **sigmas, **options)
    for algorithm in ('dpmsolver', 'sde-dpmsolver'):
      if (algorithm, order) != ('sde-dpmsolver', 3):  # not written
        run(f'{algorithm}/{tag}/min', multi, algorithm_type=algorithm, final_sigmas_type='sigma_min', **options)
    for algorithm in ('dpmsolver++', 'dpmsolver'):
      run(f'{algorithm}/{tag}/full', multi, algorithm_type=algorithm, final_sigmas_type='sigma_min', **options, **FULL)
  plus = {**TABLE, 'algorithm_type': 'dpmsolver++', 'solver_order': 2}
  for spacing, options in SPACINGS.items():
    run(f'dpmsolver++/{spacing}', multi, **plus, **options)
  run('dpmsolver++/v', multi, **plus, **TRAILING, **V)
  run('dpmsolver++/x0', multi, **plus, **TRAILING, **X0)
  run('dpmsolver/v', multi, **TABLE, algorithm_type='dpmsolver', final_sigmas_type='sigma_min', **V)
  run('dpmsolver++/zero_snr/v', multi, **plus, **ZERO_SNR, **V)
  run('sde-dpmsolver++/zero_snr/v', multi, **{**plus, 'algorithm_type': 'sde-dpmsolver++'}, **ZERO_SNR, **V)
  run('dpmsolver++/karras', multi, **plus, **KARRAS)
  run('dpmsolver++/exponential', multi, **plus, use_exponential_sigmas=True)
  run('dpmsolver++/beta', multi, **plus, use_beta_sigmas=True)
  run('dpmsolver++/lu', multi, **plus, use_lu_lambdas=True)
  run('dpmsolver++/euler_at_final', multi, **plus, final_sigmas_type='sigma_min', euler_at_final=True, **FULL)
  run('dpmsolver++/3/zero/full', multi, **{**plus, 'solver_order': 3}, **FULL)
  run('dpmsolver++/3/min/16', multi, steps=16, **{**plus, 'solver_order': 3}, final_sigmas_type='sigma_min')
  for order in (2, 3):
    flow = {'use_flow_sigmas': True, 'flow_shift': 3.0, 'solver_order': order, **FLOW}
    run(f'dpmsolver++/{order}/flow', multi, **flow)
    run(f'sde-dpmsolver++/{order}/flow', multi, algorithm_type='sde-dpmsolver++', **flow)
  for order, kind in [*orders, (3, 'heun')]:
    tag, options = f'{order}/{kind}', {**TABLE, 'solver_order': order, 'solver_type': kind}
    for steps in (9, 10, 11) if order == 3 else (10,):
      run(f'dpmsolver++/{tag}/zero/{steps}', single, steps=steps, algorithm_type='dpmsolver++', **options)
      run(f'dpmsolver/{tag}/min/{steps}', single, steps=steps, algorithm_type='dpmsolver', final_sigmas_type='sigma_min',
          lower_order_final=True, **options)
    steps = 9 if order == 3 else 10
    run(f'dpmsolver++/{tag}/full', single, steps=steps, final_sigmas_type='sigma_min', **options, **FULL)
    run(f'dpmsolver/{tag}/full', single, steps=steps, algorithm_type='dpmsolver', final_sigmas_type='sigma_min', **options,
        **FULL)
    run(f'sde-dpmsolver++/{tag}', single, steps=steps, algorithm_type='sde-dpmsolver++', lower_order_final=True, **options)
  run('dpmsolver++/v', single, **plus, **V)
  run('dpmsolver++/flow', single, use_flow_sigmas=True, flow_shift=3.0, lower_order_final=True, **FLOW)
  for order in (1, 2, 3):
    for spacing, options in SPACINGS.items():
      run(f'{order}/{spacing}', 'DEISMultistep', solver_order=order, **TABLE, **options)
    run(f'{order}/full', 'DEISMultistep', solver_order=order, **TABLE, **FULL)
  run('3/v', 'DEISMultistep', solver_order=3, **TABLE, **V)
  run('3/x0', 'DEISMultistep', solver_order=3, **TABLE, **X0)
  run('2/karras', 'DEISMultistep', solver_order=2, **TABLE, **KARRAS)
  run('2/flow', 'DEISMultistep', solver_order=2, use_flow_sigmas=True, flow_shift=3.0, **FLOW)


def corrector_runs(run):
  """UniPC and SA-Solver."""
  unipc = 'UniPCMultistep'
  for order in (1, 2, 3):
    for kind in ('bh1', 'bh2'):
      options = {**TABLE, 'solver_order': order, 'solver_type': kind}
      for x0 in (True, False):
        run(f'{order}/{kind}/{"x0" if x0 else "noise"}/min', unipc, predict_x0=x0, final_sigmas_type='sigma_min', **options)
      run(f'{order}/{kind}/full', unipc, final_sigmas_type='sigma_min', **options, **FULL)
    run(f'{order}/bh2/zero', unipc, **TABLE, solver_order=order)
    run(f'{order}/predictor', unipc, **TABLE, solver_order=order, disable_corrector=list(range(10)))
  for spacing, options in SPACINGS.items():
    run(spacing, unipc, **TABLE, **options)
  run('v', unipc, **TABLE, **TRAILING, **V)
  run('noise/v', unipc, predict_x0=False, final_sigmas_type='sigma_min', **TABLE, **TRAILING, **V)
  run('prediction_x0', unipc, **TABLE, **TRAILING, **X0)
  run('zero_snr/v', unipc, **TABLE, **ZERO_SNR, **V)
  run('karras', unipc, **TABLE, **KARRAS)
  run('flow', unipc, use_flow_sigmas=True, flow_shift=3.0, **FLOW)
  for order in (1, 2, 3):
    for algorithm in ('data_prediction', 'noise_prediction'):
      options = {**TABLE, 'predictor_order': order, 'corrector_order': order, 'algorithm_type': algorithm}
      for tau in (0.0, 1.0):
        run(f'{algorithm}/{order}/{tau}', 'SASolver', tau=tau, **options)
  run('data_prediction/3_4/1.0', 'SASolver', tau=1.0, predictor_order=3, corrector_order=4, **TABLE)
  run('data_prediction/2_1/0.5', 'SASolver', tau=0.5, predictor_order=2, corrector_order=1, **TABLE)
  run('default', 'SASolver', **TABLE)
  run('v', 'SASolver', tau=1.0, **TABLE, **TRAILING, **V)
  run('flow', 'SASolver', tau=0.0, use_flow_sigmas=True, flow_shift=3.0, **FLOW)


def ratio_runs(run):
  """Schedulers in x / alpha: Euler, Heun, DPM-2, LMS, DPM++ SDE; EDM; flow matching."""
  for spacing, options in SPACINGS.items():
    for sampler in ('EulerDiscrete', 'EulerAncestralDiscrete', 'HeunDiscrete', 'KDPM2Discrete', 'KDPM2AncestralDiscrete',
                    'LMSDiscrete', 'DPMSolverSDE'):
      run(spacing, sampler, **TABLE, **options)
      if spacing == 'trailing':
        run('v', sampler, **TABLE, **options, **V)
      if spacing == 'trailing' and sampler in ('EulerDiscrete', 'HeunDiscrete', 'LMSDiscrete'):
        run('x0', sampler, **TABLE, **options, **X0)
      if spacing == 'trailing' and sampler != 'EulerAncestralDiscrete':
        run('karras', sampler, **TABLE, **options, **KARRAS)
  run('interpolated', 'EulerDiscrete', steps=8, **TABLE)
  run('min', 'EulerDiscrete', **TABLE, **TRAILING, **SIGMA_ENDS['min'])
  run('churn', 'EulerDiscrete', step={'s_churn': 3.0, 's_tmin': 0.1, 's_noise': 1.003}, **TABLE, **TRAILING)
  for sampler in ('EulerDiscrete', 'EulerAncestralDiscrete'):
    run('zero_snr/v', sampler, **TABLE, **ZERO_SNR, **V)
  for order in (1, 2, 3):
    run(f'order/{order}', 'LMSDiscrete', step={'order': order}, **TABLE, **TRAILING)
  run('karras', 'EDMEuler')
  run('exponential/v', 'EDMEuler', sigma_schedule='exponential', **V)
  run('min', 'EDMEuler', **SIGMA_ENDS['min'])
  run('churn', 'EDMEuler', step={'s_churn': 3.0, 's_tmin': 0.1, 's_noise': 1.003})
  multi = 'EDMDPMSolverMultistep'
  for order, kind in ((1, 'midpoint'), (2, 'midpoint'), (2, 'heun'), (3, 'midpoint')):
    run(f'dpmsolver++/{order}/{kind}', multi, solver_order=order, solver_type=kind)
    if order < 3:  # it forgets to hand over the noise
      run(f'sde-dpmsolver++/{order}/{kind}', multi, algorithm_type='sde-dpmsolver++', solver_order=order, solver_type=kind)
  run('dpmsolver++/exponential/v', multi, sigma_schedule='exponential', **V)
  run('dpmsolver++/3/16', multi, steps=16, solver_order=3)
  for shift in (1.0, 3.0):
    run(f'shift_{shift}', 'FlowMatchEulerDiscrete', shift=shift)
    run(f'stochastic/shift_{shift}', 'FlowMatchEulerDiscrete', shift=shift, stochastic_sampling=True)
    run(f'shift_{shift}', 'FlowMatchHeunDiscrete', shift=shift)
  run('karras', 'FlowMatchEulerDiscrete', shift=3.0, **KARRAS)
  run('inverted', 'FlowMatchEulerDiscrete', shift=3.0, invert_sigmas=True)


def main():
  rows = Rows()
  warnings.simplefilter('ignore')
  diffusers.utils.logging.set_verbosity_error()
  with double(), mock.patch.object(np, 'float32', np.float64):
    k_diffusion_runs(rows)
    run = lambda *arguments, **options: diffusers_run(rows, *arguments, **options)
    for runs in (first_order_runs, dpm_solver_runs, corrector_runs, ratio_runs):
      runs(run)
  versions = {name: importlib.metadata.version(name) for name in ('torch', 'diffusers', 'k-diffusion', 'numpy', 'scipy')}
  arrays = {name: np.stack(array) for name, array in rows.arrays.items()}
  path = pathlib.Path(__file__).with_name('solvers.npz')
  np.savez_compressed(path, versions=str(versions), mean=MEAN.numpy(), covariance=COVARIANCE.numpy(),
                      runs=np.array([json.dumps(run) for run in rows.runs]), **arrays)
  shapes = {name: array.shape for name, array in arrays.items()}
  print(f'{path}: {len(rows.runs)} runs, {path.stat().st_size} bytes; {shapes}; {versions}')


if __name__ == '__main__':
  main()
