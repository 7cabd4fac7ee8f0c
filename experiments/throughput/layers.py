"""The account by layer: every layer of our U-Net timed alone, at its own shapes, beside the whole training step.

`python -m experiments.throughput.layers` prints the table of README.md and writes layers.csv beside this file, or --out. A
layer is timed forward and backward, to its parameters and its input, as a program of its own; layers that are alike are
timed once and counted as often as the network has them. What the step needs beyond the sum is not any layer's.
"""
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import PyTree

from diffusion_jax.jobs.benchmark import synthetic
from diffusion_jax.method import make_network
from diffusion_jax.networks import layers, unet
from diffusion_jax.run import Run, new_state, open_run, state_shapes, trace_step
from diffusion_jax.runtime.packing import pack
from diffusion_jax.runtime.products import products, total
from diffusion_jax.runtime.step import train_step
from diffusion_jax.runtime.workdir import write_csv
from experiments.throughput.ours import config_of

SAMPLING = {'up': 'up sampling', 'down': 'down sampling'}  # by the name of a convolution between levels
REST = 'optimizer + EMA + checks'


def network_layers(run: Run) -> Counter:
  """{(kind, module, shapes of its inputs): how often}, as one pass through the network meets them."""
  found, net, inside = Counter(), make_network(run.config, run.task), []
  add = lambda kind, module, *shapes: found.update([(kind, module, shapes)])
  def look(next_call, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or any(module.path[:len(path)] == path for path in inside):
      return next_call(*args, **kwargs)
    out, name, alone = None, module.name or '', module.clone(parent=None, name=None)
    if isinstance(module, layers.Attention):
      add('attention', alone, args[0].shape)
      inside.append(module.path)
    elif isinstance(module, layers.GroupNorm):
      add('norm + silu', alone, args[0].shape)
      inside.append(module.path)
    elif isinstance(module, nn.Dense):
      add('dense', alone, args[0].shape)
    elif isinstance(module, nn.Conv):
      add(SAMPLING.get(name.partition('_')[0], 'convolution'), alone, args[0].shape)
    elif isinstance(module, unet.ResBlock):
      out = next_call(*args, **kwargs)
      add('sums', None, out.shape, out.shape)  # with the input
      add('sums', None, out.shape, (len(out), *[1] * module.axes, out.shape[-1]))  # with the time
      if name.startswith('up'):
        half = (*args[0].shape[:-1], args[0].shape[-1] // 2)
        add('concatenation', None, half, half)
    return next_call(*args, **kwargs) if out is None else out
  x = jnp.zeros((run.config.train.batch, *run.task.shape))
  with nn.intercept_methods(look):
    jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(len(x)))
  return found


def layer(kind: str, module: nn.Module | None, shapes: tuple, dtype: jnp.dtype) -> tuple[Callable, tuple]:
  """(params, *inputs) -> output, and all of these as shapes."""
  inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  if module is None:
    join = jnp.add if kind == 'sums' else lambda a, b: jnp.concatenate([a, b], -1)
    return lambda _, a, b: join(a, b), ({}, *inputs)
  after = nn.silu if kind == 'norm + silu' else lambda y: y
  params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return lambda params, x: after(module.apply(params, x)), (params, *inputs)


def both(function: Callable, shapes: tuple) -> tuple[Callable, tuple]:
  """The function forward and backward, of a cotangent and its arguments, and their shapes."""
  def forward_and_backward(cotangent, *arguments):
    out, back = jax.vjp(function, *arguments)
    return out, back(cotangent)
  return forward_and_backward, (jax.eval_shape(function, *shapes), *shapes)


def flops(function: Callable, shapes: tuple) -> int:
  """By the shapes of its products."""
  return total(list(products(jax.make_jaxpr(function)(*shapes))))


def running(function: Callable, shapes: tuple) -> Callable:
  """A function that runs it once, compiled, on noise, and waits for it."""
  rng, compiled = np.random.default_rng(0), jax.jit(function)
  arrays = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype), shapes)
  return lambda: jax.block_until_ready(compiled(*arrays))


