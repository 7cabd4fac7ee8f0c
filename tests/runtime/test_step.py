"""The training step against one written by hand, for linear regression with noise."""
from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime.step import init_state, train_step, worst_layer

TOTAL = 16
RATE = optax.constant_schedule(0.1)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))


def init(key):
  extra = {'seen': jnp.zeros((), jnp.int32), 'last': jnp.zeros(TOTAL)}
  return {'w': jax.random.normal(key, (3,)), 'b': jnp.zeros(())}, extra


def loss(params, extra, draw, batch):
  """Squared errors against targets with noise that belongs to the example; `bad` spoils an example's value, `kink` its
  gradient alone."""
  noise = jax.vmap(jax.random.normal)(draw.keys)
  errors = batch['x'] @ params['w'] + params['b'] - batch['y'] - 0.1 * noise
  kink = jnp.sqrt(1 - batch['kink'] + 0 * params['b']) - (1 - batch['kink'])  # 0, with a slope of 0, or of 0 / 0
  losses = errors**2 + kink + jnp.where(batch['bad'], jnp.nan, 0.0)
  return losses, {'noise': noise}, {'noise': noise, 'total': draw.total}


def update(extra, news):
  return {'seen': extra['seen'] + 1, 'last': news['noise']}


def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(TOTAL, 3)).astype(np.float32)
  return {'x': x, 'y': (x @ np.float32([1, -2, 3])).astype(np.float32), 'bad': np.zeros(TOTAL, bool),
          'kink': np.zeros(TOTAL, np.float32), 'index': np.arange(TOTAL, dtype=np.int32)}


STEP = partial(train_step, loss=loss, update=update, optimizer=OPTIMIZER, rate=RATE, total=TOTAL)
step_fn = jax.jit(STEP)


@pytest.fixture(scope='module')
def state():
  """A state after two steps, so that nothing in it is zero."""
  state = init_state(init, OPTIMIZER, (0.9, 0.99), 5)
  for i in range(2):
    state, _ = step_fn(state, make_batch(i))
  return state


def assert_same(ours, theirs):
  ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
  assert len(ours) == len(theirs) > 0
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_first_state():
  state = init_state(init, OPTIMIZER, (0.9, 0.99), 5)
  assert (int(state.step), int(state.skipped), int(state.in_row), set(state.ema)) == (0, 0, 0, {'0.9', '0.99'})
  assert_same(state.ema['0.9'], state.params)
  assert_same(init_state(init, OPTIMIZER, (0.9, 0.99), 5), state)
  other = init_state(init, OPTIMIZER, (0.9, 0.99), 6)
  assert (other.params['w'] != state.params['w']).all() and (other.key != state.key).any()
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
  assert len(set(pointers)) == len(pointers)  # each may be donated


