"""--mode=plan: does a config fit the chips of a TPU slice, and how fast can it be? Compiled on a machine without one."""
import math
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from ml_collections import ConfigDict

from diffusion_jax.core.types import Draw
from diffusion_jax.method import make_method
from diffusion_jax.run import (
  Run,
  batch_shapes,
  check_classes,
  chosen_params,
  open_run,
  shared,
  state_shapes,
  trace_sampler,
  trace_step,
)
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime import products, roofline
from diffusion_jax.runtime.chips import chip
from diffusion_jax.runtime.logs import say, table
from diffusion_jax.runtime.step import State
from diffusion_jax.runtime.topology import open_topology
from diffusion_jax.runtime.workdir import write_csv

SHOWN = 4  # largest tensors on the screen; the files have more


def run(config: ConfigDict, workdir: Path, topologies: str | None) -> int:
  """Plan a config for every slice of a list such as 'v5e:2x4,v5e:16x16'. Returns 1 where a program of it does not fit."""
  jax.config.update('jax_platforms', 'cpu')  # what is not compiled for a slice runs on the host
  jax.config.update('jax_enable_compilation_cache', False)  # plans are kept in the workdir, with the time of compiling
  if not topologies:
    raise ValueError('A plan is for slices of TPUs: type --topology=v5e:2x4, or several, --topology=v5e:2x4,v5e:16x16')
  check_classes(config, workdir, 'a plan does not read them')
  slices = {name: open_topology(name) for name in topologies.split(',')}
  open_run(config, workdir, False, next(iter(slices.values())))  # an illegal field shows before anything is written
  (workdir / 'plan').mkdir(parents=True, exist_ok=True)
  rows = []
  for name, scaling, batch, programs in cases(config, slices):
    config.train.batch = batch
    this = open_run(config, workdir, False, slices[name])
    rows += [{'topology': name, 'scaling': scaling, **row} for row in plan(this, name, programs)]
    write_csv(workdir / 'plan' / 'table.csv', rows)
  summarise([row for row in rows if row['program'] == 'train' and row['fits']])
  say(f'\nThe plan is in\n  {workdir / "plan"}')
  return int(not all(row['fits'] for row in rows))


def cases(config: ConfigDict, slices: dict[str, list]) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
  """(slice, scaling, batch, programs): the config's batch on every slice, strong scaling, and on those of another size a
  chip's share on the first slice times the chips, weak scaling. Sampling is planned once a slice."""
  batch, first = config.train.batch, None
  for name, devices in slices.items():
    mesh, programs = meshes.make_mesh(config.mesh, devices), ('train', 'sample')
    chips = mesh.size
    first = first or chips
    if batch % meshes.ways(mesh) == 0:
      yield name, 'as configured' if chips == first else 'strong', batch, programs
      programs = ('train',)
    else:
      say(f'\n{name}: {chips} chips cannot share {batch} examples evenly, so that there is no strong scaling to them.')
    if chips != first:
      yield name, 'weak', batch // first * chips, programs


def plan(this: Run, topology: str, programs: tuple[str, ...]) -> list[dict]:
  """Compile the programs, side by side, print what they ask, and return a row of the table for each."""
  c, chips, state = this.config, this.mesh.size, state_shapes(this)
  trace = {'train': lambda: trace_step(this, state, batch_shapes(this)),
           'sample': lambda: trace_sampler(this, c.transform, c.sample.batch)}
  count = {'train': c.train.batch, 'sample': shared(this, c.sample.batch)}
  held = {'train': state, 'sample': (chosen_params(this, state), state.extra)}
  traced = {name: trace[name]() for name in programs}
  def measure(name):
    path = this.workdir / 'plan' / f'{topology.replace(":", "_")}_{name}_{count[name]}.json'
    return roofline.measure(traced[name], topology, chips, path)
  with ThreadPoolExecutor(len(programs)) as pool:
    facts = dict(zip(programs, pool.map(measure, programs), strict=True))
  kind = this.mesh.devices.flat[0].device_kind
  say(f'\n{topology}: {chips} chips, {kind}; {precision()}')
  if 'sample' in programs:
    filled = products.filled(list(products.products(traced['sample'].jaxpr)))
    say(f'The channels fill {filled:.0%} of a 128 x 128 matrix unit: FLOPs of the network forward, over what they are with '
        'the channels in and out of each product rounded up to 128.')
  bytes_held = {name: meshes.shard_bytes(tree) for name, tree in held.items()}
  return [report(name, facts[name], kind, chips, count[name],
                 options(this, name, facts[name], state, bytes_held[name], count[name]) if 'refused' in facts[name] else [])
          for name in programs]


