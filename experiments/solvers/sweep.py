"""Every solver at the same numbers of network calls: python -m experiments.solvers.sweep --workdir=runs/digits

On a mixture of which the denoiser is known, and on the digits of a trained run (`bash run.sh`), without guidance. Writes
results.csv, mixture.png and digits.png beside this file and prints the tables of README.md. Under 15 minutes of two CPU
cores. With --guided it makes 100 guided digits by every solver in 64 calls instead, through config.solver, and writes
guided.csv.
"""
import csv
import dataclasses
import sys
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import app, flags, logging
from jax import numpy as jnp
from scipy import special

from diffusion_jax.build import build, rows
from diffusion_jax.core import grids, ode, schedules
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.solvers import drift
from diffusion_jax.core.types import example_keys, fold, split
from diffusion_jax.method import SOLVERS, make_sampling
from diffusion_jax.run import chosen_params, draw, make_sampler, open_run, trained
from diffusion_jax.runtime.workdir import load_config
from tests.oracles import Mixture

# As in config.solver; {steps} is the number of steps of the grid.
NAMES = (
  'ancestral()', "ancestral('large')", 'ddim()', 'ddim(1.0)', 'euler()', 'euler_maruyama()', 'heun()',
  'churn(heun(), 10.0, {steps})', 'langevin(ancestral())', 'dpm2()', 'dpm2(1.0)', 'dpm_solver(3)',
  'dpm_2s()', 'dpm_2s(1.0)', 'dpm_sde()', 'rk4()', 'dormand_prince({tolerance}, {tolerance})', 'lms()', 'ipndm()',
  "pndm('rk')", "pndm('heun')", 'deis()', "deis(3, 'log_r')", 'dpm_2m()', 'dpm_2m(1.0)', 'dpm_3m()', 'dpm_3m(1.0)',
  'unipc(2)', 'unipc(3)', 'sa_solver()', 'sa_solver(3, 4, 0.5)', 'restart heun()', 'restart ddim()')
EVEN, DENSE, LOGSNR = 'uniform({steps})', 'quadratic({steps})', 'logsnr({steps}, -9.0, 9.0)'
GRIDS = {'mixture': dict.fromkeys((6, 10, 20, 50), (EVEN, DENSE, LOGSNR)),  # by the number of calls
         'digits': {10: (EVEN, DENSE), 20: (EVEN, DENSE), 50: (EVEN,)}}
TOLERANCES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)  # of the adaptive solver, whose calls are counted
LAW = Mixture([0.25, 0.25, 0.3, 0.2], [[1.2, 0.8], [-1.2, 0.8], [0.0, -1.3], [0.2, 0.3]], [0.15, 0.3, 0.2, 0.1])
COSINE = Gaussian(schedules.cosine())
COUNT = {'mixture': 8192, 'digits': 297}  # samples; of digits as many as are held out
HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
  """What is sampled, and how far samples are from it."""
  name: str
  process: Gaussian
  denoise: Callable  # (parameters, x, level) -> estimate
  parameters: dict
  shape: tuple[int, ...]
  score: Callable  # samples -> {name: number}

  @cached_property
  def last(self) -> Callable:
    """(parameters, x, t) -> the last move, to the data: the estimate, as process.reverse has it; compiled once."""
    return jax.jit(lambda parameters, x, t: self.denoise(parameters, x, self.process.level(t)).x0)


