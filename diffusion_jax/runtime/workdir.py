"""The folder of a run: its resolved config, its environment, and what may change when it goes on."""
import csv
import importlib.metadata
import io
import json
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

RESUMABLE = ('train.steps', 'text.long', 'log.', 'checkpoint.', 'sample.', 'evaluate.', 'benchmark.', 'solver', 'grid',
             'transform', 'mesh', 'sharding', 'train.accumulate')
"""Fields, or beginnings of their names, in which a run may differ from the one that it continues."""

PACKAGES = ('diffusion_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets',
            'ml_collections', 'numpy', 'scikit-learn', 'pillow', 'tokenizers')


def flatten(config: ConfigDict, prefix: str = '') -> dict:
  """{'train.batch': 128, ...}."""
  flat = {}
  for name, value in config.items():
    flat |= flatten(value, f'{prefix}{name}.') if isinstance(value, ConfigDict) else {prefix + name: value}
  return flat


def write_text(path: Path, text: str) -> None:
  """Write at once or not at all: a reader never sees half a file."""
  partial = path.with_name(path.name + '.partial')
  partial.write_text(text)
  partial.replace(path)


def write_json(path: Path, content: dict) -> None:
  """`write_text` of the content as JSON."""
  write_text(path, json.dumps(content, indent=2, default=str) + '\n')


def write_csv(path: Path, rows: list[dict]) -> None:
  """All rows, with every column that one of them has."""
  file = io.StringIO()
  writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  write_text(path, file.getvalue())


def load_config(workdir: Path) -> ConfigDict:
  """The resolved config that a run left in its workdir. Raises ValueError where there is none."""
  path = Path(workdir) / 'config.json'
  if not path.exists():
    raise ValueError(f'{path} does not exist: there is no run in this workdir. Train one first with '
                     f'python -m diffusion_jax.main --config=configs/digits.py --workdir={workdir}')
  freeze = lambda value: tuple(map(freeze, value)) if isinstance(value, list) else value
  thaw = lambda tree: {k: thaw(v) if isinstance(v, dict) else freeze(v) for k, v in tree.items()}
  return ConfigDict(thaw(json.loads(path.read_text())))


def defaults() -> ConfigDict:
  """configs/base.py, which has every field; without any field where the package was installed without it."""
  path = Path(__file__).parents[2] / 'configs' / 'base.py'
  return runpy.run_path(str(path))['get_config']() if path.exists() else ConfigDict()


def load_complete(workdir: Path) -> ConfigDict:
  """`load_config` with the fields of today: one that is younger than the run has its default, one that is gone is left out,
  which `check_resumable` says of either."""
  there, today = load_config(workdir), defaults()
  if not len(today):
    return there
  fill = lambda new, old: {name: fill(value, old.get(name, {})) if isinstance(value, ConfigDict) else old.get(name, value)
                           for name, value in new.items()}
  return ConfigDict(fill(today, there))


def check_resumable(config: ConfigDict, workdir: Path) -> dict:
  """{name: value now} of the fields that are younger than the run in `workdir`.

  Raises ValueError if its config differs in more than the resumable fields; a field that it lacks counts as its default.
  """
  if not (workdir / 'config.json').exists():
    return {}
  there, now = flatten(load_config(workdir)), flatten(config)
  before = flatten(defaults()) | there
  changed = [name for name in sorted(there.keys() | now.keys())
             if before.get(name) != now.get(name) and not name.startswith(RESUMABLE)]
  if changed:
    show = lambda fields, name: repr(fields[name]) if name in fields else 'no such field'
    lines = '\n'.join(f'  config.{name}: {show(there, name)} there, {show(now, name)} now' for name in changed)
    gone = [name for name in changed if name not in now]
    advice = (f' Where {", ".join(gone)} did not matter, delete it from {workdir / "config.json"}; else take the commit in '
              'environment.json.') if gone else ''
    raise ValueError(f'The run in {workdir} has another config:\n{lines}\nTo continue it, leave these as they were (only '
                     f'{", ".join(RESUMABLE)} may change).{advice} To start anew, type another --workdir.')
  return {name: now[name] for name in now if name not in there}


def open_workdir(config: ConfigDict, workdir: Path) -> None:
  """Make the folder and write config.json and environment.json. Raises ValueError if it belongs to another config."""
  check_resumable(config, workdir)
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      write_json(workdir / 'config.json', config.to_dict())
      write_json(workdir / 'environment.json', environment())
    except OSError as error:
      raise ValueError(f'The workdir {workdir} cannot be written: {error.strerror}. Type another --workdir.') from error


def commit() -> str:
  """The commit of the package's checkout, with '+' if files differ from it; '' outside a checkout. A copy has it from
  whoever copied, in DIFFUSION_JAX_COMMIT."""
  if 'DIFFUSION_JAX_COMMIT' in os.environ:
    return os.environ['DIFFUSION_JAX_COMMIT']
  git = lambda *words: subprocess.run(['git', *words], cwd=Path(__file__).parent, capture_output=True, text=True)
  try:
    head = git('rev-parse', 'HEAD')
    dirty = git('status', '--porcelain', '--untracked-files=no').stdout.strip()
  except OSError:  # no git
    return ''
  return '' if head.returncode else head.stdout.strip() + ('+' if dirty else '')


def version(name: str) -> str | None:
  """The version of an installed package, None where it is not installed."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def environment() -> dict:
  """Versions, commit, devices and command of this process."""
  return {'commit': commit(), 'command': sys.argv, 'python': platform.python_version(), 'platform': platform.platform(),
          'packages': {name: version(name) for name in PACKAGES}, 'processes': jax.process_count(),
          'devices': [str(device.device_kind) for device in jax.devices()]}
