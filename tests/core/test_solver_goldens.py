"""Solvers, step by step, against the numbers of k-diffusion and diffusers, in float64: all that tests.core.peers lists.

Every step starts from the peer's own state, with the noise that it drew and a memory of its earlier states, and must end at
its next state; a corrector is held to what the peer made of the state before the step.
"""
import contextlib
from unittest import mock

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import integrate

from diffusion_jax.core import multistep, processes, singlestep
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Estimate, Level
from tests.compiling import SIXTEEN_DIGITS
from tests.core.peers import (
  GOLDENS,
  HALF,
  HELD,
  LAW,
  ON_LEVELS,
  ON_SCHEDULES,
  PEERS,
  PROCESSES,
  RUNS,
  STAGES,
  STEPS,
  apart,
  draws_of,
  levels_of,
  pattern_of,
)
from tests.core.tables import keys


def unscheduled(t):
  raise AssertionError('A row of ON_LEVELS read the schedule.')


UNSCHEDULED = Gaussian(unscheduled)
SIZE = 256


@pytest.mark.parametrize('name', [*ON_LEVELS, *ON_SCHEDULES])
def test_every_step_is_the_peer_s(name, x64):
  places = [(run, i) for run, held in HELD.items() for i in range(len(held)) if name in held[max(i - 1, 0):i + 1]]
  groups = [(UNSCHEDULED, places)] if name in ON_LEVELS else [
    (process, [place for place in places if RUNS[place[0]]['frame'] == frame]) for frame, process in PROCESSES.items()]
  for process, places in groups:
    for (run, i), ours, before in zip(places, *replay({**ON_LEVELS, **ON_SCHEDULES}[name], process, places), strict=True):
      if HELD[run][i] == name:
        close(ours, GOLDENS['x'][RUNS[run]['x'][0] + i + 1], f'{run}, step {i}')
      if name.startswith(('unipc', 'sa_')):
        close(before, GOLDENS['x'][RUNS[run]['corrected'][0] + i], f'{run}, the state before step {i}')


def test_a_last_step_to_the_data_is_the_mean(x64):
  runs = [name for name, held in HELD.items() if held[-1] == 'mean']
  xs = np.concatenate([GOLDENS['x'][RUNS[name]['x'][1] - 2] for name in runs])
  levels = np.repeat([GOLDENS['levels'][RUNS[name]['levels'][1] - 1] for name in runs], 3, axis=0).T
  t, s = (Level(jnp.full(len(xs), np.nan), *map(jnp.asarray, pair)) for pair in (levels[:2], levels[2:]))
  clips = np.repeat(['clip' in name for name in runs], 3)[:, None]
  @jax.jit
  def last(x, t, s):
    estimate = LAW.denoiser(None)(x, t)
    estimate = estimate._replace(x0=jnp.where(clips, jnp.clip(estimate.x0, -1, 1), estimate.x0))
    with drawing([np.ones_like(xs)]):
      return UNSCHEDULED.reverse(keys(3), estimate, x, t, s)
  ends = np.reshape(last(jnp.asarray(xs), t, s), (len(runs), 3, 2))
  for name, end in zip(runs, ends, strict=True):
    close(end, GOLDENS['x'][RUNS[name]['x'][1] - 1], name, atol=1e-9)  # DDPM adds noise of 1e-10


@pytest.mark.parametrize('name', [name for name, held in HELD.items() if STAGES in held])
def test_a_singlestep_of_order_two_is_the_peer_s(name, x64):
  """It is dpm_sde's, its middle at the level of the grid where diffusers has a stage; without noise, DPM-Solver++(2S).

  Each stage of diffusers draws anew where ours share a path: the second draw is chosen to give theirs.
  """
  process, xs = PROCESSES[RUNS[name]['frame']], GOLDENS['x'][slice(*RUNS[name]['x'])]
  (starts, ends), noise = levels_of(name), draws_of(name)
  for i in np.flatnonzero(np.array(HELD[name]) == STAGES):
    t, middle, s = (Level(*map(jnp.asarray, place)) for place in (starts[i - 1], starts[i], ends[i]))
    share = float((middle.logsnr - t.logsnr) / (s.logsnr - t.logsnr))
    solver = singlestep.dpm_sde(1.0 if 'sde' in name else 0.0, share)
    ratios = [float(place.sigma / place.alpha) for place in (t, middle, s)]
    draws = noise[i - 1, 0], apart(noise[i - 1, 0], noise[i, 0], *ratios)
    with drawing(draws), mock.patch.object(singlestep, 'between', lambda *_, middle=middle: middle):
      x, _ = solver.step(process, LAW.denoiser(process), keys(3), jnp.asarray(xs[i - 1]), t, s, ())
    close(x, xs[i + 1], f'step {i}')


