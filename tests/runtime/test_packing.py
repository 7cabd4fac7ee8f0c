"""A state in fewer arrays: which of its leaves are joined, and that nothing else about it changes."""
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from diffusion_jax.runtime.mesh import make_mesh
from diffusion_jax.runtime.packing import pack, packed_shapes, unpack
from diffusion_jax.runtime.sharding import follow, shardings
from diffusion_jax.runtime.step import init_state

RULES = [('1/bias', 'tensor(0)'), ('kernel', 'tensor(-1)'), ('.*', 'replicate()')]
OPTIMIZERS = {'adam': optax.adam(1e-3), 'adafactor': optax.adafactor(1e-3, min_dim_size_to_factor=1),
              'sgd': optax.sgd(1e-3, momentum=None)}


def init(key):
  """Two layers of one shape, and a vector that is no parameter's."""
  layer = lambda key: {'kernel': jax.random.normal(key, (8, 8)), 'bias': jax.random.normal(key, (8,))}
  first, second = jax.random.split(key)
  return {'layer_1': layer(first), 'layer_2': layer(second)}, {'seen': jnp.arange(8.0)}


def make_state(mesh='data=1', optimizer='adam'):
  mesh, state = make_mesh(mesh), init_state(init, OPTIMIZERS[optimizer], (0.9, 0.99), 3)
  return jax.device_put(state, follow(state, state.params, shardings(state.params, RULES, mesh), mesh))


def names(packed):
  """The leaves that are in each array."""
  structure = packed.layout.structure
  tree = structure.unflatten(range(structure.num_leaves))
  leaves = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return [[leaves[number] for number in part] for part in packed.layout.parts]


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def joined(packed):
  return [part for part in names(packed) if len(part) > 1]


def test_moments_and_averages_of_a_vector_are_joined_and_nothing_else():
  trees = ('optimizer/0/mu', 'optimizer/0/nu', 'ema/0.9', 'ema/0.99')
  assert joined(pack(make_state())) == [[f'{tree}/{layer}/bias' for tree in trees] for layer in ('layer_1', 'layer_2')]


def test_only_leaves_of_one_shape_are_joined():
  """Adafactor has the means of rows and of columns of a matrix at its place, and one entry for each at a vector's."""
  moments = 'optimizer/0/v', 'optimizer/0/v_row', 'optimizer/0/v_col'
  assert joined(pack(make_state(optimizer='adafactor'))) == [
      *([f'{tree}/{layer}/{name}' for tree in moments[1:]] for layer in ('layer_1', 'layer_2') for name in ('bias', 'kernel')),
      *([f'{tree}/{layer}/bias' for tree in (moments[0], 'ema/0.9', 'ema/0.99')] for layer in ('layer_1', 'layer_2'))]


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('mesh', ['data=1', 'data=2,tensor=4'])
def test_a_state_comes_back_as_it_was_and_where_it_was(mesh, optimizer):
  state = make_state(mesh, optimizer)
  packed, shapes = pack(state), packed_shapes(state)
  back, jitted = unpack(packed), jax.jit(lambda state: shapes.like(state).state)(state)
  assert_same(back, state)
  assert_same(jitted, state)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  for shape, array in zip(shapes.arrays, packed.arrays, strict=True):
    assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


def test_shapes_are_packed_as_arrays_are():
  state = make_state('tensor=4')
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
  assert jax.tree.structure(packed_shapes(shapes)) == jax.tree.structure(pack(state))


def test_a_matrix_is_cut_as_its_rows_are():
  packed = packed_shapes(make_state('tensor=4'))
  specs = {parts[0]: array.sharding.spec for parts, array in zip(names(packed), packed.arrays, strict=True) if parts[1:]}
  assert specs == {f'optimizer/0/mu/layer_{i}/bias': P(None, cut) for i, cut in ((1, 'tensor'), (2, None))}


def test_the_devices_do_not_hold_a_large_array_twice():
  state = make_state()
  arrays = {id(array) for array in pack(state).arrays}
  assert {leaf.ndim for leaf in jax.tree.leaves(state) if id(leaf) not in arrays} == {1}


def test_a_call_takes_one_list_and_compares_no_description():
  packed = pack(make_state())
  again = jax.jit(lambda packed: packed)(packed)
  assert jax.tree.structure(again).num_nodes == 1 + len(packed.arrays)
  assert again.layout is packed.layout


def test_an_array_has_the_name_of_its_first_leaf():
  """An error or a plan that names an argument says where it is in the tree."""
  packed = pack(make_state())
  found = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
  assert found[:2] == ['step', "params['layer_1']['bias']"] and "optimizer[0].mu['layer_1']['bias']" in found
  assert len(found) == len(packed.arrays)
