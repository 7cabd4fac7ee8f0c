"""Plans: for eight fake devices in place of a slice, and, where libtpu is installed, for a slice."""
import csv
import importlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import numpy as jnp

from diffusion_jax import method
from diffusion_jax import run as runs
from diffusion_jax.jobs import plan
from diffusion_jax.runtime import chips, roofline, topology
from diffusion_jax.runtime.mesh import shard_bytes
from diffusion_jax.runtime.products import products, total
from tests.jobs.runs import tiny

NO_LIBTPU = importlib.util.find_spec('libtpu') is None
REFUSAL = ('RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
           'temporaries (34.00G) exceeds available HBM (15.75G). HLO module: jit_train_step.')  # libtpu 0.0.52
GIB = 2**30
PEAKS = chips.Chip(flops=1e12, memory=2**30, bandwidth=1e10, links=1e9)


@pytest.fixture
def fake(monkeypatch):
  """v5e:2x2 and v5e:2x4 are four and eight devices of this host."""
  monkeypatch.setattr(plan, 'open_topology', lambda name: jax.devices()[:{'v5e:2x2': 4, 'v5e:2x4': 8}[name]])
  monkeypatch.setitem(chips.CHIPS, jax.devices()[0].device_kind, PEAKS)
  before = jax.config.jax_enable_compilation_cache
  yield
  jax.config.update('jax_enable_compilation_cache', before)


def config(**fields):
  return tiny(mesh='data=-1', data__classes=10, train__batch=8, **fields)


def load(name):
  return importlib.import_module(f'configs.{name}').get_config()


def opened(config, folder=Path('none')):
  if config.data.classes == -1:
    config.data.classes = 10
  return runs.open_run(config, folder, read=False)


def test_a_plan(fake, tmp_path, monkeypatch, capsys):
  assert plan.run(config(), tmp_path, 'v5e:2x4') == 0
  said = capsys.readouterr().out
  for word in ('A training step of 8 examples fits', 'Sampling 16 at once fits', '1 all-reduce', 'over ICI', 'bfloat16'):
    assert word in said, said
  rows = list(csv.DictReader((tmp_path / 'plan' / 'table.csv').read_text().splitlines()))
  assert [(row['topology'], row['scaling'], row['program'], row['batch'], row['fits']) for row in rows] == [
      ('v5e:2x4', 'as configured', 'train', '8', 'True'), ('v5e:2x4', 'as configured', 'sample', '16', 'True')]
  facts = json.loads((tmp_path / 'plan' / 'v5e_2x4_train_8.json').read_text())
  state = runs.state_shapes(opened(config()))
  row = 8 * 8 + 4 + 4  # an image, its label, its index
  assert facts['memory']['arguments'] == facts['memory']['entries_of_arguments'] == shard_bytes(state) + row
  gradient = shard_bytes(state.params)
  assert gradient <= facts['collectives']['all-reduce']['bytes'] <= gradient + 64  # and a few numbers of the metrics
  monkeypatch.setattr(jax.stages.Lowered, 'compile', None)  # all of it is kept
  assert plan.run(config(), tmp_path, 'v5e:2x4') == 0
  assert capsys.readouterr().out == said


def test_a_program_that_does_not_fit_is_said_with_what_would(fake, tmp_path, monkeypatch, capsys):
  def refuse(lowered):
    raise jax.errors.JaxRuntimeError(REFUSAL)
  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  assert plan.run(config(), tmp_path, 'v5e:2x4') == 1
  said = capsys.readouterr().out
  assert 'A training step of 8 examples does not fit: RESOURCE_EXHAUSTED' in said, said
  assert '--config.train.batch' not in said  # one example a chip is 34 GiB, and fewer cannot be
  assert 'chips with more memory: TPU v5 (95 GiB)' in said


def test_scaling_over_slices_is_against_the_first(capsys):
  row = {'topology': 'a', 'scaling': 'weak', 'chips': 8, 'batch': 8, 'batch_a_chip': 1, 'seconds_ms': 2.0,
         'bound_by': 'memory', 'mfu': 0.5, 'images_per_second': 800.0}
  plan.summarise([row])
  assert capsys.readouterr().out == ''
  plan.summarise([row, row | {'topology': 'b', 'chips': 16, 'images_per_second': 1200.0}])
  first, second = capsys.readouterr().out.splitlines()[-2:]
  assert first.endswith(' 100%') and second.startswith('b, weak') and second.endswith(' 75%')


def test_the_step_that_is_planned_is_the_step_that_trains(fake):
  """The row of a batch that is written down is what the data give."""
  this = runs.open_run(config(), Path('none'), read=True)
  batch = next(this.task.batches(0, 8, 0, 1))
  shapes = runs.batch_shapes(this)
  assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
      name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()}


def test_a_batch_that_a_slice_cannot_share_has_no_strong_scaling(fake, capsys):
  slices = {'v5e:2x2': jax.devices()[:4], 'v5e:2x4': jax.devices()}
  found = list(plan.cases(tiny(mesh='data=-1', train__batch=12), slices))
  assert found == [('v5e:2x2', 'as configured', 12, ('train', 'sample')), ('v5e:2x4', 'weak', 24, ('train', 'sample'))]
  assert '8 chips cannot share 12 examples evenly' in capsys.readouterr().out


