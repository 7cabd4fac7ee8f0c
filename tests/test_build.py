"""Call-strings: what they build, and a sentence for everything else. Nothing is evaluated."""
import dataclasses
import math
from collections.abc import Callable

import pytest

from diffusion_jax import build as module
from diffusion_jax.build import build, rows


@dataclasses.dataclass(frozen=True)
class Made:
  name: str
  values: tuple = ()


def cosine() -> Made:
  return Made('cosine')


def shift(inner: Made, factor: float = 2.0) -> Made:
  return Made('shift', (inner, factor))


def guide(weight, during=(0.0, 1.0)):
  return Made('guide', (weight, during))


def choosy(low):
  if low < 0:
    raise ValueError(f'choosy needs low >= 0; got {low}.')
  return Made('choosy', (low,))


def _hidden() -> Made:
  return Made('hidden')


NAMES = {'cosine': cosine, 'shift': shift, 'guide': guide, 'choosy': choosy}


@pytest.mark.parametrize('text, made', [
  ('cosine()', cosine()),
  ('cosine', cosine()),
  ('  cosine ( ) ', cosine()),
  ('shift(cosine(), 3.0)', Made('shift', (cosine(), 3.0))),
  ('shift(cosine, factor=0.5)', Made('shift', (cosine(), 0.5))),
  ('shift(shift(cosine()), factor=3)', Made('shift', (Made('shift', (cosine(), 2.0)), 3))),
  ('guide(-1.5)', Made('guide', (-1.5, (0.0, 1.0)))),
  ('guide(2, during=(0.2, -0.8))', Made('guide', (2, (0.2, -0.8)))),
  ("guide([1, 'two'], during={'a': (None, True)})", Made('guide', ([1, 'two'], {'a': (None, True)}))),
  ('math.sqrt(16)', 4.0),
  ('guide(math.floor(2.5))', Made('guide', (2, (0.0, 1.0)))),
  ('tests.test_build.choosy(low=1)', Made('choosy', (1,))),
])
def test_what_is_built(text, made):
  assert build(text, NAMES) == made


def test_parts_are_joined_in_order():
  join = lambda *parts: list(parts)
  assert build('cosine | guide(2) | choosy(1)', NAMES, join) == [cosine(), guide(2), choosy(1)]
  assert build('cosine()', NAMES, join) == [cosine()]
  assert build('', NAMES, join) == build('  ', NAMES, join) == []
  assert build('math.sqrt(4) | (cosine | guide(2))', NAMES, join) == [2.0, cosine(), guide(2)]


LEGAL = "Legal here: choosy, cosine, guide, shift, or a dotted name that can be imported."


@pytest.mark.parametrize('text, sentence', [
  ('cosin()', f"'cosin()': 'cosin' is unknown. Did you mean 'cosine'? {LEGAL}"),
  ('xyz', f"'xyz': 'xyz' is unknown. {LEGAL}"),
  ('shift(cosin())', f"'shift(cosin())': 'cosin' is unknown. Did you mean 'cosine'? {LEGAL}"),
  ('shift()', "'shift()': missing a required argument: 'inner'. Its form is shift(inner, factor=2.0)."),
  ('cosine(3)', "'cosine(3)': too many positional arguments. Its form is cosine()."),
  ('guide(2, durin=(0, 1))',
   "'guide(2, durin=(0, 1))': got an unexpected keyword argument 'durin'. "
   'Its form is guide(weight, during=(0.0, 1.0)).'),
  ('choosy(-1)', "'choosy(-1)': choosy needs low >= 0; got -1."),
  ('cosine() | cosine()', "'cosine() | cosine()' has 2 parts; one call such as 'choosy(...)' is legal here."),
  ('', "'' has 0 parts; one call such as 'choosy(...)' is legal here."),
  ('nowhere.at.all(1)', "'nowhere.at.all(1)': cannot import 'nowhere.at.all': No module named 'nowhere'."),
  ('math.squareroot(1)',
   "'math.squareroot(1)': cannot import 'math.squareroot': module 'math' has no attribute 'squareroot'."),
  ('guide(1 + 1)', "'guide(1 + 1)' contains '1 + 1': calls, names and literals are legal."),
  ('guide((cosine, 1))', "'guide((cosine, 1))' contains '(cosine, 1)': calls, names and literals are legal."),
])
def test_errors_are_sentences(text, sentence):
  with pytest.raises(ValueError) as error:
    build(text, NAMES)
  assert str(error.value) == sentence


@pytest.mark.parametrize('text', ['shift(cosine()', 'cosine() +', 'a = 1', 'import os', 'a;b', 'guide(weight=1, 2)'])
def test_what_is_not_an_expression(text):
  with pytest.raises(ValueError, match="is not a call such as 'choosy\\(...\\)': ."):
    build(text, NAMES)


@pytest.mark.parametrize('text', [
  '__import__("os").mkdir("{}")',
  'guide(__import__("os").mkdir("{}"))',
  '(lambda: open("{}", "w"))()',
  '[open("{}", "w") for _ in (1,)]',
  'guide([open("{}", "w")])',
  'guide(weight=open("{}", "w") or 1)',
  'cosine.__globals__["__builtins__"]["open"]("{}", "w")',
  'exec("open(\'{}\', \'w\')")',
  'open("{}", "w")',
  'guide(*[open("{}", "w")])',
  'guide(**dict(weight=open("{}", "w")))',
  'guide(f"{{open(\'{}\', \'w\')}}")',
])
def test_nothing_is_evaluated(text, tmp_path):
  mark = tmp_path / 'mark'
  with pytest.raises(ValueError):
    build(text.format(mark), NAMES)
  assert not mark.exists()


@pytest.mark.parametrize('text', ['guide({[]: 1})', 'guide({1, []})'])
def test_a_literal_that_python_refuses_gets_a_sentence(text):
  with pytest.raises(ValueError, match='contains'):
    build(text, NAMES)


def test_rows_are_the_public_functions_of_the_kind():
  from tests import test_build as here
  assert set(rows(here, Made)) == {'cosine', 'shift'}
  assert rows(math, float) == {} and 'build' not in rows(module, Made)
  assert rows(here, Callable) == {}
