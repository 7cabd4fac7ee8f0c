"""The U-Net of DDPM, DDPM++ and ADM, for 1, 2 and 3 spatial axes (arXiv:2006.11239, 2011.13456, 2105.05233)."""
import math
from collections.abc import Sequence

from flax import linen as nn
from jax import numpy as jnp

from diffusion_jax.networks.embed import Conditioning
from diffusion_jax.networks.layers import Attention, Dropout, GroupNorm, average_pool, fan_avg, sinusoid, upsample


class ResBlock(nn.Module):
  """norm, SiLU, convolution, the time, norm, SiLU, dropout, zero-initialised convolution, plus the input.

  modulation 'add' adds a projection of the time embedding (DDPM), 'scale_shift' lets it scale and shift the second
  norm (ADM, eq. 1). `resample` 'up' or 'down' changes the resolution of both branches after the first SiLU.
  """
  channels: int
  axes: int
  kernel: Sequence[int]
  stride: Sequence[int]
  resample: str | None = None
  modulation: str = 'add'
  dropout: float = 0.0
  scale: float = 1.0
  groups: int = 32
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, time, keys=None):
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    norm = lambda name: GroupNorm(self.groups, self.param_dtype, name=name)
    change = {None: lambda a: a, 'up': lambda a: upsample(a, self.stride),
              'down': lambda a: average_pool(a, self.stride)}[self.resample]
    h = change(nn.silu(norm('norm_1')(x)))
    h = nn.Conv(self.channels, self.kernel, kernel_init=fan_avg, name='conv_1', **types)(h)
    width = self.channels * (2 if self.modulation == 'scale_shift' else 1)
    time = nn.Dense(width, kernel_init=fan_avg, name='time', **types)(nn.silu(time))
    time = time.reshape(time.shape[0], *[1] * self.axes, width)
    if self.modulation == 'scale_shift':
      scale, shift = jnp.split(time, 2, -1)
      h = norm('norm_2')(h) * (1 + scale) + shift
    else:
      h = norm('norm_2')(h + time)
    h = Dropout(self.dropout, name='dropout')(nn.silu(h), keys)
    h = nn.Conv(self.channels, self.kernel, kernel_init=nn.initializers.zeros, name='conv_2', **types)(h)
    x = change(x)
    if x.shape[-1] != self.channels:  # a 1x1 convolution, as the matrix product that it is
      x = nn.Dense(self.channels, kernel_init=fan_avg, name='skip', **types)(x)
    return (x + h) * self.scale


