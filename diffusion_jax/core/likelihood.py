"""Likelihood by the probability-flow ODE, exact or with a stochastic trace, and bits per entry of data of whole numbers.

The ODE is integrated over u = log(sigma / alpha), in which it has no schedule: for z = xt / sqrt(alpha^2 + sigma^2) it is
dz/du = a (a z - x0(z)), a^2 = 1 / (1 + e^(2 u)), for every path (arXiv:2011.13456, eq. 39, by the substitution of
arXiv:2206.00364, eq. 4). Scalings of the data and of dequantization are terms of one change of variables, made here.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm
from jaxtyping import Array, Int, Key, PyTree

from diffusion_jax.core import ode, schedules
from diffusion_jax.core.ode import Integrator
from diffusion_jax.core.processes import Gaussian, whole
from diffusion_jax.core.types import Cond, Denoiser, combine, dot, fold, normal, split


class Likelihood(NamedTuple):
  """Log densities of data, nats an example."""
  each: Array  # [B, probes]: one unbiased estimate a probe; one column where the trace is exact
  latent: PyTree  # xt / sqrt(alpha^2 + sigma^2) at the end of the way
  calls: Array  # of the denoiser, each with its derivatives

  @property
  def log_density(self) -> Array:
    """[B]"""
    return self.each.mean(1)


class Trace(NamedTuple):
  """How the trace of a Jacobian J is taken: from e_i^T J e_i for directions e_i [B, ...], i = 0..count - 1."""
  count: Callable[[PyTree], int]
  direction: Callable[[Key[Array, 'batch'], PyTree, Array], PyTree]  # (keys, x, i) -> e_i
  exact: bool  # their sum is the trace; else each one is an estimate


class Summary(NamedTuple):
  """A mean over data with its standard errors: over data and draws together, and over the draws alone."""
  mean: Array
  error: Array
  error_draws: Array


Dequantizer = Callable[[Key[Array, 'batch'], Int[Array, '...']], tuple[Array, Array]]  # -> u in (0, 1), log q(u | value)


def exact() -> Trace:
  """The whole diagonal: as many derivatives as an example has entries."""
  def direction(keys, x, i):
    flat, restore = ravel_pytree(_first(x))
    unit = restore((jnp.arange(len(flat)) == i).astype(flat.dtype))
    return jax.tree.map(lambda e, leaf: jnp.broadcast_to(e[None], leaf.shape), unit, x)
  return Trace(lambda x: sum(leaf.size for leaf in jax.tree.leaves(_first(x))), direction, True)


def hutchinson(probes: int = 1, law: str = 'rademacher') -> Trace:
  """E[e^T J e] over random e, held still along the way (arXiv:1810.01367, eq. 7-8). law: 'rademacher' or 'normal'."""
  if probes < 1 or law not in ('rademacher', 'normal'):
    raise ValueError(f"hutchinson needs probes >= 1 and the law 'rademacher' or 'normal'; got {probes}, {law!r}.")
  def direction(keys, x, i):
    noise = normal(fold(keys, i), x)
    return noise if law == 'normal' else jax.tree.map(lambda leaf: jnp.where(leaf > 0, 1.0, -1.0).astype(leaf.dtype), noise)
  return Trace(lambda x: probes, direction, False)


def log_density(process: Gaussian, denoiser: Denoiser, keys: Key[Array, 'batch'], x0: PyTree, cond: Cond = None,
                trace: Trace = exact(), integrator: Integrator = ode.adaptive(), high: float = 20.0,
                low: float = -20.0) -> Likelihood:
  """log p(x0) of the law that the probability-flow ODE carries the prior to (arXiv:2011.13456, eq. 39).

  The way runs from logsnr = `high` to `low` nats, or as far as the schedule goes: what is scored is the data with noise of
  variance exp(-high), and the prior is N(0, sigma^2) at the end. With a projection densities are those in its subspace.
  """
  first, last = schedules.ends(process.schedule)
  start, end = -0.5 * jnp.minimum(first, high), -0.5 * jnp.maximum(last, low)
  data_share = lambda u: jax.nn.sigmoid(-2 * u)  # a^2
  z = combine((jnp.sqrt(data_share(start)), x0))
  probes = jnp.arange(trace.count(z))

  def slope(u, state):
    z, _ = state
    level = process.level(schedules.inner_time(process.schedule, -2 * u))
    scale = jnp.sqrt(level.alpha**2 + level.sigma**2)
    a = jnp.sqrt(data_share(u))
    drift = lambda z: combine((a**2, z), (-a, denoiser(combine((scale, z)), level, cond).x0))
    # Of the whole drift, whose trace is small near the data, and not of the denoiser, where probes err by |e|^2 - rank.
    rate, derivative = jax.linearize(drift, z)
    def along(i):
      e = process.project(trace.direction(keys, z, i))
      return dot(e, derivative(e))
    traces = jax.lax.map(along, probes)  # [count, B]
    return rate, (traces.sum(0, keepdims=True) if trace.exact else traces).T

  gained = jnp.zeros((len(keys), 1 if trace.exact else len(probes)), jax.tree.leaves(z)[0].dtype)
  (z, gained), calls = integrator(slope, (z, gained), start, end)
  std = jnp.sqrt(data_share(-end))  # sigma / sqrt(alpha^2 + sigma^2)
  squares, rank = dot(z, z) / std**2, _rank(process, x0)
  prior = -0.5 * squares - rank * (jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi))
  return Likelihood(prior[:, None] + gained + 0.5 * rank * jnp.log(data_share(start)), z, calls)


def uniform_noise() -> Dequantizer:
  """u ~ U(0, 1), the same for every value (arXiv:1511.01844, sec. 3.1)."""
  def draw(keys, values):
    u = jax.vmap(lambda key: jax.random.uniform(key, values.shape[1:]))(keys)
    return u, jnp.zeros(len(values), u.dtype)
  return draw


def logistic_normal(moments: Callable[[Array], tuple[Array, Array]]) -> Dequantizer:
  """Variational dequantization: u = sigmoid(mean + exp(log_std) noise) with (mean, log_std) = moments(values), a network or
  a function, trained to make the bits fewest (arXiv:1902.00275, sec. 3.1)."""
  def draw(keys, values):
    mean, log_std = moments(values)
    noise = normal(keys, mean)
    logit = mean + jnp.exp(log_std) * noise
    log_q = norm.logpdf(noise) - log_std - jax.nn.log_sigmoid(logit) - jax.nn.log_sigmoid(-logit)
    return jax.nn.sigmoid(logit), log_q.reshape(len(values), -1).sum(1)
  return draw


def bits(process: Gaussian, denoiser: Denoiser, keys: Key[Array, 'batch'], values: Int[Array, '...'], levels: int = 256,
         cond: Cond = None, dequantizer: Dequantizer = uniform_noise(), draws: int = 1,
         trace: Trace = exact(), integrator: Integrator = ode.adaptive(), high: float = 20.0, low: float = -20.0) -> Array:
  """Bits per entry of whole numbers 0..levels - 1, [B, draws]: an upper bound of -log2 P(value) in expectation.

  The network's data are -1 + 2 value / (levels - 1); a value becomes the u-th part of its bin, which has that value in its
  middle: x = -1 + w (value + u - 1/2) with w = 2 / (levels - 1), and -log P <= E[log q(u | value) - log p(x)] - n log w for
  n entries (arXiv:1511.01844, sec. 3.1).
  """
  if levels < 2 or draws < 1:
    raise ValueError(f'bits needs levels >= 2 and draws >= 1; got {levels} and {draws}.')
  width, entries = 2 / (levels - 1), values[0].size
  def one(keys):
    noise_keys, trace_keys = split(keys, 2)
    u, log_q = dequantizer(noise_keys, values)
    x = width * (values + u - 0.5) - 1
    found = log_density(process, denoiser, trace_keys, x, cond, trace, integrator, high, low)
    return (log_q - found.log_density - entries * jnp.log(width)) / (entries * jnp.log(2))
  return jax.lax.map(one, split(keys, draws)).T


def summary(values: Array) -> Summary:
  """The mean of values [B, draws] over B independent examples, with its standard errors (0 where draws are one)."""
  count, draws = values.shape
  error = jnp.std(values.mean(1), ddof=1) / jnp.sqrt(count)
  inner = jnp.sqrt(jnp.mean(jnp.var(values, 1, ddof=1)) / values.size) if draws > 1 else jnp.zeros(())
  return Summary(values.mean(), error, inner)


def _first(x: PyTree) -> PyTree:
  """The first example."""
  return jax.tree.map(lambda leaf: leaf[0], x)


def _rank(process: Gaussian, x0: PyTree) -> Array | int:
  """The dimension of the space in which the data live."""
  one, basis = jax.tree.map(lambda leaf: leaf[:1], x0), exact()
  if process.project is whole:
    return basis.count(one)
  def share(i):
    e = basis.direction(None, one, i)
    return dot(e, process.project(e))[0]
  return jax.lax.map(share, jnp.arange(basis.count(one))).sum()
