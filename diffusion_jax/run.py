"""What the jobs share: a config and a workdir become a mesh, a task, a method, a state, samples."""
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.build import build
from diffusion_jax.core import constraints, guidance, sampling, solvers
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import example_keys, fold
from diffusion_jax.method import Method, default_sharding, make_likelihood, make_method, make_sampling
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime import optimizers, sharding
from diffusion_jax.runtime.checkpoints import Checkpoints
from diffusion_jax.runtime.logs import say
from diffusion_jax.runtime.packing import packed_shapes
from diffusion_jax.runtime.step import State, init_state, train_step
from diffusion_jax.runtime.workdir import check_resumable, load_config
from diffusion_jax.tasks.task import Task, make_task

START = 4  # what of a sample's key is for the noise of an image from which it starts
class Run(NamedTuple):
  """A config, checked and brought to life; `config` has every field resolved."""
  config: ConfigDict
  workdir: Path
  mesh: Mesh
  task: Task
  method: Method
  optimizer: optax.GradientTransformation
  rate: optax.Schedule


def open_run(config: ConfigDict, workdir: Path, read: bool, devices: Sequence[jax.Device] | None = None) -> Run:
  """Check a config and build what it names, with its data if `read`. Nothing is written and nothing compiled, but, at the
  end, the frozen encoder of a text that is about to be sampled with guidance for the first time.

  `devices` are by default those of this job.

  Raises ValueError with a sentence for any illegal field, and where `workdir` belongs to another config.
  """
  keep_compiled()
  mesh = meshes.make_mesh(config.mesh, devices)
  for name in ('train.steps', 'train.batch', 'train.accumulate', 'sample.batch', 'evaluate.batch', 'log.every',
               'checkpoint.every', 'checkpoint.keep'):
    group, _, field = name.partition('.')
    if config[group][field] < 1:
      raise ValueError(f'config.{name} is {config[group][field]}; it must be 1 or more.')
  _check_shares(config.train.batch, meshes.ways(mesh), config.train.accumulate)
  for name in ('count', 'bits'):
    if config.evaluate[name] < 0 or config.evaluate[name] == 1:
      raise ValueError(f'config.evaluate.{name} is {config.evaluate[name]}; legal are 0, for none, and 2 or more.')
  if config.train.nonfinite not in ('stop', 'skip'):
    raise ValueError(f"config.train.nonfinite is {config.train.nonfinite!r}; legal are 'stop' and 'skip'.")
  if config.train.nonfinite_most < 0:
    raise ValueError(f'config.train.nonfinite_most is {config.train.nonfinite_most}; it must be 0 or more.')
  config = config.copy_and_resolve_references()
  if not read and config.task == 'images' and config.data.classes == -1:
    config.data.classes = load_config(workdir).data.classes  # what the data had
  task = make_task(config, read, workdir)
  config.data.classes = task.classes
  for name, value in check_resumable(config, workdir).items():
    say(f'The run in {workdir} is older than config.{name}, which is {value!r} now.')
  method = make_method(config, task)
  chosen_ema(config)
  o = config.optimizer
  rate = optimizers.schedule(o.rate, o.warmup, o.decay, config.train.steps)
  if o.name not in optimizers.OPTIMIZERS:
    raise ValueError(f'config.optimizer.name is {o.name!r}; legal are {sorted(optimizers.OPTIMIZERS)}.')
  optimizer = optimizers.OPTIMIZERS[o.name](rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip)
  config.sharding = tuple(config.sharding) or default_sharding(config)
  run = Run(config, workdir, mesh, task, method, optimizer, rate)
  state_shapes(run)  # every rule of config.sharding can be applied
  make_likelihood(config)
  for transform in {config.transform, *config.evaluate.transforms}:
    trace_sampler(run, transform, 1)  # it can be sampled
  return run


def check_classes(config: ConfigDict, workdir: Path, what: str) -> None:
  """Raise ValueError where `what` does not read the data, and nothing else says how many classes they have."""
  if config.task == 'images' and config.data.classes == -1 and not (workdir / 'config.json').exists():
    raise ValueError(f'config.data.classes is -1, as many as the data have, and {what}: type --config.data.classes=10, or '
                     '0 for none.')


