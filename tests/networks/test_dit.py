"""The transformer: published sizes, other people's numbers, what moves its output and what must not."""
import pathlib
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp
from scipy import ndimage

from diffusion_jax.build import build
from diffusion_jax.networks.dit import Block, Depthwise, DiT, positions
from diffusion_jax.networks.embed import Conditioning
from diffusion_jax.networks.layers import cut, join
from diffusion_jax.runtime.products import products, total
from tests.networks.test_unet import BATCH, assert_alive, changed, fill, inputs, make_call, quick, shapes_of

GOLDENS = dict(np.load(pathlib.Path(__file__).parents[1] / 'goldens' / 'networks.npz'))
TYPES = ['float32', pytest.param('float64', marks=pytest.mark.slow)]
positions_of = quick(positions, static_argnums=(0, 1, 2))
SMALL = dict(width=32, depth=2, heads=4)
RICH = {'cross': dict(width=32, depth=1, heads=4, dropout=0.3, qk_norm=True, conv=3, attend='cross'),
        'joint': dict(width=32, depth=2, heads=4, dropout=0.3, qk_norm=True, conv=3, attend='joint')}


def size_of(net, channels, sequence=None):
  args = jnp.zeros((1, 32, 32, channels)), jnp.zeros(1), Conditioning(sequence=sequence)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(net, *args)))


@pytest.mark.parametrize('width, depth, heads, millions', [
    (384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)])
def test_dit_has_its_published_sizes(width, depth, heads, millions):
  """S/2, B/2, L/2 and XL/2 of arXiv:2212.09748, table 4, on latents of 32 x 32 x 4 with a learned variance, to the digit
  by the layers; beside the backbone they count 1001 classes and a fixed table of 256 positions."""
  dense = lambda i, o: i * o + o
  block = dense(width, 6 * width) + 4 * dense(width, width) + dense(width, 4 * width) + dense(4 * width, width)
  ends = dense(16, width) + dense(256, width) + dense(width, width) + dense(width, 2 * width) + dense(width, 32)
  found = size_of(DiT(8, width, depth, heads, scan=True), 4)
  assert found == depth * block + ends
  assert abs((found + (1001 + 256) * width) / 1e6 - millions) < 0.6


def test_published_sizes_to_the_digit():
  """diffusers has an embedder of time and class in every block of DiT, one for pooled texts in Stable Diffusion 3, and
  there queries in the last block that come to nothing."""
  dense = lambda i, o: i * o + o
  dit, sd3 = GOLDENS['counts/dit_xl'], GOLDENS['counts/sd3_medium']
  assert dit == size_of(DiT(8, 1152, 28, 16, scan=True), 4) + 27 * (dense(256, 1152) + dense(1152, 1152)) + 28 * 1001 * 1152
  net = DiT(16, 1536, 24, 24, attend='joint', scan=True)
  ours = size_of(net, 16, jnp.zeros((1, 3, 4096)))
  assert sd3 == ours + dense(2048, 1536) + dense(1536, 1536) + dense(1536, 1536)


def golden(name, dtype):
  """A case of networks.npz as nested dicts."""
  own = {key: value for key, value in GOLDENS.items() if key.startswith(f'{name}/')}
  tree = unflatten_dict({key: value if value.dtype == bool else value.astype(dtype) for key, value in own.items()}, sep='/')
  return tree[name]


def assert_near(ours, theirs, dtype):
  assert ours.dtype == dtype
  np.testing.assert_allclose(ours, theirs, rtol=0, atol={'float32': 1e-5, 'float64': 1e-12}[dtype] * np.abs(theirs).max())


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('name, fields', [('dit', {'frequency_shift': 1}), ('sd3', {'attend': 'joint', 'qk_norm': True})])
def test_it_says_what_diffusers_says(name, fields, dtype):
  """Its DiT, whose sinusoid of the time has shift 1 and not the paper's 0, and Stable Diffusion 3, on 6 x 6 and 6 x 4
  entries."""
  with jax.enable_x64(dtype == 'float64'):
    case = golden(name, dtype)
    cond = Conditioning(case['vector'], case.get('sequence'))
    net = DiT(5, 16, 2, 2, dtype=dtype, param_dtype=dtype, **fields)
    out = quick(net.apply)({'params': case['params']}, case['x'], case['time'], cond)
    assert_near(out, case['out'], dtype)


