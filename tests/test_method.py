"""What a config makes of the mathematics: losses, learned parts, adaptive times, and the sentences for bad input."""
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import numpy as jnp

from diffusion_jax import method as methods
from diffusion_jax.build import build
from diffusion_jax.core.types import Draw
from diffusion_jax.jobs import train
from diffusion_jax.networks.embed import Conditioning
from diffusion_jax.runtime import hlo
from diffusion_jax.runtime.mesh import make_mesh, replicated, shard_bytes
from diffusion_jax.runtime.sharding import shardings
from diffusion_jax.tasks.task import make_task
from tests.jobs.runs import tiny, trained_state

HYBRID = {'schedule': 'discrete(linear_betas(50, 0.002, 0.4))', 'target': 'learned_variance(noise())', 'space': 'noise()',
          'loss': 'hybrid(50)', 'times': 'discrete(50)'}
VDM = {'schedule': 'monotone(16)', 'loss': 'bound(softmax(256), high=None)'}
SHAPES = {'task': 'captions', 'data.source': 'shapes', 'data.size': (16, 16), 'data.channels': 3, 'data.count': 40,
          'text.encoder': 'CLIPText(width=16, layers=1, heads=2)', 'text.length': 32}
BATCH = 16


def prepare(**fields):
  """(method, params, extra, the loss of a fixed batch as a compiled function of (params, extra))."""
  config = tiny(**fields)
  task = make_task(config, True)
  method = methods.make_method(config, task)
  params, extra = method.init(jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, next(task.batches(0, BATCH, 0, 1)))
  draw = Draw(jax.random.key(1), jnp.arange(BATCH), BATCH)
  return method, params, extra, jax.jit(lambda params, extra: method.loss(params, extra, draw, batch))


@pytest.mark.parametrize('fields', [HYBRID, VDM, {'uncertainty': 'uncertainty()'}, {'times': 'importance(4, 2)'},
                                    {'loss': 'regression(huber(0.1))', 'times': 'lognormal(-1.2, 1.2, stratified())'}])
def test_every_kind_of_loss_trains(fields):
  _, params, extra, loss = prepare(**fields)
  def mean(params):
    losses, _, _ = loss(params, extra)
    return losses.mean(), losses
  grads, losses = jax.jit(jax.grad(mean, has_aux=True))(params)
  assert losses.shape == (BATCH,) and np.isfinite(losses).all()
  assert set(params) == {'params'} | ({'schedule'} if fields is VDM else set()) | fields.keys() & {'uncertainty'}
  for name, grad in grads.items():
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grad)), name


def test_a_learned_variance_has_its_own_half_of_the_output():
  method, params, extra, _ = prepare(**HYBRID)
  process = method.process(params)
  estimate = method.denoiser(params, extra)(jnp.ones((2, 8, 8, 1)), process.level(0.5), {'label': jnp.zeros(2, int)})
  assert estimate.x0.shape == estimate.variance.shape == (2, 8, 8, 1)


def test_the_inner_parameters_of_a_learned_schedule_get_the_gradient_of_the_square():
  """For one batch, by finite differences: of L^2 for the inner ones, of L for the ends."""
  with jax.enable_x64(True):
    _, params, extra, loss = prepare(**VDM)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    grads = jax.jit(jax.grad(lambda params: loss(params, extra)[0].mean()))(params)['schedule']
    def moved(group, name, by):
      part = params['schedule'][group]
      first = part[name].at[(0,) * part[name].ndim].add(by)
      return np.asarray(loss({**params, 'schedule': {**params['schedule'], group: {**part, name: first}}}, extra)[0])
    for group, name, power in (('inner', 'b', 2), ('inner', 'c', 2), ('ends', 'high', 1), ('ends', 'low', 1)):
      slope = np.mean(moved(group, name, 1e-4)**power - moved(group, name, -1e-4)**power) / 2e-4
      np.testing.assert_allclose(np.ravel(grads[group][name])[0], slope, rtol=2e-3)


def test_the_sampler_follows_the_learned_schedule():
  method, params, _, _ = prepare(**VDM)
  params['schedule']['ends'] = {'high': jnp.float32(9.0), 'low': jnp.float32(-7.0)}
  level = method.process(params).level(jnp.array([1e-30, 1.0]))
  np.testing.assert_allclose(level.logsnr, [9, -7], rtol=1e-5)


