"""Reads a call-string of a config, such as 'guide(2.0) | clip(1.0)', into the object it names.

Names, calls, literals and | are all there is; nothing is evaluated. A dotted name is imported:
'experiments.sharp.method.mine()'.
"""
import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any


def rows(module: Any, kind: Any) -> dict[str, Callable]:
  """The rows of a table: the public functions defined in the module that say they return `kind`."""
  functions = inspect.getmembers(module, inspect.isfunction)
  return {name: function for name, function in functions if not name.startswith('_')
          and function.__module__ == module.__name__ and function.__annotations__.get('return') == kind}


def build(text: str, names: dict[str, Callable], join: Callable | None = None) -> Any:
  """The object that the call-string names.

  `names` are the functions it may call without importing; a name without brackets is called without arguments. `join`
  makes one of the parts of 'a | b', and of no parts if the string is empty. Raises ValueError with a sentence that
  says what was got, what is legal, and the nearest legal name.
  """
  try:
    tree = ast.parse(text.strip(), mode='eval').body if text.strip() else None
  except SyntaxError as error:
    raise ValueError(f'{text!r} is not a call such as {_example(names)}: {error.msg}.') from error
  parts = _parts(tree)
  if join is None and len(parts) != 1:
    raise ValueError(f'{text!r} has {len(parts)} parts; one call such as {_example(names)} is legal here.')
  built = [_build(part, text, names) for part in parts]
  return join(*built) if join else built[0]


def _parts(node: ast.AST | None) -> list[ast.AST]:
  if node is None:
    return []
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return _parts(node.left) + _parts(node.right)
  return [node]


def _build(node: ast.AST, text: str, names: dict[str, Callable]) -> Any:
  """A call or a name; anything else must be a literal."""
  if isinstance(node, (ast.Name, ast.Attribute)):
    node = ast.Call(node, [], [])
  if not isinstance(node, ast.Call):
    try:
      return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
      raise ValueError(f'{text!r} contains {ast.unparse(node)!r}: calls, names and literals are legal.') from error
  name = ast.unparse(node.func)
  function = _find(name, text, names)
  arguments = [_build(argument, text, names) for argument in node.args]
  keywords = {word.arg: _build(word.value, text, names) for word in node.keywords}
  try:
    inspect.signature(function).bind(*arguments, **keywords)
  except TypeError as error:
    raise ValueError(f'{text!r}: {error}. Its form is {_form(name, function)}.') from None
  try:
    return function(*arguments, **keywords)
  except ValueError as error:
    raise ValueError(f'{text!r}: {error}') from error


def _find(name: str, text: str, names: dict[str, Callable]) -> Callable:
  if name in names:
    return names[name]
  module, _, attribute = name.rpartition('.')
  if module:
    try:
      return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
      raise ValueError(f'{text!r}: cannot import {name!r}: {error}.') from error
  near = difflib.get_close_matches(name, names, 3)
  hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ''
  raise ValueError(f"{text!r}: {name!r} is unknown.{hint} Legal here: {', '.join(sorted(names))}, or a dotted name "
                   'that can be imported.')


def _form(name: str, function: Callable) -> str:
  """name(argument, other=default), without annotations and without the fields that every Flax module has."""
  parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in ('parent', 'name')]
  plain = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
  return name.rpartition('.')[2] + str(inspect.Signature(plain))


def _example(names: dict[str, Callable]) -> str:
  return repr(f'{sorted(names)[0]}(...)') if names else "'module.function(...)'"


def with_argument(text: str, name: str, value: Any, names: dict[str, Callable]) -> str | None:
  """The text with argument `name` of a call set to a value: of the first call, arguments before what takes them, whose
  function has it. None where none has."""
  if not text.strip():
    return None
  tree = ast.parse(text.strip(), mode='eval')
  for call in _calls(tree.body):
    parameters = list(inspect.signature(_find(ast.unparse(call.func), text, names)).parameters)
    if name in parameters:
      place, new = parameters.index(name), ast.Constant(value)
      call.keywords = [word for word in call.keywords if word.arg != name]
      if place < len(call.args):
        call.args[place] = new
      else:
        call.keywords.append(ast.keyword(name, new))
      return ast.unparse(tree)
  return None


def _calls(node: ast.AST) -> Iterator[ast.Call]:
  """The calls of an expression, those among the arguments of a call before it."""
  for child in ast.iter_child_nodes(node):
    yield from _calls(child)
  if isinstance(node, ast.Call):
    yield node