@pytest.mark.parametrize('name', [name for name in RUNS if PEERS[pattern_of(name)].why == HALF])
def test_the_peers_count_half_the_curve_at_order_three(name, x64):
  """k-diffusion 0.1.1.post1 and diffusers 0.42.1, whose SDE has -1/2 for 1/2 besides."""
  slip, sde = name.startswith('diffusers') and 'sde' in name, 'sde' in name
  eta = RUNS[name]['options'].get('eta', 1.0) if sde else 0.0
  xs, (starts, ends), noise = GOLDENS['x'][slice(*RUNS[name]['x'])], levels_of(name), draws_of(name)
  steps = [i for i, held in enumerate(HELD[name]) if held == '']
  assert len(steps) >= 5
  for i in steps:
    places = starts[i - 2:i + 1][::-1]
    x0s = [LAW.denoiser(None)(jnp.asarray(x), place).x0 for x, place in zip(xs[i - 2:i + 1][::-1], places, strict=True)]
    x = half_of_the_curve(x0s, xs[i], places, ends[i], eta, -0.5 if slip else 0.5)
    close(x + np.sqrt(ends[i].sigma**2 - below(places[0], ends[i], eta)**2) * noise[i, 0], xs[i + 1], f'step {i}')


def test_half_of_the_second_derivative_loses_an_order(x64):
  """The error of one step with an exact history is of order h^(p + 1): p is 2 for the peers, 3 for dpm_3m."""
  process, solver, x = PROCESSES['flow'], multistep.dpm_3m(), jnp.array([[1.5, -0.4], [-2.0, 0.9]])
  denoise, three = LAW.denoiser(process), keys(3)
  @jax.jit
  def walk(sigmas):
    levels = [process.level(sigma) for sigma in sigmas]
    states, memory = [LAW.flow_map(x, levels[0], level) for level in levels], solver.init(x)
    for xt, t, s in zip(states, levels[:-1], levels[1:], strict=False):
      ours, memory = solver.step(process, denoise, three, xt, t, s, memory)
    return levels, states, [denoise(xt, level).x0 for xt, level in zip(states, levels, strict=True)], ours
  widths, errors = np.array([0.1, 0.05, 0.025]), []
  for h in widths:
    levels, states, x0s, ours = jax.tree.map(np.asarray, walk(1 / (1 + np.exp(h * np.arange(-2, 2)))))
    theirs = half_of_the_curve(x0s[2::-1], states[2], levels[2::-1], levels[3])
    errors.append([np.abs(end - states[3]).max() for end in (theirs, ours)])
  theirs, ours = np.polyfit(np.log(widths), np.log(errors), 1)[0]
  print(f'orders of one step: {theirs:.2f}, dpm_3m {ours:.2f}')
  assert abs(theirs - 3) < 0.2 and abs(ours - 4) < 0.2, errors


def test_a_parabola_is_integrated_exactly(x64):
  """The SDE's x_s = (sigma_d / sigma_t) xt + alpha_s int 2 e^(2 (l - l_s)) x0(l) dl, l = log(alpha / sigma), is dpm_3m's by
  scipy. k-diffusion's misses half of what the square adds to it, diffusers' more than all."""
  clocks, curve, three = np.array([-0.9, -0.4, 0.2, 0.6]), 0.7, keys(3)
  levels = [Level(jnp.zeros(()), *jnp.sqrt(jax.nn.sigmoid(2 * clock * jnp.array([1, -1])))) for clock in clocks]
  data = lambda clock: 0.3 - 1.2 * clock + curve * (clock - clocks[2])**2
  denoise = lambda x, level: Estimate(jnp.full_like(x, data(0.5 * level.logsnr)))
  solver, x = multistep.dpm_3m(1.0), jnp.ones(1)
  @jax.jit
  def step(memory, t, s):
    with drawing([jnp.zeros(1)]):
      return solver.step(UNSCHEDULED, denoise, three, x, t, s, memory)
  memory = solver.init(x)
  for t, s in zip(levels[:-1], levels[1:], strict=True):
    ours, memory = step(memory, t, s)
  integral = lambda f: float(s.alpha) * integrate.quad(lambda u: 2 * np.exp(2 * (u - clocks[3])) * f(u), *clocks[2:])[0]
  exact, bend = below(t, s, 1.0) / t.sigma + integral(data), integral(lambda u: curve * (u - clocks[2])**2)
  close(ours, [exact], 'dpm_3m')
  theirs, slip = (half_of_the_curve(data(clocks[2::-1])[:, None], x, levels[2::-1], s, 1.0, half) for half in (0.5, -0.5))
  close(theirs, [exact - bend / 2], 'half')
  assert bend > 0 and slip < exact - bend


