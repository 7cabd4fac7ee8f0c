"""Input: a deterministic stream of batches whose position follows from the step alone."""
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.runtime import mesh as meshes


def batches(source: Any, augment: Callable | None, seed: int, batch: int, step: int,
            process: int = 0, processes: int = 1) -> Iterator[dict]:
  """Batches from step `step` on, of the rows that belong to this process.

  `source` has a length and gives a dict of arrays for an index. The order is shuffled anew every epoch; rows
  process, process + processes, ... of each global batch of `batch` rows are read here, so that the union over the
  processes is the same for any number of them. `augment(example, rng)` gets a generator that belongs to the example.
  The entry 'index' is the row's place in the global batch.
  """
  if len(source) < 1:
    raise ValueError('The data set has no examples.')
  data = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  if augment:
    data = data.random_map(augment)
  data = data[process::processes].batch(batch // processes)
  stream = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)))
  stream.set_state({'next_index': step})
  index = np.arange(process, batch, processes, dtype=np.int32)
  for rows in stream:
    yield {**rows, 'index': index}


def to_device(stream: Iterator[dict], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
  """The same batches as global arrays, each on the devices before the step on the one before it ends."""
  ahead, (_, parts) = None, meshes.part(mesh)
  for rows in stream:
    ready, ahead = ahead, meshes.put(rows, mesh, parts)
    if ready:
      yield ready
  if ahead:
    yield ahead
