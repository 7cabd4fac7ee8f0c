"""Encoders of text: that of CLIP (arXiv:2103.00020, sec. 2.4) and that of T5 (arXiv:1910.10683, sec. 2.1).

Parameters have the architectures' own names, without the groups between a layer and its products: layers_0/q_proj.
"""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.networks.layers import softmax_attention, wide, wide_bias

ACTIVATIONS = {'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x), 'gelu': partial(nn.gelu, approximate=False)}
BUCKETS, FURTHEST = 32, 128  # of relative positions: how many, and the distance from which all share the last


class Encoded(NamedTuple):
  """A text as a vector a token and as one vector."""
  sequence: Array  # [B, L, D], also for the padding, which reaches no real token
  pooled: Array  # [B, P]


def encoders(vocabulary: int, length: int) -> dict[str, Callable[..., nn.Module]]:
  """The encoders by name, for texts of at most `length` of `vocabulary` tokens."""
  return {'CLIPText': partial(CLIPText, vocabulary, length), 'T5Encoder': partial(T5Encoder, vocabulary)}


class CLIPText(nn.Module):
  """Tokens [B, L] with their mask, at most `length` of them, to Encoded, by a causal transformer.

  pooled is the normalised state at the last real token, which is the end token, projected to `projection` channels if
  that is not 0. skip = n takes the sequence from before the last n layers and without the final norm, as Stable
  Diffusion XL and 3 do with n = 1; Stable Diffusion 2's is that of one layer less. The hidden layer has `mlp` channels,
  4 * width unless given; activation is 'quick_gelu' (OpenAI) or 'gelu' (OpenCLIP). Raises ValueError where these
  contradict each other or the tokens.
  """
  vocabulary: int
  length: int
  width: int
  layers: int
  heads: int
  mlp: int | None = None
  activation: str = 'quick_gelu'
  projection: int = 0
  skip: int = 0
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  @nn.compact
  def __call__(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L']) -> Encoded:
    self._check(tokens)
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    embed = lambda size, std, name: nn.Embed(
        size, self.width, embedding_init=nn.initializers.normal(std), name=name, **types)
    count = tokens.shape[1]
    x = embed(self.vocabulary, 0.02, 'token_embedding')(tokens)
    x = x + embed(self.length, 0.01, 'position_embedding')(np.arange(count)[None])
    causal = np.tril(np.ones((1, 1, count, count), bool))
    states = [x]
    for i in range(self.layers):
      layer = CLIPLayer(self.heads, self.mlp or 4 * self.width, self.layers, self.activation, name=f'layers_{i}', **types)
      states.append(layer(states[-1], causal))
    sequence = layer_norm('final_layer_norm', **types)(states[-1])
    last = jnp.max(jnp.where(mask, np.arange(count)[None], 0), 1)
    pooled = jnp.take_along_axis(sequence, last[:, None, None], 1)[:, 0]
    if self.projection:
      init = nn.initializers.normal(self.width**-0.5)
      pooled = nn.Dense(self.projection, False, kernel_init=init, name='text_projection', **types)(pooled)
    return Encoded(states[-1 - self.skip].astype(sequence.dtype) if self.skip else sequence, pooled.astype(sequence.dtype))

  def _check(self, tokens):
    check_clip(self)
    if not 0 <= self.skip <= self.layers:
      raise ValueError(f'CLIPText of {self.layers} layers cannot skip {self.skip}; skip is 0 to {self.layers}.')
    if tokens.shape[1] > self.length:
      raise ValueError(f'CLIPText of length {self.length} got {tokens.shape[1]} tokens a text: cut them, or give '
                       f'length={tokens.shape[1]}.')


def check_clip(net: nn.Module) -> None:
  """Raise ValueError where an encoder of CLIP has an unknown activation, or heads that its width cannot be shared by."""
  name = type(net).__name__
  if net.activation not in ACTIVATIONS:
    raise ValueError(f'{name} got activation={net.activation!r}; it knows {tuple(ACTIVATIONS)}.')
  if net.width % net.heads:
    raise ValueError(f'{name} of width {net.width} cannot have {net.heads} heads; choose a divisor.')


class CLIPLayer(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)). `layers`, how many there are, sets how small its results start."""
  heads: int
  mlp: int
  layers: int
  activation: str
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x, mask):
    width = x.shape[-1]
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    dense = lambda size, std, name: nn.Dense(
        size, kernel_init=nn.initializers.normal(std), promote_dtype=wide_bias, name=name, **types)
    heads = lambda a: rearrange(a.astype(self.dtype), 'b l (n h) -> b l n h', n=self.heads)
    std, last = width**-0.5, (2 * width * self.layers)**-0.5
    h = layer_norm('layer_norm1', **types)(x)
    h = softmax_attention(*(heads(dense(width, std, name)(h)) for name in ('q_proj', 'k_proj', 'v_proj')), mask)
    x = (x + dense(width, last, 'out_proj')(rearrange(h, 'b l n h -> b l (n h)'))).astype(x.dtype)
    h = dense(self.mlp, (2 * width)**-0.5, 'fc1')(layer_norm('layer_norm2', **types)(x))
    return (x + dense(width, last, 'fc2')(ACTIVATIONS[self.activation](h))).astype(x.dtype)


class T5Encoder(nn.Module):
  """Tokens [B, L] of any number with their mask to Encoded, by a transformer that sees the real tokens and how far apart.

  `gated` is T5 v1.1 (arXiv:2002.05202), its absence the ReLU of the first T5. T5 itself has no vector for the whole
  text: pooled is the mean over the real tokens, so that a backbone is conditioned by either encoder alike.
  """
  vocabulary: int
  width: int
  layers: int
  heads: int
  head_channels: int
  mlp: int
  gated: bool = True
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  @nn.compact
  def __call__(self, tokens: Int[Array, 'B L'], mask: Bool[Array, 'B L']) -> Encoded:
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    init = nn.initializers.normal
    x = nn.Embed(self.vocabulary, self.width, embedding_init=init(1.0), name='token_embedding', **types)(tokens)
    positions = np.arange(tokens.shape[1])
    bias = nn.Embed(BUCKETS, self.heads, embedding_init=init(self.width**-0.5), dtype=wide(self.dtype),
                    param_dtype=self.param_dtype, name='relative_attention_bias')(
                        relative_bucket(positions[None] - positions[:, None]))
    bias = rearrange(bias, 'q k n -> 1 n q k')
    for i in range(self.layers):
      x = T5Layer(self.heads, self.head_channels, self.mlp, self.gated, name=f'layers_{i}', **types)(x, bias, mask)
    sequence = _rms_norm('final_layer_norm', **types)(x)
    real = mask[..., None]
    pooled = jnp.where(real, sequence, 0).sum(1) / jnp.maximum(real.sum(1), 1)
    return Encoded(sequence, pooled)


class T5Layer(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)), without biases; the bias of the logits is by relative position."""
  heads: int
  head_channels: int
  mlp: int
  gated: bool
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x, bias, mask):
    width, inner = x.shape[-1], self.heads * self.head_channels
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    dense = lambda size, std, name: nn.Dense(size, False, kernel_init=nn.initializers.normal(std), name=name, **types)
    heads = lambda a: rearrange(a, 'b l (n h) -> b l n h', n=self.heads)
    std = width**-0.5
    h = _rms_norm('layer_norm_0', **types)(x)
    # the logits are not scaled: 1 / sqrt(head_channels) is in how the query starts
    query, key, value = (heads(dense(inner, scale, name)(h)) for name, scale in (
        ('q', (width * self.head_channels)**-0.5), ('k', std), ('v', std)))
    h = biased_attention(query, key, value, bias, mask)
    x = (x + dense(width, inner**-0.5, 'o')(rearrange(h, 'b l n h -> b l (n h)'))).astype(x.dtype)
    h = _rms_norm('layer_norm_1', **types)(x)
    if self.gated:
      h = nn.gelu(dense(self.mlp, std, 'wi_0')(h), approximate=True) * dense(self.mlp, std, 'wi_1')(h)
    else:
      h = nn.relu(dense(self.mlp, std, 'wi')(h))
    return (x + dense(width, self.mlp**-0.5, 'wo')(h)).astype(x.dtype)


