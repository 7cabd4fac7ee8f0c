"""Rates, AdamW, Muon and moving averages against numpy and closed forms."""
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp
from optax import contrib
from optax.contrib import _muon

from diffusion_jax.runtime.optimizers import adamw, ema_decay, muon, orthogonal, schedule, update_emas


def test_cosine():
  rate = schedule(0.3, 10, 'cosine', 110)
  # Zero, half-way up, the top, half-way down the cosine, the end, and after it.
  for step, value in ((0, 0), (5, 0.15), (10, 0.3), (60, 0.15), (110, 0), (500, 0)):
    assert float(rate(step)) == pytest.approx(value, abs=1e-7), step
  quarter = 0.3 * (1 + np.cos(np.pi / 4)) / 2
  assert float(rate(35)) == pytest.approx(quarter, rel=1e-5)


def test_constant():
  rate = schedule(0.3, 10, 'constant', 110)
  for step, value in ((0, 0), (1, 0.03), (5, 0.15), (10, 0.3), (60, 0.3), (10_000, 0.3)):
    assert float(rate(step)) == pytest.approx(value, abs=1e-7), step


@pytest.mark.parametrize('decay', ['cosine', 'constant'])
def test_no_warmup_starts_at_the_rate(decay):
  assert float(schedule(0.3, 0, decay, 100)(0)) == pytest.approx(0.3)


@pytest.mark.parametrize('decay', ['cosine', 'constant'])
def test_a_run_shorter_than_its_warmup(decay):
  """A trial of 5 steps must not be an error."""
  assert float(schedule(0.3, 10, decay, 5)(5)) == pytest.approx(0.15)


def test_other_decays_get_a_sentence():
  with pytest.raises(ValueError, match="config.optimizer.decay is 'linear'; legal are 'cosine' and 'constant'"):
    schedule(0.1, 1, 'linear', 2)


def numpy_adamw(params, grads, rate, b1, b2, eps, weight_decay, clip):
  """arXiv:1711.05101, algorithm 2, in float64, over one vector."""
  m = v = np.zeros_like(params)
  for n, g in enumerate(grads):
    norm = np.sqrt((g**2).sum())
    if clip and norm > clip:
      g = g * clip / norm
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    m_hat, v_hat = m / (1 - b1**(n + 1)), v / (1 - b2**(n + 1))
    params = params - rate(n) * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * params)
  return params


