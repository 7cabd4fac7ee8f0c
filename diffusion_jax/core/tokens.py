"""Noising processes of tokens, whole numbers 0..classes - 1: what is noise here is a mask, or a token drawn at random.

alpha_t is the probability that a token has survived to t. Every entry of x is noised on its own. The denoiser's x0 are
logits [..., classes] of each clean token given the other entries of xt; what the entry itself tells, the process adds.
"""
import dataclasses

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key, PyTree

from diffusion_jax.core.types import Denoiser, Estimate, Level, Network, Schedule, split, spread


@dataclasses.dataclass(frozen=True)
class Masked:
  """A token survives with probability alpha_t and is the mask, number `classes`, otherwise (arXiv:2406.04329, eq. 1;
  arXiv:2406.07524, eq. 7). The schedule must end at alpha = 0: there all is mask."""
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
    t = jnp.asarray(t, jnp.result_type(float))
    return Level(t, *self.schedule(t))

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
    """A masked entry is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t), all at s = 0."""
    which, what = split(keys, 2)
    revealed = _unit(which, xt.shape) < spread(_revealed(t, s), xt)
    return jnp.where((xt == self.classes) & revealed, categorical(what, estimate.x0).astype(xt.dtype), xt)

  def divergence(self, estimate, x0, xt, t, s):
    """-log p(x0) of a masked entry times the probability that it is revealed (arXiv:2406.07524, eq. 8)."""
    return spread(_revealed(t, s), xt) * self._surprise(estimate, x0, xt)

  def rate(self, estimate, x0, xt, level):
    """-log p(x0) of a masked entry times -alpha' / (1 - alpha) (arXiv:2406.04329, eq. 5; arXiv:2406.07524, eq. 10)."""
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
    t = jnp.asarray(t, jnp.result_type(float))
    return Level(t, *self.schedule(t))

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
    return categorical(keys, jnp.log(self.step_law(jax.nn.softmax(estimate.x0), xt, t, s))).astype(xt.dtype)

  def divergence(self, estimate, x0, xt, t, s):
    true = self.step_law(jax.nn.one_hot(x0, self.classes), xt, t, s)
    ours = self.step_law(jax.nn.softmax(estimate.x0), xt, t, s)
    return _gap(true, ours).sum(-1)

  def rate(self, estimate, x0, xt, level):
    """sum_y (r_p(y) - r_q(y) + r_q(y) log(r_q(y) / r_p(y))) over the tokens y != xt, where r(y) is the rate of the jump
    xt -> y on the way back, -alpha' / (alpha V) times the ratio of the laws of y and xt at t (arXiv:2310.16834, eq. 10)."""
    true = self._ratios(jax.nn.one_hot(x0, self.classes), xt, level)
    ours = self._ratios(jax.nn.softmax(estimate.x0), xt, level)
    gaps = jnp.where(jax.nn.one_hot(xt, self.classes) > 0, 0.0, _gap(true, ours)).sum(-1)
    pace = -_slope(self.schedule, level) / (jnp.where(level.alpha > 0, level.alpha, jnp.inf) * self.classes)
    return spread(pace, xt) * gaps

  def prior_divergence(self, x0, level):
    """KL of alpha [x = x0] + (1 - alpha) / V from 1 / V."""
    rest = (1 - level.alpha) / self.classes
    here = level.alpha + rest
    value = _gap(here, 1 / self.classes) + (self.classes - 1) * _gap(rest, 1 / self.classes)
    return jnp.broadcast_to(spread(value, x0), x0.shape)

  def step_law(self, p, xt, t, s):
    """p(xs | xt) [..., classes] if the law of x0 given the other entries is p."""
    step = t.alpha / s.alpha
    law = self._blurred(jax.nn.one_hot(xt, self.classes), step) * self._blurred(p, s.alpha)
    return law / law.sum(-1, keepdims=True)

  def _ratios(self, p, xt, level):
    """The law of the noised token over its value at xt, for every token."""
    law = self._blurred(p, level.alpha)
    return law / jnp.take_along_axis(law, xt[..., None], -1)

  def _blurred(self, p, alpha):
    """alpha p + (1 - alpha) / V."""
    return spread(alpha, p) * p + spread((1 - alpha) / self.classes, p)

  def _draw(self, keys, like):
    draw = lambda key: jax.random.randint(key, like.shape[1:], 0, self.classes, like.dtype)
    return jax.vmap(draw)(keys)


def denoiser(network: Network) -> Denoiser:
  """The denoiser of tokens that a network of (xt, 1000 t, cond) is: what it returns are the logits of x0."""
  def denoise(xt, level, cond=None):
    batch = jax.tree.leaves(xt)[0].shape[0]
    feature = jnp.broadcast_to(1000 * level.t, (batch,)) if level.t.ndim == 0 else 1000 * level.t
    return Estimate(network(xt, feature, cond))
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


def _gap(true: Array, ours: Array | float) -> Array:
  """ours - true + true log(true / ours), which summed over two laws is KL(true | ours): all terms >= 0, and exact also
  where the two are nearly equal."""
  safe = jnp.where(true > 0, true, 1.0)
  d = (ours - true) / safe
  near = jnp.abs(d) < 0.5
  far = jnp.where(near | (true <= 0), 1.0, ours)
  log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, d, 0.0)), jnp.log(far) - jnp.log(safe))
  return jnp.where(true > 0, true * (d - log_ratio), ours)


def _check_tokens(like: PyTree) -> None:
  if not jnp.issubdtype(like.dtype, jnp.integer):
    raise ValueError(f'Tokens are whole numbers; got {like.dtype}. Give the shape with its dtype: '
                     'jax.ShapeDtypeStruct((length,), jnp.int32).')


def _check_classes(classes: int) -> None:
  if classes < 2:
    raise ValueError(f'A process of tokens needs 2 classes or more; got {classes}.')
