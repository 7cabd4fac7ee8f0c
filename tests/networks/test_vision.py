"""CLIP's image encoder against transformers' numbers, made by tests/goldens/make_vision.py."""
import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp

from diffusion_jax.networks.vision import CLIPVision

GOLDENS = dict(np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'vision.npz'))
NAMES = {'vision_model.': '', 'embeddings.': '', 'encoder.': '', 'self_attn.': '', 'mlp.': '', 'layers.': 'layers_'}


def published(name):
  """The parameters of a golden under our names; the convolution of the patches as the product that it is."""
  def ours(path, value):
    for theirs, own in NAMES.items():
      path = path.replace(theirs, own)
    if 'patch_embedding' in path:
      return ('patch_embedding', 'kernel'), value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    leaf = 'embedding' if 'position' in path else 'scale' if 'norm' in path else 'kernel'
    return tuple(path.replace('weight', leaf).split('.')), value.T if leaf == 'kernel' and value.ndim == 2 else value
  head = f'{name}/weights/'
  leaves = (ours(path.removeprefix(head), value) for path, value in GOLDENS.items() if path.startswith(head))
  return {'params': traverse_util.unflatten_dict(dict(leaves))}


@pytest.mark.parametrize('name', ['quick_gelu', 'gelu'])
def test_the_encoder_is_that_of_transformers(name):
  net, x = CLIPVision(16, 2, 2, 4, 24, name, projection=10), GOLDENS[f'{name}/x']
  params = published(name)
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  assert shapes(params) == shapes(jax.eval_shape(net.init, jax.random.key(0), x))
  for value, expected in zip(jax.jit(net.apply)(params, x), (GOLDENS[f'{name}/sequence'], GOLDENS[f'{name}/pooled']),
                             strict=True):
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_published_size():
  shapes = jax.eval_shape(CLIPVision(1024, 24, 16, 14).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == GOLDENS['count'] == 303_179_776


def test_half_precision_sums_in_float32():
  net, x = CLIPVision(16, 2, 2, 4), GOLDENS['gelu/x']
  params = jax.jit(net.init)(jax.random.key(0), x)
  half, exact = (jax.jit(each.apply)(params, x) for each in (net.clone(dtype='bfloat16'), net))
  for one, two in zip(half, exact, strict=True):
    assert one.dtype == jnp.float32 and 1e-4 < np.abs(one - two).max() / np.abs(two).max() < 0.05


@pytest.mark.parametrize('fields, said', [
    (dict(activation='relu'), "activation='relu'; it knows"), (dict(heads=5), 'width 16 cannot have 5 heads'),
    (dict(patch=5), r'patch=5 needs sizes divisible by it; got \(12, 12\)')])
def test_fields_that_contradict_each_other_get_a_sentence(fields, said):
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(CLIPVision(16, 2, 2, 4).clone(**fields).init, jax.random.key(0), GOLDENS['gelu/x'])
