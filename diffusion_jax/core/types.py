"""The words that all of core speaks: levels, estimates, keys, and sums over pytrees."""
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PyTree

TIMES, NOISE, DROP, DROPOUT, LATENT, VIEW = range(6)  # what a training draw is for: Draw.part(TIMES)

Cond = dict[str, PyTree] | None
"""Raw conditions, one row an example ({'label': [B]}), or None. The condition 'known' is no wish but what is known of x0:
guidance leaves it in every branch. The entries `ASIDE` are not conditions. 'drop', {name: [B], bool}, marks what the
network replaces by its null: that is how training drops and how guidance asks for the unconditional. 'negative', {name:
condition}, is what guidance is to lead away from, in place of the null. 'towards', (share [B], {name: condition}), is what
`blend` is to lead to, and how far."""
ASIDE = 'drop', 'negative', 'towards'


class Level(NamedTuple):
  """A place on the way from data to noise. The axes of its entries are the first axes of x: (), [B], [B, frames]."""
  t: Float[Array, '...']
  alpha: Float[Array, '...']
  sigma: Float[Array, '...']

  @property
  def logsnr(self) -> Float[Array, '...']:
    """log(alpha^2 / sigma^2), in nats; +inf where sigma = 0, -inf where alpha = 0."""
    return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))


class Estimate(NamedTuple):
  """What a denoiser says of the data given xt: their mean, or for tokens their logits; and of the reverse step."""
  x0: PyTree
  variance: PyTree = None  # where log Var p(xs | xt) lies between its least, 0, and its largest, 1; None: 0
  aux: PyTree = None


class Draw(NamedTuple):
  """The randomness of some rows of a global batch; it does not depend on how the batch is cut into devices or slices."""
  key: Key[Array, '']  # of the step, the same for every row
  index: Int[Array, 'batch']  # of each row in the global batch
  total: int  # rows of the global batch

  @property
  def keys(self) -> Key[Array, 'batch']:
    return example_keys(self.key, self.index)

  def part(self, purpose: int) -> 'Draw':
    """The randomness for one purpose, independent of that for every other."""
    return self._replace(key=jax.random.fold_in(self.key, purpose))


class Learned(NamedTuple):
  """A part of the mathematics that has parameters of its own; they live with the network's.

  Those of a schedule are {'ends': ..., 'inner': ...}: the bound is trained by the first, its variance by the second.
  """
  init: Callable[[Key[Array, '']], PyTree]
  bind: Callable[[PyTree], Callable]  # parameters -> the part: a Schedule, ...


Schedule = Callable[[Array], tuple[Array, Array]]  # t -> (alpha, sigma)
Network = Callable[[PyTree, Array, Cond], PyTree]  # (scaled xt, time feature [B], cond) -> prediction; params bound
Denoiser = Callable[[PyTree, Level, Cond], Estimate]
Transform = Callable[[Denoiser], Denoiser]


def level_of(schedule: Schedule, t: ArrayLike) -> Level:
  """The level of a schedule at time t in [0, 1]."""
  t = jnp.asarray(t, jnp.result_type(float))
  return Level(t, *schedule(t))


def per_example(value: Array, x: PyTree) -> Array:
  """A number for every example of x, where one is given for all."""
  return jnp.broadcast_to(value, (jax.tree.leaves(x)[0].shape[0],)) if value.ndim == 0 else value


def example_keys(key: Key[Array, ''], index: Int[Array, 'batch']) -> Key[Array, 'batch']:
  """One key an example, folded from its index: the noise belongs to the example, not to the device that holds it."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def fold(keys: Key[Array, 'batch'], data: int | Array) -> Key[Array, 'batch']:
  """Fold the same number (a step, a purpose) into every example's key."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def split(keys: Key[Array, 'batch'], count: int) -> Key[Array, 'count batch']:
  """`count` independent keys for every example, the new axis first so that they unpack."""
  return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def normal(keys: Key[Array, 'batch'], like: PyTree) -> PyTree:
  """Standard normal noise of the shapes [B, ...] and dtypes of `like` (arrays or jax.ShapeDtypeStruct)."""
  leaves, tree = jax.tree.flatten(like)
  draw = lambda leaf, keys: jax.vmap(lambda key: jax.random.normal(key, leaf.shape[1:], leaf.dtype))(keys)
  return tree.unflatten([draw(leaf, fold(keys, i)) for i, leaf in enumerate(leaves)])


def spread(a: Array | float, x: Array) -> Array:
  """Give `a`, whose axes are the first axes of x, the rank of x: [B] becomes [B, 1, 1, 1]."""
  a = jnp.asarray(a)
  return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def dot(x: PyTree, y: PyTree) -> Array:
  """The sum of x y over all entries of an example, [B]."""
  return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a * b).reshape(len(a), -1), 1), x, y)))


def combine(*terms: tuple[Array | float, PyTree]) -> PyTree:
  """sum_i a_i x_i over the terms (a_i, x_i), for arrays and pytrees x; the axes of a_i are the first axes of x_i."""
  coefficients, xs = zip(*terms, strict=True)
  add = lambda *leaves: sum(spread(a, x) * x for a, x in zip(coefficients, leaves, strict=True))
  return jax.tree.map(add, *xs)
