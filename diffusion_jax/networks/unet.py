"""The U-Net of DDPM, DDPM++ and ADM, for 1, 2 and 3 spatial axes (arXiv:2006.11239, 2011.13456, 2105.05233)."""
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.networks.embed import Conditioning
from diffusion_jax.networks.layers import (
  REMAT,
  Attention,
  Dropout,
  GroupNorm,
  average_pool,
  check_fields,
  cut,
  fan_avg,
  join,
  per_axis,
  place_of,
  sinusoid,
  upsample,
  wide,
  wide_bias,
)


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
  def __call__(self, x, time, keys=None, place=None):
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype, promote_dtype=wide_bias)
    norm = lambda name: GroupNorm(self.groups, self.param_dtype, name=name)
    change = {None: lambda a: a, 'up': lambda a: upsample(a, self.stride),
              'down': lambda a: average_pool(a, self.stride)}[self.resample]
    h = change(nn.silu(norm('norm_1')(x).astype(self.dtype)))
    h = nn.Conv(self.channels, self.kernel, kernel_init=fan_avg, name='conv_1', **types)(h)
    width = self.channels * (2 if self.modulation == 'scale_shift' else 1)
    time = nn.Dense(width, kernel_init=fan_avg, name='time', **types)(nn.silu(time))
    time = time.reshape(time.shape[0], *[1] * self.axes, width)
    if self.modulation == 'scale_shift':
      scale, shift = jnp.split(time, 2, -1)
      h = norm('norm_2')(h) * (1 + scale) + shift
    else:
      h = norm('norm_2')(h + time)
    h = Dropout(self.dropout, name='dropout')(nn.silu(h.astype(self.dtype)), keys, place)
    h = nn.Conv(self.channels, self.kernel, kernel_init=nn.initializers.zeros, name='conv_2', **types)(h)
    x = change(x)
    if x.shape[-1] != self.channels:  # a 1x1 convolution, as the matrix product that it is
      x = nn.Dense(self.channels, kernel_init=fan_avg, name='skip', **types)(x)
    return ((x + h) * self.scale).astype(self.dtype)


class Stage(NamedTuple):
  """A place on the way through the U-Net: a residual block with what follows it, or the convolution between levels."""
  name: str
  size: int  # channels of its result
  attention: str = ''  # the name of the attention after the block, '' for none
  skip: int = 0  # channels that it takes from the way down, 0 for none
  keep: bool = False  # its result is kept for the way up
  resample: str | None = None  # 'up', 'down'


def plan(channels: int, multipliers: Sequence[int], blocks: int | Sequence[int],
         attention: Sequence[bool]) -> list[Stage]:
  """All stages in order: down, middle, up."""
  counts = [blocks] * len(multipliers) if isinstance(blocks, int) else blocks
  last, stages, kept = len(multipliers) - 1, [], [channels]
  sizes = [channels * multiplier for multiplier in multipliers]
  attend = lambda i, name: f'{name}_attention' if attention[i] else ''
  for i, size in enumerate(sizes):
    names = [f'down_{i}_{j}' for j in range(counts[i])]
    level = [Stage(name, size, attend(i, name), keep=True) for name in names]
    level += [Stage(f'down_{i}_resample', size, keep=True, resample='down')] if i < last else []
    stages, kept = stages + level, kept + [size] * len(level)
  stages += [Stage('middle_0', sizes[-1], 'middle_attention'), Stage('middle_1', sizes[-1])]
  for i, size in reversed(list(enumerate(sizes))):
    names = [f'up_{i}_{j}' for j in range(counts[i] + 1)]
    stages += [Stage(name, size, attend(i, name), skip=kept.pop()) for name in names]
    stages += [Stage(f'up_{i}_resample', size, resample='up')] if i else []
  return stages


def equal_runs(stages: list[Stage], channels: int) -> list[list[Stage]]:
  """The stages in runs of neighbours whose parameters have the same shapes; `channels` go into the first."""
  widths = [channels, *(stage.size for stage in stages)]
  def kind(pair):
    width, stage = pair
    return width, stage._replace(name='', attention=bool(stage.attention))
  return [[stage for _, stage in run] for _, run in itertools.groupby(zip(widths[:-1], stages, strict=True), kind)]


class Block(nn.Module):
  """What `through` does, as the body of a scan: (h, skip, place of the dropout, ...) -> (h, h if it is kept)."""
  block: nn.Module
  attention: nn.Module | None
  cross: nn.Module | None
  keep: bool

  def __call__(self, h, skip, place, time, conditioning, keys):
    h = through((self.block, self.attention, self.cross), h, skip, place, time, conditioning, keys)
    return h, h if self.keep else None


