"""Integrators of dx/du = f(u, x) for pytrees x with a leading batch axis; u is one number for all rows, or one a row.

An integrator is a function (f, x, start, end) -> (x at end, calls of f).
"""
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.types import combine, spread

Integrator = Callable[[Callable[[Array, PyTree], PyTree], PyTree, Array, Array], tuple[PyTree, Array]]

# Kutta 1901: nodes and weights; a stage looks at the one before it alone.
CLASSICAL = np.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]])
# Dormand and Prince 1980, table 2: nodes, stages, and the difference of the solutions of order 5 and 4.
NODES = np.array([1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1])
STAGES = np.array([
  [1 / 5, 0, 0, 0, 0, 0],
  [3 / 40, 9 / 40, 0, 0, 0, 0],
  [44 / 45, -56 / 15, 32 / 9, 0, 0, 0],
  [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0],
  [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0],
  [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]])
ERROR = np.array([71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40])


def fixed(steps: int = 100) -> Integrator:
  """The classical method of Runge and Kutta on even steps: order 4, 4 calls a step."""
  if steps < 1:
    raise ValueError(f'fixed needs steps >= 1; got {steps}.')
  def integrate(f, x, start, end):
    h = (end - start) / steps
    def step(x, i):
      def stage(carry, row):  # a loop, so that f is compiled once
        slope, total = carry
        slope = f(start + (i + row[0]) * h, combine((1.0, x), (row[0] * h, slope)))
        return (slope, combine((1.0, total), (row[1] * h, slope))), None
      (_, x), _ = jax.lax.scan(stage, (jax.tree.map(jnp.zeros_like, x), x), jnp.asarray(CLASSICAL))
      return x, None
    x, _ = jax.lax.scan(step, x, jnp.arange(steps))
    return x, jnp.asarray(4 * steps)
  return integrate


def adaptive(rtol: float = 1e-5, atol: float = 1e-5, most: int = 10_000) -> Integrator:
  """Dormand and Prince's pair of orders 5 and 4, every row of the batch with steps of its own: f gets u [B].

  A row's error is the root mean square of error / (atol + rtol max(|x|, |x_new|)); a step is taken where it is at most 1
  (Hairer, Norsett, Wanner, Solving ODEs I, sec. II.4). A row that has arrived stands still until all have: the calls are
  those of the slowest. One that has not after `most` steps, taken or not, or whose step no longer moves u, is NaN.
  """
  if rtol < 0 or atol < 0 or rtol + atol == 0 or most < 1:
    raise ValueError(f'adaptive needs rtol, atol >= 0, not both 0, and most >= 1; got {rtol}, {atol}, {most}.')
  def integrate(f, x, start, end):
    rows = jax.tree.leaves(x)[0].shape[0]
    start, end = (jnp.broadcast_to(jnp.asarray(each, jnp.result_type(float)), (rows,)) for each in (start, end))
    def attempt(state):
      u, h, x, slope, count = state
      h = jnp.where(jnp.abs(h) < jnp.abs(end - u), h, end - u)
      def stage(carry, row):  # a loop, so that f is compiled once
        slopes, _ = carry
        number, node, share = row
        ahead = combine((1.0, x), (h, _mix(share, jax.tree.map(lambda leaf: leaf[:-1], slopes))))
        return (_put(slopes, number, f(u + node * h, ahead)), ahead), None
      slopes = jax.tree.map(lambda leaf: jnp.zeros((len(ERROR), *leaf.shape), leaf.dtype), slope)
      stages = jnp.arange(1, len(ERROR)), jnp.asarray(NODES), jnp.asarray(STAGES)
      (slopes, ahead), _ = jax.lax.scan(stage, (_put(slopes, 0, slope), x), stages)
      size = _size(combine((h, _mix(jnp.asarray(ERROR), slopes))), x, ahead, rtol, atol)
      taken = size <= 1  # False for NaN, which then makes the step smaller
      factor = jnp.where(jnp.isfinite(size), jnp.clip(0.9 * jnp.maximum(size, 1e-10)**-0.2, 0.2, 5.0), 0.2)
      keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(spread(taken, a), a, b), new, old)
      last = jnp.abs(h) >= jnp.abs(end - u)
      u = jnp.where(taken, jnp.where(last, end, u + h), u)
      return u, h * factor, keep(ahead, x), keep(jax.tree.map(lambda leaf: leaf[-1], slopes), slope), count + 1
    unfinished = lambda state: ((state[0] != end) & (state[0] + state[1] != state[0])).any() & (state[4] < most)
    state = (start, (end - start) / 100, x, f(start, x), jnp.asarray(0))
    u, _, x, _, count = jax.lax.while_loop(unfinished, attempt, state)
    return jax.tree.map(lambda leaf: jnp.where(spread(u == end, leaf), leaf, jnp.nan), x), 1 + 6 * count
  return integrate


def _put(slopes: PyTree, number: Array | int, slope: PyTree) -> PyTree:
  return jax.tree.map(lambda stack, leaf: stack.at[number].set(leaf), slopes, slope)


def _mix(shares: Array, slopes: PyTree) -> PyTree:
  """sum_i shares_i slopes_i."""
  return jax.tree.map(lambda leaf: jnp.tensordot(shares, leaf, 1), slopes)


def _size(wrong: PyTree, x: PyTree, ahead: PyTree, rtol: float, atol: float) -> Array:
  """The root mean square of the scaled error of every row, [B]."""
  scale = lambda e, a, b: jnp.square(e / (atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))))
  squares = jax.tree.leaves(jax.tree.map(scale, wrong, x, ahead))
  total = sum(leaf.reshape(len(leaf), -1).sum(1) for leaf in squares)
  return jnp.sqrt(total / sum(np.prod(leaf.shape[1:], dtype=int) for leaf in squares))
