"""Checkpoints: what is saved comes back, on other devices too; what is damaged is named, moved aside and never used."""
import gc
import random
import re
import resource
import shutil
import sys
import threading
import warnings

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from diffusion_jax.runtime import manifest
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime.checkpoints import Checkpoints, SaveError, read_part
from diffusion_jax.runtime.packing import pack, unpack
from diffusion_jax.runtime.step import State, init_state

# At the first error of a save or restore Orbax ends its event loop: the coroutines of the other arrays are never
# awaited, and TensorStore reports to a closed loop.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(autouse=True)
def collect():
  """What Orbax left shows here, not in a test of another file."""
  yield
  gc.collect()


def make_state(step, devices=1, size=4096):
  """A training state whose numbers belong to its step, replicated over `devices`."""
  def init(key):
    layer = {'kernel': jax.random.normal(key, (size,)), 'bias': jnp.full((3,), step, jnp.bfloat16)}
    return {'layer': layer}, {'history': jnp.arange(4)}
  state = init_state(init, optax.adam(1e-3), (0.9, 0.99), step)
  state = state._replace(step=jnp.asarray(step, jnp.int32))
  return jax.device_put(jax.tree.map(np.asarray, state), meshes.replicated(meshes.make_mesh(f'data={devices}')))


def target_of(state):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def save(folder, steps, keep=3):
  """Save these steps; closes."""
  checkpoints = Checkpoints(folder, keep)
  for step in steps:
    checkpoints.save(step, make_state(step))
  checkpoints.wait()
  checkpoints.close()


def restore(folder, devices=1):
  checkpoints = Checkpoints(folder, 3)
  try:
    return checkpoints.restore(target_of(make_state(0, devices)))
  finally:
    checkpoints.close()


def assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A folder with the checkpoints of steps 2 and 4; copy it before use."""
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  save(folder, (2, 4))
  return folder


@pytest.fixture
def folder(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'checkpoints')


@pytest.mark.parametrize('before, after', [(1, 8), (8, 1)])
def test_a_state_comes_back_on_any_number_of_devices(tmp_path, before, after):
  state = make_state(6, before)
  checkpoints = Checkpoints(tmp_path / 'new', 2)
  checkpoints.save(6, state)
  checkpoints.wait()
  checkpoints.close()
  back = restore(tmp_path / 'new', after)
  assert isinstance(back, State)
  assert_same(back, state)
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(back)} == {after}


def test_cut_arrays_come_back_cut(tmp_path):
  """Arrays that are cut over 8 devices, saved and restored on 8 and on 2."""
  value = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
  cut = lambda count: meshes.by_example(meshes.make_mesh(f'data={count}'))
  checkpoints = Checkpoints(tmp_path, 2)
  checkpoints.save(1, {'x': jax.device_put(value, cut(8))})
  checkpoints.wait()
  for count in (8, 2):
    back = checkpoints.restore({'x': jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=cut(count))})
    np.testing.assert_array_equal(back['x'], value)
    assert back['x'].addressable_shards[0].data.shape == (16 // count, 3)
  checkpoints.close()


def test_training_may_go_on_while_a_save_runs(tmp_path):
  """The step takes the memory of the state, and so overwrites it, as soon as save returns."""
  state = make_state(3, size=1_000_000)
  expected, packed = jax.tree.map(np.array, state), pack(state)
  spoil = jax.jit(lambda packed: jax.tree.map(lambda leaf: leaf * 0, packed), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, 2)
  checkpoints.save(3, unpack(packed))
  zero = spoil(packed)
  checkpoints.wait()
  assert_same(checkpoints.restore(target_of(unpack(zero))), expected)
  checkpoints.close()


def test_the_newest_is_restored(folder):
  assert_same(restore(folder), make_state(4))


def test_no_checkpoints_are_none(tmp_path):
  assert restore(tmp_path / 'new') is None


def test_a_part_of_the_newest_is_read_and_nothing_is_changed(folder, tmp_path):
  part = read_part(folder, 'ema', '0.99', 'layer')
  assert all(isinstance(leaf, np.ndarray) for leaf in part.values())
  assert_same(part, make_state(4).ema['0.99']['layer'])
  assert read_part(folder, 'ema', '0.5', 'layer') is None and read_part(tmp_path / 'new', 'ema') is None
  empty_folder(folder / '4')
  with pytest.raises(ValueError, match='4 is damaged .* Sample that run, with --mode=sample, which sets it aside'):
    read_part(folder, 'ema')
  assert names(folder) == ['2', '4']


def biggest(step):
  return max((path for path in step.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(step):
  """In the middle of the data, where Orbax alone notices nothing."""
  path = biggest(step)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return f'{path.relative_to(step)} has another checksum than manifest.json says'


def cut_file(step):
  path = biggest(step)
  content = path.read_bytes()
  assert len(content) > 10_000
  path.write_bytes(content[:-1])
  return f'{path.relative_to(step)} has {len(content) - 1} bytes in place of {len(content)}'


def empty_file(step):
  path = biggest(step)
  size = path.stat().st_size
  path.write_bytes(b'')
  return f'{path.relative_to(step)} has 0 bytes in place of {size}'


def delete_file(step):
  biggest(step).unlink()
  return 'is missing'


def extra_file(step):
  (step / 'd' / 'stray').write_text('')
  return 'd/stray does not belong to it'


def no_metadata(step):
  (step / '_METADATA').unlink()
  return '_METADATA is missing'


def no_manifest(step):
  (step / 'manifest.json').unlink()
  return 'manifest.json is missing'


def half_manifest(step):
  path = step / 'manifest.json'
  path.write_text(path.read_text()[:100])
  return 'manifest.json cannot be read'


def half_deleted(step):
  """What a kill in the middle of deleting the folder would leave, were it deleted under its name."""
  for path in sorted(path for path in step.rglob('*') if path.is_file())[::2]:
    path.unlink()
  return 'is missing'


def empty_folder(step):
  shutil.rmtree(step)
  step.mkdir()
  return 'manifest.json is missing'


HARM = (flip_bit, cut_file, empty_file, delete_file, extra_file, no_metadata, no_manifest, half_manifest, half_deleted,
        empty_folder)


@pytest.mark.parametrize('harm', HARM)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_used(folder, harm):
  found = re.escape(harm(folder / '4'))
  checkpoints = Checkpoints(folder, 3)
  with pytest.warns(UserWarning, match=rf'checkpoints/4 is damaged \(.*{found}.*\); it is moved to 4\.damaged and the one'):
    back = checkpoints.restore(target_of(make_state(0)))
  assert_same(back, make_state(2))
  assert names(folder) == ['2', '4.damaged'] and checkpoints.steps() == [2]
  again = make_state(4)._replace(skipped=jnp.asarray(7, jnp.int32))
  checkpoints.save(4, again)  # the run comes past the same step
  checkpoints.wait()
  checkpoints.close()
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert_same(restore(folder), again)
  assert names(folder) == ['2', '4', '4.damaged']


def test_damage_at_the_same_step_again_finds_another_name(folder):
  (folder / '4.damaged').mkdir()
  empty_folder(folder / '4')
  with pytest.warns(UserWarning, match='moved to 4.damaged2'):
    assert_same(restore(folder), make_state(2))
  assert names(folder) == ['2', '4.damaged', '4.damaged2']


def test_nothing_but_damaged_checkpoints_is_an_error(folder):
  for step in ('2', '4'):
    empty_folder(folder / step)
  with pytest.warns(UserWarning, match='is damaged'):
    with pytest.raises(ValueError, match=r'No checkpoint in .* can be read; the damaged ones are 4.damaged, 2.damaged. '
                       'To start anew, type another --workdir'):
      restore(folder)
  assert names(folder) == ['2.damaged', '4.damaged']  # nothing is deleted


def test_a_bit_flipped_anywhere_is_noticed(folder):
  """In every file, at a random place; also in the manifest, where it takes the blame itself or puts it on a file."""
  rng, target = random.Random(0), target_of(make_state(0))
  files = sorted(path.relative_to(folder / '4') for path in (folder / '4').rglob('*') if path.is_file())
  assert len(files) > 8
  for name in files:
    content = bytearray((folder / '4' / name).read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    broken = shutil.copytree(folder, folder.parent / f'{name.name} {place}')
    (broken / '4' / name).write_bytes(content)
    assert manifest.damage(broken / '4'), name
    assert name.name == 'manifest.json' or str(name) in manifest.damage(broken / '4')
  checkpoints = Checkpoints(broken, 3)
  with pytest.warns(UserWarning, match='is damaged'):
    assert_same(checkpoints.restore(target), make_state(2))
  checkpoints.close()


def test_processes_share_the_reading_of_files(folder):
  """A flipped bit is found by the one process in three whose share the file is."""
  flip_bit(folder / '4')
  found = [manifest.damage(folder / '4', part, 3) for part in range(3)]
  assert sorted(map(bool, found)) == [False, False, True]


def test_what_cannot_be_moved_is_named_and_passed_over(folder, monkeypatch):
  flip_bit(folder / '4')
  def fail(path, aside):
    raise OSError(30, 'Read-only file system')
  monkeypatch.setattr(type(folder), 'rename', fail)
  with pytest.warns(UserWarning, match=r'it cannot be moved aside \(Read-only file system\) and the one before it is used'):
    assert_same(restore(folder), make_state(2))
  assert names(folder) == ['2', '4']


def test_a_whole_checkpoint_that_does_not_fit_is_not_called_damaged(folder):
  """Another shape: the files are as they were written, and stay."""
  checkpoints = Checkpoints(folder, 3)
  with pytest.raises(ValueError, match=r'checkpoints/4 is whole, but this program cannot read it \('):
    checkpoints.restore(target_of(make_state(0, size=17)))
  checkpoints.close()
  assert names(folder) == ['2', '4']


def test_a_save_that_was_killed_is_no_checkpoint(folder):
  """What a kill leaves of a save, and of the deletion of an old step, lies in `partial`; the next save sweeps it up."""
  for left in ('6', '6.orbax-checkpoint-tmp', '1'):
    shutil.copytree(folder / '4', folder / 'partial' / left)
  (folder / 'partial' / '1' / '_METADATA').unlink()
  assert_same(restore(folder), make_state(4))
  assert names(folder) == ['2', '4', 'partial']
  save(folder, (6,), keep=2)
  assert names(folder) == ['4', '6']
  assert_same(restore(folder), make_state(6))


def test_a_step_has_its_name_only_with_its_manifest(folder, monkeypatch):
  """A kill between Orbax's commit and ours: nothing has the name of a step, and the run goes on from the step before."""
  monkeypatch.setattr(manifest, 'write', lambda folder: sys.exit('killed'))
  checkpoints = Checkpoints(folder, 3)
  checkpoints.save(6, make_state(6))
  with pytest.raises(SystemExit):
    checkpoints.wait()
  checkpoints.close()
  assert names(folder) == ['2', '4', 'partial'] and names(folder / 'partial') == ['6']
  assert_same(restore(folder), make_state(4))


