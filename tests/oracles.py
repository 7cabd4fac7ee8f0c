"""Data laws whose denoiser E[x0 | xt] is known in closed form, to hold solvers, losses and guidance against.

A denoiser here reads alpha and sigma of the level alone; it takes x of any shape [B, ...] with d entries an example.
"""
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.scipy import stats

from diffusion_jax.core.tokens import Masked
from diffusion_jax.core.types import Estimate, spread


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
  """x0 ~ N(mean, covariance), with mean [d] and covariance [d, d]."""
  mean: np.ndarray
  covariance: np.ndarray

  @property
  def modes(self):
    """Variances [d] along the principal axes, and the axes [d, d] as columns."""
    return np.linalg.eigh(np.asarray(self.covariance))

  def sample(self, keys):
    variances, axes = self.modes
    root = axes * np.sqrt(variances)[None]
    return jax.vmap(lambda key: np.asarray(self.mean) + root @ jax.random.normal(key, (len(variances),)))(keys)

  def denoiser(self, process):
    """E[x0 | xt] = m + a C (a^2 C + s^2)^-1 (xt - a m), mode by mode."""
    variances, axes = self.modes
    def one(x, alpha, sigma):
      gain = alpha * variances / (alpha**2 * variances + sigma**2)
      return np.asarray(self.mean) + axes @ (gain * (axes.T @ (x - alpha * np.asarray(self.mean))))
    return lambda x, level, cond=None: Estimate(_each(one, x, level))

  def flow_map(self, x, t, s):
    """Where the probability-flow ODE carries x from level t to level s: every mode keeps its quantile."""
    variances, axes = self.modes
    mean = np.asarray(self.mean)
    def one(x, alpha_t, sigma_t, alpha_s, sigma_s):
      stretch = jnp.sqrt((alpha_s**2 * variances + sigma_s**2) / (alpha_t**2 * variances + sigma_t**2))
      return alpha_s * mean + axes @ (stretch * (axes.T @ (x - alpha_t * mean)))
    return _each(one, x, t, s)

  def log_density(self, x, level):
    """log density of xt at the level; (alpha, sigma) = (1, 0) is that of the data. [B]"""
    identity = np.eye(len(self.mean))
    one = lambda x, alpha, sigma: stats.multivariate_normal.logpdf(
      x, alpha * np.asarray(self.mean), alpha**2 * np.asarray(self.covariance) + sigma**2 * identity)
    return _each(one, x, level)

  def tilted(self, b):
    """The law in proportion to p(x0) exp(b x0)."""
    return Gaussian(np.asarray(self.mean) + np.asarray(self.covariance) @ b, self.covariance)

  def given(self, see, y, std=0.0):
    """The law of x0 given y = see x0 + std noise, with see [k, d] and y [k]."""
    see, covariance = np.asarray(see), np.asarray(self.covariance)
    gain = np.linalg.solve(see @ covariance @ see.T + std**2 * np.eye(len(see)), see @ covariance).T
    return Gaussian(self.mean + gain @ (np.asarray(y) - see @ self.mean), covariance - gain @ see @ covariance)

  def walk(self, process, grid, constrain=lambda gain, offset, alpha, sigma: (gain, offset), eta=1.0):
    """The law at the end of a walk of ddim(eta), which for eta = 1 is `ancestral`, from noise down and up a grid to 0, when
    `constrain` makes of x0hat = gain xt + offset another affine function of xt. Every step keeps the law normal."""
    with jax.enable_x64(True):
      level = process.level(np.asarray(grid, np.float64))
      alphas, sigmas = np.asarray(level.alpha), np.asarray(level.sigma)
    identity = np.eye(len(self.mean))
    mean, covariance = np.zeros(len(self.mean)), sigmas[0]**2 * identity
    for (a, b), (n, m) in zip(_neighbours(alphas), _neighbours(sigmas), strict=True):
      if b < a:  # up: xt ~ N(c xs, m^2 - c^2 n^2)
        c = b / a
        mean, covariance = c * mean, c**2 * covariance + (m**2 - (c * n)**2) * identity
        continue
      spread = a**2 * np.asarray(self.covariance) + n**2 * identity
      gain = a * np.linalg.solve(spread, np.asarray(self.covariance)).T
      gain, offset = constrain(gain, self.mean - a * gain @ self.mean, a, n)
      fresh = 0.0
      if m > 0:  # the precisions of q(xs | x0) and q(xt | xs) add
        fresh = eta**2 / (1 / m**2 + (a / b)**2 / (n**2 - (a / b * m)**2))
      kept = np.sqrt(max(m**2 - fresh, 0.0)) / n
      move = b * gain + kept * (identity - a * gain)
      mean = move @ mean + (b - kept * a) * offset
      covariance = move @ covariance @ move.T + fresh * identity
    return Gaussian(mean, covariance)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """x0 ~ sum_k weights_k N(means_k, stds_k^2), with weights [K], means [K, d] and stds a number or [K]."""
  weights: np.ndarray
  means: np.ndarray
  stds: np.ndarray | float

  def sample(self, keys):
    means, stds = np.asarray(self.means), np.broadcast_to(self.stds, len(self.weights))
    def one(key):
      which, noise = jax.random.split(key)
      k = jax.random.choice(which, len(self.weights), p=np.asarray(self.weights))
      return jnp.asarray(means)[k] + jnp.asarray(stds)[k] * jax.random.normal(noise, means.shape[1:])
    return jax.vmap(one)(keys)

  def denoiser(self, process):
    """The means of the components given xt, weighted by their probabilities given xt."""
    means, stds = np.asarray(self.means), np.broadcast_to(self.stds, len(self.weights))
    def one(x, alpha, sigma):
      gain = alpha * stds**2 / (alpha**2 * stds**2 + sigma**2)
      given = means + gain[:, None] * (x[None] - alpha * means)
      return jax.nn.softmax(self._joint(x, alpha, sigma)) @ given
    return lambda x, level, cond=None: Estimate(_each(one, x, level))

  def log_density(self, x, level):
    """log density of xt at the level; (alpha, sigma) = (1, 0) is that of the data. [B]"""
    return _each(lambda *place: jax.nn.logsumexp(self._joint(*place)), x, level)

  def _joint(self, x, alpha, sigma):
    """log density of xt and the component, [K]."""
    variance = alpha**2 * np.broadcast_to(self.stds, len(self.weights))**2 + sigma**2
    far = jnp.sum((x[None] - alpha * np.asarray(self.means))**2, 1)
    return np.log(self.weights) - 0.5 * (far / variance + len(x) * jnp.log(2 * np.pi * variance))


