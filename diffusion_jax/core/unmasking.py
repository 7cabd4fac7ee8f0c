"""Solvers of masked tokens: in which order the masks fall, and which tokens are masked again. One call a step.

Each is a step of `solvers`, for the process Masked alone; x are tokens [B, ...], and stay of their dtype. The last move, to
t = 0, is process.reverse, which reveals all that is left. `solvers.ancestral` reveals at random and masks nothing again.
"""
import math

import jax
from jax import numpy as jnp
from jaxtyping import Array, Key

from diffusion_jax.core.solvers import Solver, no_memory
from diffusion_jax.core.tokens import Masked, categorical
from diffusion_jax.core.types import Level, split, spread


def maskgit(temperature: float = 4.5) -> Solver:
  """Draw every masked token and keep the most confident: as many as leave round((1 - alpha_s) entries) masked at s, of all
  the entries of an example (MaskGIT, arXiv:2202.04200, sec. 3.2; it rounds up, its code down and at least to 1).

  The confidence is log p of the drawn token + temperature s G, with G ~ Gumbel(0, 1) and s the time to which the step goes,
  as in its code. What is revealed stays; a step between levels of one count reveals nothing. At temperature 0 the order is
  greedy and favours likely tokens, however good the denoiser. At a large one it is random: with an exact denoiser and steps
  of at most one entry the samples have the law of the data. Raises ValueError where temperature < 0 or is infinite.
  """
  if not 0 <= temperature < math.inf:
    raise ValueError(f'maskgit needs a finite temperature >= 0; got {temperature}.')
  def step(process, denoise, keys, x, t, s, memory):
    _check_masked('maskgit', process)
    what, order = split(keys, 2)
    logits, masked = denoise(x, t).x0, x == process.classes
    drawn = categorical(what, logits)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
    confidence = log_p + temperature * spread(s.t, x) * _gumbel(order, x)
    revealed = masked & ~_least(jnp.where(masked, confidence, jnp.inf), 1 - s.alpha)
    return jnp.where(revealed, drawn.astype(x.dtype), x), memory
  return Solver(no_memory, step)


def remdm(kind: str = 'cap', eta: float = 0.008) -> Solver:
  """Mask a revealed token again with probability sigma, and reveal a masked one with (alpha_s - (1 - sigma) alpha_t) /
  (1 - alpha_t), which keeps q(xs | x0) (ReMDM, arXiv:2503.00307, sec. 3 and 4): what was drawn too early is drawn again.

  With sigma_max = min(1, (1 - alpha_s) / alpha_t), sigma is min(eta, sigma_max) in 'cap' and eta sigma_max in 'rescale'.
  eta in [0, 1] is a probability a step, so that more steps mask more; at eta = 0 a step has the law of process.reverse.
  Raises ValueError on another kind or eta.
  """
  if kind not in REMASKING:
    raise ValueError(f'remdm has the kinds {", ".join(REMASKING)}; got {kind!r}.')
  if not 0 <= eta <= 1:
    raise ValueError(f'remdm needs 0 <= eta <= 1; got {eta}.')
  def step(process, denoise, keys, x, t, s, memory):
    _check_masked('remdm', process)
    down, up = split(keys, 2)
    sigma = REMASKING[kind](eta, _most(t, s))
    # More is revealed than at s, by what is masked again: alpha_s + sigma alpha_t, and sigma_max keeps that below 1.
    fewer = process.reverse(down, denoise(x, t), x, t, s._replace(alpha=s.alpha + sigma * t.alpha))
    more = process.forward(up, x, process.level(0.0), s._replace(alpha=1 - sigma))
    return jnp.where(x == process.classes, fewer, more), memory
  return Solver(no_memory, step)


REMASKING = {
  'cap': lambda eta, most: jnp.minimum(eta, most),
  'rescale': lambda eta, most: eta * most,
}


def _most(t: Level, s: Level) -> Array:
  """min(1, (1 - alpha_s) / alpha_t), 1 where nothing is revealed at t: more would leave too few revealed at s."""
  return jnp.where(t.alpha > 1 - s.alpha, (1 - s.alpha) / jnp.where(t.alpha > 0, t.alpha, 1.0), 1.0)


def _least(values: Array, share: Array) -> Array:
  """Which entries are among the round(share entries) least of their example [B, ...]; of equals, the first."""
  flat = values.reshape(len(values), -1)
  rank = jnp.argsort(jnp.argsort(flat, -1), -1)
  return (rank < spread(jnp.round(share * flat.shape[1]), rank)).reshape(values.shape)


def _gumbel(keys: Key[Array, 'batch'], like: Array) -> Array:
  """Gumbel(0, 1) noise for every entry; the default in float32 would lack its tail."""
  return jax.vmap(lambda key: jax.random.gumbel(key, like.shape[1:], mode='high'))(keys)


def _check_masked(name: str, process) -> None:
  if not isinstance(process, Masked):
    raise ValueError(f'{name} reveals the masks of the process Masked; got {type(process).__name__}. '
                     'Take solvers.ancestral(), which is for any process.')
