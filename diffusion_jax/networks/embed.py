"""Conditions: what a dict of raw arrays becomes before a backbone sees it."""
from typing import NamedTuple

import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array

ENCODER = 'params', 'embedders_text', 'encoder'
"""The path of the parameters of the encoder in a `Text` that is the embedder 'text' of a `Conditional`."""


class Conditioning(NamedTuple):
  """The three things that every backbone consumes: by modulation, by attention, by concatenation to its input."""
  vector: Array | None = None  # [B, D]
  sequence: Array | None = None  # [B, L, D]
  mask: Array | None = None  # [B, L], bool: which entries of the sequence are real
  channels: Array | None = None  # [B, *space, C]


class Label(nn.Module):
  """A class number becomes a learned vector. The null is a class more, number `classes` (arXiv:2207.12598, sec. 3.2)."""
  classes: int
  size: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, label):
    table = nn.Embed(self.classes + 1, self.size, param_dtype=self.param_dtype,
                     embedding_init=nn.initializers.normal(0.02), name='table')
    return Conditioning(vector=table(label))


class Text(nn.Module):
  """A text, {'tokens': [B, L], 'mask': [B, L]}, becomes its encoder's sequence, and its pooled vector one of `size`."""
  encoder: nn.Module
  size: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text):
    encoded = self.encoder(text['tokens'], text['mask'])
    vector = nn.Dense(self.size, param_dtype=self.param_dtype, name='vector')(encoded.pooled)
    return Conditioning(vector, encoded.sequence, text['mask'])


class FrozenText(nn.Module):
  """A text as a frozen encoder has it, {'sequence': [B, L, D], 'pooled': [B, P], 'mask': [B, L]}: its pooled vector becomes
  one of `size`."""
  size: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text):
    vector = nn.Dense(self.size, param_dtype=self.param_dtype, name='vector')(text['pooled'])
    return Conditioning(vector, text['sequence'], text['mask'])


class Reference(nn.Module):
  """An image, {'image': [B, H, W, C], 'given': [B]}, becomes its encoder's sequence, and its pooled vector one of `size`;
  where none is given, one learned entry and no vector."""
  encoder: nn.Module
  size: int
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, reference):
    sequence, pooled = self.encoder(reference['image'])
    given = reference['given'][:, None]
    vector = nn.Dense(self.size, param_dtype=self.param_dtype, name='vector')(pooled)
    none = self.param('none', nn.initializers.normal(1.0), sequence.shape[-1:], self.param_dtype).astype(sequence.dtype)
    first = np.arange(sequence.shape[1])[None] == 0
    return Conditioning(jnp.where(given, vector, 0), jnp.where(given[..., None], sequence, none), given | first)


class Known(nn.Module):
  """What is known of x, {'values': [B, *space, C], 'where': [B, *space, 1]}, becomes channels: the values where they are
  known, 0 elsewhere, and where that is, as 1 and 0 (GLIDE, arXiv:2112.10741, on inpainting)."""

  def __call__(self, known):
    values, where = known['values'], known['where']
    return Conditioning(channels=jnp.concatenate([jnp.where(where, values, 0), where.astype(values.dtype)], -1))


class Conditional(nn.Module):
  """A backbone with the embedders of its conditions, `embedders` = {entry of cond: module}.

  Call it with x [B, *space, C], the time feature [B], cond and, in training, dropout keys [B].
  """
  backbone: nn.Module
  embedders: dict[str, nn.Module]

  def __call__(self, x, feature, cond=None, keys=None):
    cond = cond or {}
    if set(cond) != set(self.embedders):
      raise ValueError(f'This network is conditioned on {sorted(self.embedders)}; it was given {sorted(cond)}.')
    parts = [embedder(cond[name]) for name, embedder in self.embedders.items()]
    return self.backbone(x, feature, merge(parts), keys)


def merge(parts: list[Conditioning]) -> Conditioning:
  """Vectors add up; sequences follow one another, with their masks; channels are concatenated. Raises ValueError where
  sequences have entries of another size."""
  gather = lambda name: [part for part in (getattr(each, name) for each in parts) if part is not None]
  sequences = [each for each in parts if each.sequence is not None]
  widths = [each.sequence.shape[-1] for each in sequences]
  if len(set(widths)) > 1:
    raise ValueError(f'The encoders of the conditions give sequences of {widths} channels, which must be the same: give '
                     'them one width.')
  masks = [jnp.ones(each.sequence.shape[:2], bool) if each.mask is None else each.mask for each in sequences]
  return Conditioning(
      vector=sum(gather('vector')) if gather('vector') else None,
      sequence=jnp.concatenate(gather('sequence'), 1) if sequences else None,
      mask=jnp.concatenate(masks, 1) if sequences else None,
      channels=jnp.concatenate(gather('channels'), -1) if gather('channels') else None)
