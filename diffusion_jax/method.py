"""config -> Method: the one place where the mathematics meets the networks."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.build import build, rows
from diffusion_jax.core import grids, guidance, losses, schedules, solvers, targets, times, weights
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.solvers import Solver
from diffusion_jax.core.targets import Target
from diffusion_jax.core.types import Denoiser, Draw, Network, Schedule, Transform
from diffusion_jax.networks import embed, unet
from diffusion_jax.tasks.task import Task

NETWORKS = {'UNet': unet.UNet}


class Method(NamedTuple):
  """What is trained."""
  init: Callable  # key -> (params, extra)
  loss: Callable  # (params, extra, draw, batch) -> (losses [B], extra, metrics)
  denoiser: Callable[[PyTree, PyTree], Denoiser]  # (params, extra) -> denoiser
  process: Gaussian


class Sampling(NamedTuple):
  """How a method is sampled."""
  solver: Solver
  grid: np.ndarray
  transform: Transform


def make_method(config: ConfigDict, task: Task) -> Method:
  """The method of a config for a task. Raises ValueError, before anything is compiled, where a field is illegal."""
  process = Gaussian(_build(config, 'schedule', rows(schedules, Schedule)))
  target, space = (_build(config, name, rows(targets, Target)) for name in ('target', 'space'))
  law = _build(config, 'times', rows(times, times.Times))
  weight = _build(config, 'weight', rows(weights, weights.Weight))
  if not 0 <= config.train.drop <= 1:
    raise ValueError(f'config.train.drop is {config.train.drop}; a probability between 0 and 1 is legal.')
  loss = losses.regression(process, target, law, weight, space)
  net = make_network(config, task)

  def init(key):
    x, cond = _example(task)
    return jax.jit(net.init)(key, x, jnp.zeros(1), cond), {}

  def network(params, dropout_keys=None) -> Network:
    def call(x, feature, cond):
      if 'drop' in (cond or {}) and not (config.train.drop and task.classes):
        raise ValueError('Guidance needs a network that was trained with dropped conditions: this one has '
                         f'{task.classes} classes and config.train.drop={config.train.drop}. Leave guide(...) out of the '
                         'transform, or train with config.train.drop=0.1.')
      return net.apply(params, x, feature, cond, dropout_keys)
    return call

  def training_loss(params, extra, draw: Draw, batch):
    x0, cond = task.encode(batch)
    if cond is not None and config.train.drop:
      chance = lambda key: jax.random.bernoulli(key, config.train.drop)
      cond = {**cond, 'drop': jax.vmap(chance)(draw.part(2).keys)}
    return loss(network(params, draw.part(3).keys), draw, x0, cond), extra, {}

  denoiser = lambda params, extra: targets.denoiser(process, target, network(params))
  return Method(init, training_loss, denoiser, process)


def make_network(config: ConfigDict, task: Task) -> nn.Module:
  """The backbone of config.network with an embedder for every condition of the task. Raises ValueError where the
  network's fields contradict each other or the task's shape."""
  backbone = build(config.network, NETWORKS)
  backbone = backbone.clone(out_channels=task.shape[-1], axes=len(task.shape) - 1)
  embedders = {'label': embed.Label(task.classes, backbone.vector_size)} if task.classes else {}
  net = embed.Conditional(backbone, embedders)
  x, cond = _example(task)
  jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), cond)
  return net


def make_sampling(config: ConfigDict, method: Method, transform: str) -> Sampling:
  """The solver and grid of a config with a transform. Raises ValueError where the grid touches a singular point."""
  grid = np.asarray(_build(config, 'grid', rows(grids, grids.Grid))(method.process.schedule))
  target = _build(config, 'target', rows(targets, Target))
  targets.check_grid(method.process, target, grid, f'config.target {config.target!r}')
  return Sampling(_build(config, 'solver', rows(solvers, Solver)), grid,
                  build(transform, rows(guidance, Transform), join=guidance.chain))


def _build(config: ConfigDict, field: str, names: dict[str, Callable]) -> Any:
  try:
    return build(config[field], names)
  except ValueError as error:
    raise ValueError(f'config.{field}: {error}') from error


def _example(task: Task) -> tuple[jax.Array, dict | None]:
  """One example of zeros, for shapes."""
  cond = task.context(np.zeros(1, np.int32))
  return jnp.zeros((1, *task.shape)), cond
