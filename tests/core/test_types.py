"""Keys, noise and sums over pytrees."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy import stats

from diffusion_jax.core import types
from diffusion_jax.core.types import Draw
from tests.core.tables import keys


def bits(keys):
  return np.asarray(jax.random.key_data(keys)).reshape(-1, 2)


def test_a_draw_has_the_keys_of_its_rows_however_it_is_cut():
  key = jax.random.key(3)
  whole = bits(Draw(key, jnp.arange(6), 6).keys)
  np.testing.assert_array_equal(bits(Draw(key, jnp.array([4, 1]), 6).keys), whole[[4, 1]])
  np.testing.assert_array_equal(whole[2], bits(jax.random.fold_in(key, 2))[0])


@pytest.mark.parametrize(
  'derive', [lambda keys: [types.fold(keys, 1), types.fold(keys, 2)], lambda keys: types.split(keys, 3)])
def test_keys_of_examples_and_what_is_derived_from_them_are_all_different(derive):
  """Fold or split, not both of the same keys: JAX's split(key, n)[i] is fold_in(key, i)."""
  every = [keys(50), *derive(keys(50))]
  assert len({tuple(row) for each in every for row in bits(each)}) == 50 * len(every)


def test_splits_unpack():
  first, second = types.split(keys(5), 2)
  np.testing.assert_array_equal(bits(first)[3], bits(jax.random.split(keys(5)[3], 2))[0])
  assert first.shape == second.shape == (5,)


def test_normal_noise():
  like = {'a': jax.ShapeDtypeStruct((3000, 3), jnp.float32), 'b': jnp.zeros((3000,), jnp.bfloat16)}
  noise = types.normal(keys(3000), like)
  form = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert form(noise) == form(like)
  assert stats.kstest(np.asarray(noise['a']).ravel(), 'norm').pvalue > 1e-3
  entries = np.concatenate([noise['a'], np.asarray(noise['b'], np.float32)[:, None]], 1)
  assert np.abs(np.corrcoef(entries.T) - np.eye(4)).max() < 5 / np.sqrt(3000)
  np.testing.assert_array_equal(types.normal(keys(7), jnp.zeros((7, 3))), types.normal(keys(9), jnp.zeros((9, 3)))[:7])


def test_spread_and_combine_align_first_axes():
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  assert types.spread(jnp.ones(2), jnp.array(x)).shape == (2, 1, 1)
  assert types.spread(2.0, jnp.array(x)).shape == (1, 1, 1)
  rows, frames = np.array([1.0, 2.0]), np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  out = types.combine(*((a, {'x': jnp.array(x)}) for a in (jnp.array(rows), jnp.array(frames), -1.0)))
  np.testing.assert_allclose(out['x'], np.einsum('b,bfc->bfc', rows, x) + np.einsum('bf,bfc->bfc', frames, x) - x)