@pytest.mark.parametrize('dtype', TYPES)
def test_a_block_says_what_pixart_says(dtype):
  """With entries of the sequence masked."""
  with jax.enable_x64(dtype == 'float64'):
    case = golden('pixart', dtype)
    block = Block(16, 2, 4, False, dtype=dtype, param_dtype=dtype)
    [out], _ = quick(block.apply)({'params': case['params']}, (case['x'],), np.zeros(2, np.uint32), case['time'],
                                  case['sequence'], case['mask'])
    assert_near(out, case['out'], dtype)


@pytest.mark.parametrize('axes, patch, attend', [(1, 2, 'joint'), (2, (4, 1), 'none'), (3, (1, 3, 2), 'cross')])
def test_shapes_and_types(axes, patch, attend):
  space = (4, 6, 2)[:axes]
  net = DiT(**SMALL, out_channels=5, axes=axes, patch=patch, attend=attend, dtype='bfloat16')
  args = inputs(space, sequence=attend != 'none')
  params = shapes_of(net, *args)
  out = jax.eval_shape(net.apply, params, *args)
  assert (out.shape, out.dtype) == ((BATCH, *space, 5), jnp.float32)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_another_canvas_takes_the_same_parameters():
  assert shapes_of(DiT(**SMALL), *inputs((4, 4))) == shapes_of(DiT(**SMALL), *inputs((6, 8)))


def test_without_a_sequence_it_is_dit():
  args = inputs(sequence=False)
  plain = shapes_of(DiT(**SMALL, attend='none'), *args)
  assert all(shapes_of(DiT(**SMALL, attend=attend), *args) == plain for attend in ('cross', 'joint'))


@pytest.mark.parametrize('attend', ['none', 'cross', 'joint'])
def test_flops_are_those_of_the_layers(attend):
  """Two for every entry of a kernel and token, and for every query, key and channel, twice."""
  tokens, length, w = 4 * 8 // 4, 5, 32
  x, feature, cond, _ = inputs((4, 8), sequence=attend != 'none')
  net, cond = DiT(**SMALL, attend=attend), cond._replace(channels=None)
  layer = lambda count: count * (4 * w * w + 8 * w * w)
  one = 6 * w * w + layer(tokens) + 2 * tokens**2 * w
  if attend == 'cross':
    one += tokens * 2 * w * w + length * 6 * 2 * w + 2 * tokens * length * w
  blocks = 2 * one
  if attend == 'joint':
    first = one + 6 * w * w + layer(length) + 2 * ((tokens + length)**2 - tokens**2) * w
    last = one + 2 * w * w + length * 2 * w * w + 2 * (tokens * length) * w
    blocks = first + last + length * 6 * w
  ends = tokens * 12 * w * 2 + 256 * w + w * w + 2 * w * w
  traced = jax.make_jaxpr(net.apply)(shapes_of(net, x, feature, cond), x, feature, cond)
  assert total(products(traced)) == 2 * BATCH * (blocks + ends)


def test_patches_by_hand():
  x = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
  tokens = cut(x, (2, 3))
  for i in range(2):
    for j in range(2):
      np.testing.assert_array_equal(tokens[:, 2 * i + j], x[:, 2 * i:2 * i + 2, 3 * j:3 * j + 3].reshape(2, -1))
  for axes in (1, 2, 3):
    x, patch = np.random.default_rng(1).normal(size=(2, *(4, 6, 8)[:axes], 3)), (2, 3, 4)[:axes]
    np.testing.assert_array_equal(join(cut(x, patch), patch, x.shape[1:-1]), x)


