"""Multistep solvers: one call of the denoiser a step, and a polynomial through what it said before.

Each is the first-order move `transfer`, which takes the newest prediction for the whole step, and a correction by the
integral of the polynomial's other part: exact for the linear part of the ODE (exponential integrators, arXiv:2204.13902).
With r = sigma / alpha and l = -log r the two forms are
  d(x / alpha) / dr = noise(r)   and   d(x / sigma) / dl = e^l x0(l).
A prediction whose clock is infinite, as r and l are at alpha = 0, is not remembered; the first steps are of lower order.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core.solvers import Solver, below, check_eta, is_ode, renoise, stretch, transfer
from diffusion_jax.core.targets import noise_of
from diffusion_jax.core.types import Level, combine

# Gauss and Legendre's nodes and weights on (0, 1): exact for the polynomials, to rounding for their exponential weights.
NODES, WEIGHTS = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2, np.polynomial.legendre.leggauss(16)[1] / 2


class History(NamedTuple):
  """The last predictions, the newest first, and the clocks at which they were made; NaN where there is none."""
  values: PyTree  # [count, ...] in every leaf
  clocks: Array  # [count]


class Place(NamedTuple):
  """A history, and where it ends: x at its newest level, and the noise that was added on the way from there."""
  history: History
  x: PyTree
  level: Level
  noise: PyTree  # () for an ODE


class Space(NamedTuple):
  """In what a solver's polynomials are: value(x, x0, level) over clock(level), integrated against measure(process, u, end),
  times scale(s)."""
  value: Callable
  clock: Callable
  measure: Callable
  scale: Callable
  pace: float | Array = 1.0  # of a step in the exponent of the measure


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


def dpm_2m(eta: float = 0.0, kind: str = 'midpoint') -> Solver:
  """DPM-Solver++(2M): the line of x0 over log(alpha / sigma), at its middle (arXiv:2211.01095, alg. 2). Order 2.

  'heun' integrates the line (diffusers' name). eta > 0 is SDE-DPM-Solver++(2M) (app. D): a move to less noise, and fresh
  noise (solvers.renoise).
  """
  kinds = {'midpoint': B['b2'], 'heun': None}
  if kind not in kinds:
    raise ValueError(f"dpm_2m has the kinds 'midpoint' and 'heun'; got {kind!r}.")
  return _adams('dpm_2m', 2, DATA_OVER_LOG, eta, kinds[kind])


def dpm_3m(eta: float = 0.0) -> Solver:
  """DPM-Solver++(3M): a parabola of x0 over log(alpha / sigma) (arXiv:2211.01095, app. B). Order 3.

  eta > 0 is its SDE: the parabola under the integral of the SDE's kernel, and fresh noise (solvers.renoise).
  Not the formula of diffusers 0.42.1 and k-diffusion 0.1.1, which take half of the parabola's second derivative: measured,
  theirs is of order 2.0 where this is of order 3.0.
  """
  return _adams('dpm_3m', 3, DATA_OVER_LOG, eta)


def unipc(order: int = 3, variant: str = 'vary') -> Solver:
  """UniPC: the polynomial of x0 over log(alpha / sigma), and, once the denoiser has answered at the new place, a correction
  of that place with the answer (arXiv:2302.04867, alg. 5-8). Order `order` + 1, one call a step.

  The coefficients solve the full linear system (their eq. 5; UniPC_v), where B(h) drops out. The variants 'b1', B = h, and
  'b2', B = e^h - 1, differ from 'vary' where two predictions are known: there they take a half (app. F).
  """
  _check_variant('unipc', variant)
  return _corrected('unipc', order, order + 1, lambda t: 0.0, B[variant])


def sa_solver(predictor: int = 3, corrector: int = 4, tau: float = 1.0, during: tuple[float, float] = (0.0, 1.0),
              variant: str = 'vary') -> Solver:
  """SA-Solver: stochastic Adams' predictor and corrector of x0 over log(alpha / sigma) (arXiv:2309.05019, eq. 14 and 17).

  `predictor` and `corrector` count predictions, the corrector's the new one too; corrector 0 is none. tau scales the noise
  of the SDE while t is in `during`: 0 is the ODE, 1 the reverse SDE. One call a step. `variant` is that of `unipc`; with
  'b1' it has the extra term of diffusers at order 2.
  """
  if tau < 0 or not 0 <= during[0] < during[1] <= 1:
    raise ValueError(f'sa_solver needs tau >= 0 and during=(low, high), 0 <= low < high <= 1; got {tau}, {during}.')
  _check_variant('sa_solver', variant)
  inside = lambda t: (during[0] <= t) & (t <= during[1])
  return _corrected('sa_solver', predictor, corrector, lambda t: jnp.where(inside(t), tau**2, 0.0) if tau else 0.0,
                    B[variant])


def ipndm(order: int = 4) -> Solver:
  """Improved PNDM: the noise extrapolated by Adams and Bashforth's coefficients for even steps, then a step of DDIM
  (arXiv:2204.13902, app. H.2). Order `order` on even steps of sigma / alpha, else 2 at most."""
  _check_order('ipndm', order)
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    history = push(memory, noise_of(t, x, x0), t.t, order)
    return with_noise(x, x0, t, s, _even(history)), history
  return Solver(lambda x: empty(x, order), step, order=min(order, 2))


def pndm(start: str = 'rk') -> Solver:
  """PNDM: `ipndm` of order 4 whose first steps, three of Runge and Kutta's ('rk', arXiv:2202.09778, alg. 2) or one of
  Heun's ('heun', the PLMS of Stable Diffusion), give it a history. Nine calls more in all, or one."""
  starts = {'rk': (_runge_kutta, 3, 9), 'heun': (_heun, 1, 1)}
  if start not in starts:
    raise ValueError(f"pndm has the starts 'rk' and 'heun'; got {start!r}.")
  begin, steps, calls = starts[start]
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    history = push(memory, noise_of(t, x, x0), t.t, 4)
    known = jnp.sum(~jnp.isnan(history.clocks))
    noise = jax.lax.cond(known <= steps, lambda: begin(process, denoise, x, x0, t, s), lambda: _even(history))
    return with_noise(x, x0, t, s, noise), history
  return Solver(lambda x: empty(x, 4), step, order=2, more=calls)


EVEN = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
B = {'vary': None, 'b1': lambda h: h, 'b2': jnp.expm1}  # of UniPC


def with_noise(x: PyTree, x0: PyTree, t: Level, s: Level, noise: PyTree) -> PyTree:
  """The step of DDIM from xt to s with this noise in place of that which x0 leaves."""
  return combine((1.0, transfer(x, x0, t, s)), (stretch(t, s), noise), (-stretch(t, s), noise_of(t, x, x0)))


def _even(history: History) -> PyTree:
  """Adams and Bashforth's mean of the values that are known, as if their clocks were even."""
  size = len(history.clocks)
  table = np.array([np.pad(row, (0, size - len(row))) for row in EVEN[:size]])
  shares = jnp.asarray(table)[jnp.sum(~jnp.isnan(history.clocks)) - 1]
  return jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, 1), history.values)


