"""The stream of batches: its position follows from the step, and neither processes nor devices change it."""
import itertools

import jax
import numpy as np
import pytest

from diffusion_jax.runtime import input as inputs
from diffusion_jax.runtime.mesh import make_mesh


class Numbers:
  """Example i is i."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {'x': np.float32(index) + np.zeros(2, np.float32), 'number': np.int32(index)}


def add_noise(example, rng):
  return {**example, 'x': example['x'] + rng.normal(size=2).astype(np.float32)}


def take(count, source=12, batch=6, step=0, process=0, processes=1, augment=None, seed=0):
  stream = inputs.batches(Numbers(source), augment, seed, batch, step, process, processes)
  return list(itertools.islice(stream, count))


def numbers(batches):
  return np.concatenate([rows['number'] for rows in batches])


def assert_same(ours, theirs):
  assert len(ours) == len(theirs) > 0
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize('augment', [None, add_noise])
@pytest.mark.parametrize('step', [1, 3, 50])
def test_the_position_follows_from_the_step(step, augment):
  whole = take(step + 3, augment=augment)
  assert_same(take(3, step=step, augment=augment), whole[step:])


def test_every_epoch_is_another_permutation():
  epochs = numbers(take(9, source=12, batch=4)).reshape(3, 12)
  np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(12), (3, 1)))
  assert all((a != b).any() for a, b in itertools.combinations([*epochs, np.arange(12)], 2))


def test_batches_run_over_the_end_of_an_epoch():
  """Every batch is full, and the numbers are still one permutation after the other."""
  batches = take(5, source=10, batch=4)
  assert [len(rows['x']) for rows in batches] == [4] * 5
  np.testing.assert_array_equal(np.sort(numbers(batches).reshape(2, 10), 1), np.tile(np.arange(10), (2, 1)))


def test_a_batch_may_be_larger_than_the_data():
  counts = np.bincount(numbers(take(3, source=3, batch=8)), minlength=3)
  np.testing.assert_array_equal(counts, [8, 8, 8])


def test_another_seed_is_another_order():
  assert (numbers(take(2)) != numbers(take(2, seed=1))).any()


@pytest.mark.parametrize('processes', [2, 3])
@pytest.mark.parametrize('step', [0, 4])
def test_processes_share_the_global_batch(processes, step):
  """Each row, put back at its index, is the row of a single process: the same example with the same augmentation."""
  alone = take(5, source=13, step=step, augment=add_noise)
  parts = [take(5, source=13, step=step, process=p, processes=processes, augment=add_noise) for p in range(processes)]
  for rows, *shares in zip(alone, *parts, strict=True):
    assert {len(share['x']) for share in shares} == {6 // processes}
    for name in rows:
      merged = np.concatenate([share[name] for share in shares])
      order = np.concatenate([share['index'] for share in shares])
      np.testing.assert_array_equal(np.sort(order), np.arange(6))
      np.testing.assert_array_equal(merged, rows[name][order])


def test_augmentation_is_drawn_anew():
  """Its noise differs between examples and, for the same example, between epochs."""
  noise = np.concatenate([rows['x'] - rows['number'][:, None] for rows in take(4, augment=add_noise)])
  assert len(np.unique(noise.round(4))) > 40
  assert abs(noise.mean()) < 4 / np.sqrt(noise.size)


def test_an_empty_source_gets_a_sentence():
  with pytest.raises(ValueError, match='The data set has no examples'):
    take(1, source=0)


def test_to_device_loses_nothing_and_keeps_the_order():
  mesh = make_mesh('data=4')
  host = take(5, source=40, batch=8, augment=add_noise)
  device = list(inputs.to_device(iter(host), mesh))
  assert_same([jax.tree.map(np.asarray, rows) for rows in device], host)
  for leaf in jax.tree.leaves(device[0]):
    assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [2] * 4
    assert len({shard.device for shard in leaf.addressable_shards}) == 4


def test_to_device_is_one_batch_ahead():
  """The next batch is on its way when a batch is handed over, and no more than that."""
  read = []
  def host():
    for i in range(10):
      read.append(i)
      yield {'x': np.full(8, i)}
  stream = inputs.to_device(host(), make_mesh('data=2'))
  for i in range(3):
    np.testing.assert_array_equal(next(stream)['x'], i)
    assert read == list(range(i + 2))


def test_to_device_of_an_endless_stream():
  stream = inputs.to_device(inputs.batches(Numbers(12), None, 0, 4, 2), make_mesh('data=2'))
  found = list(itertools.islice(stream, 3))
  np.testing.assert_array_equal(numbers(found), numbers(take(3, batch=4, step=2)))