def test_a_step_is_the_one_written_by_hand(state):
  """The gradient of the mean, in numpy; optax's update; averages with the ramp (1 + n) / (10 + n) at n = 2."""
  batch = make_batch(7)
  after, metrics = step_fn(state, batch)
  x, w, b = (np.asarray(a, np.float64) for a in (batch['x'], state.params['w'], state.params['b']))
  errors = x @ w + b - batch['y'] - 0.1 * np.asarray(metrics['noise'])
  grads = {'w': 2 * errors @ x / TOTAL, 'b': 2 * errors.mean()}
  assert float(metrics['loss']) == pytest.approx((errors**2).mean(), rel=1e-5)
  assert float(metrics['grad_norm']) == pytest.approx(np.sqrt((grads['w']**2).sum() + grads['b']**2), rel=1e-5)
  assert float(metrics['rate']) == pytest.approx(0.1) and int(metrics['total']) == TOTAL
  assert bool(metrics['finite']) and int(metrics['skipped']) == 0
  grads = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), grads)
  updates, _ = OPTIMIZER.update(grads, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  for name in params:
    np.testing.assert_allclose(after.params[name], params[name], rtol=1e-4, atol=1e-6)
    for ema in ('0.9', '0.99'):
      expected = 0.25 * state.ema[ema][name] + 0.75 * params[name]
      np.testing.assert_allclose(after.ema[ema][name], expected, rtol=1e-4, atol=1e-6)
  assert (int(after.step), int(after.extra['seen']), int(after.skipped)) == (3, 3, 0)
  np.testing.assert_array_equal(after.key, state.key)


def test_noise_is_new_every_step_and_for_every_example(state):
  batch = make_batch()
  after, first = step_fn(state, batch)
  _, second = step_fn(after, batch)
  both = np.concatenate([first['noise'], second['noise']])
  assert len(np.unique(both)) == 2 * TOTAL
  _, again = step_fn(state, batch)
  np.testing.assert_array_equal(again['noise'], first['noise'])
  order = np.random.default_rng(0).permutation(TOTAL)
  _, moved = step_fn(state, jax.tree.map(lambda rows: rows[order], batch))
  np.testing.assert_array_equal(moved['noise'], first['noise'][order])


@pytest.mark.parametrize('parts', [2, 4, 16])
def test_parts_of_a_batch_are_the_whole(state, parts):
  """The gradient is that of the mean over all; the news come in the order of the index, whatever the order of the rows."""
  batch = make_batch(7)
  order = np.random.default_rng(0).permutation(TOTAL)
  whole, metrics = step_fn(state, batch)
  after, ours = jax.jit(partial(STEP, parts=parts))(state, jax.tree.map(lambda rows: rows[order], batch))
  np.testing.assert_array_equal(after.extra['last'], whole.extra['last'])
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(ours[name], metrics[name], rtol=1e-6)
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_part_that_is_not_finite_spoils_the_step(state):
  batch = make_batch()
  batch['bad'][5] = True
  after, metrics = jax.jit(partial(STEP, parts=4))(state, batch)
  assert not metrics['finite']
  assert_same((after.params, after.optimizer, after.extra), (state.params, state.optimizer, state.extra))


@pytest.mark.parametrize('field', ['bad', 'kink'])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(state, field):
  """A loss of NaN whose slope is finite, and a slope of 0 / 0 where the loss is finite, in one example."""
  batch = make_batch()
  batch[field][3] = 1
  after, metrics = step_fn(state, batch)
  assert not metrics['finite']
  assert np.isfinite(metrics['loss']) == (field == 'kink') and np.isfinite(metrics['grad_norm']) == (field == 'bad')
  for name in ('params', 'optimizer', 'ema', 'extra', 'key'):
    assert_same(getattr(after, name), getattr(state, name))
  assert (int(after.step), int(after.skipped), int(metrics['skipped'])) == (int(state.step) + 1, 1, 1)
  again, metrics = step_fn(after, batch)
  assert (int(again.skipped), int(again.in_row), int(metrics['in_row'])) == (2, 2, 2)
  later, metrics = step_fn(after, make_batch())
  assert metrics['finite'] and (int(later.skipped), int(later.in_row)) == (1, 0)
  assert (later.params['w'] != state.params['w']).all()


def test_the_worst_layer_is_named(state):
  """The kink breaks the slope of b alone."""
  _, metrics = step_fn(state, make_batch())
  assert worst_layer(state.params, metrics['broken']) == 'its gradient is finite in all parameters'
  batch = make_batch()
  batch['kink'][3] = 1
  _, metrics = step_fn(state, batch)
  assert metrics['broken'].tolist() == [1, 0]
  name = worst_layer(state.params, metrics['broken'])
  assert name == 'the worst layer is b, with 1 of 1 entries of its gradient not finite'
  batch['x'][3] = np.inf  # and now that of w in all of its entries
  _, metrics = step_fn(state, batch)
  assert 'the worst layer is outer/w, with 3 of 3' in worst_layer({'outer': state.params}, metrics['broken'])


def test_devices_do_not_change_the_step(state):
  """Noise bit for bit, the loss up to the order of additions."""
  results = {}
  for count in (1, 8):
    mesh = meshes.make_mesh(f'data={count}')
    placed = jax.device_put(jax.tree.map(np.asarray, state), meshes.replicated(mesh))
    results[count] = step_fn(placed, meshes.put(make_batch(3), mesh))
  (one, one_metrics), (eight, eight_metrics) = results[1], results[8]
  assert len(eight_metrics['noise'].sharding.device_set) == 8
  np.testing.assert_array_equal(one_metrics['noise'], eight_metrics['noise'])
  assert float(one_metrics['loss']) == pytest.approx(float(eight_metrics['loss']), abs=1e-6)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_one_program_serves_every_step(state):
  before = step_fn._cache_size()
  for i in range(3):
    state, _ = step_fn(state, make_batch(i))
  assert step_fn._cache_size() == before
