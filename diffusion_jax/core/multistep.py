"""Multistep solvers: one call of the denoiser a step, and a polynomial through what it said before.

Each is the first-order move `transfer`, which takes the newest prediction for the whole step, and a correction by the
integral of the polynomial's other part: exact for the linear part of the ODE (exponential integrators, arXiv:2204.13902).
With r = sigma / alpha and l = -log r the two forms are
  d(x / alpha) / dr = noise(r)   and   d(x / sigma) / dl = e^l x0(l).
A prediction made at alpha = 0, where r is infinite, is not remembered; the first steps are of lower order.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.solvers import Solver, below, check_eta, renoise, stretch, transfer
from diffusion_jax.core.targets import noise_of
from diffusion_jax.core.types import Level, combine

# Gauss and Legendre's nodes and weights on (0, 1): exact for the polynomials, to rounding for their exponential weights.
NODES, WEIGHTS = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2, np.polynomial.legendre.leggauss(16)[1] / 2


class History(NamedTuple):
  """The last predictions, the newest first, and the clocks at which they were made; NaN where there is none."""
  values: PyTree  # [count, ...] in every leaf
  clocks: Array  # [count]


class Place(NamedTuple):
  """A history, and where it ends: x at its newest level."""
  history: History
  x: PyTree
  level: Level


class Space(NamedTuple):
  """In what a solver's polynomials are: value(x, x0, level) over clock(level), integrated against measure(process, u, end),
  times scale(s)."""
  value: Callable
  clock: Callable
  measure: Callable
  scale: Callable


NOISE_OVER_RATIO = Space(
  lambda x, x0, level: noise_of(level, x, x0), lambda level: level.sigma / level.alpha,
  lambda process, u, end: jnp.ones_like(u), lambda s: s.alpha)
NOISE_OVER_LOG = NOISE_OVER_RATIO._replace(
  clock=lambda level: -0.5 * level.logsnr, measure=lambda process, u, end: jnp.exp(u - end), scale=lambda s: s.sigma)
NOISE_OVER_TIME = NOISE_OVER_RATIO._replace(
  clock=lambda level: level.t, measure=lambda process, u, end: _ratio_slope(process, u))
DATA_OVER_LOG = Space(
  lambda x, x0, level: x0, lambda level: 0.5 * level.logsnr,
  lambda process, u, end: jnp.exp(u - end), lambda s: s.alpha)


def lms(order: int = 4) -> Solver:
  """Adams and Bashforth's method for the noise over r = sigma / alpha, on any steps: the linear multistep sampler of
  k-diffusion, rhoAB-DEIS (arXiv:2204.13902, sec. 3.3)."""
  return _adams('lms', order, NOISE_OVER_RATIO)


def deis(order: int = 3, clock: str = 't') -> Solver:
  """DEIS: polynomials of the noise over t (tAB, arXiv:2204.13902, eq. 15) or over 'log_r', log(sigma / alpha)."""
  spaces = {'t': NOISE_OVER_TIME, 'log_r': NOISE_OVER_LOG}
  if clock not in spaces:
    raise ValueError(f"deis has the clocks 't' and 'log_r'; got {clock!r}.")
  return _adams('deis', order, spaces[clock])


def dpm_3m(eta: float = 0.0) -> Solver:
  """DPM-Solver++(3M): a parabola of x0 over log(alpha / sigma) (arXiv:2211.01095, app. B). Order 3.

  eta > 0 is its SDE: the parabola under the integral of the SDE's kernel, and fresh noise (solvers.renoise).
  Not the formula of diffusers 0.42.1 and k-diffusion 0.1.1, which take half of the parabola's second derivative: measured,
  theirs is of order 2.0 where this is of order 3.0.
  """
  return _adams('dpm_3m', 3, DATA_OVER_LOG, eta)


def unipc(order: int = 3) -> Solver:
  """UniPC: the polynomial of x0 over log(alpha / sigma), and, once the denoiser has answered at the new place, a correction
  of that place with the answer (arXiv:2302.04867, alg. 5-8). Order `order` + 1, one call a step.

  The coefficients are those of the full linear system (their eq. 5), which do not depend on the paper's choice of B(h).
  """
  space = DATA_OVER_LOG
  _check_order('unipc', order)
  def init(x):
    return Place(empty(x, order), x, Level(*(jnp.full((), jnp.nan) for _ in range(3))))
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    history, newest = memory.history, jax.tree.map(lambda leaf: leaf[0], memory.history.values)
    longer = push(history, x0, space.clock(t), order + 1)
    corrected = advance(process, space, transfer(memory.x, newest, memory.level, t), memory.level, t, longer, 1)
    known = ~jnp.isnan(history.clocks[0])
    x = jax.tree.map(lambda a, b: jnp.where(known, a, b), corrected, x)
    history = push(history, x0, space.clock(t), order)
    return advance(process, space, transfer(x, x0, t, s), t, s, history, 0), Place(history, x, t)
  return Solver(init, step, order=order + 1)


def ipndm(order: int = 4) -> Solver:
  """Improved PNDM: the noise extrapolated by Adams and Bashforth's coefficients for even steps, then a step of DDIM
  (arXiv:2204.13902, app. H.2). Order `order` on even steps of sigma / alpha, else 2 at most."""
  _check_order('ipndm', order)
  def init(x):
    return empty(x, order)
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    history = push(memory, noise_of(t, x, x0), t.t, order)
    count = jnp.sum(~jnp.isnan(history.clocks))
    table = np.zeros((5, order))
    for known, row in enumerate(EVEN[:order], 1):
      table[known, :known] = row
    shares = jnp.asarray(table)[count]
    noise = jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, 1), history.values)
    newest = jax.tree.map(lambda leaf: leaf[0], history.values)
    change = combine((1.0, noise), (-1.0, newest))
    return combine((1.0, transfer(x, x0, t, s)), (stretch(t, s), change)), history
  return Solver(init, step, order=min(order, 2))


EVEN = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def _adams(name: str, order: int, space: Space, eta: float = 0.0) -> Solver:
  """The explicit multistep method of this order in a space; for eta > 0, of x0 over its logarithm, that of the SDE."""
  _check_order(name, order)
  check_eta(name, eta)
  if eta:
    space = space._replace(measure=lambda process, u, end: (1 + eta) * jnp.exp((1 + eta) * (u - end)))
  def init(x):
    return empty(x, order)
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    history = push(memory, space.value(x, x0, t), space.clock(t), order)
    down = below(t, s, eta)
    moved = advance(process, space, transfer(x, x0, t, down), t, s, history, 0)
    return renoise(keys, moved, down, s), history
  return Solver(init, step, order=order if eta == 0 else None)


def empty(x: PyTree, count: int) -> History:
  """A history of nothing."""
  return History(jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), x), jnp.full(count, jnp.nan))


def push(history: History, value: PyTree, clock: Array, count: int) -> History:
  """The history with a newer prediction, at most `count` in all."""
  add = lambda stack, leaf: jnp.concatenate([leaf[None], stack])[:count]
  clocks = jnp.where(jnp.isfinite(clock), clock, jnp.nan)[None]
  return History(jax.tree.map(add, history.values, value), jnp.concatenate([clocks, history.clocks])[:count])


def advance(process, space: Space, first: PyTree, t: Level, s: Level, history: History, own: int) -> PyTree:
  """The first-order move from t to s, corrected by the polynomial through the history, whose number `own` is made at t."""
  start, end = space.clock(t), space.clock(s)
  known = jnp.isfinite(start) & jnp.isfinite(end)
  start, end = jnp.where(known, start, 0.0), jnp.where(known, end, 1.0)
  present = known & ~jnp.isnan(history.clocks)
  nodes = jnp.where(present, history.clocks, 0.0)
  u = start + (end - start) * NODES
  shares = (WEIGHTS * (end - start) * space.measure(process, u, end)) @ _basis(u, nodes, present)
  shares = jnp.where(present, shares, 0.0) * space.scale(s)
  change = lambda base, stack: base + jnp.tensordot(shares.astype(stack.dtype), stack - stack[own][None], 1)
  return jax.tree.map(change, first, history.values)


def _basis(u: Array, nodes: Array, present: Array) -> Array:
  """Lagrange's polynomials of the nodes that are present, at u: [len(u), len(nodes)]."""
  other = present[None, :] & ~np.eye(len(nodes), dtype=bool)  # [j, i]: i is a factor of the polynomial of j
  gaps = jnp.where(other, nodes[:, None] - nodes[None, :], 1.0)
  factors = jnp.where(other[None], (u[:, None, None] - nodes[None, None, :]) / gaps[None], 1.0)
  return factors.prod(-1)


def _ratio_slope(process, t: Array) -> Array:
  """d (sigma / alpha) / dt."""
  alpha, sigma = process.schedule(t)
  alpha_slope, sigma_slope = process.slopes(t)
  return (sigma_slope * alpha - sigma * alpha_slope) / alpha**2


def _check_order(name: str, order: int) -> None:
  if not 1 <= order <= 4:
    raise ValueError(f'{name} has the orders 1 to 4; got {order}.')