def test_importance_keeps_the_expected_loss_and_learns_from_it():
  """At first uniform; each step's losses go into its history; what is drawn more often counts less."""
  method, params, extra, loss = prepare(times='importance(2, 1)')
  plain, news, _ = loss(params, extra)
  after = method.update(extra, news)
  assert (np.asarray(after['times']['count']) > 0).all() and int(after['times']['count'].sum()) == BATCH
  history = {'losses': jnp.array([[1.0], [3.0]]), 'count': jnp.array([1, 1])}
  law = method.times({'times': history})
  np.testing.assert_allclose(law.density(None, jnp.array([0.5, 1.0])), [0.5, 1.5], atol=2e-3)
  t = np.asarray(law.sample(None, Draw(jax.random.key(1), jnp.arange(BATCH), BATCH).part(0)))
  again, _, _ = loss(params, {'times': history})
  kept = t == np.asarray(method.times(extra).sample(None, Draw(jax.random.key(1), jnp.arange(BATCH), BATCH).part(0)))
  assert kept.sum() > 3  # rows that drew the same time under both laws: their losses differ by the density alone
  np.testing.assert_allclose(again[kept], plain[kept] / np.where(t[kept] == 0.5, 0.5, 1.5), rtol=5e-3)


def test_uncertainty_starts_as_the_plain_loss_and_then_divides_it():
  _, params, extra, loss = prepare(uncertainty='uncertainty(8)')
  first, _, metrics = loss(params, extra)
  plain, _, _ = prepare()[3]({'params': params['params']}, {})
  np.testing.assert_allclose(first, plain, rtol=1e-5)
  np.testing.assert_allclose(metrics['plain_loss'], plain.mean(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{'times': 'importance(4, 1)', 'uncertainty': 'uncertainty(8)'}, SHAPES])
def test_resume_is_exact_with_all_that_a_method_keeps(tmp_path, fields):
  train.run(tiny(**fields), tmp_path / 'whole')
  train.run(tiny(**fields, train__steps=2), tmp_path / 'halves')
  train.run(tiny(**fields), tmp_path / 'halves')
  whole, halves = (trained_state(tiny(**fields), tmp_path / name) for name in ('whole', 'halves'))
  for a, b in zip(whole, halves, strict=True):
    np.testing.assert_array_equal(a, b)


def test_conditions_are_dropped_together_and_each_on_its_own():
  keys = jax.random.split(jax.random.key(0), 20_000)
  lost = methods._drops(tiny(train__drop=0.1, train__drop_each=0.2), ['image', 'text'], keys)
  image, text = np.asarray(lost['image']), np.asarray(lost['text'])
  for share, law in ((image, 1 - 0.9 * 0.8), (text, 1 - 0.9 * 0.8), (image & text, 0.1 + 0.9 * 0.2 * 0.2)):
    assert abs(share.mean() - law) < 4 * np.sqrt(law * (1 - law) / 20_000)


def test_what_is_dropped_is_the_null():
  cond = {'label': jnp.array([3, 4]), 'text': {'tokens': jnp.ones((2, 3), int)}, 'negative': {'label': jnp.zeros(2)},
          'towards': (jnp.zeros(2), {'label': jnp.zeros(2)}),
          'drop': {'label': jnp.array([True, False]), 'text': jnp.array([False, True])}}
  seen = methods._with_nulls(cond, {'label': np.int32(9), 'text': {'tokens': np.array([7, 8, 9])}})
  np.testing.assert_array_equal(seen['label'], [9, 4])
  np.testing.assert_array_equal(seen['text']['tokens'], [[1, 1, 1], [7, 8, 9]])
  assert set(seen) == {'label', 'text'}


def test_a_config_says_how_the_network_is_computed():
  config = tiny(network='UNet(channels=8, multipliers=(1,), blocks=2, attention=(True,), dtype="bfloat16", '
                        'remat="products", scan=True)')
  net = methods.make_network(config, make_task(config, True))
  args = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), {'label': jnp.zeros(2, int)}
  params = jax.eval_shape(net.init, jax.random.key(0), *args)
  assert params['params']['backbone']['up_0_0_to_2']['block']['conv_1']['kernel'].shape == (3, 3, 3, 16, 8)
  loss = lambda params: net.apply(params, *args).sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert all(word in text for word in ('remat', 'scan', 'bf16'))
  assert "dtype=\"bfloat16\"" in config.network