@pytest.mark.parametrize('fields, topologies, sentence', [
    ({'data__classes': -1}, 'v5e:2x4', r'type --config.data.classes=10, or 0 for none'),
    ({}, '', r'type --topology=v5e:2x4'),
    ({}, None, r'type --topology=v5e:2x4'),
    ({}, 'v9:2x2', r"'v9:2x2' is none that can be planned for: legal are v4, v5e, v5p, v6e"),
    ({}, 'v5e:2x4', r"libtpu, which is not installed: type pip install -e '.\[plan\]'")])
def test_what_cannot_be_planned_gets_a_sentence(fields, topologies, sentence, tmp_path, monkeypatch):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
  before = jax.config.jax_enable_compilation_cache
  with pytest.raises(ValueError, match=sentence):
    plan.run(tiny(**fields) if fields else config(), tmp_path / 'run', topologies)
  jax.config.update('jax_enable_compilation_cache', before)
  assert not (tmp_path / 'run').exists()


def test_a_roofline_by_hand():
  sent = {'all-reduce': {'sent': 3e6}, 'all-gather': {'sent': 1e6}}
  facts = {'flops': 5e9, 'products': 4e9, 'bytes': 2e8, 'collectives': sent}
  found = roofline.bound(facts, PEAKS)
  np.testing.assert_allclose(found, (5e-3, 2e-2, 4e-3, 4e9 / (2e-2 * 1e12)))
  assert found.seconds == found.memory and found.by == 'memory'


def test_a_program_that_is_refused_names_the_sizes():
  """8 chips, 64 examples, 2 GiB held; 34 GiB needed: 4 GiB an example, of which 13.75 GiB take 3."""
  facts = roofline._needed(REFUSAL)
  assert facts == {'needed': 34 * GIB, 'available': 15.75 * GIB}
  sizes = roofline.sizes(facts, 2 * GIB, 64, 8, 'config.train.batch')
  assert sizes == ['--config.train.batch=24, which is 3 a chip', '3 times the chips for the same config.train.batch',
                   'chips with more memory: TPU v5 (95 GiB)']
  assert roofline.sizes(facts, 16 * GIB, 64, 8, 'config.train.batch') == sizes[2:]
  assert roofline.sizes({'refused': 'another text'}, 0, 64, 8, 'config.train.batch') == []


@pytest.mark.parametrize('held, gradient, rows, ways, kept, found', [
    (2, 0, 8, 8, [1, 3], [(False, 1, 4, 2 + 32 / 4)]),  # in 4 parts; remat alone leaves 2 + 4 + 32 * 3 / 4
    (2, 0, 1, 8, [1, 3], []),  # one row, little state, and most of it is one block
    (2, 2, 8, 8, [1] * 6, [(False, 1, 4, 2 + 4 + 30 / 4), (True, 1, 1, 2 + 2 + 6 + 30 / 6)]),
    (32, 1, 1, 8, [], [(False, 4, 1, 32 / 4 + 1 + 1)]),  # the state is most
    (20, 1, 8, 8, [], [(False, 2, 4, 20 / 2 + 2 + 13 / 4)])])  # neither alone
def test_the_cheapest_changes_by_hand(held, gradient, rows, ways, kept, found):
  """In GiB: 34 needed, 15.75 there. None is proposed with another that it does not need."""
  facts = roofline._needed(REFUSAL)
  changes = roofline.changes(facts, held * GIB, gradient * GIB, rows, ways, [each * GIB for each in kept])
  assert [(*change[:3], change.needs / GIB) for change in changes] == found
  assert roofline.changes({'refused': 'another text'}, 0, 0, 8, 8, []) == []


def test_what_is_kept_for_the_backward_pass(fake):
  """Of a network that computes its blocks again, the inputs of blocks and what lies between them: a small part."""
  this = opened(config(network='UNet(channels=32, multipliers=(1, 2), blocks=2, attention=(False, True))'))
  again = plan.rematerialised(this.config)
  assert again.network == this.config.network[:-1] + ', remat="block")'
  assert plan.rematerialised(again) is None
  state = runs.state_shapes(this)
  kept = plan.kept_bytes(this._replace(method=method.make_method(again, this.task)), state)
  assert sum(kept) < 0.25 * sum(plan.kept_bytes(this, state))
  block = 8 * 8 * 8 * 32 * 4  # rows, space, channels, float32: the stem's result and those of two blocks
  assert kept.count(block) >= 3 and max(kept) == 3 * block  # on the way up 64 and 32 channels are one input


