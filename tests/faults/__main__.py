"""python -m tests.faults --rounds=30 [--seed=0] [--only='kill -9'] [--out=FILE.csv]: disturb a small training run, type its
command again, and compare what it ends with, bit for bit, with the run that was not disturbed."""
import argparse
import csv
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests import conftest  # noqa: F401  (the devices and the compile cache of the suite)
from tests.faults.faults import FAULTS, Outcome, can_mount, own_disk, suffer, undisturbed


def disturb(name: str, seed: int, folder: Path, references: dict[int, Path]) -> Outcome:
  """One round. Raises AssertionError where the run does not end as it should."""
  fault = FAULTS[name]
  if fault.processes not in references:
    references[fault.processes] = undisturbed(folder / f'undisturbed {fault.processes}', fault.processes)
  reference = references[fault.processes]
  if not fault.own_disk:
    return suffer(fault, folder / f'run {seed}', random.Random(seed), reference)
  with own_disk(folder / f'disk {seed}') as disk:
    return suffer(fault, disk / 'run', random.Random(seed), reference)


def one_round(name: str, seed: int, folder: Path, references: dict[int, Path]) -> dict:
  """Its row of the table: what was found, or what is wrong."""
  row, began = {'fault': name, 'seed': seed, 'exact': 1}, time.monotonic()
  try:
    found = disturb(name, seed, folder, references)
    row |= {'in_mid_save': int(found.in_save), 'went_on_from_step': found.used, 'steps_done_again': found.lost,
            'said': found.said}
  except AssertionError as error:
    print(f'{name}, seed {seed}: {error}', file=sys.stderr)
    row |= {'exact': 0, 'in_mid_save': '', 'went_on_from_step': '', 'steps_done_again': '',
            'said': str(error).strip().splitlines()[0][:80]}
  return row | {'seconds': round(time.monotonic() - began)}


def show(cells) -> None:
  print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def summarise(rows: list[dict]) -> None:
  """A line a fault, and one of all."""
  print()
  show(['fault', 'rounds', 'exact', 'in mid-save', 'steps done again, most'])
  show(['---'] * 5)
  total = lambda rows, name: sum(row[name] or 0 for row in rows)
  for name in [*dict.fromkeys(row['fault'] for row in rows), 'all']:
    some = [row for row in rows if name in (row['fault'], 'all')]
    most = max(row['steps_done_again'] or 0 for row in some)
    show([name, len(some), total(some, 'exact'), total(some, 'in_mid_save'), most])
  print(f'{total(rows, "exact")} of {len(rows)} exact')


def write(path: Path, rows: list[dict]) -> None:
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.faults', description=__doc__)
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=FAULTS, help='this fault in all rounds')
  parser.add_argument('--out', type=Path, help='a csv of the rounds, written after each')
  options = parser.parse_args()
  possible = [name for name in FAULTS if can_mount() or not FAULTS[name].own_disk]
  for name in FAULTS.keys() - possible:
    print(f'Left out, as nothing can be mounted here: {name}')
  names = itertools.cycle([options.only] if options.only else possible)
  rows, references = [], {}
  with tempfile.TemporaryDirectory(prefix='faults_', dir=os.environ.get('TMPDIR')) as folder:
    for number, name in zip(range(options.rounds), names, strict=False):
      rows.append(one_round(name, options.seed + number, Path(folder), references))
      if number == 0:
        show(rows[0])
        show(['---'] * len(rows[0]))
      show(rows[-1].values())
      if options.out:
        write(options.out, rows)
  summarise(rows)
  return any(not row['exact'] for row in rows)


if __name__ == '__main__':
  sys.exit(main())