def test_no_run_is_forgotten():
  """Every run has an entry, every entry a run; a run is whole, or its entry says why not."""
  assert len(RUNS) == 329 and {pattern_of(name) for name in RUNS} == set(PEERS)
  for name, held in HELD.items():
    assert all(held) == (not PEERS[pattern_of(name)].why), (name, held)
  known = {*ON_LEVELS, *ON_SCHEDULES, STAGES, 'mean', ''}
  assert {each for held in HELD.values() for each in held} == known
  whole, some = ([name for name, held in HELD.items() if test(held)] for test in (all, any))
  print(f'runs held to ours whole: {len(whole)}, in part: {len(some) - len(whole)}, not at all: {len(RUNS) - len(some)}')


def replay(solver, process, places):
  """(the state after the step, the state before it as the solver corrected it) at the places, (run, step): [places, 3, 2].

  A solver with a memory makes the four steps before it too. All go side by side, in batches of one size: so those without a
  memory, which run op by op, compile next to nothing.
  """
  denoise, three, memory = LAW.denoiser(process), keys(3), solver.init(jnp.zeros((3, 2)))
  def step(memory, x, t, s, noise, corrected):
    with drawing(noise):
      ahead, memory = solver.step(process, denoise, three, x, t, s, memory)
    if isinstance(memory, multistep.Place):
      return memory._replace(x=corrected), ahead, memory.x
    return memory, ahead, x
  def walk(now, begun, rows):
    new, *made = jax.vmap(step)(now, *rows)
    return jax.tree.map(lambda a, b: jnp.where(begun.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, now), made
  walk = jax.jit(walk, compiler_options=SIXTEEN_DIGITS) if memory else walk
  def batch(places):
    now = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(places), *leaf.shape)), memory)
    for age in range(4 if memory else 0, -1, -1):
      rows = [STEPS[run][max(i - age, 0)] for run, i in places]
      begun = np.array([i >= age for _, i in places])
      now, made = walk(now, begun, jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows))
    return made
  full = [*places, *places[-1:] * (-len(places) % SIZE)]
  made = [batch(full[i:i + SIZE]) for i in range(0, len(full), SIZE)]
  return [np.concatenate(each)[:len(places)] for each in zip(*made, strict=True)] if places else ([], [])


@contextlib.contextmanager
def drawing(draws):
  """Let the solvers draw these."""
  draws = iter(draws)
  with mock.patch.object(processes, 'normal', lambda keys, like: jnp.asarray(next(draws))):
    yield


def half_of_the_curve(x0s, x, places, s, eta=0.0, constant=0.5):
  """DPM-Solver++(3M) with the integral of the parabola through x0s, the newest first, over log(alpha / sigma), in which the
  square counts once; `constant` 1/2 and twice that would be exact. The mean, if it is an SDE's."""
  clock = lambda level: np.log(level.alpha / level.sigma)
  h = clock(s) - clock(places[0])
  k, down = (1 + eta) * h, below(places[0], s, eta)
  nodes = [float((clock(place) - clock(places[0])) / h) for place in places]
  curve, slope, _ = np.polyfit(nodes, np.reshape(x0s, (3, -1)), 2).reshape(3, *np.shape(x))
  line = 1 - (1 - np.exp(-k)) / k
  first = down / places[0].sigma * x + (s.alpha - down / places[0].sigma * places[0].alpha) * x0s[0]
  return first + s.alpha * (line * slope + (constant - line / k) * curve)


def below(t, s, eta):
  """The sigma down to which the SDE's solver moves."""
  return s.sigma * (t.alpha * s.sigma / (s.alpha * t.sigma))**eta


def close(ours, theirs, where, atol=1e-12):
  np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=atol, err_msg=where)
