"""FLOPs by shapes: against closed forms, and against XLA's own count."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from diffusion_jax.runtime.products import Product, filled, products, total


def traced(function, *shapes):
  return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def count(function, *shapes, **options):
  return total(products(traced(function, *shapes).jaxpr, **options))


def test_a_matrix_product():
  [product] = products(traced(lambda a, b: jnp.einsum('bik,bjk->bij', a, b), (3, 5, 7), (3, 11, 7)).jaxpr)
  assert product == Product(2 * 3 * 5 * 7 * 11, inner=7, outer=11)


def convolve(x, kernel, **options):
  fields = {'window_strides': (1, 1), 'padding': 'SAME', 'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), **options}
  return jax.lax.conv_general_dilated(x, kernel, **fields)


def test_a_convolution_counts_the_taps_on_pixels():
  """3 x 3 on 4 x 4 pixels with a border of zeros: 10 of 12 taps an axis fall on pixels."""
  [product] = products(traced(convolve, (2, 4, 4, 5), (3, 3, 5, 7)).jaxpr)
  assert product == Product(2 * 2 * 10 * 10 * 5 * 7, inner=5, outer=7)


@pytest.mark.parametrize('options', [
    {}, {'window_strides': (2, 2)}, {'padding': 'VALID'}, {'padding': [(2, 0), (0, 3)]}, {'rhs_dilation': (2, 1)},
    {'lhs_dilation': (2, 3), 'padding': [(1, 1), (2, 0)]}, {'feature_group_count': 2}, {'batch_group_count': 2}], ids=str)
def test_convolutions_as_xla_counts_them(options):
  """XLA's count of the unoptimised program, the convolution being all of it; and of its two gradients."""
  features = 6 // options.get('feature_group_count', 1)
  function = lambda x, kernel: convolve(x, kernel, **options)
  shapes = (4, 8, 10, 6), (3, 3, features, 4)
  assert count(function, *shapes) == traced(function, *shapes).lower().cost_analysis()['flops']
  out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).shape
  pull = lambda x, kernel, g: jax.vjp(function, x, kernel)[1](g)
  assert count(pull, *shapes, out) == 3 * count(function, *shapes)


def test_loops_count_as_often_as_they_run_and_branches_at_most_once():
  def function(x):
    x, _ = jax.lax.scan(lambda h, _: (h @ h, None), x, None, length=5)
    return jax.lax.cond(x[0, 0] > 0, lambda h: h @ h @ h, lambda h: h @ h, x)
  one = 2 * 6**3
  assert count(function, (6, 6)) == 7 * one
  assert count(function, (6, 6), loops=False) == 3 * one
  assert count(jax.checkpoint(function), (6, 6)) == 7 * one


def test_channels_fill_the_matrix_unit():
  full, odd = Product(100, 256, 128), Product(100, 64, 192)
  assert filled([full]) == 1
  np.testing.assert_allclose(filled([odd]), 64 / 128 * 192 / 256)
  np.testing.assert_allclose(filled([full, odd]), 200 / (100 + 100 / 0.375))
