"""The order of imports of design.md, section 1, and the size of files, read from the syntax of the package."""
import ast
import sys
from pathlib import Path

import pytest

import diffusion_jax

ROOT = Path(diffusion_jax.__file__).parent
FILES = {path.relative_to(ROOT).with_suffix('').parts: path for path in sorted(ROOT.rglob('*.py'))}
MODULES = {parts: path for parts, path in FILES.items() if parts[-1] != '__init__'}
# A part may import the parts before its own line; those of one line do not know each other.
ORDER = [{'build', 'core'}, {'networks', 'metrics', 'runtime'}, {'pretrained'}, {'tasks'}, {'method'},
         {'run', 'pictures', 'options'}, {'generate'}, {'jobs'}, {'main'}]
RANK = {part: rank for rank, line in enumerate(ORDER) for part in line}
CORE = ['types', 'schedules', 'betas', 'processes', 'tokens', 'targets', 'times', 'grids', 'weights', 'losses', 'bounds',
        'guidance', 'constraints', 'ode', 'solvers', 'singlestep', 'multistep', 'correctors', 'unmasking', 'sampling',
        'likelihood']


def imports(path, body=None):
  """The dotted names that a file imports, anywhere in it or in the statements `body`."""
  nodes = ast.walk(ast.parse(path.read_text())) if body is None else body
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path} has a relative import.'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def own(path):
  """The package's own modules that a file imports, as parts: ('core', 'types')."""
  for name in imports(path):
    head, *parts = name.split('.')
    if head == 'diffusion_jax' and parts:
      while tuple(parts) not in FILES and (*parts, '__init__') not in FILES:
        parts.pop()  # the name of a function
      yield tuple(parts)


def of(table):
  return pytest.mark.parametrize('parts', table, ids=['/'.join(parts) for parts in table])


@of(MODULES)
def test_a_part_imports_only_the_parts_before_it(parts):
  assert parts[0] in RANK, f'{parts[0]} has no place in the order of imports.'
  for other in own(MODULES[parts]):
    assert other[0] == parts[0] or RANK[other[0]] < RANK[parts[0]], f'{parts} imports {other}.'


def test_the_files_of_core_import_only_those_before_them():
  files = {parts[1]: path for parts, path in MODULES.items() if parts[0] == 'core'}
  assert sorted(files) == sorted(CORE)
  for name, path in files.items():
    for other in own(path):
      if other == ('core',):
        continue  # `from diffusion_jax.core import a, b` is read as core.a and core.b
      assert other[0] == 'core' and CORE.index(other[1]) < CORE.index(name), f'{name} imports {other}.'


def test_core_imports_nothing_but_jax_numpy_jaxtyping_and_python():
  legal = {'jax', 'numpy', 'jaxtyping', 'diffusion_jax', *sys.stdlib_module_names}
  for parts, path in MODULES.items():
    if parts[0] == 'core':
      assert {name.split('.')[0] for name in imports(path)} <= legal, path


@of(MODULES)
def test_flax_stays_in_networks_and_method(parts):
  heads = {name.split('.')[0] for name in imports(MODULES[parts])}
  assert 'flax' not in heads or parts[0] in ('networks', 'method')


@of(MODULES)
def test_no_other_framework_at_the_top_of_a_file(parts):
  heads = {name.split('.')[0] for name in imports(MODULES[parts], ast.parse(MODULES[parts].read_text()).body)}
  assert not heads & {'torch', 'transformers', 'tensorflow', 'diffusers'}


def test_jobs_do_not_know_each_other_but_for_what_train_calls():
  for parts, path in MODULES.items():
    if parts[0] == 'jobs' and parts[1] != 'train':
      assert not [other for other in own(path) if other[0] == 'jobs'], path


def test_only_the_package_itself_has_words_in_its_init():
  for parts, path in FILES.items():
    if parts[-1] == '__init__':
      body = ast.parse(path.read_text()).body
      if parts == ('__init__',):
        assert isinstance(body[0], ast.Expr) and [node.targets[0].id for node in body[1:]] == ['__version__']
      else:
        assert not body, path


@of(MODULES)
def test_a_file_stays_within_its_page(parts):
  text = MODULES[parts].read_text()
  assert len(text.splitlines()) < 400 and ast.get_docstring(ast.parse(text))
