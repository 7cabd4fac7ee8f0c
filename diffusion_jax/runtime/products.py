"""The FLOPs of a program by the shapes of its matrix products and convolutions, counted in its jaxpr and not by XLA."""
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Product(NamedTuple):
  """A matrix product, or a convolution as one."""
  flops: int  # two for a multiplication and its addition
  inner: int  # entries that are summed over: channels in; without the taps of a kernel
  outer: int  # channels out


def products(jaxpr, loops: bool = True) -> Iterator[Product]:
  """Every product of a (closed) jaxpr, its FLOPs those of all its runs; with loops=False the body of a scan counts once.

  A convolution counts the taps that fall on entries, not on padding or on the holes of a dilation. A while loop, whose
  length is not known, counts once; of a cond the branch with the most FLOPs counts.
  """
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    if eqn.primitive.name == 'dot_general':
      yield _dot(eqn)
    elif eqn.primitive.name == 'conv_general_dilated':
      yield _convolution(eqn)
    elif eqn.primitive.name == 'cond':
      yield from max((list(products(branch, loops)) for branch in eqn.params['branches']), key=total)
    else:
      runs = eqn.params['length'] if eqn.primitive.name == 'scan' and loops else 1
      for inner in _inner(eqn.params):
        yield from (each._replace(flops=each.flops * runs) for each in products(inner, loops))


def total(all_of: list[Product]) -> int:
  """Their FLOPs together."""
  return sum(each.flops for each in all_of)


def filled(all_of: list[Product], lanes: int = 128) -> float:
  """The part of the matrix unit that channels fill: FLOPs over the FLOPs with channels in and out rounded up to `lanes`."""
  up = lambda size: -(-size // lanes) * lanes / size
  return total(all_of) / sum(each.flops * up(each.inner) * up(each.outer) for each in all_of)


def _inner(parameters: dict) -> Iterator:
  """The jaxprs that an equation calls."""
  for value in parameters.values():
    if hasattr(getattr(value, 'jaxpr', value), 'eqns'):
      yield value


def _dot(eqn) -> Product:
  (_, summed), (_, batch) = eqn.params['dimension_numbers']
  right = eqn.invars[1].aval.shape
  inner = math.prod(right[axis] for axis in summed)
  outer = math.prod(size for axis, size in enumerate(right) if axis not in (*summed, *batch))
  return Product(2 * math.prod(eqn.outvars[0].aval.shape) * inner, inner, outer)


def _convolution(eqn) -> Product:
  p, numbers = eqn.params, eqn.params['dimension_numbers']
  image, kernel = (var.aval.shape for var in eqn.invars)
  out = eqn.outvars[0].aval.shape
  outer, inner, *taps = (kernel[axis] for axis in numbers.rhs_spec)
  hits = [_hits(image[axis], taps[i], out[numbers.out_spec[i + 2]], p['window_strides'][i], p['padding'][i][0],
                p['lhs_dilation'][i], p['rhs_dilation'][i]) for i, axis in enumerate(numbers.lhs_spec[2:])]
  rows = out[numbers.out_spec[0]]
  return Product(2 * rows * outer * inner * math.prod(hits), inner, outer)


def _hits(size: int, taps: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
  """How many pairs of an output position and a tap meet an entry along one axis."""
  place = np.arange(out)[:, None] * stride + np.arange(taps)[None] * kernel_dilation - low
  return int(((place >= 0) & (place <= (size - 1) * dilation) & (place % dilation == 0)).sum())
