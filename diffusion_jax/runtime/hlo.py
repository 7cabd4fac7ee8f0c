"""Reading compiled HLO: what the chips send each other, and the tensors as they lie in memory.

The text is that of `jax.stages.Compiled.as_text()`: computations of one instruction a line, each with the shape, layout
and tiles of its result, such as f32[16,32,32,3]{3,0,2,1:T(8,128)S(1)}: the last axis along 128 lanes, the first along 8
sublanes, in VMEM.
"""
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
UNREAL = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'while', 'conditional', 'call', 'after-all',
          'copy-start', 'copy-done', 'slice-start', 'slice-done', 'async-start', 'async-update', 'async-done')
"""Instructions whose results are buffers of others."""
FETCHES = ('copy-start', 'slice-start', 'async-start')  # of (to, from, flags) or ((from), to, flags); one end often VMEM

_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?')
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'(?<=[\s)}\]])([a-z][a-z0-9\-]*)\(')
_CALLED = re.compile(r'(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)')
_BITS = {'pred': 8, 'token': 0, 'c64': 64, 'c128': 128}


class Tensor(NamedTuple):
  """A result of an instruction, in HBM."""
  shape: str  # with its layout
  bytes: int  # of its entries
  padded: int  # of its tiles
  opcode: str
  source: str  # the place in our program that it comes from


class Instruction(NamedTuple):
  name: str
  shapes: str  # the text of the result's shapes
  opcode: str
  rest: str  # operands and attributes


def computations(text: str) -> dict[str, list[Instruction]]:
  """{computation: its instructions}, the entry under the key ''."""
  found, current = {}, None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      current = found.setdefault('' if line.startswith('ENTRY') else head[1], [])
    elif current is not None and _LINE.match(line):
      current.append(_instruction(line))
  return found


def _instruction(line: str) -> Instruction:
  name = _LINE.match(line)
  opcode = _OPCODE.search(line, name.end())
  return Instruction(name[1], line[name.end():opcode.start()], opcode[1], line[opcode.end():])


def runs(found: dict[str, list[Instruction]]) -> dict[str, int]:
  """How often a computation runs in one run of the program; the body of a loop of unknown length counts once."""
  times = dict.fromkeys(found, 0)
  def enter(name, count):
    times[name] += count
    for instruction in found[name]:
      trips = loop_length(instruction, found) if instruction.opcode == 'while' else 1
      for called in _called(instruction):
        if called in found:
          enter(called, count * trips)
  enter('', 1)
  return times


def _called(instruction: Instruction) -> list[str]:
  """The computations that it names."""
  return [name for _, names in _CALLED.findall(instruction.rest) for name in re.findall(r'[\w.\-]+', names)]


def loop_length(instruction: Instruction, found: dict[str, list[Instruction]]) -> int:
  """The trips of a while: as the compiler notes them, or the one integer that its condition compares with; else 1."""
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if noted:
    return int(noted[1])
  condition = found.get(dict(_CALLED.findall(instruction.rest)).get('condition', '').lstrip('%'), [])
  bounds = [each.rest for each in condition if each.opcode == 'constant' and each.shapes.startswith('s32[]')]
  return int(re.match(r'\d+', bounds[0])[0]) if len(bounds) == 1 else 1


def collectives(text: str, devices: int) -> dict[str, dict[str, float]]:
  """{kind: {'count', 'bytes', 'sent'}} of one run of the program.

  `bytes` are those of the whole array, before a reduce-scatter or after an all-gather; `sent` what a chip sends at least:
  in an all-reduce of n chips 2 (n - 1) / n of the bytes (doi:10.1016/j.jpdc.2008.09.002), in a gather, scatter or exchange
  (n - 1) / n, in a permute all of them.
  """
  found, totals = computations(text), {}
  times = runs(found)
  for name, instructions in found.items():
    for each in instructions:
      kind = each.opcode.removesuffix('-start')
      if kind in COLLECTIVES and times[name]:
        group = group_size(each.rest, devices)
        size = _whole(each, kind, group)
        factor = {'all-reduce': 2 * (group - 1) / group, 'collective-permute': 1}.get(kind, (group - 1) / group)
        entry = totals.setdefault(kind, {'count': 0, 'bytes': 0, 'sent': 0.0})
        for field, value in (('count', 1), ('bytes', size), ('sent', size * factor)):
          entry[field] += value * times[name]
  return totals


