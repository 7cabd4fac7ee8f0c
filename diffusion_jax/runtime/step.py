"""The training state and the one pure step that moves it."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.types import Draw
from diffusion_jax.runtime import optimizers
from diffusion_jax.runtime.sharding import name_of


class State(NamedTuple):
  """All that a resumed run needs; the position in the data follows from `step`."""
  step: Array
  params: PyTree
  optimizer: PyTree
  ema: dict[str, PyTree]
  extra: PyTree
  key: Array  # jax.random.key_data
  skipped: Array  # steps whose loss or gradient was not finite
  in_row: Array  # of these, the ones since the last finite step


def init_state(init: Callable, optimizer: optax.GradientTransformation, decays: tuple[float, ...], seed: int) -> State:
  """The state before the first step. `init(key)` gives (params, extra)."""
  init_key, key = jax.random.split(jax.random.key(seed))
  params, extra = init(init_key)
  zero = jnp.zeros((), jnp.int32)
  # Copies, because a donated buffer may be given only once.
  emas = {str(decay): jax.tree.map(jnp.copy, params) for decay in decays}
  return State(zero, params, optimizer.init(params), emas, extra, jax.random.key_data(key), zero, zero)


def train_step(state: State, batch: dict, loss: Callable, update: Callable, optimizer: optax.GradientTransformation,
               rate: optax.Schedule, total: int, parts: int = 1) -> tuple[State, dict[str, Array]]:
  """One update on the mean loss of a global batch of `total` examples, and its metrics.

  `loss(params, extra, draw, batch)` gives (losses [B], news, metrics), and `update(extra, news)` what the news of all
  examples, in the order of their index, make of `extra`. The batch is taken in `parts`, one after the other, whose
  gradients and metrics are averaged: all that is kept for the backward pass is that of one part.

  Where the loss or the gradient is not finite nothing changes but the counts, and metrics['finite'] is False;
  metrics['broken'] has, for each parameter, how many entries of its gradient are not finite.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  def gradient(rows):
    def objective(params):
      losses, news, metrics = loss(params, state.extra, Draw(key, rows['index'], total), rows)
      return losses.mean(), (news, metrics)
    (value, (news, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    return (value, metrics, grads), news
  (value, metrics, grads), news = _in_parts(gradient, batch, parts)
  order = jnp.argsort(batch['index'])
  extra = update(state.extra, jax.tree.map(lambda rows: rows[order], news))
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(value) & jnp.isfinite(norm)
  updates, moments = optimizer.update(grads, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optimizers.update_emas(state.ema, params, state.step)
  old, new = (state.params, state.optimizer, state.ema, state.extra), (params, moments, ema, extra)
  kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
  skipped, in_row = state.skipped + ~finite, jnp.where(finite, 0, state.in_row + 1)
  broken = jnp.stack([jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)])
  metrics = {'loss': value, 'grad_norm': norm, 'rate': rate(state.step), 'skipped': skipped, 'in_row': in_row,
             'finite': finite, 'broken': broken, **metrics}
  return State(state.step + 1, *kept, state.key, skipped, in_row), metrics


def _in_parts(function: Callable[[PyTree], tuple[PyTree, PyTree]], batch: PyTree, parts: int) -> tuple[PyTree, PyTree]:
  """function(batch), computed for `parts` parts of the rows one after the other: the mean of its first result over the
  parts, and the rows of its second."""
  if parts == 1:
    return function(batch)
  # Part i has the rows i, i + parts, ...: rows stay on the device that has them.
  cut = jax.tree.map(lambda rows: rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1), batch)
  like, _ = jax.eval_shape(function, jax.tree.map(lambda rows: rows[0], cut))
  def add(total, rows):
    means, news = function(rows)
    return jax.tree.map(jnp.add, total, means), news
  sums, news = jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), cut)
  join = lambda rows: rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:])
  return jax.tree.map(lambda leaf: leaf / parts, sums), jax.tree.map(join, news)


def worst_layer(params: PyTree, broken: Array) -> str:
  """The parameter, named by its path, whose gradient has the most entries that are not finite, from metrics['broken']."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  path, leaf = leaves[int(broken.argmax())]
  if not broken.max():
    return 'its gradient is finite in all parameters'
  return (f'the worst layer is {name_of(path)}, with {int(broken.max())} of {leaf.size} entries of its gradient not '
          'finite')