@dataclasses.dataclass(frozen=True)
class Independent:
  """Every entry ~ N(mean, std^2) on its own: for scalars [B] and pytrees of any shape, without sums over entries."""
  mean: float
  std: float

  def denoiser(self, process):
    def denoise(x, level, cond=None):
      gain = level.alpha * self.std**2 / (level.alpha**2 * self.std**2 + level.sigma**2)
      column = lambda a, leaf: a.reshape(a.shape + (1,) * (leaf.ndim - a.ndim))
      one = lambda leaf: self.mean + column(gain, leaf) * (leaf - self.mean * column(level.alpha, leaf))
      return Estimate(jax.tree.map(one, x))
    return denoise


@dataclasses.dataclass(frozen=True, eq=False)
class Clouds:
  """Clouds of points x0 [points, axes] whose centre is 0: a template and normal noise of this std in the centred subspace.

  weights [K], templates [K, points, axes], each centred.
  """
  weights: np.ndarray
  templates: np.ndarray
  std: float

  @property
  def mixture(self):
    """The same law but for the centre, which is free; its denoiser leaves a centred x centred."""
    return Mixture(self.weights, np.reshape(self.templates, (len(self.weights), -1)), self.std)

  def sample(self, keys):
    x = self.mixture.sample(keys).reshape(len(keys), *np.shape(self.templates)[1:])
    return x - x.mean(1, keepdims=True)

  def denoiser(self, process):
    return self.mixture.denoiser(process)

  def log_density(self, x, level):
    """log density of xt in the subspace, which has (points - 1) axes dimensions. [B]"""
    variance = (level.alpha * self.std)**2 + level.sigma**2
    return self.mixture.log_density(x, level) + 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi * variance)