def test_a_save_returns_before_anything_is_written(tmp_path, monkeypatch):
  """Whatever the disk does: save waits for none of it, and the one after it does."""
  checkpoints, gate, write = Checkpoints(tmp_path, 2), threading.Event(), manifest.write
  monkeypatch.setattr(manifest, 'write', lambda folder: (gate.wait(60), write(folder)))
  checkpoints.save(3, make_state(3))
  assert checkpoints.steps() == []  # written it is not
  gate.set()
  checkpoints.save(5, make_state(5))
  assert 3 in checkpoints.steps()
  checkpoints.close()
  assert checkpoints.steps() == [3, 5]


def test_keep_deletes_none_but_the_oldest(tmp_path):
  save(tmp_path / 'a', (1, 2, 3, 10), keep=2)
  assert names(tmp_path / 'a') == ['10', '3']
  save(tmp_path / 'a', (11,), keep=2)
  assert names(tmp_path / 'a') == ['10', '11']


def test_keep_counts_the_damaged_ones_for_nothing(folder):
  """After a fall-back, the good older checkpoint stays until there are `keep` newer ones."""
  empty_folder(folder / '4')
  checkpoints = Checkpoints(folder, 2)
  with pytest.warns(UserWarning, match='is damaged'):
    checkpoints.restore(target_of(make_state(0)))
  checkpoints.save(4, make_state(4))
  checkpoints.wait()
  assert names(folder) == ['2', '4', '4.damaged']
  checkpoints.close()


def test_a_save_that_fails_gets_a_sentence(folder, monkeypatch):
  checkpoints = Checkpoints(folder, 3)
  def fail(*args, **options):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(checkpoints._orbax, 'save', fail)
  checkpoints.save(6, make_state(6))
  with pytest.raises(SaveError, match=r'could not be saved in .*No space left on device\. The newest complete one is '
                     'of step 4. Make room, then type the same command'):
    checkpoints.wait()
  checkpoints.close()


def test_a_first_save_that_fails_says_that_there_is_none(tmp_path):
  """The folder is a file."""
  (tmp_path / 'new').write_text('')
  checkpoints = Checkpoints(tmp_path / 'new', 3)
  checkpoints.save(1, make_state(1))
  with pytest.raises(SaveError, match='could not be saved in .*There is no complete one'):
    checkpoints.close()


@pytest.fixture
def small_files():
  """Files may grow to 100 kB and no further: the error comes from the operating system, in the middle of a write."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize('then', ['wait', 'save'])
def test_a_save_that_fails_in_the_background_is_not_swallowed(folder, small_files, then):
  checkpoints = Checkpoints(folder, 3)
  with pytest.raises(SaveError, match='could not be saved in .*The newest complete one is of step 4'):
    checkpoints.save(6, make_state(6, size=1_000_000))
    checkpoints.wait() if then == 'wait' else checkpoints.save(8, make_state(8))
  assert_same(restore(folder), make_state(4))
