"""Layers against numpy."""
import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from diffusion_jax.networks.layers import Attention, Dropout, GroupNorm, average_pool, sinusoid, upsample


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shift', [0, 1])
def test_sinusoid(shift):
  feature, size = np.array([0.0, 0.3, -2.0, 17.0, 999.0]), 12
  expected = np.zeros((5, size))
  for b in range(5):
    for i in range(size // 2):
      angle = feature[b] / 10_000 ** (i / (size / 2 - shift))
      expected[b, i], expected[b, size // 2 + i] = np.sin(angle), np.cos(angle)
  out = sinusoid(jnp.asarray(feature, jnp.float32), size, shift)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, atol=2e-4)  # angles of 1,000 have steps of 6e-5 in float32


def test_sinusoid_says_which_sizes_are_legal():
  for size, shift in ((7, 0), (2, 1)):
    with pytest.raises(ValueError, match=f'even size above {2 * shift}; got {size}'):
      sinusoid(jnp.zeros(1), size, shift)


@pytest.mark.parametrize('groups, channels, used', [(32, 128, 32), (32, 64, 16), (2, 8, 2), (32, 48, 12), (4, 6, 1)])
def test_group_norm_normalises_each_group(groups, channels, used):
  x = normal(2, 5, 3, channels) * 3 + 7
  layer = GroupNorm(groups)
  out = layer.apply(layer.init(jax.random.key(0), x), x)
  grouped = np.asarray(out).reshape(2, 15, used, channels // used)
  np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(grouped.var((1, 3)), 1, atol=1e-4)
  if used < channels:  # and no smaller part: single channels keep their own means
    assert np.abs(np.asarray(out).mean((1, 2))).max() > 1e-2


def test_group_norm_counts_in_float32():
  """In bfloat16 a mean of 100 would drown the differences; the result has the type of x, the parameters are float32."""
  x = jnp.asarray(100 + normal(2, 64, 8), jnp.bfloat16)
  layer = GroupNorm(2)
  params = layer.init(jax.random.key(0), x)
  out = layer.apply(params, x)
  assert out.dtype == jnp.bfloat16 and params['params']['norm']['scale'].dtype == jnp.float32
  np.testing.assert_allclose(np.asarray(out, np.float64).reshape(2, 64, 2, 4).var((1, 3)), 1, atol=2e-2)


class Twice(nn.Module):
  """Two dropouts, apart by their names alone."""
  rate: float = 0.3

  @nn.compact
  def __call__(self, x, keys):
    return Dropout(self.rate, name='one')(x, keys), Dropout(self.rate, name='two')(x, keys)


def test_dropout_keeps_the_mean():
  rate, count = 0.3, 64 * 2000
  keys = jax.random.split(jax.random.key(0), 64)
  out, _ = Twice(rate).apply({}, jnp.ones((64, 2000)), keys)
  np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - rate)], rtol=1e-6)
  assert abs(float(out.mean()) - 1) < 4 * np.sqrt(rate / (1 - rate) / count)


def test_dropout_belongs_to_the_example_and_the_layer():
  keys = jax.random.split(jax.random.key(0), 5)
  x = jnp.ones((5, 20, 4))
  one, two = Twice().apply({}, x, keys)
  assert (one != two).mean() > 0.2
  assert all((one[i] != one[j]).any() for i in range(5) for j in range(i))
  order = np.array([3, 1, 0])  # other places in a batch of another size
  np.testing.assert_array_equal(Twice().apply({}, x[:3], keys[order])[0], one[order])


def test_dropout_is_off_without_keys_or_rate():
  x = jnp.asarray(normal(2, 30))
  np.testing.assert_array_equal(Twice().apply({}, x, None)[0], x)
  np.testing.assert_array_equal(Twice(0.0).apply({}, x, jax.random.split(jax.random.key(0), 2))[0], x)


def numpy_attention(params, x, sequence, mask, groups, head, scale):
  """Loops over examples, heads and positions, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
  channels = x.shape[-1]
  out = np.empty(x.shape)
  for b in range(len(x)):
    flat = x[b].reshape(-1, channels).astype(np.float64)
    h = flat.copy()
    for part in np.split(np.arange(channels), groups):
      h[:, part] = (flat[:, part] - flat[:, part].mean()) / np.sqrt(flat[:, part].var() + 1e-6)
    h = h * p['norm']['norm']['scale'] + p['norm']['norm']['bias']
    dense = lambda a, name: a @ p[name]['kernel'] + p[name]['bias']
    if sequence is None:
      q, k, v = np.split(dense(h, 'qkv'), 3, 1)
    else:
      q, (k, v) = dense(h, 'query'), np.split(dense(sequence[b].astype(np.float64), 'key_value'), 2, 1)
    mixed = np.empty_like(q)
    for first in range(0, channels, head):
      part = slice(first, first + head)
      for i in range(len(q)):
        logits = k[:, part] @ q[i, part] / np.sqrt(head)
        weights = np.exp(logits - logits.max())
        if mask is not None:
          weights = weights * mask[b]
        mixed[i, part] = weights @ v[:, part] / weights.sum()
    out[b] = (flat + dense(mixed, 'out')).reshape(x[b].shape) * scale
  return out


@pytest.mark.parametrize('head', [None, 4])
@pytest.mark.parametrize('what', ['self', 'sequence', 'masked'])
def test_attention_is_softmax_attention(what, head):
  x = normal(2, 3, 2, 12)
  sequence = None if what == 'self' else normal(2, 5, 7, seed=1)
  mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool) if what == 'masked' else None
  layer = Attention(head, groups=3, scale=0.7)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x, sequence, mask)
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, leaf.dtype), shapes)
  expected = numpy_attention(params, x, sequence, mask, 3, head or 12, 0.7)
  np.testing.assert_allclose(layer.apply(params, x, sequence, mask), expected, rtol=1e-4, atol=1e-4)


def test_attention_to_nothing_is_finite():
  """An example whose whole sequence is padding must not spread NaN."""
  layer = Attention(4, groups=3)
  x, sequence = normal(2, 3, 12), normal(2, 5, 7, seed=1)
  mask = np.zeros((2, 5), bool)
  assert np.isfinite(layer.apply(layer.init(jax.random.key(0), x, sequence, mask), x, sequence, mask)).all()


@pytest.mark.parametrize('stride', [(2,), (1, 3), (2, 1, 2)])
def test_upsampling_repeats_and_pooling_undoes_it(stride):
  x = normal(2, *(3, 2, 4)[:len(stride)], 5)
  large = np.asarray(upsample(jnp.asarray(x), stride))
  blocks = np.ones((1, *stride, 1))
  np.testing.assert_array_equal(large, np.kron(x, blocks).astype(np.float32))
  np.testing.assert_allclose(average_pool(jnp.asarray(large), stride), x, rtol=1e-6)


def test_pooling_is_the_mean_of_blocks():
  x = normal(2, 4, 6, 3)
  expected = x.reshape(2, 2, 2, 2, 3, 3).mean((2, 4))
  np.testing.assert_allclose(average_pool(jnp.asarray(x), (2, 3)), expected, rtol=1e-5, atol=1e-6)
