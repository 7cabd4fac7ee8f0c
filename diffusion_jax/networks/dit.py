"""The diffusion transformer for 1, 2 and 3 spatial axes: DiT with adaLN-zero (arXiv:2212.09748), which attends to a
sequence as PixArt does (arXiv:2310.00426) or MMDiT (arXiv:2403.03206)."""
import math
from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.networks.embed import Conditioning
from diffusion_jax.networks.layers import (
  REMAT,
  Dropout,
  check_fields,
  cut,
  fan_avg,
  join,
  per_axis,
  place_of,
  sinusoid,
  softmax_attention,
  wide,
  wide_bias,
)

FREQUENCIES = 256  # sines and cosines of the time, at every width
STREAMS = '', 'sequence_'  # how the parameters of the tokens of x are named in a block, and of those of the sequence
zeros = nn.initializers.zeros


class Depthwise(nn.Module):
  """Tokens [B, N, width] plus a convolution of each channel by itself over their places, with zeros beyond them
  (arXiv:2102.10882, sec. 3.2). A fresh one adds nothing.

  It is a sum of shifted tokens: a convolution in groups with its gradients takes six times as long on a CPU.
  """
  size: int
  counts: Sequence[int]  # of the tokens, along each axis
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    axes = len(self.counts)
    weights = self.param('weights', zeros, (self.size,) * axes + x.shape[-1:], self.param_dtype)
    weights = weights.reshape(*weights.shape[:-1], *(1,) * (axes + 1), -1).astype(wide(x.dtype))
    grid = x.astype(wide(x.dtype)).reshape(len(x), *self.counts, -1)
    grid = jnp.pad(grid, [(0, 0), *[(self.size // 2,) * 2] * axes, (0, 0)])
    shifted = lambda at: grid[:, *(slice(i, i + n) for i, n in zip(at, self.counts, strict=True))]
    added = sum(weights[at] * shifted(at) for at in np.ndindex(*weights.shape[:axes]))
    return (x + added.reshape(x.shape)).astype(x.dtype)


class Block(nn.Module):
  """Attention and a perceptron, each of them added to the tokens [B, N, width], scaled, shifted and gated by the time.

  `streams` are the tokens of x alone, or those of x and of a sequence, which attend together by parameters of their own;
  in the last block the sequence gives only keys and values. A `sequence` beside them [B, L, D] is attended to in between.
  With `conv`, the tokens of x first take in their neighbours.
  """
  width: int
  heads: int
  mlp: float
  last: bool
  qk_norm: bool = False
  dropout: float = 0.0
  conv: int = 0
  counts: Sequence[int] = ()  # of the tokens of x, along each axis, where there is a convolution
  cudnn: bool = False
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, streams, places, time, sequence=None, mask=None, keys=None):
    if self.conv:
      streams = Depthwise(self.conv, self.counts, self.param_dtype, name='conv')(streams[0]), *streams[1:]
    names, count = STREAMS[:len(streams)], streams[0].shape[1]
    inputs = [self._before(name, x, nn.silu(time)) for name, x in zip(names, streams, strict=True)]
    together = lambda parts: jnp.concatenate([part for part in parts if part is not None], 1)
    heads = [together(parts) for parts in zip(*(heads for _, heads in inputs), strict=True)]
    real = None if mask is None or len(streams) == 1 else jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)
    mixed = jnp.split(self._mix(heads, real), [count], 1)
    results = [self._after(*each, sequence, mask, keys) for each in zip(
        names[:1] if self.last else names, streams, [changes for changes, _ in inputs], mixed, places, strict=False)]
    return tuple(results), None

  def _before(self, name, x, time):
    """What the time does to a stream, (shift, scale, gate) of its attention and of its perceptron; query, key, value."""
    read = self.last and name == STREAMS[1]
    changes = self._dense(f'{name}modulation', (2 if read else 6) * self.width, zeros)(time)
    changes = jnp.split(changes[:, None], 2 if read else 6, -1)
    h = modulate(x, *changes[:2])
    heads = [None if read and part == 'query' else self._heads(name + part, h) for part in ('query', 'key', 'value')]
    return changes, heads

  def _after(self, name, x, changes, mixed, place, sequence, mask, keys):
    """A stream with what it attended to, and then its perceptron, added."""
    _, _, gate, shift, scale, gate_mlp = changes
    add = lambda x, h: (x + h).astype(self.dtype)
    x = add(x, gate * self._dense(f'{name}mix', self.width)(mixed))
    if sequence is not None:
      heads = self._heads('cross_query', x), self._heads('cross_key', sequence), self._heads('cross_value', sequence)
      x = add(x, self._dense('cross_mix', self.width, zeros)(self._mix(heads, mask)))
    h = self._dense(f'{name}mlp_in', int(self.mlp * self.width))(modulate(x, shift, scale))
    h = Dropout(self.dropout, name=f'{name}dropout')(nn.gelu(h.astype(self.dtype)), keys, place)
    return add(x, gate_mlp * self._dense(f'{name}mlp_out', self.width)(h))

  def _heads(self, name, x):
    """A projection of x [B, L, D] as [B, L, heads, head]; with qk_norm queries and keys are normalised."""
    heads = rearrange(self._dense(name, self.width)(x), 'b l (n h) -> b l n h', n=self.heads)
    if self.qk_norm and not name.endswith('value'):
      heads = nn.RMSNorm(1e-6, heads.dtype, self.param_dtype, name=f'{name}_norm')(heads)
    return heads.astype(self.dtype)

  def _mix(self, heads, mask):
    """The attention of [query, key, value] as [B, L, width]; `mask` [B, L] marks the real keys."""
    mask = None if mask is None else mask[:, None, None, :]
    return rearrange(softmax_attention(*heads, mask, self.cudnn), 'b l n h -> b l (n h)')

  def _dense(self, name, size, init=fan_avg):
    return nn.Dense(size, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, promote_dtype=wide_bias,
                    name=name)


class DiT(nn.Module):
  """x [B, *space, C], time feature [B] and conditioning to [B, *space, out_channels].

  x is cut into patches, `patch` entries along each axis; sines and cosines of its place are added to each. A conditioning
  vector [B, width] is added to the time embedding, channels are concatenated to x. A sequence is attended to after every
  self-attention (attend='cross', PixArt), or its tokens attend together with those of x, by parameters of their own
  (attend='joint', MMDiT); without a sequence both are DiT, as attend='none' is. qk_norm normalises queries and keys of
  each head (arXiv:2302.05442, sec. 2). With conv=3 every block begins with a depthwise convolution of 3 tokens along each
  axis. A fresh network says 0, and each of its blocks changes nothing.

  dtype, param_dtype, remat, scan and cudnn are those of the UNet: the time embedding and the first and last product are
  computed as sums are; scan=True runs equal blocks as one loop over stacked parameters, all of them but the last of 'joint'.
  """
  out_channels: int = 3
  width: int = 384
  depth: int = 12
  heads: int = 6
  patch: int | Sequence[int] = 2
  mlp: float = 4
  attend: str = 'cross'
  axes: int = 2
  qk_norm: bool = False
  conv: int = 0
  dropout: float = 0.0
  frequency_shift: int = 0
  remat: str = 'none'
  scan: bool = False
  cudnn: bool = False
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  @property
  def vector_size(self) -> int:
    """The size of the conditioning vector that is added to the time embedding."""
    return self.width

  @nn.compact
  def __call__(self, x, feature, conditioning=Conditioning(), keys=None):
    self._check(x, conditioning)
    patch, space, sequence = per_axis(self, 'patch'), x.shape[1:-1], conditioning.sequence
    time = self._time(feature, conditioning.vector)
    if conditioning.channels is not None:
      x = jnp.concatenate([x, conditioning.channels.astype(x.dtype)], -1)
    tokens = self._dense('in', self.width)(cut(x, patch))
    counts = tuple(size // each for size, each in zip(space, patch, strict=True))
    tokens = tokens + positions(counts, self.width, tokens.dtype)
    streams = [tokens.astype(self.dtype)]
    if sequence is not None and self.attend == 'joint':
      streams, sequence = [*streams, self._dense('sequence', self.width)(sequence).astype(self.dtype)], None
    tokens = self._blocks(counts, tuple(streams), time, sequence, conditioning.mask, keys)
    shift, scale = jnp.split(self._dense('modulation', 2 * self.width, zeros)(nn.silu(time))[:, None], 2, -1)
    out = self._dense('out', math.prod(patch) * self.out_channels, zeros)(modulate(tokens, shift, scale))
    return join(out, patch, space)

  def _blocks(self, counts, streams, *shared):
    """The tokens of x after all blocks."""
    block = Block if self.remat == 'none' else nn.remat(Block, policy=REMAT[self.remat])
    make = lambda kind, last, name: kind(self.width, self.heads, self.mlp, last, self.qk_norm, self.dropout, self.conv,
                                         counts, self.cudnn, self.dtype, self.param_dtype, name=name)
    places = np.array([[place_of((*self.path, f'block_{i}', f'{stream}dropout')) for stream in STREAMS]
                       for i in range(self.depth)])
    equal = self.depth + 1 - len(streams) if self.scan else 0
    if equal > 1:
      every = dict(in_axes=(0, *[nn.broadcast] * len(shared)), variable_axes={'params': 0}, split_rngs={'params': True})
      loop = make(nn.scan(block, length=equal, **every), False, f'block_0_to_{equal - 1}')
      streams, _ = loop(streams, places[:equal], *shared)
    for i in range(equal if equal > 1 else 0, self.depth):
      streams, _ = make(block, i == self.depth - 1, f'block_{i}')(streams, places[i], *shared)
    return streams[0]

  def _time(self, feature, vector):
    """The time embedding [B, width], with the conditioning vector added."""
    time, init = sinusoid(feature, FREQUENCIES, self.frequency_shift, dtype=wide(self.dtype)), nn.initializers.normal(0.02)
    time = self._dense('time_1', self.width, init)(nn.silu(self._dense('time_0', self.width, init)(time)))
    return time if vector is None else time + vector.astype(time.dtype)

  def _dense(self, name, size, init=fan_avg):
    return nn.Dense(size, kernel_init=init, dtype=wide(self.dtype), param_dtype=self.param_dtype, name=name)

  def _check(self, x, conditioning):
    """Raise ValueError if fields contradict each other, x or the conditioning."""
    check_fields(self, x, attend=('none', 'cross', 'joint'))
    if self.conv < 0 or self.conv and self.conv % 2 == 0:
      raise ValueError(f'DiT got conv={self.conv}; give an odd number of tokens, or 0 for no convolution.')
    if self.heads < 1 or self.width % self.heads:
      raise ValueError(f'DiT of width={self.width} cannot have heads={self.heads}; choose a divisor.')
    if any(each < 1 or size % each for size, each in zip(x.shape[1:-1], per_axis(self, 'patch'), strict=True)):
      raise ValueError(f"DiT with patch={self.patch} needs sizes divisible by {per_axis(self, 'patch')}; got "
                       f'{x.shape[1:-1]}. Resize or pad the data, or give a smaller patch.')
    if conditioning.sequence is not None and self.attend == 'none':
      raise ValueError("DiT with attend='none' was given a sequence, which it does not read; type attend='cross' or "
                       "attend='joint'.")


def modulate(x: Array, shift: Array, scale: Array) -> Array:
  """Layer normalisation (arXiv:1607.06450) whose shift and scale come from outside; its result is wide."""
  return nn.LayerNorm(1e-6, wide(x.dtype), use_bias=False, use_scale=False)(x) * (1 + scale) + shift


def positions(counts: Sequence[int], width: int, dtype: str | jnp.dtype) -> Float[Array, '1 tokens width']:
  """Sines and cosines of the place of each token along the last axis, then along the one before it, and so on, in equal
  parts of the width; what is left of it is 0 (DiT has two axes)."""
  places = jnp.indices(counts).reshape(len(counts), -1)[::-1]
  size = width // (2 * len(counts)) * 2
  parts = jax.vmap(lambda each: sinusoid(each, size, dtype=dtype), out_axes=1)(places).reshape(math.prod(counts), -1)
  return jnp.pad(parts, ((0, 0), (0, width - parts.shape[-1])))[None]
