"""Where a state lies: rules, what follows them, and the sentences where one cannot be applied."""
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from diffusion_jax.runtime.mesh import make_mesh, shard_bytes
from diffusion_jax.runtime.sharding import follow, shardings

SHAPES = {'block': {'conv': (3, 3, 64, 128), 'bias': (128,)}, 'out': (128, 6)}
PARAMS = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES,
                      is_leaf=lambda leaf: isinstance(leaf, tuple))


def specs(mesh, *rules):
  """{name: spec} of PARAMS."""
  places = shardings(PARAMS, rules, make_mesh(mesh))
  return {'conv': places['block']['conv'].spec, 'bias': places['block']['bias'].spec, 'out': places['out'].spec}


@pytest.mark.parametrize('mesh, text, conv, bias, out', [
    ('fsdp=8', 'replicate()', P(None, None, None, None), P(None), P(None, None)),
    ('data=8', 'tensor(-1) | fsdp(1)', P(None, None, None, None), P(None), P(None, None)),  # axes of one device
    ('fsdp=8', 'fsdp()', P(None, None, None, 'fsdp'), P(None), P(None, None)),  # small ones stay whole
    ('fsdp=8', 'fsdp(128)', P(None, None, None, 'fsdp'), P('fsdp'), P('fsdp', None)),
    ('fsdp=4,tensor=2', 'tensor(-1) | fsdp(1)', P(None, None, 'fsdp', 'tensor'), P('tensor'), P('fsdp', 'tensor')),
    ('fsdp=4,tensor=2', 'fsdp() | tensor(0)', None, None, None),
    ('fsdp=3,data=1', 'fsdp()', P('fsdp', None, None, None), P(None), P(None, None)),
    ('fsdp=3', 'fsdp(500)', P('fsdp', None, None, None), P(None), P(None, 'fsdp')),
])
def test_rules(mesh, text, conv, bias, out):
  """The largest axis that fsdp divides and that is not cut yet; the axis that tensor names."""
  if conv is None:
    with pytest.raises(ValueError, match=r"'fsdp\(\) \| tensor\(0\)' cannot be applied to block/conv of shape "
                       r'\(3, 3, 64, 128\): axis 0 cannot be cut by tensor=2'):
      specs(mesh, ('block/conv', text), ('.*', 'replicate()'))
  else:
    assert specs(mesh, ('.*', text)) == {'conv': conv, 'bias': bias, 'out': out}


def test_the_first_rule_whose_pattern_is_found_counts():
  found = specs('fsdp=2,tensor=2', ('conv$', 'tensor(-2)'), ('block/', 'tensor(0)'), ('out', 'fsdp(1)'),
                ('.*', 'replicate()'))
  assert found == {'conv': P(None, None, 'tensor', None), 'bias': P('tensor'), 'out': P('fsdp', None)}


@pytest.mark.parametrize('rules, sentence', [
    ([('block', 'fsdp()')], "has no rule for out: end it with ('.*', 'fsdp()')"),
    ([('(', 'fsdp()')], "config.sharding: '(' is no regular expression"),
    ([('.*', 'fsd()')], "'fsd' is unknown. Did you mean 'fsdp'"),
    ([('.*', 'tensor()')], "missing a required argument: 'axis'"),
    ([('bias', 'tensor(1)'), ('.*', 'replicate()')], "'tensor(1)' cannot be applied to block/bias of shape (128,): axis 1"),
    ([('out', 'tensor(1)'), ('.*', 'replicate()')], 'out of shape (128, 6): axis 1 cannot be cut by tensor=4'),
])
def test_bad_rules_get_a_sentence(rules, sentence):
  with pytest.raises(ValueError) as error:
    specs('tensor=4', *rules)
  assert sentence in str(error.value)


def test_a_parameter_that_fsdp_cannot_cut_gets_a_sentence():
  with pytest.raises(ValueError, match=r"'fsdp\(\)' cannot be applied to block/conv of shape .*: fsdp=5 divides"):
    specs('fsdp=5', ('.*', 'fsdp()'))


def test_moments_and_averages_follow_their_parameters():
  """All that has a parameter's path at its end and its shape; the state of Adafactor, of other shapes, is whole."""
  mesh = make_mesh('fsdp=8')
  places = shardings(PARAMS, [('.*', 'fsdp()')], mesh)
  adam = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init, PARAMS)
  factored = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=2).init, PARAMS)
  state = {'params': PARAMS, 'optimizer': adam, 'ema': {'0.9': PARAMS}, 'step': jax.ShapeDtypeStruct((), jnp.int32)}
  found = follow(state, PARAMS, places, mesh)
  moments = found['optimizer'][1][0]
  assert found['params'] == found['ema']['0.9'] == moments.mu == moments.nu == places
  assert found['step'].spec == moments.count.spec == P()
  others = jax.tree.leaves(follow(factored, PARAMS, places, mesh))
  specs = {leaf.shape: place.spec for leaf, place in zip(jax.tree.leaves(factored), others, strict=True)}
  assert specs[(3, 3, 64)] == specs[(1,)] == P() and specs[(128,)] == P(None)
  placed = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), PARAMS, places)
  assert shard_bytes(placed) == 4 * (9 * 64 * 128 // 8 + 128 + 128 * 6)


def test_numbers_do_not_depend_on_where_they_lie():
  """Random numbers that are made where they lie are those of one device, bit for bit."""
  draw = lambda: jax.random.normal(jax.random.key(0), (64, 128))
  place = shardings({'x': jax.eval_shape(draw)}, [('.*', 'tensor(0) | fsdp()')], make_mesh('data=2,fsdp=2,tensor=2'))['x']
  made = jax.jit(draw, out_shardings=place)()
  assert made.sharding.spec == P('tensor', 'fsdp')
  np.testing.assert_array_equal(made, draw())
