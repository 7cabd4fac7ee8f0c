"""Optimizers, and moving averages of the parameters."""
import re
from collections.abc import Sequence

import jax
import optax
from jax import numpy as jnp
from jaxtyping import Array, PyTree
from optax import contrib


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
  return _clipped(clip, contrib.muon(
      rate, eps=eps, weight_decay=weight_decay, adam_b1=b1, adam_b2=b2, adam_weight_decay=weight_decay,
      muon_weight_dimension_numbers=_matrices, consistent_rms=0.2))


def _clipped(clip: float, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer on gradients clipped to the global norm `clip`, 0: not clipped."""
  return optax.chain(*[optax.clip_by_global_norm(clip)] * bool(clip), optimizer)


def _matrices(params: PyTree) -> PyTree:
  """Which axes of each parameter are the rows and the columns of Muon's matrix; None for all that it leaves."""
  def axes(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if not name.endswith('/kernel') or re.search(r'embedding|backbone/(in|out)/', name):
      return None
    stacked = int(bool(re.search(r'_to_\d+/', name)))
    return contrib.MuonDimensionNumbers(tuple(range(stacked, leaf.ndim - 1)), leaf.ndim - 1)
  return jax.tree_util.tree_map_with_path(axes, params)


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
