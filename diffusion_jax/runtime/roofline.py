"""What a program asks of a chip, from its compilation, and how fast the chip's peaks let it be."""
import hashlib
import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax

from diffusion_jax.runtime import hlo, products
from diffusion_jax.runtime.chips import CHIPS, Chip
from diffusion_jax.runtime.logs import first_line
from diffusion_jax.runtime.workdir import version, write_json

SHOWN = 10  # largest tensors
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Bound(NamedTuple):
  """The least time of one run, in seconds, by each of a chip's peaks, and the MFU that the longest allows."""
  compute: float
  memory: float
  links: float
  mfu: float

  @property
  def seconds(self) -> float:
    """Where all three overlap perfectly."""
    return max(self.compute, self.memory, self.links)

  @property
  def by(self) -> str:
    """What binds."""
    return max(('compute', 'memory', 'links'), key=lambda name: getattr(self, name))


def bound(facts: dict, chip: Chip) -> Bound:
  """The roofline (doi:10.1145/1498765.1498785) of the facts of `measure`: FLOPs, bytes of HBM and bytes sent, each over its
  peak. MFU counts the products alone.
  """
  sent = sum(each['sent'] for each in facts['collectives'].values())
  times = facts['flops'] / chip.flops, facts['bytes'] / chip.bandwidth, sent / chip.links
  return Bound(*times, facts['products'] / (max(times) * chip.flops))


def measure(traced: jax.stages.Traced, topology: str, chips: int, path: Path) -> dict:
  """What the program asks of one of the chips: compiled for them, or read from `path` where that holds the same.

  Bytes, FLOPs and products are those of one run and one chip; 'refused' is there where the compiler finds no place for it.
  """
  began = time.perf_counter()
  lowered = traced.lower()
  key = _key(lowered, topology)
  if path.exists() and (kept := json.loads(path.read_text()))['key'] == key:
    return kept
  middle = time.perf_counter()
  facts = {'key': key, 'lower_seconds': middle - began, **_products(traced.jaxpr, chips)}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    facts |= {'refused': first_line(error), **_needed(str(error))}
  else:
    facts |= _read(compiled, chips, facts['loops'])
  facts['compile_seconds'] = time.perf_counter() - middle
  write_json(path, facts)
  return facts


def _key(lowered: jax.stages.Lowered, topology: str) -> str:
  """A hash of all that a measurement depends on: the program, the topology, the versions, and the code that reads it."""
  versions = [str(version(name)) for name in ('jax', 'jaxlib', 'libtpu')]
  readers = [Path(file).read_text() for file in (__file__, hlo.__file__, products.__file__)]
  return hashlib.sha256('\n'.join([lowered.as_text(), topology, *versions, *readers]).encode()).hexdigest()


def _products(jaxpr, chips: int) -> dict:
  """FLOPs by shapes, and the factor that the loops of the program make of them."""
  every, once = list(products.products(jaxpr)), products.products(jaxpr, loops=False)
  return {'products': products.total(every) / chips, 'loops': products.total(every) / products.total(once)}


def _read(compiled: jax.stages.Compiled, chips: int, loops: float) -> dict:
  """The facts of a compiled program. XLA counts the FLOPs of a loop's body once; `loops` makes them those of all runs."""
  text, stats, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis()
  arguments, written = hlo.parameters(text), hlo.tensors(text)
  padding = lambda all_of: 1 - sum(each.bytes for each in all_of) / max(1, sum(each.padded for each in all_of))
  largest = sorted([*arguments, *written], key=lambda tensor: -tensor.padded)[:SHOWN]
  return {
      'memory': {'arguments': stats.argument_size_in_bytes, 'entries_of_arguments': sum(each.bytes for each in arguments),
                 'outputs': stats.output_size_in_bytes, 'shared': stats.alias_size_in_bytes,
                 'temporaries': stats.temp_size_in_bytes, 'code': stats.generated_code_size_in_bytes,
                 'peak': stats.peak_memory_in_bytes},
      'flops': cost['flops'] * loops, 'bytes': hlo.moved(text), 'collectives': hlo.collectives(text, chips),
      'padding': {'arguments': padding(arguments), 'results': padding(written)},
      'tensors': [tensor._asdict() for tensor in largest]}


def _needed(message: str) -> dict:
  """The bytes that the compiler names when it refuses: {'needed', 'available'}, or nothing where it names none."""
  match = re.search(r'\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)', message)
  return {'needed': float(match[1]) * UNITS[match[2]], 'available': float(match[3]) * UNITS[match[4]]} if match else {}


class Change(NamedTuple):
  """A way to need less memory: factors by which the state is cut over more chips and a chip's rows are taken in more parts,
  and whether blocks are computed again in the backward pass."""
  remat: bool
  shards: int
  parts: int
  needs: float  # bytes of a chip, by estimate


def changes(facts: dict, held: int, gradient: int, rows: int, ways: int, kept: list[int]) -> list[Change]:
  """The changes by which a refused program would fit, the cheapest first, none that has more in it than it must.

  Parts cost no FLOPs but make products smaller, shards send the parameters once more, remat computes them once more. Of
  the bytes that it needs `held` are the state, cut by shards; the rest is a `gradient`, of which parts need a second to sum
  in, and activations, cut by parts. Remat leaves the inputs of blocks, of `kept` bytes each (none: no remat), and while one
  is computed again its share of the activations. A chip has `rows`; the state can be cut `ways` times more.
  """
  if 'needed' not in facts:
    return []
  activations = max(0, facts['needed'] - held - gradient)
  again = sum(kept) + activations * max(kept) / sum(kept) if kept else activations
  def needs(remat, shards, parts):
    return held / shards + gradient * (2 if parts > 1 else 1) + (again if remat else activations) / parts
  more = lambda wanted, most: [k for k in range(2, most + 1) if most % k == 0] if wanted else [1]
  found = {}
  for kind in itertools.product((False, True) if kept else (False,), (False, True), (False, True)):
    if not any(all(map(int.__ge__, kind, less)) for less in found):
      cuts = itertools.product(more(kind[1], ways), more(kind[2], rows))
      fits = [Change(kind[0], *cut, size) for cut in cuts if (size := needs(kind[0], *cut)) < facts['available']]
      found |= {kind: fits[0]} if fits else {}
  return list(found.values())


def sizes(facts: dict, held: int, rows: int, chips: int, field: str) -> list[str]:
  """Fewer rows, more chips or larger ones by which a refused program of `rows` rows would fit, by estimate: of what it
  needs, `held` bytes stay and the rest grows with the rows of a chip."""
  if 'needed' not in facts:
    return []
  a_row = (facts['needed'] - held) / (rows / chips)
  most = int((facts['available'] - held) / a_row)
  fewer = [f'--{field}={most * chips}, which is {most} a chip',
           f'{math.ceil(rows / chips / most)} times the chips for the same {field}'] if most > 0 else []
  kinds = [f'{kind} ({chip.memory / 2**30:.0f} GiB)' for kind, chip in CHIPS.items()
           if kind.startswith('TPU') and chip.memory > facts['needed']]
  return [*fewer, *([f'chips with more memory: {", ".join(kinds)}'] if kinds else [])]
