"""--mode=benchmark: how fast a config trains and samples on the devices of this job, and what that is of their peak."""
import csv
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax.build import build
from diffusion_jax.method import NETWORKS
from diffusion_jax.run import (
  Run,
  batch_shapes,
  check_classes,
  chosen_params,
  new_state,
  open_run,
  shared,
  trace_sampler,
  trace_step,
)
from diffusion_jax.runtime import input as inputs
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime import products
from diffusion_jax.runtime.checkpoints import Checkpoints
from diffusion_jax.runtime.chips import CHIPS
from diffusion_jax.runtime.logs import say, table
from diffusion_jax.runtime.packing import pack, unpack
from diffusion_jax.runtime.step import State
from diffusion_jax.runtime.workdir import environment, write_csv, write_json


def run(config: ConfigDict, workdir: Path) -> int:
  """Time the training step and the sampler of a config, and add a row to benchmark.csv. Returns the exit status."""
  jax.config.update('jax_enable_compilation_cache', False)  # so that the seconds of compiling are those of compiling
  b = config.benchmark
  if b.seconds <= 0 or b.repeats < 1:
    raise ValueError(f'config.benchmark.seconds is {b.seconds} and config.benchmark.repeats {b.repeats}; legal are more '
                     'than 0, and 1 or more.')
  if not b.real:
    check_classes(config, workdir, 'without real input they are not read')
  this = open_run(config, workdir, read=b.real)
  dtype = jnp.dtype(build(config.network, NETWORKS).dtype)  # of its products
  peak = measured_peak(this, dtype)
  state, training = benchmark_training(this, new_state(this), peak)
  measured = {'train': training, 'sample': benchmark_sampling(this, state, peak),
              'save_ms': spread(benchmark_saving(this, state), 1e3), 'device_peak_mib': device_peak(this)}
  known = {'network': config.network, 'train_batch': config.train.batch, 'sample_batch': shared(this, config.sample.batch),
           'solver': config.solver, 'grid': config.grid, 'transform': config.transform, 'dtype': dtype.name,
           'measured_peak_tflops': peak / 1e12, 'mesh': str(dict(this.mesh.shape))}
  show(this, known, measured)
  if jax.process_index() == 0:
    store(workdir, this, known, measured)
  say(f'\nThe row is in\n  {workdir / "benchmark.csv"}')
  return 0


def timed(this: Run, *works: Callable[[int], None]) -> list[list[float]]:
  """Seconds of one run of each work, in turn: config.benchmark.repeats blocks of about config.benchmark.seconds each.

  work(n) does n runs and returns when the devices are done; two runs before, not counted, warm up and tell how many
  fill a block.
  """
  def seconds(work, count):
    began = time.perf_counter()
    work(count)
    return (time.perf_counter() - began) / count
  once = [(seconds(work, 1), seconds(work, 1))[1] for work in works]
  counts = [max(1, round(this.config.benchmark.seconds / each)) for each in once]
  rounds = [[seconds(work, count) for work, count in zip(works, counts, strict=True)]
            for _ in range(this.config.benchmark.repeats)]
  return [list(column) for column in zip(*rounds, strict=True)]


def spread(values: list[float], scale: float = 1.0) -> dict:
  """The median of the blocks, the least and the most."""
  return {name: scale * of(values) for name, of in (('median', statistics.median), ('least', min), ('most', max))}


def measured_peak(this: Run, dtype: jnp.dtype) -> float:
  """FLOP/s of a large square matrix product on one device, the fastest block of the repeats."""
  device = this.mesh.local_devices[0]
  size = 1024 if device.platform == 'cpu' else 8192
  a = jax.device_put(jnp.ones((size, size), dtype), device)
  product = jax.jit(jnp.matmul)
  def work(count):
    for _ in range(count):
      b = product(a, a)
    jax.block_until_ready(b)
  return 2 * size**3 / min(timed(this, work)[0])


