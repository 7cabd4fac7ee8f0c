"""Sampling: walk a solver down a grid, and up again where the grid rises. One compiled program, whatever the solver."""
import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.processes import Process
from diffusion_jax.core.solvers import Solver
from diffusion_jax.core.types import Cond, Denoiser, combine, dot, fold, split


def sample(keys: Key[Array, 'batch'], process: Process, solver: Solver, denoiser: Denoiser, grid: np.ndarray,
           shape: PyTree, cond: Cond = None, start: PyTree = None) -> PyTree:
  """Draw one sample a key by walking `solver` from grid[0] to grid[-1].

  Where the grid rises, process.forward adds the noise and the solver starts anew; a solver that `rises` steps up itself.
  `shape` is that of one example (a tuple, or a pytree of jax.ShapeDtypeStruct). `start` is x at grid[0], by default the
  prior. Where the grid ends at 0 the last move is process.reverse, which returns the mean. Returns x at grid[-1].
  """
  walk, x, last = _prepare(keys, process, solver, denoiser, grid, shape, cond, start)
  (x, _), _ = jax.lax.scan(lambda carry, now: (walk(carry, now), None), (x, solver.init(x)), _pairs(grid))
  return last(x)[0]


def trajectory(keys: Key[Array, 'batch'], process: Process, solver: Solver, denoiser: Denoiser, grid: np.ndarray,
               shape: PyTree, cond: Cond = None, start: PyTree = None) -> tuple[PyTree, PyTree]:
  """Like `sample`, but keep the way: (xt at every time of the grid, the estimate of x0 at every time but the last).

  A new first axis runs over the grid. The estimates cost one call of the denoiser a step more than `sample`.
  """
  walk, x, last = _prepare(keys, process, solver, denoiser, grid, shape, cond, start)
  def keep(carry, now):
    estimate = denoiser(carry[0], process.level(now[1]), cond)
    x0 = jax.tree.map(lambda a, b: jnp.where(now[1] == 0, b, a), estimate.x0, carry[0]) if grid[0] == 0 else estimate.x0
    return walk(carry, now), (carry[0], x0)
  (x, _), (xs, x0s) = jax.lax.scan(keep, (x, solver.init(x)), _pairs(grid))
  end, *estimate = last(x)
  append = lambda stack, *more: jax.tree.map(lambda a, *b: jnp.concatenate([a, *(each[None] for each in b)]), stack, *more)
  return (append(xs, x, end), append(x0s, estimate[0])) if estimate else (append(xs, end), x0s)


def begin(keys: Key[Array, 'batch'], process: Process, grid: np.ndarray, shape: PyTree) -> PyTree:
  """Draw x at grid[0] from the prior, as `sample` does with these keys."""
  if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
    shape = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(keys), *leaf.shape), leaf.dtype), shape)
  return process.prior(split(keys, 3)[0], like, process.level(grid[0]))


def slerp(a: PyTree, b: PyTree, share: Float[Array, 'batch']) -> PyTree:
  """sin((1 - share) angle) / sin(angle) a + sin(share angle) / sin(angle) b, along the great circle from a to b.

  The angle is that between a and b over all entries of an example (Shoemake, Animating rotation with quaternion curves,
  SIGGRAPH 1985). Independent noises keep their variance on the way; halfway along the straight line half of it is left.
  Undefined where a = -b.
  """
  angle = jnp.arccos(jnp.clip(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)), -1.0, 1.0))
  part = lambda share: share * jnp.sinc(share * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)  # has a value at angle 0
  return combine((part(1 - share), a), (part(share), b))


def _pairs(grid: np.ndarray) -> tuple[Array, Array, Array]:
  """(number, t, s) of the moves that the solver makes: all, but for the last one where it ends at 0."""
  moves = len(grid) - 1 - (grid[-1] == 0)
  times = jnp.asarray(grid, jnp.result_type(float))
  return jnp.arange(moves), times[:-1][:moves], times[1:][:moves]


def _prepare(keys, process, solver, denoiser, grid, shape, cond, start):
  """The solver's move, x at grid[0], and the last move: x -> (x at grid[-1], estimate of x0 if it took one)."""
  times = np.asarray(grid, jnp.result_type(float))
  if len(times) < 2 or np.any(np.diff(times) == 0) or np.min(times) < 0 or np.max(times) > 1 or np.any(times[1:-1] == 0):
    raise ValueError('A grid has two or more times in [0, 1], each unlike the one before, and 0 at its ends alone; got '
                     f'{times}.')
  if start is None and times[0] == 0:
    raise ValueError('A grid that begins at the data, t = 0, needs start=x0; got none.')
  _, step_keys, last_keys = split(keys, 3)  # the first is for `begin`
  start = begin(keys, process, grid, shape) if start is None else start
  denoise = lambda x, level: denoiser(x, level, cond)
  rises = bool(np.any(np.diff(grid) > 0)) and not solver.rises
  def walk(carry, now):
    number, *times = now
    x, memory = carry
    keys, (t, s) = fold(step_keys, number), map(process.level, times)
    down = lambda: solver.step(process, denoise, keys, x, t, s, memory)
    up = lambda: (process.forward(keys, x, t, s), solver.init(x))
    return jax.lax.cond(s.t > t.t, up, down) if rises else down()
  def last(x):
    if grid[-1] != 0:
      return (x,)
    t = process.level(grid[-2])
    estimate = denoise(x, t)
    return process.reverse(last_keys, estimate, x, t, process.level(0.0)), estimate.x0
  return walk, start, last