def walker(case: Case, solver) -> Callable:
  """grid -> (samples, calls): a step of the solver is compiled once, whatever the grid. The noise is that of the sample's
  number; the moves are those of sampling.sample."""
  keys = example_keys(jax.random.key(0), jnp.arange(COUNT[case.name]))
  prior_keys, step_keys, _ = split(keys, 3)
  calls = []

  @jax.jit
  def down(parameters, number, x, t, s, memory):
    def denoise(x, level):
      if solver.calls is None:
        jax.debug.callback(lambda: calls.append(1))
      return case.denoise(parameters, x, level)
    levels = case.process.level(t), case.process.level(s)
    return solver.step(case.process, denoise, fold(step_keys, number), x, *levels, memory)

  @jax.jit
  def up(number, x, t, s):
    return case.process.forward(fold(step_keys, number), x, case.process.level(t), case.process.level(s))

  def walk(grid):
    calls.clear()
    like = jax.ShapeDtypeStruct((len(keys), *case.shape), jnp.float32)
    x = case.process.prior(prior_keys, like, case.process.level(grid[0]))
    memory, counted = solver.init(x), 1 + solver.more
    for number, (t, s) in enumerate(zip(grid[:-2], grid[1:-1], strict=True)):
      if s > t:
        x, memory = up(number, x, t, s), solver.init(x)
      else:
        x, memory = down(case.parameters, number, x, t, s, memory)
        counted += solver.calls or 0
    x = np.asarray(case.last(case.parameters, x, grid[-2]))
    jax.effects_barrier()
    return x, 1 + len(calls) if solver.calls is None else counted
  return walk