def group_size(rest: str, devices: int) -> int:
  """How many devices take part in a collective, of any of the forms that replica_groups is written in."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
  if mesh:
    sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r'\w+', mesh[2]))
  iota, listed = re.search(r'replica_groups=\[\d+,(\d+)\]<=', rest), re.search(r'replica_groups=\{\{([\d,]+)\}', rest)
  return int(iota[1]) if iota else len(listed[1].split(',')) if listed else devices


def _whole(each: Instruction, kind: str, group: int) -> int:
  """Bytes of the whole array; a start of a gather or a permute has its operand before its result, then flags."""
  sizes = [size for _, size, _, _ in _shapes(each.shapes)]
  if each.opcode.endswith('-start') and kind in ('all-gather', 'collective-permute'):
    return max(sizes) if kind == 'collective-permute' or len(sizes) == 2 else sum(sizes) * group // (group + 1)
  return sum(sizes) * (group if kind == 'reduce-scatter' else 1)


def tensors(text: str) -> list[Tensor]:
  """Every buffer that an instruction of the entry, of a loop or of a branch writes to HBM, the largest first."""
  found = computations(text)
  results = [tensor for name in _outer(found)
             for each in found[name] if each.opcode not in UNREAL for tensor in _results(each)]
  return sorted(results, key=lambda tensor: -tensor.padded)


def moved(text: str) -> int:
  """Bytes that one run of the program reads from HBM and writes to it, with their padding: the operands and results that
  lie there of every instruction of the entry, of loops and of branches. What passes within a fusion or by VMEM is not among
  them; an operand of which only a slice is read counts whole."""
  found, total = computations(text), 0
  times = runs(found)
  for name in _outer(found):
    sizes = {each.name: [tensor.padded for tensor in _results(each)] for each in found[name]}
    for each in found[name]:
      if each.opcode in FETCHES:
        ends = list(_shapes(each.shapes))[:2]
        total += times[name] * ends[1][2] * sum(map(_in_hbm, ends))
      elif each.opcode not in UNREAL:
        operands = re.findall(r'%([\w.\-]+)', each.rest.partition(')')[0])
        total += times[name] * (sum(sizes[each.name]) + sum(sum(sizes.get(operand, ())) for operand in operands))
  return total


def _outer(found: dict[str, list[Instruction]]) -> list[str]:
  """The computations whose instructions are buffers in memory: the entry, loops, branches; not those within a fusion."""
  names, waiting = set(), ['']
  while waiting:
    names.add(name := waiting.pop())
    waiting += [called for each in found[name] if each.opcode in ('while', 'conditional', 'call')
                for called in _called(each) if called in found]
  return sorted(names)


def parameters(text: str) -> list[Tensor]:
  """The arguments of the program, as they lie in HBM."""
  return [tensor for each in computations(text)[''] if each.opcode == 'parameter' for tensor in _results(each)]


def _results(each: Instruction) -> Iterator[Tensor]:
  source = re.search(r'op_name="([^"]*)"', each.rest)
  for array in _shapes(each.shapes):
    if _in_hbm(array):
      yield Tensor(*array[:3], each.opcode, source[1] if source else each.name)


def _in_hbm(array: tuple[str, int, int, str]) -> bool:
  """VMEM, SMEM and flags are other memory spaces: S(1), S(2), ..."""
  return not re.search(r'S\([1-9]', array[3])


def _shapes(text: str) -> Iterator[tuple[str, int, int, str]]:
  """(shape, bytes of its entries, bytes of its tiles, tiles and memory space) of every array in the text."""
  for match in _SHAPE.finditer(text):
    kind, dims, order, tiles = match[1], match[2], match[3], match[4] or ''
    bits = _BITS.get(kind) if kind in _BITS else int(re.search(r'\d+', kind)[0])
    sizes = [int(size) for size in dims.split(',') if size]
    tile = re.search(r'T\(([\d,]+)\)', tiles)
    padded = list(sizes) or [1]
    minor = [int(axis) for axis in order.split(',')] if order else list(reversed(range(len(sizes)))) or [0]
    for axis, unit in zip(minor, reversed(tile[1].split(',')) if tile else (), strict=False):
      padded[axis] = -(-padded[axis] // int(unit)) * int(unit)
    yield match[0], math.prod(sizes) * bits // 8, math.prod(padded) * bits // 8, tiles
