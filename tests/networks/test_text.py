"""Text encoders against transformers' numbers, made by tests/goldens/make_text.py, and laws of their attention."""
import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp

from diffusion_jax.networks.text import CLIPText, T5Encoder, biased_attention, relative_bucket

GOLDENS = dict(np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'text.npz'))
NAMES = {'text_model.': '', 'embeddings.': '', 'encoder.': '', 'self_attn.': '', 'mlp.': '', 'block.': 'layers.',
         'layer.0.SelfAttention.relative_attention_bias': 'relative_attention_bias', 'layer.0.SelfAttention.': '',
         'layer.1.DenseReluDense.': '', 'layer.0.layer_norm': 'layer_norm_0', 'layer.1.layer_norm': 'layer_norm_1',
         'shared': 'token_embedding', 'layers.0.relative': 'relative'}
SMALL = {'clip': CLIPText(512, 16, 64, 2, 4), 't5': T5Encoder(512, 64, 2, 4, 16, 128)}
GOLDEN = {'clip/quick_gelu': CLIPText(32, 10, 16, 2, 2, 24, projection=12),
          'clip/gelu': CLIPText(32, 10, 16, 2, 2, 24, 'gelu', projection=12),
          't5/gated-gelu': T5Encoder(32, 16, 2, 2, 6, 24), 't5/relu': T5Encoder(32, 16, 2, 2, 6, 24, gated=False)}
SIZES = {'clip/vit_l_14': CLIPText(49408, 77, 768, 12, 12), 'clip/vit_h_14': CLIPText(49408, 77, 1024, 24, 16),
         't5/small': T5Encoder(32128, 512, 8, 6, 64, 1024), 't5/base': T5Encoder(32128, 768, 12, 12, 64, 2048),
         't5/large': T5Encoder(32128, 1024, 24, 16, 64, 2816), 't5/xl': T5Encoder(32128, 2048, 24, 32, 64, 5120),
         't5/xxl': T5Encoder(32128, 4096, 24, 64, 64, 10240)}


def published(name):
  """The parameters of a golden under our names: a product's matrix is transposed, a norm's weight is its scale."""
  def ours(path, value):
    for theirs, own in NAMES.items():
      path = path.replace(theirs, own)
    path = path.replace('layers.', 'layers_')
    leaf = 'embedding' if 'embedding' in path or 'relative' in path else 'scale' if 'norm' in path else 'kernel'
    path = path.replace('weight', leaf)
    return tuple(path.split('.')), value.T if leaf == 'kernel' and value.ndim == 2 else value

  head = f'{name}/weights/'
  leaves = (ours(path.removeprefix(head), value) for path, value in GOLDENS.items() if path.startswith(head))
  return {'params': traverse_util.unflatten_dict(dict(leaves))}


def golden(name, *parts):
  return [GOLDENS[f'{name}/{part}'] for part in parts]


def near(value, expected):
  """Within 1e-5 of the largest."""
  assert value.shape == expected.shape
  np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def batch(length=16):
  """Random tokens, three texts of which one is whole, with their mask."""
  tokens = jax.random.randint(jax.random.key(0), (3, length), 0, 512)
  return tokens, jnp.arange(length)[None] < jnp.array([[3], [9], [length]])


@pytest.fixture(scope='module')
def params():
  return {name: jax.jit(net.init)(jax.random.key(1), *batch()) for name, net in SMALL.items()}


@pytest.mark.parametrize('name', GOLDEN)
def test_an_encoder_is_that_of_transformers(name):
  tokens, mask, sequence = golden(name, 'tokens', 'mask', 'sequence')
  out = jax.jit(GOLDEN[name].apply)(published(name), tokens, mask)
  if 'clip' in name:  # also behind the end, where Stable Diffusion looks
    near(out.sequence, sequence)
    near(out.pooled, *golden(name, 'pooled'))
  else:
    near(out.sequence[mask], sequence[mask])
    near(out.pooled, np.stack([row[real].mean(0) for row, real in zip(sequence, mask, strict=True)]))


def test_a_skipped_layer_gives_the_state_before_it():
  name = 'clip/quick_gelu'
  tokens, mask, penultimate, pooled = golden(name, 'tokens', 'mask', 'penultimate', 'pooled')
  out = jax.jit(GOLDEN[name].clone(skip=1).apply)(published(name), tokens, mask)
  near(out.sequence, penultimate)
  near(out.pooled, pooled)


def test_relative_buckets_are_those_of_transformers():
  distance, bucket = GOLDENS['t5/buckets']
  np.testing.assert_array_equal(relative_bucket(distance), bucket)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name in ('t5/large', 't5/xl') else name for name in SIZES])
def test_published_sizes(name):
  shapes = jax.eval_shape(SIZES[name].init, jax.random.key(0), jnp.zeros((1, 7), int), jnp.ones((1, 7), bool))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == GOLDENS[f'count/{name}']


@pytest.mark.parametrize('name', SMALL)
def test_what_a_token_reaches(name, params):
  """Another token at place 5 of a text of 9: CLIP's states before it stay, T5's change; other texts stay in both."""
  tokens, mask = batch()
  apply = jax.jit(SMALL[name].apply)
  one, two = (apply(params[name], each, mask) for each in (tokens, tokens.at[1, 5].add(1)))
  moved = np.abs(one.sequence - two.sequence).max(-1) > 1e-6
  assert moved[1, 5:9].all() and not moved[[0, 2]].any()
  assert moved[1, :5].all() if name == 't5' else not moved[1, :5].any()
  np.testing.assert_array_equal(np.abs(one.pooled - two.pooled).max(-1) > 1e-6, [False, True, False])