def compile_program(this: Run, trace: Callable[[], jax.stages.Traced]) -> tuple[jax.stages.Compiled, dict]:
  """The program, with the FLOPs by shapes and the memory of a device, and how long tracing and compiling took."""
  began = time.perf_counter()
  traced = trace()
  lowered = traced.lower()
  middle = time.perf_counter()
  compiled = lowered.compile()
  done, memory = time.perf_counter(), compiled.memory_analysis()
  held = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)
  flops = products.total(list(products.products(traced.jaxpr))) / this.mesh.size
  return compiled, {'gflop_a_device': flops / 1e9, 'memory_mib': held / 2**20, 'trace_seconds': middle - began,
                    'compile_seconds': done - middle}


def speed(this: Run, facts: dict, images: int, seconds: list[float], peak: float) -> dict:
  """The columns of a program that takes `seconds` for so many images; MFU counts the products alone."""
  rate, kind = 1e9 * facts['gflop_a_device'] / statistics.median(seconds), this.mesh.devices.flat[0].device_kind
  sheet = {'mfu_of_data_sheet': rate / CHIPS[kind].flops} if kind in CHIPS else {}
  return {'images_per_second': images / statistics.median(seconds), 'ms': spread(seconds, 1e3), 'tflops': rate / 1e12,
          'mfu_of_measured_peak': rate / peak, **sheet, **facts}


def synthetic(this: Run) -> dict[str, jax.Array]:
  """A batch as training has it, of noise, on the devices."""
  rng = np.random.default_rng(0)
  def rows(leaf):
    return rng.integers(0, 256, leaf.shape, np.uint8) if leaf.dtype == np.uint8 else np.zeros(leaf.shape, leaf.dtype)
  batch = jax.tree.map(rows, batch_shapes(this))
  return meshes.place({**batch, 'index': np.arange(this.config.train.batch, dtype=np.int32)}, this.mesh)


def benchmark_training(this: Run, state: State, peak: float) -> tuple[State, dict]:
  """The step on one batch that stays on the devices, in turn with the step on the task's own stream; and its dispatch."""
  c, batch, packed = this.config, synthetic(this), pack(state)
  step, facts = compile_program(this, lambda: trace_step(this, state, batch))
  def steps(count, batches):
    nonlocal packed
    before = None
    for _ in range(count):
      packed, metrics = step(packed, next(batches))
      if before is not None:  # as jobs/train.py reads it: of the step before, while this one runs
        bool(before)
      before = metrics['finite']
    jax.block_until_ready(packed)
  same = iter(lambda: batch, None)
  works = [lambda count: steps(count, same)]
  if c.benchmark.real:
    host = this.task.batches(0, c.train.batch, *meshes.part(this.mesh))
    stream = inputs.to_device(host, this.mesh)
    works.append(lambda count: steps(count, stream))
  seconds = timed(this, *works)
  dispatch, host = [], []
  for _ in range(max(25, c.benchmark.repeats)):  # a short thing, on cores that the step takes as soon as it has begun
    began, worked = time.perf_counter(), time.thread_time()
    packed, _ = step(packed, batch)
    host.append(time.thread_time() - worked)  # without the time in which the step itself has the core
    dispatch.append(time.perf_counter() - began)
    jax.block_until_ready(packed)
  row = speed(this, facts, c.train.batch, seconds[0], peak) | {
      'dispatch_ms': spread(dispatch, 1e3), 'dispatch_host_ms': spread(host, 1e3)}
  if c.benchmark.real:
    ratios = [real / same for same, real in zip(*seconds, strict=True)]
    row |= {'real_ms': spread(seconds[1], 1e3), 'real_over_synthetic': spread(ratios)}
  return unpack(packed), row


def benchmark_sampling(this: Run, state: State, peak: float) -> dict:
  """The sampler of config.transform, config.sample.batch samples at once."""
  c, count = this.config, shared(this, this.config.sample.batch)
  program, facts = compile_program(this, lambda: trace_sampler(this, c.transform, count))
  index = np.arange(count, dtype=np.int32)
  rows = meshes.place((index, this.task.context(index)), this.mesh)
  def work(runs):
    for _ in range(runs):
      samples = program(chosen_params(this, state), state.extra, *rows)
    jax.block_until_ready(samples)
  return speed(this, facts, count, timed(this, work)[0], peak)