def through(parts, h, skip, place, time, conditioning, keys):
  """h, with the skip if there is one, through a residual block, attention, and attention to the sequence, or None."""
  block, attention, cross = parts
  h = h if skip is None else jnp.concatenate([h, skip], -1)
  h = block(h, time, keys, place)
  h = h if attention is None else attention(h)
  return h if cross is None else cross(h, conditioning.sequence, conditioning.mask)


class UNet(nn.Module):
  """x [B, *space, C], time feature [B] and conditioning to [B, *space, out_channels].

  Level i has channels * multipliers[i] channels, `blocks` or blocks[i] residual blocks (one more on the way up) and
  attention where attention[i] is true; the middle always has it. Between levels the resolution changes by `stride`, by a
  convolution (resample='conv', DDPM) or inside a residual block (resample='block', DDPM++ and ADM). A conditioning vector
  [B, 4 * channels] is added to the time embedding, a sequence is attended to after every self-attention, channels are
  concatenated to x. skip_rescale multiplies residual sums by 1 / sqrt(2). All of it works on patches of `patch` entries
  along each axis, as channels (arXiv:2301.11093): large ones spare the levels that cost most. With `coordinates`, waves of
  so many frequencies along each axis say to the first convolution where it is (arXiv:1807.03247): convolutions else learn
  it from the zeros beyond the borders, for which a network of few levels does not reach far enough.

  Parameters are kept in param_dtype, products computed in dtype, but for the time embedding and the first and last
  convolution, which are computed as sums are, in float32 (float64 for float64). remat says what is kept for the backward
  pass: everything, 'none'; the results of products with parameters, 'products'; the input of each block and each
  attention, 'block'; all else is computed again. scan=True runs equal neighbouring blocks as one loop over stacked
  parameters, named after its first block and its last: the same function, compiled faster. cudnn=True computes
  attention without a mask by cuDNN's kernel where the devices are NVIDIA GPUs: for bfloat16, without forward derivatives.
  """
  out_channels: int = 3
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  blocks: int | Sequence[int] = 2
  attention: Sequence[bool] = (False, True, False, False)
  head_channels: int | None = None
  axes: int = 2
  kernel: int | Sequence[int] = 3
  stride: int | Sequence[int] = 2
  patch: int | Sequence[int] = 1
  coordinates: int = 0
  modulation: str = 'add'
  resample: str = 'conv'
  skip_rescale: bool = False
  dropout: float = 0.0
  groups: int = 32
  frequency_shift: int = 0
  remat: str = 'none'
  scan: bool = False
  cudnn: bool = False
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  @property
  def vector_size(self) -> int:
    """The size of the conditioning vector that is added to the time embedding."""
    return 4 * self.channels

  @nn.compact
  def __call__(self, x, feature, conditioning=Conditioning(), keys=None):
    self._check(x)
    shared = self._time(feature, conditioning.vector), conditioning, keys
    if conditioning.channels is not None:
      x = jnp.concatenate([x, conditioning.channels.astype(x.dtype)], -1)
    patch, space = per_axis(self, 'patch'), x.shape[1:-1]
    x = cut(x, patch).reshape(len(x), *(size // each for size, each in zip(space, patch, strict=True)), -1)
    if self.coordinates:
      place = waves(x.shape[1:-1], self.coordinates, x.dtype)
      x = jnp.concatenate([x, jnp.broadcast_to(place, (len(x), *place.shape[1:]))], -1)
    h = self._conv(self.channels, 'in', wide(self.dtype))(x).astype(self.dtype)
    stages, skips = plan(self.channels, self.multipliers, self.blocks, self.attention), [h]
    for run in equal_runs(stages, self.channels) if self.scan else [[stage] for stage in stages]:
      taken = [skips.pop() for stage in run if stage.skip]
      h, kept = self._scan(run, h, taken, shared) if len(run) > 1 else self._stage(run[0], h, taken, shared)
      skips += kept
    h = nn.silu(GroupNorm(self.groups, self.param_dtype, name='norm')(h))
    out = self._conv(math.prod(patch) * self.out_channels, 'out', wide(self.dtype), nn.initializers.zeros)(h)
    return join(out, patch, space)

  def _stage(self, stage, h, taken, shared):
    """The result of a stage, and a list of it if it is kept."""
    if stage.resample and self.resample == 'conv':
      h = upsample(h, per_axis(self, 'stride')) if stage.resample == 'up' else h
      strides = per_axis(self, 'stride') if stage.resample == 'down' else 1
      h = self._conv(stage.size, stage.name, self.dtype, strides=strides)(h).astype(self.dtype)
    else:
      names = stage.name, stage.attention, f'{stage.attention}_cross'
      h = through(self._parts(stage, names, shared, self), h, *taken or [None], None, *shared)
    return h, [h] if stage.keep else []

  def _scan(self, run, h, taken, shared):
    """The result of a run of equal stages, and a list of those of all of them if they are kept."""
    every = dict(in_axes=(0, 0, *[nn.broadcast] * len(shared)), variable_axes={'params': 0}, split_rngs={'params': True})
    parts = self._parts(run[0], (None, None, None), shared, None)
    name = f'{run[0].name}_to_{run[-1].name.rpartition("_")[2]}'
    places = np.array([place_of((*self.path, stage.name, 'dropout')) for stage in run])
    h, results = nn.scan(Block, length=len(run), **every)(*parts, run[0].keep, name=name)(
        h, jnp.stack(taken) if taken else None, places, *shared)
    return h, list(results) if run[0].keep else []

  def _parts(self, stage, names, shared, parent):
    """The modules of a block: itself, its attention and that to the sequence, or None."""
    wrap = (lambda module: module) if self.remat == 'none' else partial(nn.remat, policy=REMAT[self.remat])
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    scale = math.sqrt(0.5) if self.skip_rescale else 1.0
    attend = lambda name: wrap(Attention)(self.head_channels, self.groups, scale, self.cudnn, parent=parent, name=name,
                                          **types)
    return (wrap(ResBlock)(stage.size, self.axes, per_axis(self, 'kernel'), per_axis(self, 'stride'), stage.resample,
                           self.modulation, self.dropout, scale, self.groups, parent=parent, name=names[0], **types),
            attend(names[1]) if stage.attention else None,
            attend(names[2]) if stage.attention and shared[1].sequence is not None else None)

  def _conv(self, size, name, dtype, init=fan_avg, strides=1):
    return nn.Conv(size, per_axis(self, 'kernel'), strides, kernel_init=init, dtype=dtype, param_dtype=self.param_dtype,
                   promote_dtype=wide_bias, name=name)

  def _time(self, feature, vector):
    """The time embedding [B, vector_size], with the conditioning vector added."""
    dtype = wide(self.dtype)
    dense = lambda name: nn.Dense(
        self.vector_size, kernel_init=fan_avg, dtype=dtype, param_dtype=self.param_dtype, name=name)
    time = sinusoid(feature, self.channels, self.frequency_shift, dtype=dtype)
    time = dense('time_1')(nn.silu(dense('time_0')(time)))
    return time if vector is None else time + vector.astype(dtype)

  def _check(self, x):
    """Raise ValueError if fields contradict each other or x."""
    check_fields(self, x, modulation=('add', 'scale_shift'), resample=('conv', 'block'))
    levels = len(self.multipliers)
    for field, legal in (('blocks', 'number a level, or one for all'), ('attention', 'truth value a level')):
      values = getattr(self, field)
      if not isinstance(values, int) and len(values) != levels:
        raise ValueError(f'UNet has {levels} levels, multipliers={tuple(self.multipliers)}, but {field}={tuple(values)} '
                         f'speaks of {len(values)}: give one {legal}.')
    if self.coordinates < 0:
      raise ValueError(f'UNet got coordinates={self.coordinates}; give a number of frequencies, or 0 for none.')
    steps = zip(per_axis(self, 'stride'), per_axis(self, 'patch'), strict=True)
    factor = tuple(patch * stride ** (levels - 1) for stride, patch in steps)
    if any(each < 1 or size % each for size, each in zip(x.shape[1:-1], factor, strict=True)):
      raise ValueError(f'UNet with {levels} levels and patch={self.patch} needs sizes divisible by '
                       f'{factor}; got {x.shape[1:-1]}. Resize or pad the data, or give fewer multipliers.')


def waves(space: Sequence[int], count: int, dtype: str | jnp.dtype) -> Float[Array, '1 *space waves']:
  """cos(pi k u), k = 1 to `count`, of the place u of each entry, (i + 1/2) / n for entry i of n, along each axis."""
  places = (np.moveaxis(np.indices(space), 0, -1) + 0.5) / space
  return jnp.asarray(np.cos(np.pi * places[..., None] * np.arange(1, count + 1)).reshape(1, *space, -1), dtype)
