"""Weights of the loss as functions of logsnr, for squared errors of the noise: loss = w(logsnr) |noise_hat - noise|^2.

A weight w_x of errors of x0 (at alpha = 1) is w = w_x / snr here. A weight also gets the density of the training times
over logsnr, so that `measure` can divide by it; the others do not look at it and are meant under their paper's times.
"""
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array

from diffusion_jax.core.types import Learned

Weight = Callable[[Array, Array], Array]  # (logsnr, density over logsnr) -> weight


def constant() -> Weight:
  """w = 1, the simple loss (arXiv:2006.11239, eq. 14)."""
  return lambda logsnr, density: jnp.ones_like(logsnr)


def elbo() -> Weight:
  """1 / (2 p(logsnr)): the variational bound of continuous time, nats an entry (arXiv:2107.00630, eq. 17; 2303.00848)."""
  return lambda logsnr, density: 0.5 / density


def snr(power: float = 1.0) -> Weight:
  """snr^power on x0, snr^(power - 1) on the noise (arXiv:2202.00512, sec. 4: power 1; 0 is the plain loss of x0)."""
  return lambda logsnr, density: jnp.exp((power - 1) * logsnr)


def truncated_snr() -> Weight:
  """max(snr, 1) on x0, which is max(1, 1 / snr) on the noise (arXiv:2202.00512, sec. 4)."""
  return lambda logsnr, density: jnp.maximum(1, jnp.exp(-logsnr))


def min_snr(gamma: float = 5.0) -> Weight:
  """min(snr, gamma) on x0, which is min(1, gamma / snr) on the noise (arXiv:2303.09556, sec. 3.4)."""
  return lambda logsnr, density: jnp.minimum(1, gamma * jnp.exp(-logsnr))


def soft_min_snr(gamma: float = 5.0) -> Weight:
  """gamma snr / (snr + gamma) on x0, which is gamma / (snr + gamma) on the noise (arXiv:2401.11605)."""
  return lambda logsnr, density: jax.nn.sigmoid(jnp.log(gamma) - logsnr)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weight:
  """1 / (k + snr)^gamma on the noise: perception prioritized (arXiv:2204.00227, eq. 8)."""
  return lambda logsnr, density: (k + jnp.exp(logsnr))**-gamma


def edm(sigma_data: float = 0.5) -> Weight:
  """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 (arXiv:2206.00364, table 1), times sigma^2 on the noise.

  sigma_data = 1 is SNR + 1 on x0 (arXiv:2202.00512, sec. 4), the plain loss of v.
  """
  return lambda logsnr, density: jnp.exp(-logsnr) / sigma_data**2 + 1


def sigmoid(bias: float = 1.0) -> Weight:
  """sigmoid(bias - logsnr) (arXiv:2303.00848; arXiv:2410.19324). The papers mean `measure`."""
  return lambda logsnr, density: jax.nn.sigmoid(bias - logsnr)


def rectified_flow() -> Weight:
  """1 on the velocity of `flow`, 1 / (1 - t)^2 on the noise, t = sigma / (alpha + sigma) (arXiv:2403.03206, sec. 3)."""
  return lambda logsnr, density: jnp.square(1 + jnp.exp(-0.5 * logsnr))


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Weight:
  """The density of a logit-normal t on the velocity of `flow` (arXiv:2403.03206, eq. 19): instead of drawing such t."""
  if std <= 0:
    raise ValueError(f'logit_normal needs std > 0; got {std}.')
  def weight(logsnr, density):
    log_t, log_rest = jax.nn.log_sigmoid(-0.5 * logsnr), jax.nn.log_sigmoid(0.5 * logsnr)
    value = jnp.exp(norm.logpdf(-0.5 * logsnr, mean, std) - log_t - 3 * log_rest)
    return jnp.where(jnp.isinf(logsnr), 0.0, value)
  return weight


def cosmap() -> Weight:
  """2 / (pi (1 - 2 t + 2 t^2)) on the velocity of `flow` (arXiv:2403.03206, eq. 22)."""
  def weight(logsnr, density):
    t, rest = jax.nn.sigmoid(-0.5 * logsnr), jax.nn.sigmoid(0.5 * logsnr)
    return 2 / (jnp.pi * (t**2 + rest**2)) / rest**2
  return weight


def measure(weight: Weight) -> Weight:
  """Mean the weight as a measure over logsnr, whatever times are trained: w(logsnr) / p(logsnr) (arXiv:2303.00848)."""
  return lambda logsnr, density: weight(logsnr, density) / density


def uncertainty(features: int = 128) -> Learned:
  """The learned log variance u(logsnr) of EDM2: the loss becomes loss / exp(u) + u (arXiv:2312.02696, eq. 14 and 21).

  u is linear in random Fourier features of c_noise = -logsnr / 8; it starts at 0 and learns log E[loss | logsnr], so that
  the gradient is of one size at every level.
  """
  if features < 1:
    raise ValueError(f'uncertainty needs features >= 1; got {features}.')
  rng = np.random.RandomState(0)  # whose stream numpy keeps for ever
  frequencies, phases = 2 * np.pi * rng.normal(size=features), 2 * np.pi * rng.random_sample(features)
  def bind(params):
    def one(logsnr):
      c_noise = -jnp.clip(logsnr, -40, 40) / 8  # finite also for pure noise
      return jnp.vdot(params, np.sqrt(2 / features) * jnp.cos(c_noise * frequencies + phases))
    return jnp.vectorize(one)
  return Learned(lambda key: jnp.zeros(features), bind)