def benchmark_saving(this: Run, state: State) -> list[float]:
  """Seconds for which a save holds up the training, which goes on while the files are written."""
  folder, seconds = this.workdir / 'benchmark_checkpoints', []
  checkpoints = Checkpoints(folder, keep=1)
  packed = pack(state)
  jax.block_until_ready(unpack(packed))
  for step in range(1 + max(5, this.config.benchmark.repeats)):
    began = time.perf_counter()
    checkpoints.save(step, unpack(packed))
    seconds.append(time.perf_counter() - began)
    checkpoints.wait()
  checkpoints.close()
  if jax.process_index() == 0:
    shutil.rmtree(folder)
  return seconds[1:]


def device_peak(this: Run) -> float | None:
  """The most memory, MiB, that the device has held so far, where the backend counts it."""
  stats = this.mesh.local_devices[0].memory_stats() or {}
  return stats['peak_bytes_in_use'] / 2**20 if 'peak_bytes_in_use' in stats else None


def show(this: Run, known: dict, measured: dict) -> None:
  """The figures, for people: medians, with the least and the most of the repeats."""
  between = lambda of, digits=2: f'{of["median"]:,.{digits}f} ({of["least"]:,.{digits}f} to {of["most"]:,.{digits}f})'
  def program(row):
    sheet = f'{row["mfu_of_data_sheet"]:.1%}' if 'mfu_of_data_sheet' in row else 'unknown'
    return (f'{row["images_per_second"]:10,.1f} {between(row["ms"]):>36} {row["tflops"]:8.3f} '
            f'{row["mfu_of_measured_peak"]:9.1%} {sheet:>10} {row["memory_mib"]:8,.0f} {row["compile_seconds"]:9.1f}')
  train, held = measured['train'], measured['device_peak_mib']
  real = (f'{between(train["real_ms"])} ms a step, {between(train["real_over_synthetic"], 3)} of that on synthetic input'
          if 'real_ms' in train else 'not measured: --config.benchmark.real=False')
  table({
      'devices': f'{this.mesh.size} x {this.mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es)',
      'network': known['network'],
      'measured peak': f'{known["measured_peak_tflops"]:.3f} TFLOP/s of a large product in {known["dtype"]}, a device',
      '': f'{"images/s":>10} {"ms a run (least to most)":>36} {"TFLOP/s":>8} {"MFU, peak":>9} {"data sheet":>10} '
          f'{"MiB":>8} {"compile s":>9}',
      f'train, {known["train_batch"]}': program(train), f'sample, {known["sample_batch"]}': program(measured['sample']),
      'real input': real,
      'dispatch': f'{between(train["dispatch_ms"])} ms, in which the host works {between(train["dispatch_host_ms"])} ms',
      'a save blocks': f'{between(measured["save_ms"])} ms',
      'memory held': 'not counted by this backend' if held is None else f'{held:,.0f} MiB of the device, at most'})


def store(workdir: Path, this: Run, known: dict, measured: dict) -> None:
  """benchmark.json, the whole of the last run, and benchmark.csv, a row for each."""
  about, path = environment(), workdir / 'benchmark.csv'
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / 'benchmark.json', {**known, **measured, 'config': this.config.to_dict(), 'environment': about})
  row = {'commit': about['commit'], 'device': about['devices'][0], 'devices': this.mesh.size,
         'processes': about['processes'],
         **{name: about['packages'][name] for name in ('jax', 'jaxlib', 'flax')}, **known, **flat(measured),
         'command': ' '.join(about['command'])}
  before = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
  write_csv(path, [*before, row])


def flat(tree: dict, prefix: str = '') -> dict:
  """{'train_ms_median': 12.3, ...}, to five digits."""
  found = {}
  for name, value in tree.items():
    found |= flat(value, f'{prefix}{name}_') if isinstance(value, dict) else {
        prefix + name: f'{value:.5g}' if isinstance(value, float) else value}
  return found