def rest(run: Run) -> Callable:
  """A function that runs once what a step does beside the network: optimizer, averages, norms, the check for what is not
  finite. Its loss is linear in the parameters."""
  def loss(params, extra, draw, batch):
    return sum(leaf.sum() for leaf in jax.tree.leaves(params)) + jnp.zeros(len(batch['index'])), {}, {}
  step = partial(train_step, loss=loss, update=run.method.update, optimizer=run.optimizer, rate=run.rate,
                 total=run.config.train.batch)
  return stepping(new_state(run), synthetic(run), jax.jit(step, donate_argnums=0))


def stepping(state: PyTree, batch: dict, step: Callable) -> Callable:
  """A function that does one step from the state where it is, and waits for it."""
  def once():
    nonlocal state
    state, _ = step(state, batch)
    jax.block_until_ready(state)
  return once


def seconds(work: Callable, least: float = 0.05) -> float:
  """Of one run: the mean of as many as fill `least` seconds."""
  began, count = time.perf_counter(), 0
  while not count or time.perf_counter() - began < least:
    work()
    count += 1
  return (time.perf_counter() - began) / count


def table(kinds: dict[str, tuple[float, int, int]], step: float, ratio: list[float]) -> str:
  """A line a kind: {kind: (seconds, FLOPs, layers)}."""
  whole = sum(each for each, _, _ in kinds.values())
  lines = ['| | layers | ms | share of the sum | GFLOP/s |', '|---|---|---|---|---|']
  for kind, (each, work, count) in sorted(kinds.items(), key=lambda item: -item[1][0]):
    rate = f'{work / each / 1e9:,.1f}' if work else ''
    lines.append(f'| {kind} | {count} | {1e3 * each:,.1f} | {each / whole:.1%} | {rate} |')
  lines.append(f'| sum | | {1e3 * whole:,.1f} | | {sum(work for _, work, _ in kinds.values()) / whole / 1e9:,.1f} |')
  lines.append(f'| step | | {1e3 * step:,.1f} | {statistics.median(ratio):.3f} ({min(ratio):.3f} to {max(ratio):.3f}) | |')
  return '\n'.join(lines)


def main(arguments: list[str]) -> None:
  del arguments
  run = open_run(config_of(flags.FLAGS.batch, flags.FLAGS.dtype), Path('nowhere'), read=False)
  state, batch = state_shapes(run), synthetic(run)
  whole = stepping(pack(new_state(run)), batch, trace_step(run, state, batch).lower().compile())
  found = network_layers(run)
  programs = {key: both(*layer(*key, jnp.dtype(flags.FLAGS.dtype))) for key in found}
  works = {key: running(*program) for key, program in programs.items()} | {REST: rest(run)}
  counted = {key: flops(*program) for key, program in programs.items()} | {REST: 0}
  found[REST] = 1
  for work in (whole, *works.values()):
    work()
  rounds = []
  for number in range(flags.FLAGS.rounds):
    rounds.append({'step': seconds(whole), **{key: seconds(work) for key, work in works.items()}})
    print(f'round {number}: the step {1e3 * rounds[-1]["step"]:.1f} ms', flush=True)
  of = lambda key: statistics.median(each[key] for each in rounds)
  ratio = [each['step'] / sum(each[key] * count for key, count in found.items()) for each in rounds]
  kinds, rows = {}, []
  for key, count in found.items():
    kind, module, shapes = (REST, None, ()) if key == REST else key
    before = kinds.get(kind, (0.0, 0, 0))
    kinds[kind] = before[0] + of(key) * count, before[1] + counted[key] * count, before[2] + count
    rows.append({'kind': kind, 'inputs': ' '.join('x'.join(map(str, shape)) for shape in shapes),
                 'features': getattr(module, 'features', ''), 'count': count, 'ms': f'{1e3 * of(key):.3f}',
                 'gflops': f'{counted[key] / of(key) / 1e9:.1f}'})
  write_csv(Path(flags.FLAGS.out), rows)
  print(table(kinds, of('step'), ratio))


if __name__ == '__main__':
  flags.DEFINE_string('out', str(Path(__file__).parent / 'layers.csv'), 'The file of results.')
  flags.DEFINE_integer('rounds', 7, 'Times that the step and every layer get their turn.')
  flags.DEFINE_integer('batch', 32, 'Images a step.')
  flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'In which products are computed.')
  app.run(main)
