"""What a chip can do: the one table, by JAX's device_kind, that rooflines and MFU are read from."""
from typing import NamedTuple


class Chip(NamedTuple):
  """Peaks of one chip."""
  flops: float  # FLOP/s of dense bfloat16 products with float32 sums
  memory: float  # bytes of HBM
  bandwidth: float  # bytes/s of HBM
  links: float  # bytes/s that leave by all its links at once, one way: ICI of a TPU, NVLink of a GPU


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key chip specifications"; ICI there is both ways for v5e and v6e
# (400 and 800 GB/s), one way for v4 and v5p (2400 and 4800 Gbit/s). GPUs, all SXM: NVIDIA's data sheets of A100 (2021),
# H100 (2022) and H200 (2024), FLOP/s without sparsity; NVLink there is both ways (600, 900 GB/s).
CHIPS = {
    'TPU v4': Chip(275e12, 32 * 2**30, 1.2e12, 300e9),
    'TPU v5 lite': Chip(197e12, 16 * 2**30, 819e9, 200e9),  # v5e
    'TPU v5': Chip(459e12, 95 * 2**30, 2765e9, 600e9),  # v5p
    'TPU v6 lite': Chip(918e12, 32 * 2**30, 1638e9, 400e9),  # v6e
    'NVIDIA A100-SXM4-40GB': Chip(312e12, 40e9, 1555e9, 300e9),
    'NVIDIA A100-SXM4-80GB': Chip(312e12, 80e9, 2039e9, 300e9),
    'NVIDIA H100 80GB HBM3': Chip(989e12, 80e9, 3350e9, 450e9),
    'NVIDIA H200': Chip(989e12, 141e9, 4800e9, 450e9),
}


def chip(kind: str) -> Chip:
  """The peaks of a device_kind. Raises ValueError where the table has none."""
  if kind not in CHIPS:
    raise ValueError(f'The peaks of {kind!r} are not known; runtime/chips.py has {", ".join(CHIPS)}.')
  return CHIPS[kind]
