"""Our U-Net against diffusers' of the same shape: a training step, and sampling by DDIM in 50 steps, side by side.

python -m experiments.throughput.peers --torch=PYTHON, the interpreter that has torch and diffusers (the extra `peers`).
Every side is a process of its own on the same cores with as many threads, and all but the one that is timed are stopped
(SIGSTOP). Writes results.csv beside this file, or --out, and prints the table of README.md.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from diffusion_jax.runtime.workdir import commit, write_csv

HERE = Path(__file__).parent
OURS = [sys.executable, '-m', 'experiments.throughput.ours']
TORCH = flags.DEFINE_string('torch', sys.executable, 'The interpreter that has torch and diffusers.')
CORES = flags.DEFINE_integer('cores', 2, 'Cores, and threads, of every side.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Times that every side gets its turn.')
STEPS = flags.DEFINE_integer('steps', 5, 'Training steps a turn.')
SAMPLINGS = flags.DEFINE_integer('samplings', 1, 'Samplings a turn.')
BATCH = flags.DEFINE_integer('batch', 32, 'Images a step, and samples at once.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ('float32', 'bfloat16'), 'In which products are computed.')
OUT = flags.DEFINE_string('out', str(HERE / 'results.csv'), 'The file of results.')


class Side:
  """A process that is stopped unless it is asked."""

  def __init__(self, command: list[str], environment: dict[str, str]):
    threads = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'NPROC'), str(CORES.value))
    self.process = subprocess.Popen(
        command, env=os.environ | threads | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
      self.about = self._read()
    except BaseException:
      self.process.kill()
      raise
    self.process.send_signal(signal.SIGSTOP)

  def seconds(self, job: str) -> float:
    """Seconds of one of the runs that the job, such as 'train 3', asks for."""
    self.process.send_signal(signal.SIGCONT)
    print(job, file=self.process.stdin, flush=True)
    answer = self._read()['seconds']
    self.process.send_signal(signal.SIGSTOP)
    return answer

  def _read(self) -> dict:
    """The next line that is an answer; libraries may print others."""
    for line in self.process.stdout:
      if line.startswith('{'):
        return json.loads(line)
    sys.exit(f'ERROR: {" ".join(self.process.args)} ended; what it said is above.')


def start(started: dict[str, Side]) -> None:
  """Start every side, one after the other, into `started`."""
  ours = [*OURS, str(BATCH.value), DTYPE.value]
  theirs = lambda mode: [TORCH.value, str(HERE / 'theirs.py'), str(BATCH.value), DTYPE.value, mode, str(CORES.value)]
  flag = '--xla_cpu_experimental_ynn_fusion_type='
  found = {'ours': (ours, {}), f'ours, {flag}': (ours, {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'}),
           'torch eager': (theirs('eager'), {}), 'torch compiled': (theirs('compiled'), {})}
  for name, (command, environment) in found.items():
    started[name] = Side(command, environment)
    print(f'{name}: {started[name].about}', flush=True)


def table(results: list[dict]) -> str:
  """For each job and side the median of the seconds, and that of the ratios to ours round by round with their range."""
  lines = ['| | side | seconds | images/s | our time over its, median (range) |', '|---|---|---|---|---|']
  for job in ('train', 'sample'):
    of = lambda side, job=job: [row['seconds'] for row in results if (row['job'], row['side']) == (job, side)]
    for side in dict.fromkeys(row['side'] for row in results):
      ratios = [mine / its for mine, its in zip(of('ours'), of(side), strict=True)]
      seconds = statistics.median(of(side))
      lines.append(f'| {job} | {side} | {seconds:.3f} | {BATCH.value / seconds:.1f} | '
                   f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |')
  return '\n'.join(lines)


def main(arguments: list[str]) -> None:
  if len(arguments) > 1:
    sys.exit(f'ERROR: this takes flags alone; got {arguments[1:]}.')
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES.value])  # which the sides inherit
  signal.signal(signal.SIGTERM, lambda *_: sys.exit('ERROR: SIGTERM.'))  # no stopped process is left behind
  started, results = {}, []
  try:
    start(started)
    if len({side.about['parameters'] for side in started.values()}) > 1:
      sys.exit('ERROR: the networks differ in their numbers of parameters.')
    for number in range(ROUNDS.value):
      for name, side in started.items():
        for job, count in (('train', STEPS.value), ('sample', SAMPLINGS.value)):
          seconds = side.seconds(f'{job} {count}')
          results.append({'round': number, 'side': name, 'job': job, 'seconds': round(seconds, 5), 'batch': BATCH.value,
                          'dtype': DTYPE.value, 'cores': CORES.value, **side.about, 'commit': commit()})
          print(number, name, job, f'{seconds:.3f}', flush=True)
  finally:
    for side in started.values():
      side.process.kill()
  write_csv(Path(OUT.value), results)
  print(table(results))


if __name__ == '__main__':
  app.run(main)