def _check_shares(batch: int, devices: int, parts: int) -> None:
  """Raise ValueError if a batch cannot be cut evenly over the devices and the parts in which it is taken."""
  if batch % (devices * parts):
    taken = f', in config.train.accumulate={parts} parts,' if parts > 1 else ''
    raise ValueError(f'config.train.batch is {batch}, which {devices} devices{taken} cannot share evenly: choose a '
                     f'multiple of {devices * parts}.')


def keep_compiled() -> None:
  """Keep compiled programs in the user's cache directory, so that the next run of the same config starts at once."""
  cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'diffusion_jax' / 'compiled'
  jax.config.update('jax_compilation_cache_dir', os.environ.get('JAX_COMPILATION_CACHE_DIR', str(cache)))


def fresh_state(run: Run) -> Callable[[], State]:
  """A function that makes the state before the first step."""
  return partial(init_state, run.method.init, run.optimizer, tuple(run.config.train.ema), run.config.seed)


def open_checkpoints(run: Run) -> Checkpoints:
  return Checkpoints(run.workdir / 'checkpoints', run.config.checkpoint.keep)


def state_shapes(run: Run) -> State:
  """The state as shapes, with where they lie."""
  state = jax.eval_shape(fresh_state(run))
  places = sharding.shardings(state.params, run.config.sharding, run.mesh)
  return _placed(state, sharding.follow(state, state.params, places, run.mesh))


def new_state(run: Run) -> State:
  """The state before the first step, made where it lies."""
  return jax.jit(fresh_state(run), out_shardings=_places(state_shapes(run)))()