def grid_of(text: str, budget: int, solver, restarts: bool, process: Gaussian) -> np.ndarray | None:
  """The grid of this form with the most steps that the budget pays for, the last move among them; None if not for three."""
  again = max(2, budget // 10)  # steps of a restart, of which there are two
  steps = 1 + (budget - 1 - solver.more) // solver.calls - 2 * again * restarts
  if steps < 3:
    return None
  grid = build(text.format(steps=steps), rows(grids, grids.Grid))
  return (grids.restart(grid, 0.15, 0.4, again, 2) if restarts else grid)(process.schedule)


def measure(case: Case) -> list[dict]:
  """A row for each solver, grid and number of calls."""
  results = []
  def note(name, grid, budget, x, calls):
    scores = case.score(x)
    if is_random(name):
      scores['path_error'] = ''
    results.append({'case': case.name, 'solver': name, 'grid': grid, 'budget': budget, 'calls': calls, **scores})
    print(*results[-1].values(), flush=True)
  for name in NAMES:
    if 'tolerance' in name:
      for tolerance in TOLERANCES:
        solver = build(name.format(tolerance=tolerance), SOLVERS)
        x, calls = walker(case, solver)(np.array([1.0, 0.01, 0.0]))
        note(name.partition('(')[0], f'tolerance {tolerance:g}', calls, x, calls)
      continue
    restarts, text = name.startswith('restart'), name.removeprefix('restart ')
    made = None if '{steps}' in text else build(text, SOLVERS)
    walk = made and walker(case, made)
    for budget, forms in GRIDS[case.name].items():
      for form in forms:
        solver = made or build(text.format(steps=budget // 2), SOLVERS)
        times = grid_of(form, budget, solver, restarts, case.process)
        if times is not None:
          x, calls = (walk or walker(case, solver))(times)
          note(name.replace(', {steps}', ''), form.partition('(')[0], budget, x, calls)
  return results


def is_random(name: str) -> bool:
  """Whether a row of the results draws noise on its way."""
  return name.startswith(('restart', 'churn', 'langevin')) or build(name, SOLVERS).order is None


def mixture() -> Case:
  """Errors: the mean distance of sorted projections from the true quantiles (sliced Wasserstein-1), over 32 directions, and
  for an ODE the root mean square distance from where the exact flow carries the same noise."""
  angles = np.pi * np.arange(32) / 32
  directions = np.stack([np.cos(angles), np.sin(angles)])
  weights, means, stds = map(np.asarray, (LAW.weights, LAW.means, LAW.stds))
  levels = (np.arange(COUNT['mixture']) + 0.5) / COUNT['mixture']

  def quantiles(direction):
    x = np.linspace(-5, 5, 20_001)
    cdf = (weights * special.ndtr((x[:, None] - means @ direction) / stds)).sum(1)
    return np.interp(levels, cdf, x)
  true = np.stack([quantiles(direction) for direction in directions.T], 1)
  case = Case('mixture', COSINE, lambda parameters, x, level: LAW.denoiser(COSINE)(x, level), {}, (2,), None)
  flow = exact_flow(case, ode.adaptive(1e-6, 1e-6))
  def score(x):
    return {'error': float(np.abs(np.sort(x @ directions, 0) - true).mean()), 'path_error': rms(x, flow())}
  return dataclasses.replace(case, score=score)


def digits(run, state) -> Case:
  """Errors: the Fréchet distance to the training digits, and the path error as above, in a pixel of [-1, 1]."""
  cond = run.task.context(np.arange(COUNT['digits']))
  clip = make_sampling(run.config, 'clip(1.0)').transform
  def denoise(parameters, x, level):
    return clip(run.method.denoiser(parameters, state.extra))(x, level, cond)
  case = Case('digits', COSINE, denoise, chosen_params(run, state), run.task.shape, None)
  flow = exact_flow(case, ode.fixed(100))
  def score(x):
    scores = run.task.metrics(run.task.decode(x), cond)
    return {'error': scores['frechet_distance']['samples'], 'path_error': rms(x, flow()),
            'accuracy': scores['svm_accuracy']['samples']}
  return dataclasses.replace(case, score=score)


def exact_flow(case: Case, integrate: ode.Integrator) -> Callable[[], np.ndarray]:
  """Where the probability-flow ODE carries the same noise, to t = 0.002 and by the denoiser to 0."""
  @jax.jit
  def flow(parameters):
    keys = split(example_keys(jax.random.key(0), jnp.arange(COUNT[case.name])), 3)[0]
    like = jax.ShapeDtypeStruct((len(keys), *case.shape), jnp.float32)
    x = case.process.prior(keys, like, case.process.level(1.0))
    denoise = lambda x, level: case.denoise(parameters, x, level)
    # In u = sqrt(t), whose steps are short near the data.
    slope = lambda u, x: jax.tree.map(lambda d: 2 * jnp.reshape(u, (-1, *[1] * (d.ndim - 1))) * d,
                                      drift(case.process, denoise, x, case.process.level(u**2)))
    x, _ = integrate(slope, x, 1.0, 0.002**0.5)
    return denoise(x, case.process.level(0.002)).x0
  return cache(lambda: np.asarray(flow(case.parameters)))


def rms(x: np.ndarray, y: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(x - y))))


def best(results: list[dict], case: str, field: str) -> dict[str, dict]:
  """{solver: {budget: row}}: the grid with the least error."""
  found = {}
  for row in results:
    if row['case'] == case:
      place = found.setdefault(row['solver'], {})
      if row['budget'] not in place or row[field] < place[row['budget']][field]:
        place[row['budget']] = row
  return found


def table(results: list[dict], case: str, field: str) -> str:
  """A line a solver: for every number of calls the error on its best grid, named by the first letter."""
  budgets = GRIDS[case]
  lines = ['| solver | ' + ' | '.join(f'{budget} calls' for budget in budgets) + ' |', '|---|' + '---|' * len(budgets)]
  rows_of = best([row for row in results if row[field] != ''], case, field)
  for name, at in sorted(rows_of.items(), key=lambda item: item[1][20][field] if 20 in item[1] else np.inf):
    if name == 'dormand_prince':
      continue
    cell = lambda row: f'{row[field]:{".4f" if case == "mixture" else ".3f"}} {row["grid"][0]}' if row else ''
    lines.append(f'| `{name}` | ' + ' | '.join(cell(at.get(budget)) for budget in budgets) + ' |')
  adaptive = [f'{row[field]:.4f} in {calls} calls' for calls, row in sorted(rows_of['dormand_prince'].items())]
  return '\n'.join([*lines, '', f'`dormand_prince`: {", ".join(adaptive)}.'])


def plot(results: list[dict], case: str, path: Path, floor: float) -> None:
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout='constrained', sharex=True)
  colours = plt.get_cmap('tab20')
  for axis, field, title in zip(axes, ('error', 'path_error'), TITLES[case], strict=True):
    for number, (name, at) in enumerate(best(results, case, field).items()):
      random = is_random(name)
      if field == 'path_error' and random:
        continue
      x, y = zip(*sorted((row['calls'], row[field]) for row in at.values()), strict=True)
      axis.plot(x, y, '--' if random else '-', marker='os^Dv'[number % 5], color=colours(number % 20), label=name, ms=4)
    axis.set(xscale='log', yscale='log', xlabel='network calls', title=title)
  axes[0].axhline(floor, color='black', lw=0.8, ls=':')
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=7)
  figure.savefig(path, dpi=90)
  plt.close(figure)


