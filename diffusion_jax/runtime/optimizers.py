"""Optimizers, and moving averages of the parameters."""
from collections.abc import Sequence

import jax
import optax
from jax import numpy as jnp
from jaxtyping import Array, PyTree


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
  clipping = [optax.clip_by_global_norm(clip)] if clip else []
  return optax.chain(*clipping, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay))


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
