"""Layers that the backbones share. Axes are [batch, *space, channels]; norms and softmax are computed in float32."""
import zlib

import jax
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float, Key

fan_avg = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')


def sinusoid(feature: Float[Array, 'batch'], size: int, shift: int = 0, period: float = 10_000.0) -> Array:
  """[sin(f w_i), cos(f w_i)] with w_i = period^(-i / (size/2 - shift)) (arXiv:1706.03762, sec. 3.5), [B, size], float32.

  shift is 1 in DDPM, 0 in ADM, DiT and Stable Diffusion.
  """
  if size % 2 or size // 2 <= shift:
    raise ValueError(f'sinusoid needs an even size above {2 * shift}; got {size}.')
  half = size // 2
  frequencies = jnp.exp(-np.log(period) * np.arange(half, dtype=np.float32) / (half - shift))
  angles = feature.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class GroupNorm(nn.Module):
  """Group normalisation in float32 (arXiv:1803.08494), with at most `groups` groups, of four channels or more.

  A group of one channel would remove whatever is added to the whole channel, such as a time embedding.
  """
  groups: int = 32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    most = max(1, min(self.groups, channels // 4))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    norm = nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, param_dtype=self.param_dtype, name='norm')
    return norm(x).astype(x.dtype)


class Dropout(nn.Module):
  """Dropout whose mask belongs to the example: drawn from its key and this layer's place in the network."""
  rate: float

  @nn.compact
  def __call__(self, x, keys: Key[Array, 'batch'] | None):
    if not self.rate or keys is None:
      return x
    place = np.uint32(zlib.crc32('/'.join(self.path).encode()))
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.rate, x.shape[1:])
    return jnp.where(jax.vmap(draw)(keys), x / (1 - self.rate), 0)


class Attention(nn.Module):
  """Residual multi-head attention over all positions of x, to itself or to a sequence [B, L, D] (arXiv:1706.03762).

  `mask` [B, L], bool, marks the real entries of the sequence. One head where head_channels is None.
  """
  head_channels: int | None = None
  groups: int = 32
  scale: float = 1.0  # of the residual sum
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, sequence=None, mask=None):
    channels = x.shape[-1]
    head = self.head_channels or channels
    if channels % head:
      raise ValueError(f'Attention over {channels} channels cannot have heads of {head}; choose a divisor.')
    dense = lambda size, name, init=fan_avg: nn.Dense(
        size, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, name=name)
    tokens = lambda a: a.reshape(a.shape[0], -1, a.shape[-1])
    h = tokens(GroupNorm(self.groups, self.param_dtype, name='norm')(x))
    if sequence is None:
      query, key, value = jnp.split(dense(3 * channels, 'qkv')(h), 3, -1)
    else:
      query = dense(channels, 'query')(h)
      key, value = jnp.split(dense(2 * channels, 'key_value')(sequence.astype(self.dtype)), 2, -1)
    heads = lambda a: rearrange(a, 'b l (n h) -> b l n h', h=head)
    mask = None if mask is None else mask[:, None, None, :]
    h = jax.nn.dot_product_attention(heads(query), heads(key), heads(value), mask=mask)
    h = dense(channels, 'out', nn.initializers.zeros)(rearrange(h, 'b l n h -> b l (n h)'))
    return (x + h.reshape(x.shape)) * self.scale


def upsample(x: Array, stride: tuple[int, ...]) -> Array:
  """Repeat every entry `stride` times along each spatial axis (nearest neighbour)."""
  for axis, factor in enumerate(stride, 1):
    x = jnp.repeat(x, factor, axis)
  return x


def average_pool(x: Array, stride: tuple[int, ...]) -> Array:
  """The mean of every block of `stride` entries."""
  return nn.avg_pool(x, stride, stride)
