"""How the transformer is computed: in which types, and equal blocks as one loop."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.networks.dit import DiT
from tests.networks.test_unet import fill, inputs, quick, shapes_of
from tests.networks.test_unet_programs import SUMS, assert_equal, gradient, outcome, program, types_of

EITHER = [pytest.param('cross', marks=pytest.mark.slow), 'joint']
TINY = dict(axes=1, width=32, depth=3, heads=2, dropout=0.3, qk_norm=True, conv=3)


@pytest.mark.parametrize('attend', EITHER)
def test_bfloat16_is_for_products_alone(attend):
  """Every product of a block multiplies bfloat16; every sum, of the backward pass too, is float32."""
  net = DiT(**TINY, attend=attend, dtype='bfloat16', scan=True, remat='products')
  x, feature, cond, keys = inputs((8,))
  params = shapes_of(net, x, feature, cond)
  forward = program(net.apply, params, x, feature, cond, keys)
  backward = program(gradient(net, keys), params, x, cond)
  assert set(types_of(forward, SUMS)) == set(types_of(backward, SUMS)) == {('float32',)}
  dense = types_of(forward, ['dot_general'])
  assert dense.keys() == {('float32',) * 2, ('bfloat16',) * 2}
  assert dense['float32', 'float32'] == 5 + (attend == 'joint')  # the time embedding, the ends, the sequence's
  assert set(types_of(forward, ['exp', 'rsqrt'])) == {('float32',)}


@pytest.mark.parametrize('attend', EITHER)
def test_float64_is_float64_everywhere(attend, x64):
  net = DiT(**TINY, attend=attend, dtype='float64', param_dtype='float64', scan=True, remat='block')
  x, feature, cond, keys = inputs((8,))
  x, feature, cond = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, (x, feature, cond))
  params = shapes_of(net, x, feature, cond)
  found = {v.aval.dtype for each in program(gradient(net, keys), params, x, cond) for v in each.outvars}
  assert {each for each in found if jnp.issubdtype(each, jnp.floating)} == {jnp.dtype('float64')}


def stacked(tree, count):
  """The parameters of an unrolled network as those of one with scan=True, whose loop has `count` blocks."""
  left = dict(tree['params'])
  rows = [left.pop(f'block_{i}') for i in range(count)]
  return {'params': {**left, f'block_0_to_{count - 1}': jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)}}


def test_a_loop_over_blocks_says_the_same(x64):
  """With the parameters stacked and the same dropout masks."""
  net, args = DiT(**TINY | {'depth': 2}, dtype='float64', param_dtype='float64'), inputs((8,), sequence=False)
  params = fill(shapes_of(net, *args))
  scanned, moved = net.clone(scan=True), stacked(params, 2)
  assert jax.tree.map(jnp.shape, shapes_of(scanned, *args)) == jax.tree.map(jnp.shape, moved)
  out = quick(net.apply)(params, *args)
  np.testing.assert_allclose(quick(scanned.apply)(moved, *args), out, rtol=0, atol=1e-12 * np.abs(out).max())


@pytest.fixture(scope='module', params=['cross', 'joint'])
def plain(request):
  """(network, its parameters, its inputs, its output and gradients) in float64, with dropout and every condition."""
  with jax.enable_x64(True):
    net, args = DiT(**TINY, attend=request.param, dtype='float64', param_dtype='float64'), inputs((8,))
    params = fill(shapes_of(net, *args))
    return net, params, args, outcome(net, params, args)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['products', 'block'])
def test_remat_changes_nothing(remat, plain, x64):
  """The same parameters, dropout masks, output and gradients."""
  net, params, args, (out, grads) = plain
  assert_equal(outcome(net.clone(remat=remat), params, args), (out, grads))


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'products'])
def test_scan_changes_nothing(remat, plain, x64):
  """With the parameters stacked: the same dropout masks, output and gradients."""
  net, params, args, (out, grads) = plain
  count = 2 if net.attend == 'joint' else 3
  assert_equal(outcome(net.clone(scan=True, remat=remat), stacked(params, count), args), (out, stacked(grads, count)))


@pytest.mark.slow
def test_the_types_are_as_near_as_their_digits(plain, x64):
  net, params, args, (exact, _) = plain
  params, exact, error = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), np.asarray(exact), {}
  for dtype in ('float32', 'bfloat16'):
    out = np.asarray(quick(net.clone(dtype=dtype, param_dtype='float32').apply)(params, *args))
    assert out.dtype == np.float32
    error[dtype] = np.sqrt(np.mean((out - exact)**2)) / np.std(exact)
  assert 1e-8 < error['float32'] < 2e-6 and 1e-4 < error['bfloat16'] < 0.03, error


@pytest.mark.slow
def test_remat_keeps_less():
  """Bytes from the forward pass to the backward pass fall from each policy to the next."""
  x, feature, cond, keys = inputs((64,))
  kept = {}
  for remat in ('block', 'products', 'none'):
    net = DiT(**TINY, attend='joint', scan=True, remat=remat)
    params = shapes_of(net, x, feature, cond)
    back = jax.eval_shape(lambda p, net=net: jax.vjp(lambda p: net.apply(p, x, feature, cond, keys), p)[1], params)
    kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))
  parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
  block, products, none = (size - parameters for size in kept.values())
  assert 0 < block < 0.7 * products < 0.7 * 0.7 * none