TITLES = {'mixture': ('sliced Wasserstein-1 distance to the law (dotted: true samples)',
                      'distance from the exact flow (ODE solvers)'),
          'digits': ('Fréchet distance to the training digits (dotted: held-out digits)',
                     'distance from the exact flow (ODE solvers), a pixel')}


def guided(workdir: Path) -> None:
  """100 guided digits by every solver at 64 calls through config.solver: the accuracy of the SVM."""
  results = []
  for name in (*NAMES, 'euler_ancestral()', 'dpm_solver(2)', "unipc(3, 'b2')"):
    config = load_config(workdir)
    restarts, text = name.startswith('restart'), name.removeprefix('restart ').format(steps=32, tolerance=1e-3)
    solver = build(text, SOLVERS)
    if solver.calls is None:
      config.grid = 'quadratic(4)'
    else:
      steps = 1 + (63 - solver.more) // solver.calls - 12 * restarts
      config.grid = f'restart(uniform({steps}), 0.15, 0.4, 6, 2)' if restarts else f'uniform({steps})'
    config.solver = text
    run = open_run(config, workdir, read=True)
    samples = draw(run, make_sampler(run, config.transform), trained(run), 100, 100)
    accuracy = run.task.metrics(samples, run.task.context(np.arange(100)))['svm_accuracy']['samples']
    results.append({'solver': text, 'grid': config.grid, 'transform': config.transform, 'accuracy': accuracy})
    print(*results[-1].values(), flush=True)
  write(HERE / 'guided.csv', results)


def write(path: Path, results: list[dict]) -> None:
  with open(path, 'w', newline='') as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in results for name in row)), lineterminator='\n')
    writer.writeheader()
    short = lambda cell: f'{cell:.4g}' if isinstance(cell, float) else cell
    writer.writerows({name: short(cell) for name, cell in row.items()} for row in results)


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    sys.exit(f'This takes flags alone; got {arguments[1:]}.')
  logging.set_verbosity(logging.WARNING)  # of Orbax
  workdir = Path(flags.FLAGS.workdir)
  if flags.FLAGS.guided:
    return guided(workdir)
  toy = mixture()
  true = (LAW.sample(example_keys(jax.random.key(seed), jnp.arange(COUNT['mixture']))) for seed in range(1, 9))
  floor = np.mean([toy.score(np.asarray(x))['error'] for x in true])
  results = measure(toy)
  run = open_run(load_config(workdir), workdir, read=True)
  real = digits(run, trained(run))
  blank = np.zeros((COUNT['digits'], *real.shape), np.uint8)
  held_out = run.task.metrics(blank, run.task.context(np.arange(COUNT['digits'])))['frechet_distance']['held_out']
  results += measure(real)
  write(HERE / 'results.csv', results)
  for case, low in (('mixture', floor), ('digits', held_out)):
    plot(results, case, HERE / f'{case}.png', low)
    for field in ('error', 'path_error'):
      print(f'\n{case}, {field}; floor of the error {low:.4f}\n{table(results, case, field)}')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/digits', 'A trained run of configs/digits.py.')
  flags.DEFINE_bool('guided', False, 'Make guided digits by every solver in 64 calls.')
  app.run(main)