@pytest.mark.parametrize('counts, width', [((5,), 12), ((3, 5), 16), ((2, 3, 4), 32)])
def test_positions_by_hand(counts, width):
  """The last axis first; of 32 entries 3 axes have 10 each."""
  size = {12: 12, 16: 8, 32: 10}[width]
  expected = np.zeros((*counts, width))
  for place in np.ndindex(*counts):
    for k, axis in enumerate(reversed(range(len(counts)))):
      for i in range(size // 2):
        angle = place[axis] / 10_000 ** (i / (size // 2))
        expected[place][size * k + i], expected[place][size * k + size // 2 + i] = np.sin(angle), np.cos(angle)
  found = positions_of(counts, width, 'float32')
  np.testing.assert_allclose(found, expected.reshape(1, -1, width), atol=1e-6)
  assert len(np.unique(np.round(found[0], 4), axis=0)) == np.prod(counts)  # no two places are alike


@pytest.mark.parametrize('counts, size', [((5,), 3), ((3, 4), 5), ((2, 3, 4), 3)])
def test_a_depthwise_convolution_is_scipys(counts, size):
  """Channel by channel, 0 beyond the tokens, added to them."""
  x = np.random.default_rng(0).normal(size=(2, np.prod(counts), 3)).astype(np.float32)
  net = Depthwise(size, counts)
  params = fill(shapes_of(net, x))
  weights, grid = np.asarray(params['params']['weights']), x.reshape(2, *counts, 3)
  expected = [[ndimage.correlate(grid[i, ..., c], weights[..., c], mode='constant') for c in range(3)] for i in range(2)]
  expected = x + np.stack(expected).reshape(2, 3, -1).swapaxes(1, 2)
  np.testing.assert_allclose(quick(net.apply)(params, x), expected, atol=1e-5)


@pytest.mark.parametrize('fields', [{}, {'conv': 3}])
def test_with_a_convolution_a_token_knows_its_neighbours(fields):
  """One block whose attention and perceptron are shut: the tokens beside one that changes, and no others, change too."""
  x, feature, _, _ = inputs((16,), sequence=False)
  net = DiT(**SMALL | {'depth': 1, 'attend': 'none', 'axes': 1}, **fields)
  params = flatten_dict(fill(shapes_of(net, x, feature)), sep='/')
  params = {name: jnp.zeros_like(leaf) if '/block_0/modulation/' in name else leaf for name, leaf in params.items()}
  call = quick(net.apply)
  params = unflatten_dict(params, sep='/')
  moved = call(params, x + np.float32(np.arange(16)[:, None] == 7), feature) != call(params, x, feature)
  reached = range(4, 10) if fields else range(6, 8)  # patches of 2
  np.testing.assert_array_equal(np.flatnonzero(moved.any((0, 2))), reached)


@pytest.fixture(scope='module', params=RICH)
def rich(request):
  """A network with dropout and every kind of conditioning: (params, call, args)."""
  net, args = DiT(**RICH[request.param]), inputs()
  return fill(shapes_of(net, *args)), quick(lambda *args: (net.apply(*args), None)), args


@pytest.mark.slow
@pytest.mark.parametrize('attend', RICH)
def test_no_layer_is_dead(attend):
  net, args = DiT(**RICH[attend]), inputs()
  params = fill(shapes_of(net, *args))
  _, grads = make_call(net, params, args)(params, *args)
  assert_alive(grads)


@pytest.mark.parametrize('attend', ['cross', *(pytest.param(name, marks=pytest.mark.slow) for name in ('none', 'joint'))])
def test_a_fresh_network_says_zero(attend):
  """And each of its blocks, whose modulation is 0, changes nothing; other kernels start by their fans."""
  args = inputs(sequence=attend != 'none')
  net = DiT(**SMALL | {'depth': 1 + (attend == 'joint')}, attend=attend)
  fresh = quick(net.init)(jax.random.key(3, impl='rbg'), *args)  # which compiles faster
  out, states = quick(partial(net.apply, capture_intermediates=True))(fresh, *args)
  np.testing.assert_array_equal(out, np.zeros_like(out))
  [(tokens, _)], [first] = states['intermediates']['block_0']['__call__'], states['intermediates']['in']['__call__']
  np.testing.assert_array_equal(tokens[0], first + positions_of((2, 2), 32, 'float32'))
  for name, leaf in flatten_dict(fresh['params'], sep='/').items():
    if name.endswith('kernel') and name.split('/')[-2] not in ('modulation', 'sequence_modulation', 'out', 'cross_mix'):
      expected = 0.02 if 'time_' in name else np.sqrt(2 / sum(leaf.shape))
      assert abs(np.std(leaf) / expected - 1) < 0.15, name
    else:
      assert not np.any(leaf), name


def test_every_input_moves_the_output(rich):
  _, _, (x, feature, cond, keys) = rich
  for name in ('vector', 'sequence', 'channels'):
    swapped = changed(rich, cond={name: getattr(cond, name)[::-1]})[::2]  # the middle row stays where it is
    assert (swapped > 1e-2).all(), name
  assert (changed(rich, feature=feature + 0.5) > 1e-2).all()
  assert (changed(rich, x=x + 0.5 * x**2) > 1e-2).all()
  assert (changed(rich, keys=jax.random.split(jax.random.key(9), BATCH)) > 1e-2).all()


def test_a_sequence_is_a_set_of_its_real_entries(rich):
  """What is masked does not matter, nor the order of what is not."""
  cond = rich[2][2]
  noise = np.where(cond.mask[..., None], cond.sequence, 100.0).astype(np.float32)
  np.testing.assert_array_equal(changed(rich, cond={'sequence': noise}), 0)
  assert (changed(rich, cond={'mask': np.ones_like(cond.mask)})[1:] > 1e-3).all()
  order = np.array([3, 1, 4, 0, 2])
  assert (changed(rich, cond={'sequence': cond.sequence[:, order]})[1:] > 1e-3).all()
  if 'sequence' not in rich[0]['params']:  # in 'joint' dropout falls on places of the sequence
    assert (changed(rich, cond={'sequence': cond.sequence[:, order], 'mask': cond.mask[:, order]}) < 1e-5).all()


def test_a_row_does_not_see_the_others(rich):
  """Row 0 keeps its output where all others change, and a permutation of the rows permutes the outputs."""
  params, call, args = rich
  other = inputs(seed=5)
  mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), args, other)
  diff = changed(rich, x=mixed[0], feature=mixed[1], cond=mixed[2]._asdict(), keys=mixed[3])
  assert diff[0] < 1e-5 and (diff[1:] > 1e-2).all()
  order = np.array([2, 0, 1])
  out, _ = call(params, *args)
  moved, _ = call(params, *jax.tree.map(lambda a: a[order], args))
  np.testing.assert_allclose(moved, out[order], rtol=1e-4, atol=1e-5)


WRONG = {
    'attend': (dict(attend='film'), (4, 4), r"attend='film'; it knows \('none', 'cross', 'joint'\)"),
    'remat': (dict(remat='blocks'), (4, 4), r"remat='blocks'; it knows \('none', 'block', 'products'\)"),
    'dtype': (dict(dtype='half'), (4, 4), r"DiT got dtype='half'; it knows \('bfloat16', 'float32', 'float64'\)"),
    'float64': (dict(dtype='float64'), (4, 4), 'float64 needs JAX_ENABLE_X64=1'),
    'axes': (dict(axes=3), (4, 4), r'DiT with axes=3 needs x of 5 axes.* got shape \(3, 4, 4, 3\)'),
    'size': ({}, (4, 5), r'patch=2 needs sizes divisible by \(2, 2\); got \(4, 5\)'),
    'patch': (dict(patch=0), (4, 4), r'patch=0 needs sizes divisible'),
    'patches': (dict(patch=(1, 2, 2)), (4, 4), r'DiT got patch=\(1, 2, 2\) for 2 axes: give one number an axis'),
    'conv': (dict(conv=2), (4, 4), 'DiT got conv=2; give an odd number of tokens, or 0 for no convolution'),
    'heads': (dict(heads=5), (4, 4), 'DiT of width=32 cannot have heads=5; choose a divisor'),
    'sequence': (dict(attend='none'), (4, 4), "was given a sequence, which it does not read; type attend='cross' or"),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_fields_get_a_sentence(name):
  fields, space, sentence = WRONG[name]
  with pytest.raises(ValueError, match=sentence):
    shapes_of(DiT(**SMALL | fields), *inputs(space))


def test_built_from_a_call_string():
  net = build('DiT(width=32, depth=1, heads=2, patch=(2, 1), attend="joint")', {'DiT': DiT})
  assert (net.width, net.patch, net.attend, net.vector_size) == (32, (2, 1), 'joint', 32)
  with pytest.raises(ValueError, match=r"unexpected keyword argument 'channels'.*Its form is DiT\(out_channels=3, "):
    build('DiT(channels=8)', {'DiT': DiT})
