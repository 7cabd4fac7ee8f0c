"""Layers that the backbones share. Axes are [batch, *space, channels].

Products are computed in dtype; norms, softmax and every sum, also those of the backward pass, in wide(dtype).
"""
import math
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Key

fan_avg = nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
REMAT = {'none': None, 'block': jax.checkpoint_policies.nothing_saveable,
         'products': lambda primitive, *_, **fields: primitive == lax.conv_general_dilated_p or (
             jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *_, **fields))}
LEGAL = {'remat': tuple(REMAT), 'dtype': ('bfloat16', 'float32', 'float64'), 'param_dtype': ('float32', 'float64')}


def check_fields(net: nn.Module, x: Array, **legal: tuple[str, ...]) -> None:
  """Raise ValueError where a field of a backbone has none of its legal values, float64 is off, or x has other axes."""
  name = type(net).__name__
  for field, values in {**legal, **LEGAL}.items():
    if getattr(net, field) not in values:
      raise ValueError(f'{name} got {field}={getattr(net, field)!r}; it knows {values}.')
  if 'float64' in (net.dtype, net.param_dtype) and not jax.config.jax_enable_x64:
    raise ValueError(f'{name} got dtype={net.dtype!r}, param_dtype={net.param_dtype!r}; float64 needs JAX_ENABLE_X64=1.')
  if net.cudnn and net.dtype != 'bfloat16':
    raise ValueError(f"{name} got cudnn=True and dtype={net.dtype!r}; cuDNN's attention takes dtype='bfloat16'.")
  if x.ndim != net.axes + 2:
    raise ValueError(f'{name} with axes={net.axes} needs x of {net.axes + 2} axes, [batch, *space, channels]; '
                     f'got shape {x.shape}.')


def per_axis(net: nn.Module, field: str) -> tuple[int, ...]:
  """A field that is one number an axis, or one for all, as the former. Raises ValueError where their count is another."""
  sizes = getattr(net, field)
  if isinstance(sizes, Sequence) and len(sizes) != net.axes:
    raise ValueError(f'{type(net).__name__} got {field}={tuple(sizes)} for {net.axes} axes: give one number an axis, or '
                     'one for all.')
  return tuple(sizes) if isinstance(sizes, Sequence) else (sizes,) * net.axes