def batch_shapes(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of training as shapes, with where they lie. No data are read."""
  row = {**run.task.row, 'index': jax.ShapeDtypeStruct((), np.int32)}
  rows = {name: jax.ShapeDtypeStruct((run.config.train.batch, *leaf.shape), leaf.dtype) for name, leaf in row.items()}
  return _by_example(rows, run.mesh)


def _by_example(rows: PyTree, mesh: Mesh) -> PyTree:
  return _placed(rows, jax.tree.map(lambda leaf: meshes.by_example(mesh), rows))


def _placed(shapes: PyTree, places: PyTree) -> PyTree:
  """The shapes with where they lie."""
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)


def _places(placed: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: leaf.sharding, placed)


def restore(run: Run, checkpoints: Checkpoints) -> State | None:
  """The newest readable state of the run, None if there is none."""
  return checkpoints.restore(state_shapes(run))


def trace_step(run: Run, state: PyTree, batch: PyTree) -> jax.stages.Traced:
  """The one training step, traced on arrays or shapes: (Packed, batch) -> (Packed, metrics). It takes the memory of the state
  that it is given."""
  shapes = packed_shapes(state)
  def step(packed, batch):
    new, metrics = train_step(packed.state, batch, run.method.loss, run.method.update, run.optimizer, run.rate,
                              run.config.train.batch, run.config.train.accumulate)
    return shapes.like(new), metrics
  places = _places(shapes), meshes.replicated(run.mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=places).trace(shapes, batch)


def trained(run: Run) -> State:
  """The state of a run that has been trained. Raises ValueError where no checkpoint exists."""
  checkpoints = open_checkpoints(run) if (run.workdir / 'checkpoints').is_dir() else None
  state = restore(run, checkpoints) if checkpoints else None
  if state is None:
    raise ValueError(f'{run.workdir} holds no checkpoint yet: train first, with --mode=train.')
  checkpoints.close()
  return state


def chosen_ema(config: ConfigDict) -> str:
  """The name of the parameters to sample, of those that a run of this config keeps."""
  return optimizers.chosen_ema(config.train.ema, config.sample.ema)


def chosen_params(run: Run, state: State) -> PyTree:
  name = chosen_ema(run.config)
  return state.params if name == '0.0' else state.ema[name]


def trained_process(run: Run, state: State) -> Gaussian:
  """The process of the run, with what of it is learned on this host."""
  params = {name: part for name, part in chosen_params(run, state).items() if name != 'params'}
  return run.method.process(jax.tree.map(meshes.gather, params))


def sampling_program(run: Run, transform: str, keep: bool = False, strength: float | None = None,
                     inpaint: str = 'replace()') -> Callable:
  """(params, extra, index [B], cond, ...) -> samples, or, to keep the way, (xts, x0 estimates): a pure function.

  The noise of a sample follows from `seed`, config.sample.seed unless given, and its number in `index`. It may be given
  images x0 [B, ...] too, from which it starts, noised to the time `strength`, and not from pure noise if that is below 1;
  `source`, the condition of these images, with which the inverse of DDIM leads there in place of noise; and `known`, bool,
  which of their entries the samples are to have, by one of `_given`. `turn`, (seed [B], share [B]), turns the pure noise
  from which they start to that of another seed.
  """
  parts = make_sampling(run.config, transform)
  walk = sampling.trajectory if keep else sampling.sample
  def program(params, extra, index, cond, seed=None, image=None, known=None, source=None, turn=None):
    key = jax.random.key(run.config.sample.seed if seed is None else seed)
    keys, process, start = example_keys(key, index), run.method.process(params), None
    plain, grid = run.method.denoiser(params, extra), parts.grid
    denoiser = parts.transform(guidance.blend()(plain) if 'towards' in (cond or {}) else plain)
    if known is not None:
      denoiser = build(inpaint, _given(image, known))(denoiser)
    if strength is not None and strength < 1:
      grid = np.array([strength, *grid[grid < strength]])
      grid = grid[np.append(True, np.diff(grid) != 0)]  # what is left of a grid that rises may stand still
      if source is None:
        start, _ = process.corrupt(fold(keys, START), image, process.level(strength))
      else:
        start = sampling.sample(keys, process, solvers.ddim_inverse(3), plain, grid[::-1], run.task.shape, source, image)
    if turn is not None:
      seeds, share = turn
      others = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, index)
      start = sampling.slerp(*(sampling.begin(each, process, grid, run.task.shape) for each in (keys, others)), share)
    return walk(keys, process, parts.solver, denoiser, grid, run.task.shape, cond, start)
  return program


def _given(image: jax.Array, known: jax.Array) -> dict[str, Callable]:
  """The rows of constraints.py by which samples are made to have the known entries of an image."""
  see = lambda x0: jnp.where(known, x0, 0)
  return {'replace': lambda: constraints.replace(image, known), 'ddnm': lambda: constraints.ddnm(see, see(image)),
          'dps': partial(constraints.dps, see, see(image)), 'pigdm': partial(constraints.pigdm, see, see(image))}


def make_sampler(run: Run, transform: str, keep: bool = False) -> Callable:
  """The compiled sampling program as a function of (params, extra, index [B]), what to sample being task.context(index)."""
  program = jax.jit(sampling_program(run, transform, keep))
  def sampler(params, extra, index):
    return program(params, extra, *meshes.place((index, run.task.context(index)), run.mesh))
  return sampler


def trace_sampler(run: Run, transform: str, count: int) -> jax.stages.Traced:
  """The sampling program for one batch of `count`, traced on shapes. Raises ValueError where it cannot be."""
  state, index = state_shapes(run), np.arange(shared(run, count), dtype=np.int32)
  rows = _by_example((index, run.task.context(index)), run.mesh)
  return jax.jit(sampling_program(run, transform)).trace(chosen_params(run, state), state.extra, *rows)


def shared(run: Run, count: int) -> int:
  """`count` rounded up to what the devices can share evenly."""
  return -(-count // meshes.ways(run.mesh)) * meshes.ways(run.mesh)


def draw(run: Run, sampler: Callable, state: State, count: int, batch: int) -> np.ndarray:
  """Samples 0 to count - 1, uint8, `batch` at a time, rounded up to what the devices share; the surplus is cut off."""
  params = chosen_params(run, state)
  batch = shared(run, batch)
  parts = []
  for first in range(0, count, batch):
    index = np.arange(first, first + batch, dtype=np.int32)
    with jax.transfer_guard('disallow'):
      samples = meshes.gather(sampler(params, state.extra, index))
    parts.append(run.task.decode(samples))
  return np.concatenate(parts)[:count]


def provenance(run: Run, state: State, count: int, transform: str) -> dict:
  """What a number on samples needs beside it."""
  c = run.config
  return {'samples': count, 'step': int(state.step), 'solver': c.solver, 'grid': c.grid, 'transform': transform,
          'ema': chosen_ema(c), 'seed': c.sample.seed}