@pytest.mark.parametrize('clip', [0.0, 1.0, 3.0])
@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
def test_adamw_is_the_papers(clip, weight_decay):
  """The norm that is clipped is that of all parameters together."""
  rng = np.random.default_rng(0)
  start, grads = rng.normal(size=7), rng.normal(size=(6, 7)) * np.array([[0.1], [5], [1], [0.2], [30], [1]])
  rate = lambda n: 0.1 / (1 + n)
  optimizer = adamw(rate, 0.8, 0.95, 0.1, weight_decay, clip)
  cut = lambda vector: {'a': jnp.asarray(vector[:3], jnp.float32), 'b': jnp.asarray(vector[3:], jnp.float32)}
  params = cut(start)
  state = optimizer.init(params)
  for grad in grads:
    updates, state = optimizer.update(cut(grad), state, params)
    params = optax.apply_updates(params, updates)
  expected = numpy_adamw(start, grads, rate, 0.8, 0.95, 0.1, weight_decay, clip)
  np.testing.assert_allclose(np.concatenate([params['a'], params['b']]), expected, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_what_a_huge_gradient_does():
  """With a large eps the first update is rate * g / eps, so that its norm is rate * clip / eps."""
  optimizer = adamw(lambda n: 1.0, 0.9, 0.999, 1e3, 0.0, 2.0)
  params = jnp.zeros(4)
  for size in (10.0, 1e6):
    updates, _ = optimizer.update(jnp.array([3.0, 0, 4, 0]) * size, optimizer.init(params), params)
    np.testing.assert_allclose(updates, -2 / 1e3 * np.array([0.6, 0, 0.8, 0]), rtol=2e-3)


def first_update(optimizer, params, grads):
  return optimizer.update(grads, optimizer.init(params), params)[0]


INNER = {'backbone/block/conv_1/kernel': (3, 3, 4, 8), 'backbone/attention/out/kernel': (16, 6),
         'backbone/block_0_to_2/mlp/kernel': (3, 6, 12)}
OUTER = {'backbone/in/kernel': (3, 3, 3, 8), 'backbone/out/kernel': (8, 3), 'backbone/block/conv_1/bias': (8,),
         'backbone/block_0_to_2/mlp/bias': (3, 12), 'text/token_embedding/embedding': (20, 4),
         'image/patch_embedding/kernel': (12, 4)}


def test_muon_brings_all_singular_values_near_one_and_leaves_the_rest_to_adam():
  """Of the matrix from all that a layer reads to its channels, each layer of a stack apart; and weights decay."""
  rng = np.random.default_rng(0)
  shapes = INNER | OUTER
  draw = lambda: unflatten_dict({path: jnp.asarray(rng.normal(size=shapes[path])) for path in shapes}, sep='/')
  params, grads = draw(), draw()
  found = first_update(muon(lambda n: 0.1, 0.8, 0.95, 1e-8, 0.3, 0.0), params, grads)
  adam = first_update(optax.nadamw(0.1, 0.8, 0.95, 1e-8, weight_decay=0.3), params, grads)
  found, adam, params, grads = (flatten_dict(values, sep='/') for values in (found, adam, params, grads))
  for path in OUTER:
    np.testing.assert_allclose(found[path], adam[path], rtol=1e-6)
  for path, shape in INNER.items():
    update, grad = -(found[path] / 0.1 + 0.3 * params[path]), grads[path]
    layers = [(update, grad)] if 'to' not in path else list(zip(update, grad, strict=True))
    for ours, theirs in layers:
      ours, theirs = (each.reshape(-1, shape[-1]) for each in (ours, theirs))
      values = np.linalg.svd(ours / (0.2 * np.sqrt(max(ours.shape))), compute_uv=False)
      assert values.min() > 0.6 and values.max() < 1.3
      left, _, right = np.linalg.svd(theirs, full_matrices=False)
      assert np.vdot(ours, left @ right) > 0.95 * np.linalg.norm(ours) * np.linalg.norm(left @ right)


@pytest.mark.parametrize('shape', [(12, 12), (40, 6), (5, 30), (3, 20, 8)])
def test_orthogonal_is_optaxs(x64, shape):
  """Whose iteration multiplies the large matrix in each step, on matrices with singular values over three decades."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=shape) * np.geomspace(1, 1e-3, shape[-1]))
  dims, coefficients = contrib.MuonDimensionNumbers(len(shape) - 2, len(shape) - 1), jnp.array([3.4445, -4.7750, 2.0315])
  peer = _muon.orthogonalize_via_newton_schulz(x, coefficients, dimension_numbers=dims)
  np.testing.assert_allclose(orthogonal(x), peer, rtol=0, atol=1e-12)


def test_orthogonal_of_float32_keeps_what_float64_says():
  """Although x^T x has the squares of the singular values, here over six decades."""
  x = np.random.default_rng(0).normal(size=(200, 40)) * np.geomspace(1, 1e-3, 40)
  with jax.enable_x64(True):
    expected = np.asarray(orthogonal(jnp.asarray(x)))
  np.testing.assert_allclose(orthogonal(jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_orthogonal_of_nothing_is_nothing():
  assert not jnp.any(orthogonal(jnp.zeros((4, 3))))


def test_muon_clips_first():
  """By the norm of all parameters together, of which the bias is 2 entries in 6; with a large eps Adam moves by it."""
  params = {'backbone': {'block': {'kernel': jnp.ones((2, 2)), 'bias': jnp.zeros(2)}}}
  def bias(size, clip):
    grads = jax.tree.map(lambda leaf: size + jnp.zeros_like(leaf), params)
    return first_update(muon(lambda n: 1.0, 0.9, 0.999, 1e3, 0.0, clip), params, grads)['backbone']['block']['bias']
  np.testing.assert_allclose(bias(100.0, 2.0), bias(2 / np.sqrt(6), 0.0), rtol=1e-5)
  assert abs(bias(1.0, 0.0)).min() > abs(bias(100.0, 2.0)).max() > 0


def test_the_decay_ramps_up():
  for step, value in ((0, 1 / 10), (1, 2 / 11), (80, 81 / 90), (10**6, 0.999)):
    assert float(ema_decay(0.999, jnp.asarray(step))) == pytest.approx(value, rel=1e-6)
  assert float(ema_decay(0.0, jnp.asarray(5))) == 0


def run(emas, params, first, count):
  update = jax.jit(update_emas)
  for step in range(first, first + count):
    emas = update(emas, params, jnp.asarray(step))
  return emas


def test_averages_forget_at_their_own_rates():
  """Long after the ramp, over constant parameters p: p + (start - p) decay^n; several averages do not mix."""
  params = {'w': jnp.array([1.0, -2.0]), 'b': jnp.array(3.0)}
  start = jax.tree.map(jnp.zeros_like, params)
  emas = run({'0.9': start, '0.99': start}, params, 10**6, 20)
  assert set(emas) == {'0.9', '0.99'}
  for name, ema in emas.items():
    for leaf in params:
      np.testing.assert_allclose(ema[leaf], params[leaf] * (1 - float(name)**20), rtol=1e-4)


def test_averages_soon_forget_the_start():
  """From step 0, what is left of the start after n steps is prod (1 + k) / (10 + k) = 9! n! / (n + 9)!."""
  emas = run({'0.9999': {'w': jnp.ones(2)}}, {'w': jnp.zeros(2)}, 0, 5)
  np.testing.assert_allclose(emas['0.9999']['w'], 362_880 * 120 / 87_178_291_200, rtol=1e-5)


def test_averages_keep_their_type():
  emas = update_emas({'0.5': jnp.zeros(2, jnp.float32)}, jnp.ones(2, jnp.bfloat16), jnp.asarray(100))
  assert emas['0.5'].dtype == jnp.float32
  np.testing.assert_allclose(emas['0.5'], 0.5)