def _heun(process, denoise, x, x0, t, s):
  """The mean of the noise at both ends of a step."""
  ahead = transfer(x, x0, t, s)
  return combine((0.5, noise_of(t, x, x0)), (0.5, noise_of(s, ahead, denoise(ahead, s).x0)))


def _runge_kutta(process, denoise, x, x0, t, s):
  """Runge and Kutta's mean of the noise over a step, every stage a step of DDIM from x."""
  middle = process.level(0.5 * (t.t + s.t))
  def stage(noise, to):
    ahead = with_noise(x, x0, t, to, noise)
    return noise_of(to, ahead, denoise(ahead, to).x0)
  first = noise_of(t, x, x0)
  second = stage(first, middle)
  third = stage(second, middle)
  return combine((1 / 6, first), (1 / 3, second), (1 / 3, third), (1 / 6, stage(third, s)))


def _adams(name: str, order: int, space: Space, eta: float = 0.0, b: Callable | None = None) -> Solver:
  """The explicit multistep method of this order in a space; for eta > 0, of x0 over its logarithm, that of the SDE."""
  _check_order(name, order)
  check_eta(name, eta)
  space = _stochastic(space, eta)
  def step(process, denoise, keys, x, t, s, memory):
    x0 = denoise(x, t).x0
    history = push(memory, space.value(x, x0, t), space.clock(t), order)
    down = below(t, s, eta)
    moved = advance(process, space, transfer(x, x0, t, down), t, s, history, 0, b)
    return renoise(process, keys, moved, down, s), history
  return Solver(lambda x: empty(x, order), step, order=order if eta == 0 else None)


