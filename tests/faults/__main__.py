"""python -m tests.faults --rounds=30 [--seed=0] [--only='flipped bit']: disturb a small training run, type its command
again, and compare what it ends with, bit for bit, with the run that was not disturbed."""
import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests import conftest  # noqa: F401  (the devices and the compile cache of the suite)
from tests.faults.faults import FAULTS, can_mount, own_disk, suffer, undisturbed


def one_round(name: str, seed: int, folder: Path, references: dict[int, Path]) -> str:
  """'exact' and what was found, or what is wrong."""
  fault = FAULTS[name]
  try:
    if fault.processes not in references:
      references[fault.processes] = undisturbed(folder / f'undisturbed {fault.processes}', fault.processes)
    reference = references[fault.processes]
    if fault.own_disk:
      with own_disk(folder / f'disk {seed}') as disk:
        outcome = suffer(fault, disk / 'run', random.Random(seed), reference)
    else:
      outcome = suffer(fault, folder / f'run {seed}', random.Random(seed), reference)
    return f'exact | {outcome.used} | {outcome.lost} | {outcome.said}'
  except AssertionError as error:
    print(f'{name}, seed {seed}: {error}', file=sys.stderr)
    return 'NOT EXACT | | | ' + str(error).strip().splitlines()[0][:80]


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.faults', description=__doc__)
  parser.add_argument('--rounds', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=FAULTS, help='this fault in all rounds')
  options = parser.parse_args()
  possible = [name for name in FAULTS if can_mount() or not FAULTS[name].own_disk]
  for name in FAULTS.keys() - possible:
    print(f'Left out, as nothing can be mounted here: {name}')
  names = itertools.cycle([options.only] if options.only else possible)
  print('| round | fault | outcome | went on from step | steps done again | what was said | seconds |\n' + '|---' * 7 + '|')
  exact, references = 0, {}
  with tempfile.TemporaryDirectory(prefix='faults_', dir=os.environ.get('TMPDIR')) as folder:
    for number, name in zip(range(options.rounds), names, strict=False):
      began = time.monotonic()
      row = one_round(name, options.seed + number, Path(folder), references)
      exact += row.startswith('exact')
      print(f'| {number + 1} | {name} | {row} | {time.monotonic() - began:.0f} |', flush=True)
  print(f'{exact} of {options.rounds} exact')
  return exact != options.rounds


if __name__ == '__main__':
  sys.exit(main())
