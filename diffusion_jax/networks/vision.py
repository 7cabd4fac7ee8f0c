"""The image encoder of CLIP, a vision transformer (arXiv:2103.00020, sec. 2.4; arXiv:2010.11929), with its own names."""
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.networks.layers import cut
from diffusion_jax.networks.text import CLIPLayer, Encoded, check_clip, layer_norm


class CLIPVision(nn.Module):
  """Images [B, H, W, C] to Encoded: one token for the whole, then one for each square of `patch` pixels a side.

  The sequence is that of the last layer without a norm; pooled is the first token, normalised and projected to
  `projection` channels if that is not 0. The other fields are those of CLIPText. Published weights want colours from 0 to
  1 less their mean, over their standard deviation; here they are taken as they come. Raises ValueError where the fields
  contradict each other or the images.
  """
  width: int
  layers: int
  heads: int
  patch: int
  mlp: int | None = None
  activation: str = 'quick_gelu'
  projection: int = 0
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'B H W C']) -> Encoded:
    self._check(x)
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    normal = nn.initializers.normal
    dense = lambda size, std, name: nn.Dense(size, False, kernel_init=normal(std), name=name, **types)
    tokens = dense(self.width, 0.02, 'patch_embedding')(cut(x, (self.patch,) * 2))
    whole = self.param('class_embedding', normal(self.width**-0.5), (self.width,), self.param_dtype)
    tokens = jnp.concatenate([jnp.broadcast_to(whole.astype(tokens.dtype), (len(x), 1, self.width)), tokens], 1)
    places = nn.Embed(tokens.shape[1], self.width, embedding_init=normal(0.02), name='position_embedding', **types)
    tokens = layer_norm('pre_layrnorm', **types)(tokens + places(np.arange(tokens.shape[1])[None]))
    for i in range(self.layers):
      tokens = CLIPLayer(self.heads, self.mlp or 4 * self.width, self.layers, self.activation, name=f'layers_{i}', **types)(
          tokens, None)
    pooled = layer_norm('post_layernorm', **types)(tokens[:, 0])
    if self.projection:
      pooled = dense(self.projection, self.width**-0.5, 'visual_projection')(pooled)
    return Encoded(tokens, pooled.astype(tokens.dtype))

  def _check(self, x):
    check_clip(self)
    if self.patch < 1 or any(size % self.patch for size in x.shape[1:-1]):
      raise ValueError(f'CLIPVision with patch={self.patch} needs sizes divisible by it; got {x.shape[1:-1]}: give a '
                       'divisor.')
