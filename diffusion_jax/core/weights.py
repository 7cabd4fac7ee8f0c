"""Weights of the loss as functions of logsnr, for squared errors of the noise: loss = w(logsnr) |noise_hat - noise|^2.

A weight also gets the density of the training times over logsnr, so that `measure` can divide by it.
"""
from collections.abc import Callable

import jax
from jax import numpy as jnp
from jaxtyping import Array

Weight = Callable[[Array, Array], Array]  # (logsnr, density over logsnr) -> weight


def constant() -> Weight:
  """w = 1, the simple loss (arXiv:2006.11239, eq. 14)."""
  return lambda logsnr, density: jnp.ones_like(logsnr)


def min_snr(gamma: float = 5.0) -> Weight:
  """min(snr, gamma) on x0, which is min(1, gamma / snr) on the noise (arXiv:2303.09556, sec. 3.4)."""
  return lambda logsnr, density: jnp.minimum(1, gamma * jnp.exp(-logsnr))


def edm(sigma_data: float = 0.5) -> Weight:
  """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 (arXiv:2206.00364, table 1), times sigma^2 on the noise."""
  return lambda logsnr, density: jnp.exp(-logsnr) / sigma_data**2 + 1


def sigmoid(bias: float = 1.0) -> Weight:
  """sigmoid(bias - logsnr) (arXiv:2303.00848; arXiv:2410.19324). The papers mean `measure`."""
  return lambda logsnr, density: jax.nn.sigmoid(bias - logsnr)


def measure(weight: Weight) -> Weight:
  """Mean the weight as a measure over logsnr, whatever times are trained: w(logsnr) / p(logsnr) (arXiv:2303.00848)."""
  return lambda logsnr, density: weight(logsnr, density) / density
