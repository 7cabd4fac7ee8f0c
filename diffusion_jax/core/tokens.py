"""Noising processes of tokens, whole numbers 0..classes - 1: what is noise here is a mask, or a token drawn at random.

alpha_t is the probability that a token has survived to t. Every entry of x is noised on its own. The denoiser's x0 are
logits [..., classes] of each clean token given the other entries of xt; what the entry itself tells, the process adds.
"""
import dataclasses

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key, PyTree

from diffusion_jax.core.types import Denoiser, Estimate, Level, Network, Schedule, level_of, per_example, split, spread


@dataclasses.dataclass(frozen=True)
class Masked:
  """A token survives with probability alpha_t and is the mask, number `classes`, otherwise (arXiv:2406.07524, eq. 4;
  arXiv:2406.04329, sec. 2). The schedule must end at alpha = 0: there all is mask."""
  schedule: Schedule
  classes: int

  def __post_init__(self):
    _check_classes(self.classes)
    with jax.ensure_compile_time_eval():
      left = float(self.schedule(jnp.ones(()))[0])
    if left != 0:
      raise ValueError(f'Masked needs a schedule with alpha = 0 at t = 1, where all is mask; this one ends at {left:.3g}. '
                       "Take 'flow()', 'cosine()' or another that reaches 0.")

  def level(self, t: ArrayLike) -> Level:
    return level_of(self.schedule, t)

  def prior(self, keys: Key[Array, 'batch'], like: PyTree, level: Level) -> Int[Array, '...']:
    """All mask."""
    _check_tokens(like)
    return jnp.full(like.shape, self.classes, like.dtype)

  def corrupt(self, keys, x0, level):
    """Draw (xt, which entries are masked)."""
    masked = _unit(keys, x0.shape) >= spread(level.alpha, x0)
    return jnp.where(masked, self.classes, x0), masked

  def forward(self, keys, xs, s, t):
    return jnp.where(_unit(keys, xs.shape) >= spread(t.alpha / s.alpha, xs), self.classes, xs)

  def reverse(self, keys, estimate, xt, t, s):
    """A masked entry is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), all at s = 0 (2406.07524, eq. 7)."""
    which, what = split(keys, 2)
    revealed = _unit(which, xt.shape) < spread(_revealed(t, s), xt)
    return jnp.where((xt == self.classes) & revealed, categorical(what, estimate.x0).astype(xt.dtype), xt)

  def divergence(self, estimate, x0, xt, t, s):
    """-log p(x0) of a masked entry times the probability that it is revealed (arXiv:2406.07524, eq. 8)."""
    return spread(_revealed(t, s), xt) * self._surprise(estimate, x0, xt)

  def rate(self, estimate, x0, xt, level):
    """-log p(x0) of a masked entry times -alpha' / (1 - alpha) (arXiv:2406.07524, eq. 10; also 2406.04329)."""
    return spread(-_slope(self.schedule, level) / _noised(level), xt) * self._surprise(estimate, x0, xt)

  def prior_divergence(self, x0, level):
    return jnp.zeros(x0.shape)

  def _surprise(self, estimate, x0, xt):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(estimate.x0), x0[..., None], -1)[..., 0]
    return jnp.where(xt == self.classes, -log_p, 0.0)


