"""Optimizers, and moving averages of the parameters."""
import math
import re
from collections.abc import Sequence
from functools import partial, reduce

import jax
import optax
from jax import numpy as jnp
from jaxtyping import Array, Float, PyTree

from diffusion_jax.runtime.sharding import name_of


def schedule(rate: float, warmup: int, decay: str, steps: int) -> optax.Schedule:
  """A linear warm-up over `warmup` steps to `rate`, then constant, or along a cosine to 0 at `steps`."""
  if decay == 'cosine':
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(steps, warmup + 1))
  if decay == 'constant':
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)], [warmup])
  raise ValueError(f"config.optimizer.decay is {decay!r}; legal are 'cosine' and 'constant'.")


def adamw(rate: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float,
          clip: float) -> optax.GradientTransformation:
  """AdamW (arXiv:1711.05101) on gradients clipped to the global norm `clip` (0: not clipped)."""
  return _clipped(clip, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay))


def muon(rate: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float,
         clip: float) -> optax.GradientTransformation:
  """Muon (Jordan, 2024): kernels of inner layers move by their momentum with all its singular values brought near 1, times
  0.2 sqrt(max(fan in, fan out)), as far as AdamW moves them, whose rate so serves (arXiv:2502.16982, eq. 4).

  The momentum is Nesterov's, with 0.95. All else, and a backbone's first and last layer, moves by NAdamW with b1 and b2.
  A convolution is the matrix from all that it reads to its channels; of layers that are stacked for a scan each is one.
  """
  kernels = optax.chain(optax.trace(0.95, nesterov=True), optax.stateless(lambda updates, _: _orthogonalized(updates)),
                        optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate))
  rest = optax.nadamw(rate, b1, b2, eps, weight_decay=weight_decay)
  return _clipped(clip, optax.partition({'kernels': kernels, 'rest': rest}, _parts))


@partial(jnp.vectorize, signature='(m,n)->(m,n)')
def orthogonal(x: Float[Array, 'm n']) -> Float[Array, 'm n']:
  """U V^T, about, of a matrix x = U S V^T: five steps s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 from s / |x| bring each s
  that is 0.002 |x| or more between 0.68 and 1.21 (Newton-Schulz; Jordan, 2024).

  Each step multiplies x by a polynomial of the small matrix x^T x. These commute, so x itself is multiplied only twice.
  """
  if x.shape[0] < x.shape[1]:
    return orthogonal(x.T).T
  times = partial(jnp.matmul, precision='highest')
  x = x / (jnp.linalg.norm(x) + 1e-8)
  gram, steps = times(x.T, x), []
  for _ in range(5):
    step = 3.4445 * jnp.eye(len(gram), dtype=x.dtype) - 4.7750 * gram + 2.0315 * times(gram, gram)
    gram, steps = times(times(step, gram), step), [*steps, step]
  return times(x, reduce(times, steps))


def _clipped(clip: float, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer on gradients clipped to the global norm `clip`, 0: not clipped."""
  return optax.chain(*[optax.clip_by_global_norm(clip)] * bool(clip), optimizer)


def _orthogonalized(updates: PyTree) -> PyTree:
  """Every kernel orthogonal, times 0.2 sqrt(max(fan in, fan out))."""
  def move(path, leaf):
    stacked = bool(re.search(r'_to_\d+/', name_of(path)))
    matrix = leaf.reshape(*leaf.shape[:stacked], -1, leaf.shape[-1])
    return (0.2 * math.sqrt(max(matrix.shape[-2:])) * orthogonal(matrix)).reshape(leaf.shape)
  return jax.tree_util.tree_map_with_path(move, updates)


def _parts(params: PyTree) -> PyTree:
  """'kernels' for those of inner layers, 'rest' for all other parameters."""
  def part(path, _):
    inner = name_of(path).endswith('/kernel') and not re.search(r'embedding|backbone/(in|out)/', name_of(path))
    return 'kernels' if inner else 'rest'
  return jax.tree_util.tree_map_with_path(part, params)


OPTIMIZERS = {'adamw': adamw, 'muon': muon}


def ema_decay(decay: float, step: Array) -> Array:
  """The decay at a step, with a ramp-up so that the first parameters are soon forgotten: min(decay, (1 + n) / (10 + n))."""
  return jnp.minimum(decay, (1 + step) / (10 + step))


def chosen_ema(decays: Sequence[float], wanted: float) -> str:
  """The name of the parameters to sample: a decay of train.ema, by default (-1) the first, or '0.0' for the parameters
  themselves."""
  if wanted == -1:
    return str(decays[0]) if decays else '0.0'
  if wanted != 0 and wanted not in decays:
    raise ValueError(f'config.sample.ema is {wanted}; this run keeps {tuple(decays)}, 0.0 means the parameters themselves.')
  return str(float(wanted))


def update_emas(emas: dict[str, PyTree], params: PyTree, step: Array) -> dict[str, PyTree]:
  """Every moving average one step on; its name is its decay."""
  def move(average, value, decay):
    return (average * decay + value * (1 - decay)).astype(average.dtype)
  return {name: jax.tree.map(lambda a, b, d=ema_decay(float(name), step): move(a, b, d), average, params)
          for name, average in emas.items()}