@dataclasses.dataclass(frozen=True, eq=False)
class Markov:
  """Tokens x0 [length]: the first ~ initial [V], every other ~ the row of transition [V, V] of the one before it."""
  initial: np.ndarray
  transition: np.ndarray
  length: int

  @property
  def marginals(self):
    """The law of each token, [length, V]."""
    powers = [np.linalg.matrix_power(np.asarray(self.transition), i) for i in range(self.length)]
    return np.stack([np.asarray(self.initial) @ power for power in powers])

  @property
  def entropy(self):
    """Nats an example: H(x_1) + sum_i H(x_i | x_{i-1})."""
    of = lambda law: -np.sum(law * np.log(law), -1)
    return of(np.asarray(self.initial)) + np.sum(self.marginals[:-1] @ of(np.asarray(self.transition)))

  def sample(self, keys):
    initial, transition = jnp.log(jnp.asarray(self.initial)), jnp.log(jnp.asarray(self.transition))
    def one(key):
      first, *others = jax.random.split(key, self.length)
      x = [jax.random.categorical(first, initial)]
      for each in others:
        x.append(jax.random.categorical(each, transition[x[-1]]))
      return jnp.stack(x)
    return jax.vmap(one)(keys)

  def log_prob(self, x):
    """[B]"""
    return np.log(self.initial)[x[:, 0]] + np.log(self.transition)[x[:, :-1], x[:, 1:]].sum(1)

  def denoiser(self, process):
    """log p(x0_i | xt without its entry i), up to a constant: what comes from the left times what comes from the right."""
    normalized = lambda p: p / p.sum()
    def one(likelihood):
      initial, transition = (jnp.asarray(each, likelihood.dtype) for each in (self.initial, self.transition))
      _, left = jax.lax.scan(lambda p, q: (normalized((p * q) @ transition), p), initial, likelihood)
      _, right = jax.lax.scan(lambda p, q: (normalized(transition @ (p * q)), p), jnp.ones_like(initial), likelihood,
                              reverse=True)
      return jnp.log(left) + jnp.log(right)
    return lambda x, level, cond=None: Estimate(jax.vmap(one)(_likelihood(process, x, level, len(self.initial))))


def _likelihood(process, x, level, classes):
  """q(xt_i | x0_i) for every x0_i up to a factor, [..., classes]: a mask says nothing, another token all there is."""
  same = jax.nn.one_hot(x, classes)
  if isinstance(process, Masked):
    return jnp.where((x == classes)[..., None], 1.0, same)
  return spread(level.alpha, same) * same + spread((1 - level.alpha) / classes, same)


def affine(see, y, push):
  """For Gaussian.walk: the estimate e becomes e + P (y - see e), P = push(gain, alpha, sigma); see [k, d], y [k]."""
  see, y = np.asarray(see), np.asarray(y)
  def constrain(gain, offset, alpha, sigma):
    pushed = push(gain, alpha, sigma)
    return gain - pushed @ see @ gain, offset + pushed @ (y - see @ offset)
  return constrain


def affine_ddnm(see, y):
  """The nearest estimate that agrees; with rows of the identity for `see` it is replacement."""
  return affine(see, y, lambda gain, alpha, sigma: np.linalg.pinv(see))


def affine_dps(see, y, std, scale=1.0):
  """A score with scale grad log N(y; see x0hat, std^2) added; nothing at alpha = 0."""
  by = lambda gain, alpha, sigma: scale / std**2 * sigma**2 / alpha * gain.T @ np.asarray(see).T
  none = np.zeros(np.shape(see)[::-1])
  return affine(see, y, lambda gain, alpha, sigma: by(gain, alpha, sigma) if alpha > 0 else none)


def affine_pigdm(see, y, std, data_std):
  """A score with grad log p(y | xt) added for x0 given xt ~ N(x0hat, r2), where the precisions of data and xt add."""
  see = np.asarray(see)
  def push(gain, alpha, sigma):
    r2 = 1 / (1 / data_std**2 + (alpha / sigma)**2)
    precision = np.linalg.inv(r2 * see @ see.T + std**2 * np.eye(len(see)))
    return (sigma**2 / alpha * gain.T if alpha > 0 else r2 * np.eye(see.shape[1])) @ see.T @ precision
  return affine(see, y, push)


def _neighbours(values):
  return list(zip(values[:-1], values[1:], strict=True))


def _each(function: Callable, x, *levels):
  """function(x [d], alpha, sigma, ...) for every example, whose levels have entries () or [B]."""
  places = [jnp.broadcast_to(entry, len(x)) for level in levels for entry in (level.alpha, level.sigma)]
  out = jax.vmap(function)(x.reshape(len(x), -1), *places)
  return out.reshape(x.shape) if out.ndim == 2 else out