class UNet(nn.Module):
  """x [B, *space, C], time feature [B] and conditioning to [B, *space, out_channels].

  Level i has channels * multipliers[i] channels, `blocks` residual blocks (one more on the way up) and attention where
  attention[i] is true; the middle always has it. Between levels the resolution changes by `stride`, by a convolution
  (resample='conv', DDPM) or inside a residual block (resample='block', DDPM++ and ADM). A conditioning vector
  [B, 4 * channels] is added to the time embedding, a sequence is attended to after every self-attention, channels are
  concatenated to x. skip_rescale multiplies residual sums by 1 / sqrt(2). remat recomputes each block in the backward
  pass. Parameters are kept in param_dtype, products computed in dtype.
  """
  out_channels: int = 3
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  blocks: int = 2
  attention: Sequence[bool] = (False, True, False, False)
  head_channels: int | None = None
  axes: int = 2
  kernel: int | Sequence[int] = 3
  stride: int | Sequence[int] = 2
  modulation: str = 'add'
  resample: str = 'conv'
  skip_rescale: bool = False
  dropout: float = 0.0
  groups: int = 32
  frequency_shift: int = 0
  remat: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @property
  def vector_size(self) -> int:
    """The size of the conditioning vector that is added to the time embedding."""
    return 4 * self.channels

  @nn.compact
  def __call__(self, x, feature, conditioning=Conditioning(), keys=None):
    self._check(x)
    kernel, stride = (each if isinstance(each, Sequence) else (each,) * self.axes for each in (self.kernel, self.stride))
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    scale = math.sqrt(0.5) if self.skip_rescale else 1.0
    wrap = (lambda module: nn.remat(module)) if self.remat else (lambda module: module)
    conv = lambda size, name, init=fan_avg, strides=1: nn.Conv(
        size, kernel, strides, kernel_init=init, name=name, **types)
    def block(h, size, name, resample=None):
      return wrap(ResBlock)(size, self.axes, kernel, stride, resample, self.modulation, self.dropout, scale,
                            self.groups, name=name, **types)(h, time, keys)
    def attend(h, name):
      options = dict(head_channels=self.head_channels, groups=self.groups, scale=scale, **types)
      h = wrap(Attention)(name=name, **options)(h)
      if conditioning.sequence is not None:
        h = wrap(Attention)(name=f'{name}_cross', **options)(h, conditioning.sequence, conditioning.mask)
      return h

    time = self._time(feature, conditioning.vector, types)
    if conditioning.channels is not None:
      x = jnp.concatenate([x, conditioning.channels.astype(x.dtype)], -1)
    h = conv(self.channels, 'in')(x.astype(self.dtype))
    skips, last = [h], len(self.multipliers) - 1
    for i, multiplier in enumerate(self.multipliers):
      size = self.channels * multiplier
      for j in range(self.blocks):
        h = block(h, size, f'down_{i}_{j}')
        h = attend(h, f'down_{i}_{j}_attention') if self.attention[i] else h
        skips.append(h)
      if i < last:
        h = (block(h, size, f'down_{i}_resample', 'down') if self.resample == 'block'
             else conv(size, f'down_{i}_resample', strides=stride)(h))
        skips.append(h)
    h = block(h, size, 'middle_0')
    h = attend(h, 'middle_attention')
    h = block(h, size, 'middle_1')
    for i, multiplier in reversed(list(enumerate(self.multipliers))):
      size = self.channels * multiplier
      for j in range(self.blocks + 1):
        h = block(jnp.concatenate([h, skips.pop()], -1), size, f'up_{i}_{j}')
        h = attend(h, f'up_{i}_{j}_attention') if self.attention[i] else h
      if i:
        h = (block(h, size, f'up_{i}_resample', 'up') if self.resample == 'block'
             else conv(size, f'up_{i}_resample')(upsample(h, stride)))
    h = nn.silu(GroupNorm(self.groups, self.param_dtype, name='norm')(h))
    return conv(self.out_channels, 'out', nn.initializers.zeros)(h).astype(jnp.float32)

  def _time(self, feature, vector, types):
    """The time embedding [B, vector_size], with the conditioning vector added."""
    dense = lambda name: nn.Dense(self.vector_size, kernel_init=fan_avg, name=name, **types)
    time = dense('time_1')(nn.silu(dense('time_0')(sinusoid(feature, self.channels, self.frequency_shift))))
    return time if vector is None else time + vector.astype(self.dtype)

  def _check(self, x):
    """Raise ValueError if fields contradict each other or x."""
    for name, legal in (('modulation', ('add', 'scale_shift')), ('resample', ('conv', 'block'))):
      if getattr(self, name) not in legal:
        raise ValueError(f'UNet got {name}={getattr(self, name)!r}; it knows {legal}.')
    if len(self.attention) != len(self.multipliers):
      raise ValueError(f'UNet has {len(self.multipliers)} levels, multipliers={tuple(self.multipliers)}, but attention='
                       f'{tuple(self.attention)} speaks of {len(self.attention)}: give one truth value a level.')
    if x.ndim != self.axes + 2:
      raise ValueError(f'UNet with axes={self.axes} needs x of {self.axes + 2} axes, [batch, *space, channels]; '
                       f'got shape {x.shape}.')
    for name in ('kernel', 'stride'):
      sizes = getattr(self, name)
      if isinstance(sizes, Sequence) and len(sizes) != self.axes:
        raise ValueError(f'UNet got {name}={tuple(sizes)} for {self.axes} axes: give one number an axis, or one for all.')
    stride = self.stride if isinstance(self.stride, Sequence) else (self.stride,) * self.axes
    factor = tuple(each ** (len(self.multipliers) - 1) for each in stride)
    if any(size % each for size, each in zip(x.shape[1:-1], factor, strict=True)):
      raise ValueError(f'UNet with {len(self.multipliers)} levels needs sizes divisible by {factor}; got '
                       f'{x.shape[1:-1]}. Resize or pad the data, or give fewer multipliers.')