@dataclasses.dataclass(frozen=True)
class Uniform:
  """A token survives with probability alpha_t and is drawn uniformly from all otherwise (arXiv:2107.03006, app. A.2.1).

  The way back is p(xs | xt) in proportion to q(xt | xs) sum_x0 q(xs | x0) p(x0), D3PM's eq. 4. It is the true one if p(x0)
  is the law of x0 given the *other* entries of xt, because the factor q(xt | xs) holds what the entry itself tells.
  """
  schedule: Schedule
  classes: int

  def __post_init__(self):
    _check_classes(self.classes)

  def level(self, t: ArrayLike) -> Level:
    return level_of(self.schedule, t)

  def prior(self, keys: Key[Array, 'batch'], like: PyTree, level: Level) -> Int[Array, '...']:
    """Uniform tokens."""
    _check_tokens(like)
    return self._draw(keys, like)

  def corrupt(self, keys, x0, level):
    """Draw (xt, which entries were drawn anew)."""
    which, what = split(keys, 2)
    replaced = _unit(which, x0.shape) >= spread(level.alpha, x0)
    return jnp.where(replaced, self._draw(what, x0), x0), replaced

  def forward(self, keys, xs, s, t):
    which, what = split(keys, 2)
    return jnp.where(_unit(which, xs.shape) >= spread(t.alpha / s.alpha, xs), self._draw(what, xs), xs)

  def reverse(self, keys, estimate, xt, t, s):
    """Draw xs ~ p(xs | xt); at s = 0 it is a draw of x0."""
    return categorical(keys, self.step_law(jax.nn.log_softmax(estimate.x0), xt, t, s)).astype(xt.dtype)

  def divergence(self, estimate, x0, xt, t, s):
    true = self.step_law(self._known(x0), xt, t, s)
    return _gap(true, self.step_law(jax.nn.log_softmax(estimate.x0), xt, t, s)).sum(-1)

  def rate(self, estimate, x0, xt, level):
    """sum_y (r_p(y) - r_q(y) + r_q(y) log(r_q(y) / r_p(y))) over the tokens y != xt, where r(y) is the rate of the jump
    xt -> y on the way back, -alpha' / (alpha V) times the ratio of the laws of y and xt at t (2310.16834, theorem 3.6)."""
    true = self._ratios(self._known(x0), xt, level)
    ours = self._ratios(jax.nn.log_softmax(estimate.x0), xt, level)
    gaps = jnp.where(jax.nn.one_hot(xt, self.classes) > 0, 0.0, _gap(true, ours)).sum(-1)
    pace = -_slope(self.schedule, level) / (jnp.where(level.alpha > 0, level.alpha, jnp.inf) * self.classes)
    return spread(pace, xt) * gaps

  def prior_divergence(self, x0, level):
    """KL of alpha [x = x0] + (1 - alpha) / V from 1 / V."""
    rest = (1 - level.alpha) / self.classes
    gap = lambda p: _gap(jnp.log(p), -jnp.log(self.classes))
    return jnp.broadcast_to(spread(gap(level.alpha + rest) + (self.classes - 1) * gap(rest), x0), x0.shape)

  def step_law(self, log_p, xt, t, s):
    """log p(xs | xt) [..., classes] if the law of x0 given the other entries is p."""
    law = self._blurred(self._known(xt), t.alpha / s.alpha) + self._blurred(log_p, s.alpha)
    return law - jax.nn.logsumexp(law, -1, keepdims=True)

  def _ratios(self, log_p, xt, level):
    """The logarithm of the law of the noised token over its value at xt, for every token."""
    law = self._blurred(log_p, level.alpha)
    return law - jnp.take_along_axis(law, xt[..., None], -1)

  def _blurred(self, log_p, alpha):
    """log(alpha p + (1 - alpha) / V)."""
    return jnp.logaddexp(spread(jnp.log(alpha), log_p) + log_p, spread(jnp.log((1 - alpha) / self.classes), log_p))

  def _known(self, x):
    """log p where p is all on x."""
    return jnp.where(jax.nn.one_hot(x, self.classes) > 0, 0.0, -jnp.inf)

  def _draw(self, keys, like):
    draw = lambda key: jax.random.randint(key, like.shape[1:], 0, self.classes, like.dtype)
    return jax.vmap(draw)(keys)


def denoiser(network: Network) -> Denoiser:
  """The denoiser of tokens that a network of (xt, 1000 t, cond) is: what it returns are the logits of x0."""
  def denoise(xt, level, cond=None):
    return Estimate(network(xt, per_example(1000 * level.t, xt), cond))
  return denoise


def categorical(keys: Key[Array, 'batch'], logits: Array) -> Int[Array, '...']:
  """One draw for every entry of logits [B, ..., classes]; in float32 the default Gumbel noise would lack its tail."""
  return jax.vmap(lambda key, row: jax.random.categorical(key, row, mode='high'))(keys, logits)


def _unit(keys: Key[Array, 'batch'], shape: tuple[int, ...]) -> Array:
  """Uniform in [0, 1)."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)


def _revealed(t: Level, s: Level) -> Array:
  return (s.alpha - t.alpha) / _noised(t)


def _noised(level: Level) -> Array:
  """1 - alpha, to divide by: where it rounds to 0 nothing is masked."""
  return jnp.maximum(1 - level.alpha, jnp.finfo(level.alpha.dtype).tiny)


def _slope(schedule: Schedule, level: Level) -> Array:
  """d alpha / dt."""
  return jax.jvp(lambda t: schedule(t)[0], (level.t,), (jnp.ones_like(level.t),))[1]


def _gap(log_true: Array, log_ours: Array | float) -> Array:
  """ours - true + true log(true / ours), which summed over two laws is KL(true | ours): all terms >= 0, and exact also
  where the two are nearly equal."""
  true, ours, none = jnp.exp(log_true), jnp.exp(log_ours), jnp.isneginf(log_true)
  more = jnp.where(none, 0.0, log_ours - jnp.where(none, 0.0, log_true))
  near = jnp.abs(more) < 0.5
  small = jnp.where(near, more, 0.0)
  return jnp.where(near & ~none, true * (jnp.expm1(small) - small), ours - true - true * more)


def _check_tokens(like: PyTree) -> None:
  if not jnp.issubdtype(like.dtype, jnp.integer):
    raise ValueError(f'Tokens are whole numbers; got {like.dtype}. Give the shape with its dtype: '
                     'jax.ShapeDtypeStruct((length,), jnp.int32).')


def _check_classes(classes: int) -> None:
  if classes < 2:
    raise ValueError(f'A process of tokens needs 2 classes or more; got {classes}.')