@pytest.mark.parametrize('name', SMALL)
def test_padding_reaches_nothing_real(name, params):
  tokens, mask = batch()
  apply = jax.jit(SMALL[name].apply)
  one, two = (apply(params[name], each, mask) for each in (tokens, jnp.where(mask, tokens, 7)))
  np.testing.assert_array_equal(one.sequence[mask], two.sequence[mask])
  np.testing.assert_array_equal(one.pooled, two.pooled)
  short = apply(params[name], tokens[:2, :9], mask[:2, :9])
  np.testing.assert_allclose(short.sequence[1], one.sequence[1, :9], atol=1e-5)
  np.testing.assert_allclose(short.pooled, one.pooled[:2], atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_every_parameter_learns(name, params):
  """But for CLIP's bias of the keys, which adds the same to all logits of a row; with one layer of the two."""
  def loss(params):
    out = SMALL[name].clone(layers=1).apply(params, *batch())
    return jnp.sum(jnp.sin(out.sequence)**2) + jnp.sum(jnp.sin(out.pooled)**2)

  one = {path: value for path, value in params[name]['params'].items() if path != 'layers_1'}
  gradients = traverse_util.flatten_dict(jax.jit(jax.grad(loss))({'params': one}), sep='/')
  largest = {path: float(jnp.abs(value).max()) for path, value in gradients.items()}
  assert all(np.isfinite(value) for value in largest.values())
  assert {path for path, value in largest.items() if value < 1e-3} == (
      {'params/layers_0/k_proj/bias'} if name == 'clip' else set())


@pytest.mark.parametrize('name', SMALL)
def test_a_new_encoder_starts_as_its_paper_says(name, params):
  """The standard deviations by hand: width 64, 2 layers, 4 heads of 16, hidden 256 and 128."""
  expected = {'clip': {'token_embedding': 0.02, 'position_embedding': 0.01, 'q_proj': 0.125, 'v_proj': 0.125,
                       'out_proj': 0.0625, 'fc1': 0.0884, 'fc2': 0.0625},
              't5': {'token_embedding': 1.0, 'q': 0.03125, 'k': 0.125, 'v': 0.125, 'o': 0.125, 'wi_0': 0.125,
                     'wi_1': 0.125, 'wo': 0.0884}}[name]
  tables = params[name]['params'] | params[name]['params']['layers_1']
  for path, std in expected.items():
    np.testing.assert_allclose(np.std(jax.tree.leaves(tables[path])[-1]), std, rtol=0.05, err_msg=path)


@pytest.mark.parametrize('name', SMALL)
def test_half_precision_sums_in_float32(name, params):
  half, (tokens, mask) = SMALL[name].clone(dtype='bfloat16'), batch()
  program = jax.make_jaxpr(half.apply)(params[name], tokens, mask)
  exponentials = [line for line in str(program).splitlines() if ' exp ' in line or ' exp[' in line]
  assert len(exponentials) == 2 and all(':f32[' in line for line in exponentials)
  out, exact = (jax.jit(net.apply)(params[name], tokens, mask) for net in (half, SMALL[name]))
  assert out.sequence.dtype == out.pooled.dtype == jnp.float32
  for one, two in zip(out, exact, strict=True):
    error = np.abs(one - two).max() / np.abs(two).max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize('dtype, error', [('float32', 1e-4), ('bfloat16', 2e-2)])
def test_biased_attention_is_a_weighted_mean(dtype, error):
  """Beside sums in numpy, one by one, of logits around 200, whose steps in bfloat16 are 1; no key at all gives no NaN."""
  draw = np.random.default_rng(0).normal
  query, key, value = (jnp.asarray(draw(size=(2, length, 2, 4)), dtype) for length in (3, 5, 5))
  query, bias = query.at[..., 0].set(200), jnp.asarray(draw(size=(1, 2, 3, 5)), jnp.float32)
  key = key.at[..., 0].set(1)
  mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
  out = np.asarray(biased_attention(query, key, value, bias, mask), np.float64)
  query, key, value, bias = (np.asarray(each, np.float64) for each in (query, key, value, bias))
  for q in range(3):
    for n in range(2):
      weights = [np.exp(query[0, q, n] @ key[0, k, n] + bias[0, n, q, k]) for k in (0, 1, 3)]
      mean = sum(w * value[0, k, n] for w, k in zip(weights, (0, 1, 3), strict=True)) / sum(weights)
      np.testing.assert_allclose(out[0, q, n], mean, rtol=0, atol=error)
  assert np.isfinite(out).all()


@pytest.mark.parametrize('fields, said', [
    (dict(activation='relu'), "activation='relu'; it knows"), (dict(heads=5), 'width 64 cannot have 5 heads'),
    (dict(skip=3), '2 layers cannot skip 3; skip is 0 to 2'), (dict(length=15), 'length 15 got 16 tokens a text')])
def test_fields_that_contradict_each_other_get_a_sentence(fields, said):
  with pytest.raises(ValueError, match=said):
    jax.eval_shape(SMALL['clip'].clone(**fields).init, jax.random.key(0), *batch())