def _corrected(name: str, predictor: int, corrector: int, eta_at: Callable, b: Callable | None = None) -> Solver:
  """Adams' method with x corrected, as soon as the denoiser has answered at it, by the polynomial through that answer and
  `corrector` - 1 of those before; the SDE's noise stays. eta_at(t) is 0.0 for the ODE."""
  _check_order(name, predictor)
  if corrector and not 2 <= corrector <= 5:
    raise ValueError(f'{name} has correctors of 2 to 5 predictions, or 0 for none; got {corrector}.')
  size, ode = max(predictor, corrector - 1), is_ode(eta_at(jnp.zeros(())))
  def init(x):
    noise = () if ode else jax.tree.map(jnp.zeros_like, x)
    return Place(empty(x, size), x, Level(*(jnp.full((), jnp.nan) for _ in range(3))), noise)
  def correct(process, x, x0, t, memory):
    history, start, eta = memory.history, memory.level, eta_at(memory.level.t)
    space = _stochastic(DATA_OVER_LOG, eta)
    newest = jax.tree.map(lambda leaf: leaf[0], history.values)
    first = transfer(memory.x, newest, start, below(start, t, eta))
    answered = push(history, x0, space.clock(t), corrector)
    corrected = advance(process, space, first, start, t, answered, 1, b)
    corrected = corrected if ode else combine((1.0, corrected), (1.0, memory.noise))
    known = ~jnp.isnan(history.clocks[0])
    return jax.tree.map(lambda a, b: jnp.where(known, a, b), corrected, x)
  def step(process, denoise, keys, x, t, s, memory):
    x0, eta = denoise(x, t).x0, eta_at(t.t)
    x = correct(process, x, x0, t, memory) if corrector else x
    space, down = _stochastic(DATA_OVER_LOG, eta), below(t, s, eta)
    history = push(memory.history, x0, space.clock(t), size)
    moved = advance(process, space, transfer(x, x0, t, down), t, s, last(history, predictor), 0, b)
    there = renoise(process, keys, moved, down, s)
    return there, Place(history, x, t, () if ode else combine((1.0, there), (-1.0, moved)))
  order = min(corrector, predictor + 1) if corrector else predictor
  return Solver(init, step, order=order if ode else None)


def _stochastic(space: Space, eta: float | Array) -> Space:
  """A space of x0 over its logarithm under the kernel of the SDE."""
  if is_ode(eta):
    return space
  return space._replace(measure=lambda process, u, end: (1 + eta) * jnp.exp((1 + eta) * (u - end)), pace=1 + eta)


def empty(x: PyTree, count: int) -> History:
  """A history of nothing."""
  return History(jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), x), jnp.full(count, jnp.nan))


def push(history: History, value: PyTree, clock: Array, count: int) -> History:
  """The history with a newer prediction, at most `count` in all."""
  add = lambda stack, leaf: jnp.concatenate([leaf[None], stack])[:count]
  clocks = jnp.where(jnp.isfinite(clock), clock, jnp.nan)[None]
  return History(jax.tree.map(add, history.values, value), jnp.concatenate([clocks, history.clocks])[:count])


def last(history: History, count: int) -> History:
  """The newest `count` predictions."""
  return jax.tree.map(lambda leaf: leaf[:count], history)


def advance(process, space: Space, first: PyTree, t: Level, s: Level, history: History, own: int,
            b: Callable | None = None) -> PyTree:
  """The first-order move from t to s, corrected by the polynomial through the history, whose number `own` is made at t.

  With `b`, a B(h) of UniPC, a line through two predictions is not integrated: it counts B / 2 at the step's end.
  """
  start, end = space.clock(t), space.clock(s)
  known = jnp.isfinite(start) & jnp.isfinite(end)
  start, end = jnp.where(known, start, 0.0), jnp.where(known, end, 1.0)
  present = known & ~jnp.isnan(history.clocks)
  nodes = jnp.where(present, history.clocks, 0.0)
  u, weights = start + (end - start) * jnp.asarray(NODES, start.dtype), (end - start) * jnp.asarray(WEIGHTS, start.dtype)
  shares = (weights * space.measure(process, u, end)) @ _basis(u, nodes, present)
  if b:
    place = jnp.where(nodes == start, 1.0, (nodes - start) / (end - start))
    shares = jnp.where(present.sum() == 2, -0.5 * b(space.pace * (start - end)) / place, shares)
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


def _check_variant(name: str, variant: str) -> None:
  if variant not in B:
    raise ValueError(f'{name} has the variants {", ".join(B)}; got {variant!r}.')


def _check_order(name: str, order: int) -> None:
  if not 1 <= order <= 4:
    raise ValueError(f'{name} has the orders 1 to 4; got {order}.')