def layers(this):
  """{layer: FLOPs of one example forward}, from the shapes of the network's kernels and of its layers' outputs: two for
  every entry of a kernel and place where it falls. Of 3 taps a place at the border has 2; stride 2 pads one side alone."""
  net = method.make_network(this.config, this.task)
  x, cond = jnp.zeros((1, *this.task.shape)), this.task.context(np.zeros(1, np.int32))
  init = lambda key: net.init_with_output(key, x, jnp.zeros(1), cond, capture_intermediates=True)[1]
  shapes = jax.eval_shape(init, jax.random.key(0))
  kernels = flatten_dict(shapes['params'], sep='/')
  calls = flatten_dict(shapes['intermediates'], sep='/')
  outs = {name.removesuffix('/__call__'): out[0].shape for name, out in calls.items() if hasattr(out[0], 'shape')}
  found = {}
  for path in (path for path in kernels if path.endswith('/kernel')):
    name, kernel = path.removesuffix('/kernel'), kernels[path].shape
    places = outs[name][:-1]
    if len(kernel) == 4:
      lost = 1 if 'down' in name and name.endswith('resample') else 2
      places = [3 * size - lost for size in places[1:]]
    found[name] = 2 * math.prod(places) * kernel[-2] * kernel[-1]
    if name.endswith(('qkv', 'query')):  # queries by keys, and weights by values
      found[f'{name} attention'] = 2 * 2 * math.prod(places)**2 * kernel[-1] // (3 if name.endswith('qkv') else 1)
  return found


def analytic(this):
  """FLOPs of a training step: forward, and backward to kernels and inputs; but what comes first passes nothing on."""
  forward = layers(this)
  return this.config.train.batch * (3 * sum(forward.values()) - forward['backbone/in'] - forward['backbone/time_0'])


def traced_step(this):
  return runs.trace_step(this, runs.state_shapes(this), runs.batch_shapes(this))


@pytest.mark.parametrize('name', ['digits', *(pytest.param(name, marks=pytest.mark.slow)
                                              for name in ('cifar10', 'fashion_mnist', 'folder'))])
def test_flops_by_shapes_are_those_of_the_layers(name):
  this = opened(load(name))
  assert total(products(traced_step(this).jaxpr)) == analytic(this)


def test_flops_of_a_transformer_by_shapes_are_those_of_the_layers():
  this = opened(config(network='DiT(width=32, depth=1, heads=4)'))
  assert total(products(traced_step(this).jaxpr)) == analytic(this)


@pytest.mark.slow
def test_flops_as_xla_counts_them_are_those_of_the_layers():
  """Within 2 %, which norms, dropout and the optimizer need beside products."""
  config = load('cifar10')
  config.train.batch = 16
  this = opened(config)
  assert 1 < traced_step(this).lower().cost_analysis()['flops'] / analytic(this) < 1.02


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed: pip install -e '.[plan]'")
def test_a_slice_of_tpus(tmp_path):
  """The entries of the arguments are the shards of the state and the batch, and XLA's FLOPs those of the layers."""
  config = load('base')
  config.data.size, config.data.channels, config.data.classes, config.train.batch = (16, 16), 3, 10, 128
  config.network = 'UNet(channels=128, multipliers=(1, 1), blocks=1, attention=(False, False))'
  assert plan.run(config, tmp_path, 'v5e:2x4') == 0
  facts = json.loads((tmp_path / 'plan' / 'v5e_2x4_train_128.json').read_text())
  this = runs.open_run(config, tmp_path, False, topology.open_topology('v5e:2x4'))
  assert facts['memory']['entries_of_arguments'] == shard_bytes((runs.state_shapes(this), runs.batch_shapes(this)))
  assert facts['flops'] == pytest.approx(analytic(this) / 8, rel=0.02)
  assert [each['count'] for each in facts['collectives'].values()] and 'refused' not in facts


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed: pip install -e '.[plan]'")
def test_a_slice_that_is_too_small(tmp_path, capsys):
  """32,768 images a chip are refused by libtpu itself; to take them in parts is the cheapest, and is enough alone."""
  config = load('base')
  config.data.size, config.data.channels, config.data.classes, config.train.batch = (16, 16), 3, 10, 8 * 32_768
  config.network = 'UNet(channels=128, multipliers=(1, 1), blocks=1, attention=(False, False))'
  assert plan.run(config, tmp_path, 'v5e:2x4') == 1
  lines = capsys.readouterr().out.partition('The cheapest changes')[2].splitlines()[1:4]
  assert lines[0].startswith('  --config.train.accumulate=') and lines[0].endswith(' GiB')
  facts = json.loads((tmp_path / 'plan' / 'v5e_2x4_train_262144.json').read_text())
  assert facts['needed'] > facts['available'] > float(lines[0].split()[-2]) * GIB


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed: pip install -e '.[plan]'")
@pytest.mark.parametrize('name, kind, chips_of_it', [('v4:2x2x1', 'TPU v4', 4), ('v5e:16x16', 'TPU v5 lite', 256),
                                                     ('v5p:4x4x4', 'TPU v5', 64), ('v6e:4x4', 'TPU v6 lite', 16)])
def test_a_device_is_a_chip(name, kind, chips_of_it):
  devices = topology.open_topology(name)
  assert len(devices) == len({tuple(device.coords) for device in devices}) == chips_of_it
  assert devices[0].device_kind == kind in chips.CHIPS