@pytest.mark.parametrize('fields, sentence', [
  ({'schedule': 'cosinus()'}, "config.schedule: 'cosinus()': 'cosinus' is unknown. Did you mean 'cosine'"),
  ({'schedule': 'discrete(linear_bets())'}, "'linear_bets' is unknown. Did you mean 'linear_betas'"),
  ({'schedule': 'laplace(0.0, 1.0, 2.0)'}, "too many positional arguments. Its form is laplace(mean=0.0, scale=0.5)"),
  ({'schedule': 'discrete(linear_betas(10, 0.1, 1.2))'}, 'betas must lie in (0, 1), but for a last one of 1; beta 9 of'),
  ({'schedule': 'tests.test_method.rising()'}, 'must have a logsnr that falls from t = 0 to t = 1; from t = 0.'),
  ({'target': 'noise()', 'grid': 'uniform(4)'}, "config.target 'noise()' is singular at t=1"),
  ({'schedule': 'monotone()'}, "Take config.loss='bound(softmax(256), high=None)'"),
  (VDM | {'grid': 'karras(4)'}, "grids in t, such as 'uniform(64)', are legal here"),
  (VDM | {'weight': 'min_snr()'}, "has a weight of its own; config.weight is 'min_snr()'"),
  ({'loss': 'bound()'}, "config.loss: 'bound()': missing a required argument: 'decoder'"),
  ({'loss': 'hybrid()'}, "hybrid trains a variance too; this target has none. Take 'learned_variance(noise())'"),
  ({'target': 'learned_variance(v())'}, 'does not train a variance'),
  (VDM | {'target': 'learned_variance(v())'}, 'does not train a variance'),
  ({'loss': 'regression(hubert())'}, "'hubert' is unknown. Did you mean 'huber'"),
  ({'times': 'discrete(9)', 'target': 'noise()', 'grid': 'uniform(4, 0.9)'}, 'These times draw t = 1, where alpha = 0'),
  (VDM | {'times': 'shift(uniform(), 2.0)'}, "config.times 'shift(uniform(), 2.0)': shift by 2.0 needs lower logsnr"),
  ({'schedule': 'geometric()', 'times': 'shift(uniform(), 0.5)'}, "'shift(uniform(), 0.5)': shift by 0.5 needs higher"),
  ({'evaluate.trace': 'hutchinson(0)'}, "config.evaluate.trace: 'hutchinson(0)': hutchinson needs"),
  ({'network': 'UNet(dtype="half")'}, "UNet got dtype='half'; it knows ('bfloat16', 'float32', 'float64')"),
  ({'network': 'UNet(remat="blocks")'}, "UNet got remat='blocks'; it knows ('none', 'block', 'products')"),
  ({'times': 'mode(3.0)'}, 'mode needs -1 <= scale <= 2 / (pi - 2)'),
])
def test_bad_input_gets_a_sentence_before_anything_is_compiled(fields, sentence):
  config = tiny(**fields)
  with jax.log_compiles(), pytest.raises(ValueError) as error:
    methods.make_method(config, make_task(config, True))
    methods.make_sampling(config, config.transform)
    methods.make_likelihood(config)
  assert sentence in str(error.value)


def rising():
  """A schedule that goes back towards the data half way."""
  way = lambda t: jnp.sin(jnp.pi * jnp.minimum(t, 1 - t))
  return lambda t: (1 - way(t), way(t))


@pytest.mark.parametrize('network', ['UNet(channels=64, multipliers=(1,), blocks=1, attention=(False,))',
                                     'DiT(width=192, depth=8, heads=6, attend="joint", scan=True)'])
def test_every_rule_of_sharding_finds_a_parameter_and_can_be_applied(network):
  """And of a mixed mesh every device holds a quarter of most parameters, and half of the others."""
  config = tiny(network=network)
  rules, mesh = methods.default_sharding(config), make_mesh('data=2,fsdp=2,tensor=2')
  assert set(methods.SHARDING) == {'UNet', 'DiT'}
  backbone = build(config.network, methods.NETWORKS)
  args = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), Conditioning(sequence=jnp.zeros((1, 5, 6)))
  params = jax.eval_shape(backbone.init, jax.random.key(0), *args)
  used = {next(pattern for pattern, _ in rules if re.search(pattern, name)) for name in flatten_dict(params, sep='/')}
  assert used == {pattern for pattern, _ in rules}
  places = shardings(params, rules, mesh)
  held = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params, places)
  assert shard_bytes(held) < sum(4 * leaf.size for leaf in jax.tree.leaves(params)) * 3 / 8


@pytest.mark.slow
@pytest.mark.parametrize('attend, reductions', [('none', 4), ('cross', 6), ('joint', 6)])
def test_a_transformer_is_cut_into_whole_heads(attend, reductions):
  """Attention moves nothing between the devices of 'tensor': forward, two blocks add up the parts of what attends and of
  the perceptron (arXiv:1909.08053, fig. 4), 'joint' of both streams but in the last block, and nothing is gathered."""
  mesh = make_mesh('tensor=2')
  net = methods.NETWORKS['DiT'](width=32, depth=2, heads=4, attend=attend)
  sequence = None if attend == 'none' else jnp.zeros((1, 5, 6))
  args = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), Conditioning(sequence=sequence)
  params = jax.eval_shape(net.init, jax.random.key(0), *args)
  places = shardings(params, methods.SHARDING['DiT'], mesh), replicated(mesh)
  text = jax.jit(lambda params, args: net.apply(params, *args), in_shardings=places, out_shardings=replicated(mesh)).lower(
      params, args).compile().as_text()
  found = [each for body in hlo.computations(text).values() for each in body if each.opcode in hlo.COLLECTIVES]
  assert {each.opcode for each in found} == {'all-reduce'}
  assert sum(each.shapes.count('[') for each in found) == reductions  # one may add up several arrays
