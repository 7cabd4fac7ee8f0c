"""--mode=sample: samples, a sheet of them, and the way from noise to data, from a trained run."""
from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax import pictures
from diffusion_jax.core.types import example_keys, fold
from diffusion_jax.method import make_sampling
from diffusion_jax.run import (
  Run,
  chosen_params,
  draw,
  make_sampler,
  open_run,
  provenance,
  shared,
  trained,
  trained_process,
)
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime import workdir as workdirs
from diffusion_jax.runtime.logs import say
from diffusion_jax.runtime.step import State

SHOWN = 11  # times in trajectory.png
FRAMES = 40  # frames of each way in trajectory.gif


def run(config: ConfigDict, workdir: Path) -> int:
  this = open_run(config, workdir, read=False)
  if config.sample.count < 1:
    raise ValueError(f'config.sample.count is {config.sample.count}; it must be 1 or more to sample.')
  files = write(this, trained(this))
  say('\n'.join(['The samples are in', *(f'  {path}' for path in files)]))
  return 0


def write(this: Run, state: State) -> list[Path]:
  """Draw config.sample.count samples and write every file of this mode; returns their paths."""
  c, folder = this.config, this.workdir / 'samples'
  samples = draw(this, make_sampler(this, c.transform), state, c.sample.count, c.sample.batch)
  if jax.process_index() == 0:
    picture = pictures.save_png(folder / 'samples.png', sheet(this, samples))
    titles = this.task.titles(np.arange(c.sample.count))
    np.savez_compressed(folder / 'samples.npz', x=samples, title=titles)
    workdirs.write_json(folder / 'samples.json', provenance(this, state, c.sample.count, c.transform))
  ways = write_trajectory(this, state)
  return [picture, folder / 'samples.npz', *ways, write_schedule(this, state)] if jax.process_index() == 0 else []


def sheet(this: Run, samples: np.ndarray) -> np.ndarray:
  """All samples in one picture, a row for all of one thing, such as a class; where there are few of each, rows of ten."""
  titles = this.task.titles(np.arange(len(samples)))
  kinds = list(dict.fromkeys(titles))
  if not 1 < len(kinds) <= len(samples) / 2:
    return this.task.render(samples, min(10, len(samples)))
  order = np.argsort([kinds.index(title) for title in titles], kind='stable')
  return this.task.render(samples[order], -(-len(samples) // len(kinds)))


def write_trajectory(this: Run, state: State) -> list[Path]:
  """trajectory.png and trajectory.gif: a sample being noised, and noise becoming that sample, with the estimates of x0."""
  c, process = this.config, trained_process(this, state)
  index = np.arange(shared(this, 10), dtype=np.int32)
  sampler = make_sampler(this, c.transform, keep=True)
  xts, x0s = map(meshes.gather, sampler(chosen_params(this, state), state.extra, index))
  x0s = np.concatenate([x0s, xts[-1:]])  # at t = 0 the estimate is the sample
  grid = make_sampling(c, c.transform).grid
  level = process.level(grid)
  if jax.process_index():
    return []
  keys = fold(example_keys(jax.random.key(c.sample.seed), jnp.asarray(index)), 4)
  # Noisy images are shown at unit scale, so that exploding variances fit on the screen.
  scale = 1 / np.maximum(1, np.hypot(level.alpha, level.sigma))
  forward = lambda i: this.task.decode(scale[i] * process.corrupt(keys, jnp.asarray(xts[-1]), process.level(grid[i]))[0])
  xt = lambda i: this.task.decode(scale[i] * xts[i])
  x0 = lambda i: this.task.decode(x0s[i])
  spaced = lambda count: np.unique(np.linspace(0, len(grid) - 1, count).round().astype(int))
  column = lambda images: [this.task.render(images(i)[:4], 1) for i in spaced(SHOWN)]
  figure = pictures.trajectory_figure(this.workdir / 'trajectory.png', grid[spaced(SHOWN)], {
      'data noised,\nfrom right to left': column(forward), 'sampling: xt': column(xt),
      'sampling:\nestimate of x0': column(x0)})
  def frame(left, right):
    left, right = this.task.render(left[:10], 5), this.task.render(right[:10], 5)
    return np.concatenate([left, np.full((len(left), 12, 3), 255, np.uint8), right], 1)
  there = [frame(forward(i), x0(-1)) for i in spaced(FRAMES)[::-1]]
  back = [frame(xt(i), x0(i)) for i in spaced(FRAMES)]
  return [figure, pictures.save_gif(this.workdir / 'trajectory.gif', there + back, 60)]


def write_schedule(this: Run, state: State) -> Path:
  """schedule.png: the schedule of the run, its training times and its grid."""
  c, process = this.config, trained_process(this, state)
  t = np.linspace(0, 1, 402)[1:-1]
  level = process.level(t)
  density = this.method.times(state.extra).density(process, level.t) / np.abs(np.asarray(process.logsnr_slope(level)))
  grid = make_sampling(c, c.transform).grid
  inner = process.level(grid[(grid > 0) & (grid < 1)])
  return pictures.schedule_figure(
      this.workdir / 'schedule.png', t, np.asarray(level.alpha), np.asarray(level.sigma), np.asarray(level.logsnr),
      np.asarray(density), np.asarray(inner.t), np.asarray(inner.logsnr),
      f'{c.schedule}, trained at {c.times}, sampled on {c.grid}')
