"""The U-Net: published size, every shape it takes, what moves its output and what must not."""
import itertools
import math
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.build import build
from diffusion_jax.networks.embed import Conditioning
from diffusion_jax.networks.layers import cut
from diffusion_jax.networks.unet import ResBlock, UNet, plan, waves

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(False, True), groups=4)
RICH = dict(**SMALL, head_channels=4, dropout=0.3)
BATCH = 3
quick = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # compiling is most of the time here


def inputs(space=(4, 4), sequence=True, seed=0):
  """x, feature, conditioning of every kind, dropout keys."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  mask = np.arange(5)[None] < np.array([5, 3, 2])[:, None]
  cond = Conditioning(draw(BATCH, 32), draw(BATCH, 5, 6) if sequence else None, mask if sequence else None,
                      draw(BATCH, *space, 2))
  return draw(BATCH, *space, 3), draw(BATCH), cond, jax.random.split(jax.random.key(seed), BATCH)


def fill(shapes, seed=1):
  """Parameters without a zero among them: kernels of unit gain, biases and scales moved off 0 and 1."""
  rng = np.random.default_rng(seed)
  def leaf(path, shape):
    value = rng.normal(size=shape.shape)
    kind = path[-1].key
    if kind == 'kernel':
      value /= np.sqrt(np.prod(shape.shape[:-1]))
    elif kind in ('bias', 'scale'):
      value = 0.2 * value + (kind == 'scale')
    return jnp.asarray(value, shape.dtype)
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def shapes_of(net, *args):
  return jax.eval_shape(net.init, jax.random.key(0), *args)


def make_call(net, params, args):
  """(params, x, feature, conditioning, keys) -> (output, gradient of a random projection of it), compiled once."""
  probe = jnp.asarray(np.random.default_rng(2).normal(size=args[0].shape), jnp.float32)
  def objective(params, *args):
    out = net.apply(params, *args)
    return (out * probe).sum(), out
  @quick
  def call(params, *args):
    grads, out = jax.grad(objective, has_aux=True)(params, *args)
    return out, grads
  return call


@pytest.fixture(scope='module')
def rich():
  """A network with dropout and every kind of conditioning: (params, call, args)."""
  args = inputs()
  net = UNet(**RICH)
  params = fill(shapes_of(net, *args))
  return params, make_call(net, params, args), args


def changed(rich, **new):
  """The largest change of each row's output where inputs are replaced, relative to the output's size."""
  params, call, (x, feature, cond, keys) = rich
  before, _ = call(params, x, feature, cond, keys)
  after, _ = call(params, new.pop('x', x), new.pop('feature', feature), cond._replace(**new.pop('cond', {})),
                  new.pop('keys', keys))
  assert not new
  return np.abs(after - before).max((1, 2, 3)) / np.std(before)


def test_ddpm_has_its_published_size():
  """35.7 M on CIFAR-10, arXiv:2006.11239, appendix B; counted from the published checkpoint."""
  shapes = shapes_of(UNet(3, frequency_shift=1), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 35_746_307


ADM = {64: dict(channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(False, True, True, True)),
       256: dict(channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(False,) * 3 + (True,) * 3)}


@pytest.mark.parametrize('size, published', [(64, 295_904_454), (256, 553_838_086)])
def test_adm_has_its_published_size(size, published):
  """295.9 M and 553.8 M with 1000 classes (arXiv:2105.05233, table 11), counted from its description, layer by layer."""
  c, multipliers, blocks, attention = ADM[size].values()
  dense, conv, norm = lambda i, o: i * o + o, lambda i, o: 9 * i * o + o, lambda i: 2 * i
  def block(i, o, attends=False):
    count = norm(i) + conv(i, o) + dense(4 * c, 2 * o) + norm(o) + conv(o, o) + (dense(i, o) if i != o else 0)
    return count + (norm(o) + dense(o, 3 * o) + dense(o, o) if attends else 0)
  total, width, skips = dense(c, 4 * c) + dense(4 * c, 4 * c) + conv(3, c) + norm(c) + conv(c, 6), c, [c]
  for i, multiplier in enumerate(multipliers):
    for _ in range(blocks):
      total, width = total + block(width, c * multiplier, attention[i]), c * multiplier
      skips.append(width)
    if i < len(multipliers) - 1:
      total, skips = total + block(width, width), [*skips, width]
  total += block(width, width, True) + block(width, width)
  for i, multiplier in reversed(list(enumerate(multipliers))):
    for _ in range(blocks + 1):
      total, width = total + block(width + skips.pop(), c * multiplier, attention[i]), c * multiplier
    total += block(width, width) if i else 0
  assert total + 1000 * 4 * c == published
  net = UNet(6, **ADM[size], head_channels=64, modulation='scale_shift', resample='block')
  shapes = shapes_of(net, jnp.zeros((1, size, size, 3)), jnp.zeros(1))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


CASES = list(itertools.product((1, 2, 3), ('add', 'scale_shift'), ('conv', 'block')))


@pytest.mark.parametrize('axes, modulation, resample', CASES)
def test_shapes_and_types(axes, modulation, resample):
  space = (4, 6, 2)[:axes]
  net = UNet(**SMALL, out_channels=5, axes=axes, modulation=modulation, resample=resample, dtype='bfloat16')
  args = inputs(space)
  params = shapes_of(net, *args)
  out = jax.eval_shape(net.apply, params, *args)
  assert (out.shape, out.dtype) == ((BATCH, *space, 5), jnp.float32)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def states_of(net, params, *args):
  """{block: shape of its output}."""
  _, states = jax.eval_shape(partial(net.apply, capture_intermediates=True, mutable='intermediates'), params, *args)
  entries = states['intermediates'].items()
  return {name: value['__call__'][0].shape for name, value in entries if '__call__' in value}


@pytest.mark.parametrize('resample', ['conv', 'block'])
def test_kernel_and_stride_an_axis(resample):
  """Frames are left apart: three of them, which 2 does not divide, are neither convolved nor resampled."""
  net = UNet(**SMALL, axes=3, kernel=(1, 3, 5), stride=(1, 2, 4), resample=resample)
  x, feature, *_ = inputs((3, 4, 8))
  params = shapes_of(net, x, feature)
  states = states_of(net, params, x, feature)
  assert states['down_0_0'] == (BATCH, 3, 4, 8, 8)
  assert states['middle_0'] == (BATCH, 3, 2, 2, 16)
  assert states['up_0_0'] == (BATCH, 3, 4, 8, 8)
  kernels = {leaf.shape[:3] for leaf in jax.tree.leaves(params) if len(leaf.shape) == 5}
  assert kernels == {(1, 3, 5)}


def test_patches_are_channels_of_a_smaller_image():
  """With the same parameters the network on patches is the one on the image of them."""
  patch, space = (2, 3), (4, 6)
  x, feature, cond, keys = inputs(space)
  net, plain = UNet(**RICH, patch=patch), UNet(**RICH, out_channels=18)
  params = fill(shapes_of(net, x, feature, cond, keys))
  small = lambda a: cut(a, patch).reshape(BATCH, 2, 2, -1)
  # conditioning channels stand beside x at every place before it is cut
  known = cond._replace(channels=None)
  both = np.concatenate([x, cond.channels], -1)
  whole = quick(net.apply)(params, x, feature, cond, keys)
  parts = quick(plain.apply)(params, small(both), feature, known, keys)
  np.testing.assert_allclose(small(whole), parts, atol=1e-5)
  assert whole.shape == x.shape


def test_only_coordinates_tell_places_apart():
  """Without borders, which kernels of one entry do not see, a flat picture comes out flat."""
  x, feature, cond, _ = inputs()
  flat, cond = np.ones_like(x), cond._replace(channels=None)
  spreads = []
  for coordinates in (0, 2):
    net = UNet(**SMALL, kernel=1, coordinates=coordinates)
    out = quick(net.apply)(fill(shapes_of(net, flat, feature, cond)), flat, feature, cond)
    spreads.append(out.std((1, 2)).min() / out.std())
  assert spreads[0] < 1e-5 and spreads[1] > 1e-2, spreads


@pytest.mark.parametrize('space', [(6,), (5, 8)])
def test_waves_are_orthogonal_and_say_the_place_in_the_whole(space):
  """The basis of the discrete cosine transform; two neighbours of a picture twice as large are, in the mean, their middle."""
  flat = lambda values: np.asarray(values, np.float64).reshape(-1, values.shape[-1])
  ours = flat(waves(space, 4, jnp.float32))
  np.testing.assert_allclose(ours.T @ ours, np.eye(4 * len(space)) * math.prod(space) / 2, atol=1e-4)
  twice = np.asarray(waves([2 * size for size in space], 4, jnp.float32), np.float64)
  middle = twice.reshape(-1, *itertools.chain(*[(size, 2) for size in space]), ours.shape[-1])
  middle = flat(middle.mean(tuple(range(2, middle.ndim, 2))))
  factor = np.cos(np.pi * np.arange(1, 5) / (4 * np.array(space)[:, None])).reshape(-1)
  np.testing.assert_allclose(middle, ours * factor, atol=1e-5)


def test_blocks_a_level():
  names = [stage.name for stage in plan(8, (1, 2), (3, 1), (False, True)) if 'resample' not in stage.name]
  assert names == ['down_0_0', 'down_0_1', 'down_0_2', 'down_1_0', 'middle_0', 'middle_1',
                   'up_1_0', 'up_1_1', 'up_0_0', 'up_0_1', 'up_0_2', 'up_0_3']
  assert plan(8, (1, 2), (2, 2), (False, True)) == plan(8, (1, 2), 2, (False, True))
  x, feature, *_ = inputs()
  net = UNet(**SMALL | {'blocks': (3, 1)})
  assert jax.eval_shape(net.apply, shapes_of(net, x, feature), x, feature).shape == x.shape


def test_three_axes_have_no_dead_layer():
  """kernel and stride an axis, scale and shift, resampling in blocks, skip_rescale, in numbers."""
  net = UNet(**SMALL | {'attention': (False, False)}, axes=3, kernel=(1, 3, 3), stride=(1, 2, 2),
             modulation='scale_shift', resample='block', skip_rescale=True)
  args = inputs((3, 2, 2), sequence=False)
  params = fill(shapes_of(net, *args))
  out, grads = make_call(net, params, args)(params, *args)
  assert out.shape == args[0].shape and np.isfinite(out).all()
  assert_alive(grads)


def assert_alive(grads):
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  largest = max(float(np.abs(leaf).max()) for _, leaf in leaves)
  dead = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.abs(leaf).max() > 1e-5 * largest]
  assert not dead


def test_no_layer_is_dead(rich):
  params, call, args = rich
  _, grads = call(params, *args)
  assert_alive(grads)


def test_a_fresh_network_says_zero(rich):
  _, call, args = rich
  params = quick(UNet(**RICH).init)(jax.random.key(3), *args)
  out, grads = call(params, *args)
  np.testing.assert_array_equal(out, np.zeros_like(out))
  assert np.abs(grads['params']['out']['kernel']).max() > 1e-3  # and yet it learns


def test_every_input_moves_the_output(rich):
  _, _, (x, feature, cond, keys) = rich
  for name in ('vector', 'sequence', 'channels'):
    swapped = changed(rich, cond={name: getattr(cond, name)[::-1]})[::2]  # the middle row stays where it is
    assert (swapped > 1e-2).all(), name
  assert (changed(rich, feature=feature + 0.5) > 1e-2).all()
  assert (changed(rich, x=x + 0.5 * x**2) > 1e-2).all()
  assert (changed(rich, keys=jax.random.split(jax.random.key(9), BATCH)) > 1e-2).all()


def test_masked_entries_of_the_sequence_do_not_matter(rich):
  cond = rich[2][2]
  noise = np.where(cond.mask[..., None], cond.sequence, 100.0).astype(np.float32)
  np.testing.assert_array_equal(changed(rich, cond={'sequence': noise}), 0)
  assert (changed(rich, cond={'mask': np.ones_like(cond.mask)})[1:] > 1e-3).all()


def test_a_row_does_not_see_the_others(rich):
  """Row 0 keeps its output where all others change, and a permutation of the rows permutes the outputs."""
  params, call, args = rich
  x, feature, cond, keys = args
  other = inputs(seed=5)
  mix = lambda a, b: jnp.concatenate([a[:1], b[1:]])
  diff = changed(rich, x=mix(x, other[0]), feature=mix(feature, other[1]), keys=mix(keys, other[3]),
                 cond=jax.tree.map(mix, cond, other[2])._asdict())
  assert diff[0] < 1e-5 and (diff[1:] > 1e-2).all()
  order = np.array([2, 0, 1])
  out, _ = call(params, *args)
  moved, _ = call(params, *jax.tree.map(lambda a: a[order], args))
  np.testing.assert_allclose(moved, out[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('channels', [12, 32, 64])
def test_a_block_hears_the_time(channels):
  """Whatever the width: the group norm that follows must not take the added time out again."""
  block = ResBlock(channels, 1, (3,), (2,))
  rng = np.random.default_rng(0)
  x, time = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, channels), (2, 16)))
  params = fill(shapes_of(block, x, time))
  out, other = block.apply(params, x, time), block.apply(params, x, -time)
  assert np.abs(out - other).max() > 1e-2 * np.std(out)


WRONG = {
    'modulation': (dict(modulation='film'), (4, 4), r"modulation='film'; it knows \('add', 'scale_shift'\)"),
    'resample': (dict(resample='pool'), (4, 4), r"resample='pool'; it knows \('conv', 'block'\)"),
    'remat': (dict(remat=True), (4, 4), r"remat=True; it knows \('none', 'block', 'products'\)"),
    'dtype': (dict(dtype='bf16'), (4, 4), r"dtype='bf16'; it knows \('bfloat16', 'float32', 'float64'\)"),
    'param_dtype': (dict(param_dtype='bfloat16'), (4, 4), r"param_dtype='bfloat16'; it knows \('float32', 'float64'\)"),
    'float64': (dict(dtype='float64'), (4, 4), "dtype='float64', param_dtype='float32'; float64 needs JAX_ENABLE_X64=1"),
    'attention': (dict(attention=(True,)), (4, 4), r'has 2 levels, multipliers=\(1, 2\), but attention=\(True,\)'),
    'blocks': (dict(blocks=(1, 2, 3)), (4, 4), r'has 2 levels, multipliers=\(1, 2\), but blocks=\(1, 2, 3\) speaks of 3'),
    'coordinates': (dict(coordinates=-1), (4, 4), 'coordinates=-1; give a number of frequencies, or 0 for none'),
    'axes': (dict(axes=3), (4, 4), r'axes=3 needs x of 5 axes.* got shape \(3, 4, 4, 3\)'),
    'size': ({}, (4, 5), r'2 levels and patch=1 needs sizes divisible by \(2, 2\); got \(4, 5\)'),
    'levels': (dict(multipliers=(1, 1, 1), attention=(False,) * 3), (4, 6), r'divisible by \(4, 4\); got \(4, 6\)'),
    'patch': (dict(patch=2), (8, 6), r'2 levels and patch=2 needs sizes divisible by \(4, 4\); got \(8, 6\)'),
    'no patch': (dict(patch=0), (4, 4), r'patch=0 needs sizes divisible by \(0, 0\)'),
    'heads': (dict(head_channels=5), (4, 4), '16 channels cannot have heads of 5'),
    'sinusoid': (dict(channels=7), (4, 4), 'sinusoid needs an even size'),
    'kernel': (dict(kernel=(1, 3, 3)), (4, 4), r'(?s)kernel.*axes'),
    'stride': (dict(stride=(1, 2, 2)), (4, 4), r'(?s)stride.*axes'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_fields_get_a_sentence(name):
  fields, space, sentence = WRONG[name]
  x, feature, *_ = inputs(space)
  with pytest.raises(ValueError, match=sentence):
    shapes_of(UNet(**SMALL | fields), x, feature)


def test_built_from_a_call_string():
  names = {'UNet': UNet}
  net = build('UNet(channels=8, multipliers=(1,2), attention=(False,True), groups=4, stride=(2, 1))', names)
  assert (net.channels, net.attention, net.blocks) == (8, (False, True), 2)
  x, feature, *_ = inputs((2, 3))
  assert jax.eval_shape(net.apply, shapes_of(net, x, feature), x, feature).shape == (BATCH, 2, 3, 3)
  with pytest.raises(ValueError, match=r"unexpected keyword argument 'chanels'.*Its form is UNet\(out_channels=3, "):
    build('UNet(chanels=8)', names)
