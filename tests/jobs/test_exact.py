"""The same noise, losses, gradients and pictures on any mesh, and for a batch taken in any number of parts."""
import jax
import numpy as np
import optax
import pytest

from diffusion_jax import run as runs
from diffusion_jax.jobs import train
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime.packing import pack, unpack
from tests.compiling import SIXTEEN_DIGITS
from tests.jobs.runs import RULES, SMALL, losses, tiny, trained_state

NETWORK = 'UNet(channels=8, multipliers=(1,), blocks=1, attention=(True,), dropout=0.1, modulation="scale_shift", {})'
WAYS = [('data=2,fsdp=2,tensor=2', 2), ('data=8', 1), ('fsdp=8', 1), ('tensor=8', 1), ('data=4,tensor=2', 1),
        ('data=2,fsdp=4', 1), ('data=1', 16), ('data=4', 4)]
FEW = [pytest.param(*way, marks=[pytest.mark.slow] if i else []) for i, way in enumerate(WAYS)]
TRANSFORMER = 'DiT(width=16, depth=3, heads=8, mlp=2, dropout=0.1, qk_norm=True, scan=True, {})'
STEPS = 50


def curve(folder, mesh, parts, dtype, network=NETWORK, rules=RULES):
  """(losses of STEPS steps, gradients of the first), by the program that trains, from parameters none of which is zero."""
  config = tiny(mesh=mesh, train__accumulate=parts, sharding=rules, train__steps=STEPS, optimizer__clip=0.0,
                data__size=(4, 4), network=network.format(f'dtype="{dtype}", param_dtype="{dtype}"'))
  run = runs.open_run(config, folder, read=True)
  rng = np.random.default_rng(0)
  state = runs.new_state(run)
  move = lambda leaf: jax.device_put(np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)
  state = state._replace(params=jax.tree.map(move, state.params))
  stream, step, found, packed = run.task.batches(0, config.train.batch, 0, 1), None, [], pack(state)
  for _ in range(STEPS):
    batch = meshes.put(next(stream), run.mesh)
    step = step or runs.trace_step(run, state, batch).lower().compile(SIXTEEN_DIGITS)
    packed, metrics = step(packed, batch)
    found.append(float(metrics['loss']))
    if len(found) == 1:  # after one step Adam's first moment is (1 - b1) times the gradient
      moments = jax.tree.leaves(optax.tree.get(unpack(packed).optimizer, 'mu'))
      gradients = [np.asarray(leaf) / (1 - config.optimizer.b1) for leaf in moments]
  return np.array(found), gradients


@pytest.fixture(scope='module', params=['float64', pytest.param('float32', marks=pytest.mark.slow)])
def one(request, tmp_path_factory):
  """(dtype, the curve on one device)."""
  with jax.enable_x64(request.param == 'float64'):
    return request.param, curve(tmp_path_factory.mktemp('one'), 'data=1', 1, request.param)


@pytest.mark.parametrize('mesh, parts', FEW)
def test_a_mesh_and_parts_do_not_change_training(one, tmp_path, mesh, parts):
  """Noise, dropout and data being the same bits, a loss of the first step agrees to rounding, and so do the gradients of
  every parameter; the curve of 50 steps in float64."""
  dtype, (expected, gradients) = one
  with jax.enable_x64(dtype == 'float64'):
    found, ours = curve(tmp_path, mesh, parts, dtype)
  near = 1e-5 if dtype == 'float32' else 1e-12
  np.testing.assert_allclose(found[0], expected[0], rtol=near)
  for a, b in zip(ours, gradients, strict=True):
    assert np.linalg.norm(a - b) <= near * np.linalg.norm(b) > 0
  if dtype == 'float64':
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('mesh, parts', [('data=2,fsdp=2,tensor=2', 2), ('fsdp=8', 1), ('tensor=8', 1)])
def test_a_mesh_and_parts_do_not_change_the_training_of_a_transformer(tmp_path, x64, mesh, parts):
  (expected, gradients), (found, ours) = (curve(tmp_path / name, name, count, 'float64', TRANSFORMER, SMALL['DiT'])
                                          for name, count in (('data=1', 1), (mesh, parts)))
  for a, b in zip(ours, gradients, strict=True):
    assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b) > 0
  np.testing.assert_allclose(found, expected, rtol=1e-9)


MIXED = 'data=2,fsdp=2,tensor=2'


@pytest.mark.slow
def test_a_mesh_does_not_change_what_muon_learns(tmp_path, x64):
  network = NETWORK.format('dtype="float64", param_dtype="float64"')
  for mesh in (MIXED, 'data=1'):
    train.run(on(mesh, network=network, optimizer__name='muon'), tmp_path / mesh)
  np.testing.assert_allclose(*(list(losses(tmp_path / mesh).values()) for mesh in (MIXED, 'data=1')), rtol=1e-9)


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  """A run of 4 steps on a mixed mesh."""
  workdir = tmp_path_factory.mktemp('mixed')
  train.run(on(MIXED), workdir)
  return workdir


def on(mesh, **fields):
  return tiny(mesh=mesh, sharding=RULES, **fields)


def test_every_device_holds_a_part_of_the_state(tmp_path):
  """Of all moments too: Muon has its own and Adam's."""
  run = runs.open_run(on(MIXED, optimizer__name='muon'), tmp_path, read=True)
  state = runs.new_state(run)
  whole, held = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), meshes.shard_bytes(state)
  shards = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
  assert held == shards < 0.4 * whole  # a quarter, and the biases of 8 entries
  alone = runs.new_state(runs.open_run(on('data=1', optimizer__name='muon'), tmp_path, read=True))
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
    np.testing.assert_array_equal(a, b)  # born there as it is on one device


def test_resume_is_exact_on_a_mesh(mixed, tmp_path):
  """2 + 2 steps equal 4, bit for bit."""
  train.run(on(MIXED, train__steps=2), tmp_path)
  train.run(on(MIXED), tmp_path)
  for a, b in zip(*(trained_state(on(MIXED), workdir) for workdir in (mixed, tmp_path)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert losses(mixed) == losses(tmp_path)


@pytest.mark.parametrize('mesh', ['data=1', pytest.param('fsdp=8', marks=pytest.mark.slow),
                                  pytest.param('data=4,tensor=2', marks=pytest.mark.slow)])
def test_a_mesh_does_not_change_pictures(mixed, mesh):
  """What was trained on one mesh and is sampled on another, at another batch size, differs by at most 1/255."""
  def drawn(mesh, batch):
    run = runs.open_run(on(mesh), mixed, read=False)
    return runs.draw(run, runs.make_sampler(run, run.config.transform), runs.trained(run), 20, batch).astype(int)
  np.testing.assert_allclose(drawn(mesh, 8), drawn(MIXED, 16), atol=1)


@pytest.mark.slow
def test_a_run_goes_from_mesh_to_mesh(mixed, tmp_path):
  """Its losses are those of one mesh, to rounding."""
  for steps, mesh in enumerate((MIXED, 'data=1', 'fsdp=8', 'tensor=8'), 1):
    train.run(on(mesh, train__steps=steps), tmp_path)
  np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(mixed).values()), rtol=1e-5)


def test_a_transfer_that_nobody_asked_for_is_an_error(tmp_path, monkeypatch):
  """In the loop of training no array comes to the devices but by runtime/mesh.py."""
  monkeypatch.setattr(train.Stop, 'look', lambda self, step: jax.jit(lambda x: x + 1)(np.ones(3)))
  with pytest.raises(jax.errors.JaxRuntimeError, match='Disallowed host-to-device transfer'):
    train.run(on('data=1', train__steps=1), tmp_path)
