"""How the U-Net is computed: in which types, what the backward pass keeps, and equal blocks as one loop."""
import collections

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.extend.core import jaxprs_in_params

from configs import cifar10
from diffusion_jax.build import build
from diffusion_jax.networks.unet import REMAT, UNet, equal_runs, plan
from tests.networks.test_unet import fill, inputs, quick, shapes_of

ONE = dict(axes=1, channels=8, head_channels=4, dropout=0.3, groups=4)
LOOPS = ONE | dict(multipliers=(1,), blocks=2, attention=(True,))  # a run of two blocks down, one of three up
TINY = ONE | dict(multipliers=(1,), blocks=1, attention=(False,))  # five blocks, one attention, a run of two up
LEVELS = ONE | dict(multipliers=(1, 1), blocks=1, attention=(True, False))  # runs of two up
PRODUCTS = ('conv_general_dilated', 'dot_general')
SUMS = ('reduce_sum', 'reduce_max', 'reduce_window_sum', 'scatter-add', 'cumsum')


def equations(jaxpr):
  """All equations of a program, those of its loops and calls once."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def program(function, *args):
  return list(equations(jax.make_jaxpr(function)(*args).jaxpr))


def types_of(program, names):
  """{(types of the arguments): how many such operations}."""
  found = [tuple(str(v.aval.dtype) for v in each.invars) for each in program if each.primitive.name in names]
  return collections.Counter(found)


def gradient(net, keys=None):
  """(params, x, conditioning) -> the gradient to all three."""
  feature = inputs()[1]
  loss = lambda params, x, cond: jnp.square(net.apply(params, x, feature.astype(x.dtype), cond, keys)).sum()
  return jax.grad(loss, (0, 1, 2), allow_int=True)


@pytest.mark.parametrize('fields', [
  {'scan': True, 'remat': 'products'},
  pytest.param({'modulation': 'scale_shift', 'resample': 'block'}, marks=pytest.mark.slow)])
def test_bfloat16_is_for_products_alone(fields):
  """Every product of a block multiplies bfloat16; every sum, of the backward pass too, is float32."""
  net = UNet(**LEVELS | fields, dtype='bfloat16')
  x, feature, cond, keys = inputs((8,))
  params = shapes_of(net, x, feature, cond)
  forward = program(net.apply, params, x, feature, cond, keys)
  backward = program(gradient(net, keys), params, x, cond)
  assert set(types_of(forward, SUMS)) == set(types_of(backward, SUMS)) == {('float32',)}
  convolutions, dense = (types_of(forward, [name]) for name in PRODUCTS)
  assert convolutions.keys() == dense.keys() == {('float32',) * 2, ('bfloat16',) * 2}
  assert convolutions['float32', 'float32'] == dense['float32', 'float32'] == 2  # the ends; the time embedding
  convolutions, dense = (types_of(backward, [name]) for name in PRODUCTS)
  assert convolutions['float32', 'float32'] == 3 * 2
  assert dense['float32', 'float32'] == 3 * 2 - 1  # no gradient to the feature


def test_float64_is_float64_everywhere(x64):
  net = UNet(**TINY, dtype='float64', param_dtype='float64', scan=True, remat='block', modulation='scale_shift')
  x, feature, cond, keys = inputs((8,))
  x, feature, cond = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, (x, feature, cond))
  params = shapes_of(net, x, feature, cond)
  found = {v.aval.dtype for each in program(gradient(net, keys), params, x, cond) for v in each.outvars}
  assert {each for each in found if jnp.issubdtype(each, jnp.floating)} == {jnp.dtype('float64')}


def stacked(net, params):
  """The parameters of an unrolled network as those of the same one with scan=True."""
  left = dict(params['params'])
  for run in equal_runs(plan(net.channels, net.multipliers, net.blocks, net.attention), net.channels):
    if len(run) > 1:
      name = f'{run[0].name}_to_{run[-1].name[-1]}'
      parts = {'block': '', 'attention': '_attention', 'cross': '_attention_cross'}
      rows = [{part: left.pop(each.name + end) for part, end in parts.items() if each.name + end in left} for each in run]
      left[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
  return {'params': left}


@pytest.fixture(scope='module')
def plain():
  """(network, its parameters, its inputs, its output and gradients) in float64, with dropout and every condition."""
  with jax.enable_x64(True):
    net, args = UNet(**LOOPS, dtype='float64', param_dtype='float64'), inputs((8,))
    params = fill(shapes_of(net, *args))
    return net, params, args, outcome(net, params, args)


def outcome(net, params, args):
  def loss(params):
    out = net.apply(params, *args)
    return jnp.square(out + 1).sum(), out
  grads, out = quick(jax.grad(loss, has_aux=True))(params)
  return out, grads


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


def test_the_types_are_as_near_as_their_digits(plain, x64):
  _, params, args, (exact, _) = plain
  params, exact, error = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), np.asarray(exact), {}
  for dtype in ('float32', 'bfloat16'):
    out = np.asarray(quick(UNet(**LOOPS, dtype=dtype).apply)(params, *args))
    assert out.dtype == np.float32
    error[dtype] = np.sqrt(np.mean((out - exact)**2)) / np.std(exact)
  assert 1e-8 < error['float32'] < 2e-6 and 1e-4 < error['bfloat16'] < 0.03, error


@pytest.mark.parametrize('remat', [pytest.param('products', marks=pytest.mark.slow), 'block'])
def test_remat_changes_nothing(remat, plain, x64):
  """The same parameters, dropout masks, output and gradients."""
  net, params, args, (out, grads) = plain
  assert_equal(outcome(net.clone(remat=remat), params, args), (out, grads))


@pytest.mark.parametrize('remat', [pytest.param('none', marks=pytest.mark.slow), 'products'])
def test_scan_changes_nothing(remat, plain, x64):
  """With the parameters stacked: the same dropout masks, output and gradients."""
  net, params, args, (out, grads) = plain
  scanned, moved = net.clone(scan=True, remat=remat), stacked(net, params)
  assert jax.tree.map(jnp.shape, shapes_of(scanned, *args)) == jax.tree.map(jnp.shape, moved)
  assert_equal(outcome(scanned, moved, args), (out, stacked(net, grads)))


def test_runs_are_of_equal_neighbours():
  names = lambda runs: [[stage.name for stage in run] for run in runs if len(run) > 1]
  runs = equal_runs(plan(128, (1, 2, 2), 2, (False, True, False)), 128)
  assert names(runs) == [['down_0_0', 'down_0_1'], ['down_2_0', 'down_2_1'], ['up_2_0', 'up_2_1', 'up_2_2'],
                         ['up_1_0', 'up_1_1'], ['up_0_1', 'up_0_2']]
  assert [stage for run in runs for stage in run] == plan(128, (1, 2, 2), 2, (False, True, False))


def test_a_scanned_block_starts_as_any_other():
  """Its iterations start apart, each with the variance of its own fans."""
  net = UNet(axes=1, channels=32, multipliers=(1,), blocks=1, attention=(False,), scan=True)
  x, feature, *_ = inputs((4,))
  params = quick(net.init)(jax.random.key(0), x, feature)['params']
  kernel = np.asarray(params['up_0_0_to_1']['block']['conv_1']['kernel'])
  assert kernel.shape == (2, 3, 64, 32)
  np.testing.assert_allclose(kernel.var((1, 2, 3)) * 3 * (64 + 32) / 2, 1, rtol=0.05)
  assert len(np.unique(kernel[:, 0, 0, 0])) == 2


@pytest.mark.parametrize('scan', [pytest.param(False, marks=pytest.mark.slow), True])
def test_remat_keeps_less(scan):
  """Bytes from the forward pass to the backward pass fall from each policy to the next."""
  x, feature, cond, keys = inputs((64,))
  kept = {}
  for remat in REMAT:
    net = UNet(**TINY, scan=scan, remat=remat)
    params = shapes_of(net, x, feature, cond)
    back = jax.eval_shape(lambda p, net=net: jax.vjp(lambda p: net.apply(p, x, feature, cond, keys), p)[1], params)
    kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))
  parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
  kept = {remat: size - parameters for remat, size in kept.items()}
  assert 0 < kept['block'] < 0.7 * kept['products'] < 0.7 * 0.5 * kept['none']


def test_only_remat_of_blocks_multiplies_again():
  """'products' computes none of the products with parameters again, of an attention both of those without."""
  x, feature, cond, _ = inputs((8,))
  count = {}
  for remat in REMAT:
    net = UNet(**TINY, remat=remat)
    names = [each.primitive.name for each in program(gradient(net), shapes_of(net, x, feature, cond), x, cond)]
    count[remat] = {name: names.count(name) for name in PRODUCTS}
  attentions = 2  # the middle one to itself and to the sequence
  assert count['products']['conv_general_dilated'] == count['none']['conv_general_dilated']
  assert count['products']['dot_general'] == count['none']['dot_general'] + 2 * attentions
  assert all(count['block'][name] > count['products'][name] for name in PRODUCTS)


def test_scan_makes_the_program_of_cifar10_smaller():
  net = build(cifar10.get_config().network, {'UNet': UNet})
  size, parameters = {}, {}
  for scan in (False, True):
    init = jax.make_jaxpr(net.clone(scan=scan).init, return_shape=True)
    made, params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
    size[scan], parameters[scan] = len(list(equations(made.jaxpr))), sum(leaf.size for leaf in jax.tree.leaves(params))
  assert parameters[True] == parameters[False] == 35_746_307
  assert size[True] < 0.75 * size[False], size