def wide(dtype: str | jnp.dtype) -> jnp.dtype:
  """The type in which is summed what has type `dtype`: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)


def wide_bias(x, kernel, bias, dtype):
  """The `promote_dtype` of Flax layers whose product has type `dtype` and whose result, with the bias added, is wide.

  A bias added in bfloat16 would have a gradient that is summed over batch and space in bfloat16.
  """
  return x.astype(dtype), kernel.astype(dtype), bias.astype(wide(dtype))


def sinusoid(feature: Float[Array, 'batch'], size: int, shift: int = 0, period: float = 10_000.0,
             dtype: str | jnp.dtype = jnp.float32) -> Array:
  """[sin(f w_i), cos(f w_i)] with w_i = period^(-i / (size/2 - shift)) (arXiv:1706.03762, sec. 3.5), [B, size].

  shift is 1 in DDPM, 0 in ADM, DiT and Stable Diffusion.
  """
  if size % 2 or size // 2 <= shift:
    raise ValueError(f'sinusoid needs an even size above {2 * shift}; got {size}.')
  half = size // 2
  frequencies = np.exp(-np.log(period) * np.arange(half) / (half - shift))
  angles = feature.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class GroupNorm(nn.Module):
  """Group normalisation (arXiv:1803.08494), with at most `groups` groups, of four channels or more; its result is wide.

  A group of one channel would remove whatever is added to the whole channel, such as a time embedding.
  """
  groups: int = 32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    most = max(1, min(self.groups, channels // 4))
    groups = next(count for count in range(most, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=wide(x.dtype), param_dtype=self.param_dtype, name='norm')(x)


def place_of(path: tuple[str, ...]) -> np.uint32:
  """The number of a place in a network."""
  return np.uint32(zlib.crc32('/'.join(path).encode()))


class Dropout(nn.Module):
  """Dropout whose mask belongs to the example: drawn from its key and this layer's place in the network.

  `place` is that of its path unless given: all iterations of a scan have one path. The barrier makes the
  mask an array: else XLA draws it anew in every product that reads it, forward and backward, and a
  TPU's compiler takes twice as long for each of them.
  """
  rate: float

  @nn.compact
  def __call__(self, x, keys: Key[Array, 'batch'] | None, place=None):
    if not self.rate or keys is None:
      return x
    place = place_of(self.path) if place is None else place
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - self.rate, x.shape[1:])
    mask = jax.lax.optimization_barrier(jax.vmap(draw)(keys))
    return jnp.where(mask, x / (1 - self.rate), 0)


class Attention(nn.Module):
  """Residual multi-head attention over all positions of x, to itself or to a sequence [B, L, D] (arXiv:1706.03762).

  `mask` [B, L], bool, marks the real entries of the sequence. One head where head_channels is None.
  """
  head_channels: int | None = None
  groups: int = 32
  scale: float = 1.0  # of the residual sum
  cudnn: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, sequence=None, mask=None):
    channels = x.shape[-1]
    head = self.head_channels or channels
    if channels % head:
      raise ValueError(f'Attention over {channels} channels cannot have heads of {head}; choose a divisor.')
    dense = lambda size, name, init=fan_avg: nn.Dense(
        size, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, promote_dtype=wide_bias, name=name)
    tokens = lambda a: a.reshape(a.shape[0], -1, a.shape[-1])
    h = tokens(GroupNorm(self.groups, self.param_dtype, name='norm')(x))
    if sequence is None:
      query, key, value = jnp.split(dense(3 * channels, 'qkv')(h), 3, -1)
    else:
      query = dense(channels, 'query')(h)
      key, value = jnp.split(dense(2 * channels, 'key_value')(sequence), 2, -1)
    heads = lambda a: rearrange(a.astype(self.dtype), 'b l (n h) -> b l n h', h=head)
    mask = None if mask is None else mask[:, None, None, :]
    h = softmax_attention(heads(query), heads(key), heads(value), mask, self.cudnn)
    h = dense(channels, 'out', nn.initializers.zeros)(rearrange(h, 'b l n h -> b l (n h)'))
    return ((x + h.reshape(x.shape)) * self.scale).astype(x.dtype)


def softmax_attention(query: Array, key: Array, value: Array, mask: Array | None, cudnn: bool = False) -> Array:
  """softmax(q k^T / sqrt(head)) v for [B, L, heads, head], the softmax in float32, or in float64 for float64.

  With `cudnn`, where the devices are NVIDIA GPUs and there is no mask, by cuDNN's kernel, which does not write the logits
  to memory. It is for bfloat16, and has no derivatives in forward mode. Raises ValueError where it knows no such heads.
  """
  if cudnn and query.shape[-1] % 8:
    raise ValueError(f"cudnn=True needs heads of a multiple of 8 channels, and got {query.shape[-1]}; leave it out, or "
                     'change the heads.')
  if query.dtype != jnp.float64:
    kernel = 'cudnn' if cudnn and mask is None and on_nvidia() else 'xla'
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=kernel)
  logits = jnp.einsum('bqnh,bknh->bnqk', query, key) / np.sqrt(query.shape[-1])  # JAX's own takes a float32 softmax of it
  logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  return jnp.einsum('bnqk,bknh->bqnh', jax.nn.softmax(logits), value)


def on_nvidia() -> bool:
  return jax.default_backend() == 'gpu' and 'cuda' in jax.devices()[0].client.platform_version


def upsample(x: Array, stride: tuple[int, ...]) -> Array:
  """Repeat every entry `stride` times along each spatial axis (nearest neighbour)."""
  large = x.astype(wide(x.dtype))  # its gradient is a sum over the repeated entries
  for axis, factor in enumerate(stride, 1):
    large = jnp.repeat(large, factor, axis)
  return large.astype(x.dtype)


def average_pool(x: Array, stride: tuple[int, ...]) -> Array:
  """The mean of every block of `stride` entries."""
  return nn.avg_pool(x.astype(wide(x.dtype)), stride, stride).astype(x.dtype)


def cut(x: Array, patch: Sequence[int]) -> Float[Array, 'batch tokens size']:
  """[B, *space, C] in patches, in row-major order, of `patch` entries along each axis, in row-major order."""
  pairs = [(size // each, each) for size, each in zip(x.shape[1:-1], patch, strict=True)]
  x = x.reshape(len(x), *(size for pair in pairs for size in pair), x.shape[-1])
  x = x.transpose(0, *range(1, x.ndim - 1, 2), *range(2, x.ndim - 1, 2), x.ndim - 1)
  return x.reshape(len(x), math.prod(count for count, _ in pairs), -1)


def join(tokens: Array, patch: Sequence[int], space: Sequence[int]) -> Array:
  """The inverse of `cut`: [B, *space, C]."""
  axes = len(patch)
  x = tokens.reshape(len(tokens), *(size // each for size, each in zip(space, patch, strict=True)), *patch, -1)
  x = x.transpose(0, *(axis for i in range(1, axes + 1) for axis in (i, i + axes)), x.ndim - 1)
  return x.reshape(len(tokens), *space, -1)
