"""--mode=train: train, with exact resume, then sample and evaluate."""
import json
import signal
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from diffusion_jax.jobs import evaluate, sample
from diffusion_jax.pictures import save_png
from diffusion_jax.run import (
  Run,
  draw,
  make_sampler,
  new_state,
  open_checkpoints,
  open_run,
  restore,
  state_shapes,
  trace_step,
)
from diffusion_jax.runtime import input as inputs
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime import workdir as workdirs
from diffusion_jax.runtime.checkpoints import Checkpoints
from diffusion_jax.runtime.logs import Log, say, table
from diffusion_jax.runtime.packing import pack, unpack
from diffusion_jax.runtime.signals import Stop
from diffusion_jax.runtime.step import State, worst_layer


def run(config: ConfigDict, workdir: Path) -> int:
  """Train to config.train.steps from the newest checkpoint, or from nothing. Returns the exit status."""
  this = open_run(config, workdir, read=True)
  workdirs.open_workdir(this.config, workdir)
  if jax.process_index() == 0:
    this.task.save(workdir)
  checkpoints = open_checkpoints(this)
  state = restore(this, checkpoints) or new_state(this)
  start, steps = int(state.step), this.config.train.steps
  if start >= steps and finished_step(workdir) == start:
    say(f'This run is finished, at step {start}. Its results are in {workdir}. To go on, type a larger '
        '--config.train.steps; to sample or score again, --mode=sample or --mode=evaluate.')
    return 0
  say(f'Going on from step {start}.' if start else f'Starting a new run in {workdir}.')
  if start < steps:
    with Stop() as stop:
      state = fit(this, state, checkpoints, stop)
    if stop.name:
      say(f'{stop.name} at step {int(state.step)}: saved. Type the same command to go on.')
      return 128 + signal.Signals[stop.name]
  checkpoints.close()
  files = finish(this, state)
  say('\n'.join([f'Finished at step {int(state.step)}. Look at', *(f'  {path}' for path in files)]))
  return 0


def fit(this: Run, state: State, checkpoints: Checkpoints, stop: Stop) -> State:
  """The training loop. It leaves, saved, at config.train.steps or when `stop` has a name."""
  c, start = this.config, int(state.step)
  host = this.task.batches(start, c.train.batch, *meshes.part(this.mesh))
  stream = inputs.to_device(host, this.mesh)
  batch = next(stream)
  step_fn = compile_step(this, state, batch)
  packed = pack(state)
  jax.block_until_ready(unpack(packed))  # compiled: the devices hold the state twice while it is saved
  sampler = make_sampler(this, c.transform)
  before = None  # the metrics of the last step, read once the next one is on its way
  with Log(this.workdir, start, c.train.steps, c.log.every, c.train.batch) as log, jax.transfer_guard('disallow'):
    for step in range(start + 1, c.train.steps + 1):
      packed, metrics = step_fn(packed, batch)
      stop.look(step)
      if before:
        report(this, log, step - 1, before)
      before = metrics
      if step < c.train.steps:
        batch = next(stream)
      if step % c.checkpoint.every == 0 or step == c.train.steps or stop.name:
        report(this, log, step, before)
        before = None
        checkpoints.wait()  # so that the devices never hold it three times
        checkpoints.save(step, unpack(packed))
      if c.log.samples and step % c.log.samples == 0:
        snapshot(this, log, sampler, unpack(packed), step)
      if stop.name:
        break
    checkpoints.wait()
  return unpack(packed)


def compile_step(this: Run, state: State, batch: dict):
  """The one compiled step, with the table that a person sees before it runs."""
  lowered = trace_step(this, state, batch).lower()
  leaves = jax.tree.leaves
  parameters = sum(leaf.size for leaf in leaves(state.params))
  flops = (lowered.cost_analysis() or {}).get('flops', float('nan'))
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  temporary = f', {memory.temp_size_in_bytes / 2**20:,.0f} MiB of intermediates' if memory else ''
  table({
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)',
      'mesh': str(dict(this.mesh.shape)),
      'data': this.task.summary,
      'network': this.config.network,
      'parameters': f'{parameters:,}',
      'FLOPs': f'{flops / this.config.train.batch / 1e6:,.1f} million an example and training step',
      'memory': f'{meshes.shard_bytes(state) / 2**20:,.0f} MiB of state{temporary}, a device',
      'steps': f'{int(state.step):,} of {this.config.train.steps:,}, {this.config.train.batch} examples each'})
  return compiled


def report(this: Run, log: Log, step: int, metrics: dict) -> None:
  """Log a step; raise FloatingPointError if it was not finite and the config says to stop."""
  metrics = jax.device_get(metrics)
  c, finite, in_row = this.config.train, bool(metrics['finite']), int(metrics['in_row'])
  hidden = ('finite', 'broken', 'in_row')
  log.scalars(step, {name: value for name, value in metrics.items() if name not in hidden}, always=not finite)
  if in_row > (c.nonfinite_most if c.nonfinite == 'skip' else 0):
    worst = worst_layer(state_shapes(this).params, metrics['broken'])
    skip = '' if c.nonfinite == 'skip' else ', or type --config.train.nonfinite=skip,'
    raise FloatingPointError(
        f'Step {step} has loss {float(metrics["loss"])} and gradient norm {float(metrics["grad_norm"])}, the {in_row}. in '
        f'a row that is not finite; {worst}. Its update was not applied. Lower --config.optimizer.rate{skip} in a new '
        '--workdir.')


def snapshot(this: Run, log: Log, sampler, state: State, step: int) -> None:
  """A sheet of samples, a row a class, into samples/ and TensorBoard."""
  c, began = this.config, time.perf_counter()
  samples = draw(this, sampler, state, c.sample.batch, c.sample.batch)
  picture = sample.sheet(this, samples)
  if jax.process_index() == 0:
    save_png(this.workdir / 'samples' / f'step_{step:07d}.png', picture)
  log.image(step, 'samples', picture, time.perf_counter() - began)


def finished_step(workdir: Path) -> int | None:
  """The step whose samples and scores are complete, None if there is none."""
  path = workdir / 'finished.json'
  return json.loads(path.read_text())['step'] if path.exists() else None


def finish(this: Run, state: State) -> list[Path]:
  """Sample and evaluate; returns the files that a person wants to see."""
  files = sample.write(this, state) if this.config.sample.count else []
  if this.config.evaluate.count or this.config.evaluate.bits:
    files.append(evaluate.write(this, state))
  skipped = this.task.skipped()
  if skipped:
    say(f'{skipped} image files could not be read and were left out.')
  if jax.process_index() == 0:
    workdirs.write_json(this.workdir / 'finished.json', {'step': int(state.step)})
  return [*files, this.workdir / 'metrics.jsonl', this.workdir / 'checkpoints']