def options(this: Run, name: str, facts: dict, state: State, held: int, count: int) -> list[str]:
  """The three cheapest changes by which a refused program would fit, by estimate, as what to type."""
  shards, tensor = this.mesh.shape['fsdp'], this.mesh.shape['tensor']
  ways, parts = meshes.ways(this.mesh), this.config.train.accumulate
  sizes = roofline.sizes(facts, held, count, ways, f'config.{name}.batch')
  if name == 'sample':  # a sample is the same in any batch
    return [*sizes, *(typed(this.config, each, shards, tensor, parts)
                      for each in roofline.changes(facts, held, 0, 1, ways // shards, []))][:3]
  again = rematerialised(this.config)
  kept = kept_bytes(this._replace(method=make_method(again, this.task)), state) if again else []
  found = roofline.changes(facts, held, meshes.shard_bytes(state.params), count // ways // parts, ways // shards,
                           [size // ways // parts for size in kept])
  return [*(typed(this.config, each, shards, tensor, parts) for each in found), *sizes][:3]


def typed(config: ConfigDict, change: roofline.Change, shards: int, tensor: int, parts: int) -> str:
  """The flags that make a change, and what it would need."""
  mesh = f'data=-1,fsdp={shards * change.shards}' + (f',tensor={tensor}' if tensor > 1 else '')
  flags = [f'--config.train.accumulate={parts * change.parts}' if change.parts > 1 else '',
           f"--config.mesh='{mesh}'" if change.shards > 1 else '',
           '--config.network=' + shlex.quote(rematerialised(config).network) if change.remat else '']
  return f'{" ".join(filter(None, flags))}: {change.needs / 2**30:.1f} GiB'


def rematerialised(config: ConfigDict) -> ConfigDict | None:
  """The config with a network that computes its blocks again in the backward pass, None where it does so already."""
  if 'remat="block"' in config.network:
    return None
  network = re.sub(r',?\s*remat="\w+"', '', config.network).rstrip().removesuffix(')').rstrip(', ')
  return ConfigDict({**config, 'network': f'{network}, remat="block")'.replace('(, ', '(')})


def kept_bytes(this: Run, state: State) -> list[int]:
  """The bytes of every array of all rows that the forward pass of training keeps for the backward pass."""
  batch = batch_shapes(this)
  def backward(params, extra, batch):
    draw = Draw(jax.random.key(0), batch['index'], this.config.train.batch)
    return jax.vjp(lambda params: this.method.loss(params, extra, draw, batch)[0].mean(), params)[1]
  kept = jax.tree.leaves(jax.eval_shape(backward, state.params, state.extra, batch))
  return [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept if leaf.shape[:1] == batch['index'].shape]


def precision() -> str:
  """How float32 numbers are multiplied."""
  asked = jax.config.jax_default_matmul_precision
  return (f'float32 is multiplied with jax_default_matmul_precision={asked}' if asked else
          "float32 is multiplied in one pass of bfloat16 with float32 sums, JAX's default on a TPU")


def report(name: str, facts: dict, kind: str, chips: int, count: int, options: list[str]) -> dict:
  """Print what a program asks of a chip and what that allows, or what would make it fit; returns its row."""
  what = {'train': f'A training step of {count:,} examples', 'sample': f'Sampling {count:,} at once'}[name]
  row = {'chips': chips, 'program': name, 'batch': count, 'batch_a_chip': count / chips, 'fits': 'refused' not in facts,
         'compile_seconds': round(facts['compile_seconds'], 1)}
  if 'refused' in facts:
    say(f'\n{what} does not fit: {facts["refused"]}')
    say('\n'.join(['The cheapest changes by which it would, by estimate:', *(f'  {option}' for option in options)]))
    return row
  peaks = chip(kind)
  bound, memory = roofline.bound(facts, peaks), facts['memory']
  say(f'\n{what} fits: {memory["peak"] / 2**30:.2f} of {peaks.memory / 2**30:.0f} GiB a chip')
  table(shown(facts, bound, count))
  return row | {
      'peak_gib': round(memory['peak'] / 2**30, 3), 'hbm_gib': round(peaks.memory / 2**30, 1),
      'gflop': round(facts['flops'] / 1e9, 1), 'gb_moved': round(facts['bytes'] / 1e9, 3),
      'mb_sent': round(sum(each['sent'] for each in facts['collectives'].values()) / 1e6, 1),
      **{f'{part}_ms': round(getattr(bound, part) * 1e3, 3) for part in ('compute', 'memory', 'links', 'seconds')},
      'bound_by': bound.by, 'mfu': round(bound.mfu, 4), 'images_per_second': round(count / bound.seconds, 1)}


def shown(facts: dict, bound: roofline.Bound, count: int) -> dict[str, str]:
  """What the screen says of a program that fits."""
  memory, padding = facts['memory'], facts['padding']
  mib = lambda size: f'{size / 2**20:,.1f}'
  sent = [f'{each["count"]} {kind} of {mib(each["bytes"])} MiB, over ICI (one slice)'
          for kind, each in facts['collectives'].items()]
  tensors = [f'{mib(each["padded"])} MiB, {each["shape"]}, {each["source"]}'.replace("\\'", "'")
             for each in facts['tensors'][:SHOWN]]
  return {
      'memory, MiB': f'{mib(memory["arguments"])} arguments ({mib(memory["entries_of_arguments"])} without padding), '
                     f'{mib(memory["temporaries"])} temporary, {mib(memory["outputs"] - memory["shared"])} new outputs, '
                     f'{mib(memory["code"])} code',
      'padding': f'{padding["arguments"]:.0%} of the bytes of arguments, {padding["results"]:.0%} of results: what their '
                 'tiles hold beside entries, as the compiler laid them out',
      'FLOPs': f'{facts["flops"] / 1e9:,.1f} G a chip, {facts["products"] / 1e9:,.1f} G by the shapes of the products',
      'HBM': f'{facts["bytes"] / 1e9:,.2f} GB read and written a chip',
      'collectives': ', '.join(sent) or 'none',
      'at least': f'{bound.seconds * 1e3:,.2f} ms, bound by {bound.by}: compute {bound.compute * 1e3:,.2f}, HBM '
                  f'{bound.memory * 1e3:,.2f}, links {bound.links * 1e3:,.2f} ms',
      'at most': f'MFU {bound.mfu:.1%}, {count / bound.seconds:,.0f} images/s',
      'compiled in': f'{facts["compile_seconds"]:.0f} s',
      **{'largest' if i == 0 else ' ' * i: line for i, line in enumerate(tensors)}}


def summarise(rows: list[dict]) -> None:
  """Print how training scales over several slices: images a second and chip, against the first row's."""
  if len(rows) < 2:
    return
  rate = lambda row: row['images_per_second'] / row['chips']
  say('\nTraining, at best')
  table({'': f'{"chips":>6} {"batch":>7} {"a chip":>7} {"ms":>9} {"bound by":>9} {"MFU":>6} {"images/s":>9} {"a chip":>7}',
         **{f'{row["topology"]}, {row["scaling"]}': f'{row["chips"]:6} {row["batch"]:7} {row["batch_a_chip"]:7g} '
            f'{row["seconds_ms"]:9.2f} {row["bound_by"]:>9} {row["mfu"]:6.1%} {row["images_per_second"]:9,.0f} '
            f'{rate(row) / rate(rows[0]):7.0%}' for row in rows}})