def biased_attention(query: Float[Array, 'B Q N H'], key: Float[Array, 'B K N H'], value: Float[Array, 'B K N H'],
                     bias: Float[Array, '1 N Q K'], mask: Bool[Array, 'B K']) -> Float[Array, 'B Q N H']:
  """softmax(q k^T + bias) v over the keys that the mask has, the softmax in wide(dtype)."""
  logits = jnp.einsum('bqnh,bknh->bnqk', query, key, preferred_element_type=wide(query.dtype)) + bias
  logits = jnp.where(mask[:, None, None], logits, jnp.finfo(logits.dtype).min)
  return jnp.einsum('bnqk,bknh->bqnh', nn.softmax(logits).astype(value.dtype), value)


def relative_bucket(distance: np.ndarray) -> np.ndarray:
  """The bucket of key position - query position: one for each distance below 8, then eight up to 128 in equal steps of the
  logarithm; 16 for keys before the query and itself, 16 for those after it (arXiv:1910.10683, sec. 2.1)."""
  half, exact = BUCKETS // 2, BUCKETS // 4
  size = np.abs(distance)
  step = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(FURTHEST / exact) * (half - exact)
  far = np.minimum(exact + step.astype(np.int32), half - 1)
  return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)


def layer_norm(name, dtype, param_dtype):
  return nn.LayerNorm(1e-5, dtype=wide(dtype), param_dtype=param_dtype, name=name)


def _rms_norm(name, dtype, param_dtype):
  return nn.RMSNorm(1e-6, dtype=wide(dtype), param_dtype=param_dtype, name=name)
