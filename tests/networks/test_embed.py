"""Conditions: what each becomes, and how several become one."""
import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from diffusion_jax.networks.embed import Conditional, Conditioning, Label, merge


def test_label_reads_its_row_and_the_null_the_last():
  layer, label = Label(classes=4, size=6), jnp.array([0, 3, 4, 4])
  params = layer.init(jax.random.key(0), label)
  table = np.asarray(params['params']['table']['embedding'])
  assert table.shape == (5, 6) and table.dtype == np.float32
  out = layer.apply(params, label)
  np.testing.assert_array_equal(out.vector, table[[0, 3, 4, 4]])
  assert out.sequence is None and out.mask is None and out.channels is None


def test_labels_start_small_and_apart():
  params = Label(1000, 64).init(jax.random.key(0), jnp.zeros(1, int))
  table = np.asarray(params['params']['table']['embedding'])
  assert abs(table.std() / 0.02 - 1) < 0.02
  assert len(np.unique(table[:, 0])) == 1001


def test_merge():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  mask = jnp.array([[True, False], [True, True]])
  parts = [Conditioning(vector=draw(2, 3), channels=draw(2, 4, 1)), Conditioning(sequence=draw(2, 2, 5), mask=mask),
           Conditioning(vector=draw(2, 3), sequence=draw(2, 3, 5), channels=draw(2, 4, 2))]
  out = merge(parts)
  np.testing.assert_allclose(out.vector, np.asarray(parts[0].vector) + np.asarray(parts[2].vector))
  np.testing.assert_array_equal(out.sequence, np.concatenate([parts[1].sequence, parts[2].sequence], 1))
  np.testing.assert_array_equal(out.mask, [[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # no mask: all are real
  np.testing.assert_array_equal(out.channels, np.concatenate([parts[0].channels, parts[2].channels], -1))


def test_merge_of_nothing_is_nothing():
  assert merge([]) == Conditioning() == merge([Conditioning()])


class Echo(nn.Module):
  """A backbone that returns what it is conditioned on."""

  def __call__(self, x, feature, conditioning=Conditioning(), keys=None):
    return conditioning


@pytest.fixture(scope='module')
def echo():
  net = Conditional(Echo(), {'label': Label(3, 2), 'style': Label(4, 2)})
  cond = {'label': jnp.array([0, 2]), 'style': jnp.array([3, 1])}
  params = net.init(jax.random.key(0), jnp.zeros((2, 4, 1)), jnp.zeros(2), cond)
  return net, params, cond


def call(echo, cond):
  net, params, _ = echo
  return net.apply(params, jnp.zeros((2, 4, 1)), jnp.zeros(2), cond)


def test_conditional_adds_its_embeddings(echo):
  _, params, cond = echo
  tables = {name: np.asarray(tree['table']['embedding']) for name, tree in
            ((key.removeprefix('embedders_'), value) for key, value in params['params'].items())}
  np.testing.assert_allclose(call(echo, cond).vector, tables['label'][[0, 2]] + tables['style'][[3, 1]], rtol=1e-6)


def test_other_conditions_get_a_sentence(echo):
  with pytest.raises(ValueError, match=r"conditioned on \['label', 'style'\]; it was given \['label'\]"):
    call(echo, {'label': jnp.zeros(2, int)})
  with pytest.raises(ValueError, match=r"conditioned on \['label', 'style'\]; it was given \[\]"):
    call(echo, None)
  net = Conditional(Echo(), {})
  assert net.apply({}, jnp.zeros((2, 4, 1)), jnp.zeros(2)) == Conditioning()
  with pytest.raises(ValueError, match=r"conditioned on \[\]; it was given \['text'\]"):
    net.apply({}, jnp.zeros((2, 4, 1)), jnp.zeros(2), {'text': jnp.zeros(2)})
