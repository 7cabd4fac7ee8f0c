"""The mesh: which devices a string takes, and how rows lie on them."""
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffusion_jax.runtime.mesh import by_example, gather, make_mesh, part, place, put, replicated, ways


@pytest.mark.parametrize('text, sizes', [
    ('data=-1', (8, 1, 1)), ('data=1', (1, 1, 1)), ('data=3', (3, 1, 1)), (' data = 2', (2, 1, 1)), ('fsdp=8', (1, 8, 1)),
    ('tensor=2', (1, 1, 2)), ('data=-1,fsdp=2', (4, 2, 1)), ('tensor=2, data=-1, fsdp=2', (2, 2, 2)),
    ('data=1,fsdp=-1,tensor=4', (1, 2, 4)), ('data=-1,tensor=8', (1, 1, 8)), ('data=2,fsdp=3', (2, 3, 1))])
def test_meshes(text, sizes):
  mesh = make_mesh(text)
  assert tuple(mesh.shape.items()) == tuple(zip(('data', 'fsdp', 'tensor'), sizes, strict=True))
  assert mesh.devices.flatten().tolist() == jax.devices()[:np.prod(sizes)]
  assert ways(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize('text', ['', 'data', 'data=', 'data=all', 'model=2', 'data=2.0', 'data=--1', 'data=2,model=4',
                                  'data=0', 'data=-2', 'data=2,data=4', 'data=-1,fsdp=-1', 'data=2;fsdp=4', 'data=2,'])
def test_other_strings_get_a_sentence(text):
  with pytest.raises(ValueError, match=rf"config.mesh is '{text}'; legal are sizes for data, fsdp, tensor, each once"):
    make_mesh(text)


@pytest.mark.parametrize('text, odd', [('data=9', ''), ('data=3,fsdp=3', ''),
                                       ('data=-1,fsdp=3', ', which 3 does not divide'),
                                       ('data=-1,tensor=16', ', which 16 does not divide')])
def test_more_devices_than_there_are(text, odd):
  with pytest.raises(ValueError, match=f"config.mesh is '{text}', but this job has 8 devices{odd}[.]"):
    make_mesh(text)


def test_several_processes_take_all_devices(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert make_mesh('data=-1').size == 8
  with pytest.raises(ValueError, match="'data=4', 4 devices; several processes use all of theirs, here 8"):
    make_mesh('data=4')


@pytest.fixture
def processes(monkeypatch):
  """(mesh, this process, of how many) -> part(mesh), as if the devices were spread over the processes in order."""
  def of(text, this, count):
    mesh, devices = make_mesh(text), 8 // count
    owner = lambda device: SimpleNamespace(process_index=device.id // devices)
    spread = SimpleNamespace(shape=mesh.shape, devices=np.vectorize(owner)(mesh.devices))
    monkeypatch.setattr(jax, 'process_count', lambda: count)
    monkeypatch.setattr(jax, 'process_index', lambda: this)
    return part(spread)
  return of


@pytest.mark.parametrize('text, count, parts', [
    ('data=8', 1, [0]), ('data=8', 2, [0, 1]), ('data=2,fsdp=4', 4, [0, 1, 2, 3]), ('data=2,fsdp=2,tensor=2', 2, [0, 1]),
    ('tensor=8', 2, [0, 0]), ('data=2,tensor=4', 4, [0, 0, 1, 1]), ('fsdp=2,tensor=4', 8, [0, 0, 0, 0, 1, 1, 1, 1])])
def test_the_rows_that_a_process_feeds(processes, monkeypatch, text, count, parts):
  """Processes whose devices hold the same rows feed the same part."""
  for this in range(count):
    monkeypatch.undo()
    assert processes(text, this, count) == (parts[this], max(parts) + 1)


def test_put_and_place_cut_rows_over_devices_and_gather_brings_them_back():
  mesh = make_mesh('data=2,fsdp=2,tensor=2')
  batch = {'x': np.arange(48.0, dtype=np.float32).reshape(8, 3, 2), 'index': np.arange(8, dtype=np.int32)}
  for placed in (put(batch, mesh), place(batch, mesh)):
    assert placed['x'].sharding == by_example(mesh)
    for i, shard in enumerate(sorted(placed['x'].addressable_shards, key=lambda shard: shard.device.id)):
      np.testing.assert_array_equal(shard.data, batch['x'][i // 2 * 2:i // 2 * 2 + 2])  # two of tensor hold the same
    for name in batch:
      back = gather(placed[name])
      assert isinstance(back, np.ndarray)
      np.testing.assert_array_equal(back, batch[name])


def test_replicated_puts_all_everywhere():
  value = jax.device_put(np.arange(5), replicated(make_mesh('data=4')))
  assert [shard.data.tolist() for shard in value.addressable_shards] == [[0, 1, 2, 3, 4]] * 4
