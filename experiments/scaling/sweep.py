"""What training asks of slices of 8 to 256 chips, and how fast it can be: python -m experiments.scaling.sweep [NAME ...]

Plans the named configs, by default all three, and writes results.csv beside this file, of all that have been planned. What
is compiled is kept in runs/scaling, so that a sweep that was stopped goes on where it was. Prints the README's table.
"""
import csv
import importlib
import sys
from pathlib import Path

from diffusion_jax.jobs import plan
from diffusion_jax.runtime.workdir import write_csv

SLICES = ('v5e:2x4', 'v5e:16x16')
BATCHES = {'cifar10': 128, 'imagenet_64': 64, 'imagenet_256': 8}
"""Of 8 chips: DDPM's own batch; a chip's share of ADM's makes the paper's batch on 256."""
PARTS = {'cifar10': 1, 'imagenet_64': 8, 'imagenet_256': 1}
"""In which a batch is taken: a chip's part is an image of ADM's, for more the compiler unrolls ever further."""
HERE, KEPT = Path(__file__).parent, Path('runs/scaling')
COLUMNS = ('config', 'topology', 'scaling', 'batch', 'peak_gib', 'hbm_gib', 'gflop', 'gb_moved', 'mb_sent', 'seconds_ms',
           'bound_by', 'mfu', 'images_per_second')


def table(rows: list[dict[str, str]]) -> str:
  """The rows of training, in markdown; what does not fit has no figures."""
  lines = [[row.get(name) or ('does not fit' if name == 'peak_gib' else '') for name in COLUMNS]
           for row in rows if row['program'] == 'train']
  return '\n'.join(f'| {" | ".join(line)} |' for line in [COLUMNS, ['---'] * len(COLUMNS), *lines])


def main(names: list[str]) -> None:
  """Plan the configs and write what is known of all."""
  for name in names:
    config = importlib.import_module(f'configs.{name}').get_config()
    config.train.batch = config.sample.batch = BATCHES[name]
    config.train.accumulate = PARTS[name]
    plan.run(config, KEPT / name, ','.join(SLICES))
  rows = []
  for name in BATCHES:
    if (path := KEPT / name / 'plan' / 'table.csv').exists():
      rows += [{'config': name, **row} for row in csv.DictReader(path.read_text().splitlines())]
  write_csv(HERE / 'results.csv', rows)
  print(table(rows))


if __name__ == '__main__':
  main(sys.argv[1:] or list(BATCHES))
