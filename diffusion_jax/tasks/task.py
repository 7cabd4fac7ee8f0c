"""What a task is, and the task of a config."""
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from diffusion_jax.core.types import Cond


class Task(NamedTuple):
  """A kind of data: how to read it, what the network sees, how to show it and how to score it."""
  shape: tuple[int, ...]  # of one example, as the network sees it
  classes: int  # 0: no labels
  null: Cond  # what a dropped condition becomes: one example, without the axis of the batch; None: unconditional
  summary: str  # a sentence on the data, for people
  row: dict[str, jax.ShapeDtypeStruct]  # what an example of `batches` is
  batches: Callable[[int, int, int, int], Iterator[dict]]  # (step, batch, process, processes) -> rows of this process
  encode: Callable[[dict], tuple[PyTree, Cond]]  # rows on the device -> (x0, cond)
  drawn: Callable[[Key[Array, 'batch'], PyTree, Cond], Cond]  # (keys, x0, cond) -> cond with what training draws from x0
  context: Callable[[np.ndarray], Cond]  # sample numbers -> what to sample
  ask: Callable[[list[str]], Cond]  # titles -> what to sample
  titles: Callable[[np.ndarray], list[str]]  # sample numbers -> what each is of, for people
  decode: Callable[[Array], np.ndarray]  # samples -> uint8
  render: Callable[[np.ndarray, int], np.ndarray]  # (uint8 samples, columns) -> a picture [H, W, 3], uint8
  examples: Callable[[str, int], dict]  # ('train' or 'held_out', most) -> rows of a fixed choice of examples
  metrics: Callable[[np.ndarray, list[str]], dict[str, Any]]  # (uint8 samples, their titles) -> scores beside their floors
  skipped: Callable[[], int]  # bad files left out so far
  save: Callable[[Path], None]  # write into the workdir what sampling needs of the data


def make_task(config: ConfigDict, read: bool, workdir: Path = Path()) -> Task:
  """The task that config.task names; `read`=False leaves the data alone, which sampling does not need: what it needs of
  them was saved in the workdir."""
  from diffusion_jax.tasks import captions, conditions, images
  if config.task not in ('images', 'captions'):
    raise ValueError(f"config.task is {config.task!r}; legal are 'images' and 'captions'.")
  if config.task == 'images' and (config.sample.prompts or config.sample.negative):
    raise ValueError(f'config.sample.prompts is {config.sample.prompts} and config.sample.negative '
                     f"{config.sample.negative!r}; they are for captions. Leave them empty, or type --config.task=captions")
  task = (captions.make_task(config, read, workdir) if config.task == 'captions' else
          images.make_task(config.data, config.evaluate.reference, config.seed, config.sample.labels, read))
  return conditions.add(task, bool(config.condition.reference), config.condition.known)


def stored(workdir: Path, name: str, otherwise: Any) -> Any:
  """What a task saved as JSON in the workdir, `otherwise` where there is no run."""
  path = workdir / name
  if path.exists():
    return json.loads(path.read_text())
  if (workdir / 'config.json').exists():
    raise ValueError(f'{path} does not exist: it was written when the run began. Type the command of its training again.')
  return otherwise
