"""The mesh: which devices a string takes, and how rows lie on them."""
import jax
import numpy as np
import pytest

from diffusion_jax.runtime.mesh import by_example, check_divisible, gather, make_mesh, put, replicated


@pytest.mark.parametrize('text, count', [('data=-1', 8), ('data=1', 1), ('data=3', 3), ('data=8', 8), (' data = 2', 2)])
def test_meshes(text, count):
  mesh = make_mesh(text)
  assert dict(mesh.shape) == {'data': count}
  assert mesh.devices.tolist() == jax.devices()[:count]


@pytest.mark.parametrize('text', ['', 'data', 'data=', 'data=all', 'model=2', 'data=2.0', 'data=--1', 'data=2,model=4'])
def test_other_strings_get_a_sentence(text):
  with pytest.raises(ValueError, match=rf"config.mesh is '{text}'; legal is 'data=N', with N devices or -1 for all"):
    make_mesh(text)


@pytest.mark.parametrize('text', ['data=0', 'data=9', 'data=-2'])
def test_more_devices_than_there_are(text):
  with pytest.raises(ValueError, match=f"config.mesh is '{text}', but this job has 8 devices"):
    make_mesh(text)


def test_several_processes_take_all_devices(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert make_mesh('data=-1').size == 8
  with pytest.raises(ValueError, match="config.mesh is 'data=4'; with 2 processes type 'data=-1'"):
    make_mesh('data=4')


def test_check_divisible():
  mesh = make_mesh('data=8')
  for count in (8, 64):
    check_divisible(count, mesh, 'config.train.batch')
  for count in (1, 12):
    with pytest.raises(ValueError, match=f'config.train.batch is {count}, which 8 devices cannot share evenly: choose '
                       'a multiple of 8'):
      check_divisible(count, mesh, 'config.train.batch')


def test_put_cuts_rows_over_devices_and_gather_brings_them_back():
  mesh = make_mesh('data=4')
  batch = {'x': np.arange(48.0, dtype=np.float32).reshape(8, 3, 2), 'index': np.arange(8, dtype=np.int32)}
  placed = put(batch, mesh)
  assert placed['x'].sharding == by_example(mesh)
  for i, shard in enumerate(sorted(placed['x'].addressable_shards, key=lambda shard: shard.device.id)):
    np.testing.assert_array_equal(shard.data, batch['x'][2 * i:2 * i + 2])
  for name in batch:
    back = gather(placed[name])
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, batch[name])


def test_replicated_puts_all_everywhere():
  value = jax.device_put(np.arange(5), replicated(make_mesh('data=4')))
  assert [shard.data.tolist() for shard in value.addressable_shards] == [[0, 1, 2, 3, 4]] * 4
