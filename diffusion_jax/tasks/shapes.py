"""Coloured shapes: pictures with captions, drawn by rule, and a reader that tells by rule whether a caption is true.

A picture has one to three shapes of one kind and colour, all in one half of a black square. A caption says some of four
facts: "two red rings at the top", "a cross", "blue shapes on the left".
"""
import itertools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from diffusion_jax.metrics.share import share

COLOURS = {'red': (255, 0, 0), 'green': (0, 160, 0), 'blue': (40, 60, 255), 'yellow': (255, 225, 0),
           'purple': (190, 0, 230), 'white': (255, 255, 255)}
FORMS = {'square': ('####', '####', '####', '####'), 'ring': ('####', '#..#', '#..#', '####'),
         'triangle': ('#...', '##..', '###.', '####'), 'cross': ('#..#', '.##.', '.##.', '#..#')}
PLACES = {'left': 'on the left', 'right': 'on the right', 'top': 'at the top', 'bottom': 'at the bottom'}
COUNTS = ('a', 'two', 'three')
UNSEEN = (('red', 'cross'), ('blue', 'ring'), ('yellow', 'triangle'))
"""Pairs that no training picture has."""
MASKS = {name: np.array([[mark == '#' for mark in row] for row in rows]) for name, rows in FORMS.items()}
WHAT = ('colour', 'shape', 'position', 'count')


class Facts(NamedTuple):
  """What a picture shows, or what a caption says of it; None: not said."""
  colour: str | None = None
  shape: str | None = None
  position: str | None = None
  count: int | None = None


class Shape(NamedTuple):
  """A shape that was read from a picture: its kind and colour, and its box in pixels, the ends not in it."""
  shape: str
  colour: str
  top: int
  left: int
  bottom: int
  right: int


class Shapes:
  """`count` pictures of height and width `side`, a multiple of 8 of at least 16, each with captions, from a seed."""

  def __init__(self, count: int, side: int, seed: int, unseen: bool):
    if side < 16 or side % 8:
      raise ValueError(f'Shapes are drawn on squares of a multiple of 8 pixels, 16 or more; config.data.size is ({side}, '
                       f'{side}).')
    self.count, self.side, self.seed = count, side, seed
    self.pairs = [pair for pair in itertools.product(COLOURS, FORMS) if unseen or pair not in UNSEEN]

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    facts, rng = self._facts(index)
    picture = draw(facts, self.side, rng)
    return {'x': picture, 'captions': [caption(facts), *(caption(forget(facts, rng)) for _ in range(3))]}

  @property
  def prompts(self) -> list[str]:
    """All that there is to say of each picture."""
    return [caption(self._facts(index)[0]) for index in range(self.count)]

  @property
  def texts(self) -> list[str]:
    """All captions that a picture can have."""
    pairs = [*self.pairs, *((colour, None) for colour in COLOURS), *((None, shape) for shape in FORMS), (None, None)]
    return [caption(Facts(*pair, position, count))
            for pair, position, count in itertools.product(pairs, (*PLACES, None), (1, 2, 3, None))]

  def _facts(self, index):
    rng = np.random.default_rng((self.seed, int(index)))
    pair = self.pairs[rng.integers(len(self.pairs))]
    return Facts(*pair, str(rng.choice(list(PLACES))), int(rng.integers(1, 4))), rng


def draw(facts: Facts, side: int, rng: np.random.Generator) -> np.ndarray:
  """A picture [side, side, 3], uint8, of the facts: the shapes lie anywhere in their half, a pixel or more apart."""
  large = side // 4
  mask = MASKS[facts.shape].repeat(large // 4, 0).repeat(large // 4, 1)
  first, size = half(facts.position, side)
  while True:
    corners = rng.integers(0, size - large + 1, (facts.count, 2))
    if (apart(corners, large) | np.eye(facts.count, dtype=bool)).all():
      break
  picture = np.zeros((side, side, 3), np.uint8)
  for top, left in corners + first:
    picture[top:top + large, left:left + large][mask] = COLOURS[facts.colour]
  return picture


def half(position: str, side: int) -> tuple[np.ndarray, np.ndarray]:
  """The first corner of the half of a picture that a position names, and its height and width."""
  size = np.array([side, side // 2] if position in ('left', 'right') else [side // 2, side])
  return np.array({'right': (0, side // 2), 'bottom': (side // 2, 0)}.get(position, (0, 0))), size


def apart(corners: np.ndarray, large: int) -> np.ndarray:
  """Which of the corners [N, 2] of shapes of `large` pixels leave a pixel or more between them, bool [N, N]."""
  return np.abs(corners[:, None] - corners[None]).max(-1) > large


def forget(facts: Facts, rng: np.random.Generator) -> Facts:
  """The facts without some of them: each is left out one time in three."""
  return Facts(*(None if rng.random() < 1 / 3 else fact for fact in facts))


def caption(facts: Facts) -> str:
  """What the facts are in words. Who does not say how many speaks of shapes, in the plural."""
  words = [COUNTS[facts.count - 1]] if facts.count else []
  words += [facts.colour] if facts.colour else []
  kind = facts.shape or 'shape'
  words += [kind if facts.count == 1 else 'crosses' if kind == 'cross' else kind + 's']
  words += [PLACES[facts.position]] if facts.position else []
  return ' '.join(words)


def said(text: str) -> Facts:
  """The facts that a caption says."""
  words = text.lower().replace(',', ' ').split()
  first = lambda names, of=lambda word: word: next((name for word in words for name in names if of(word) == name), None)
  singular = lambda word: 'cross' if word == 'crosses' else word.removesuffix('s') if word != 'cross' else word
  count = first((*COUNTS, 'an', 'one'))
  return Facts(first(COLOURS), first(FORMS, singular), first(PLACES),
               None if count is None else 1 + COUNTS.index('a' if count in ('an', 'one') else count))


def read(picture: np.ndarray) -> list[Shape]:
  """The shapes of a picture [side, side, 3], uint8: connected pixels that are not nearest to black.

  The colour is the nearest to their mean, the kind the one whose mask, of the size of their box, differs least from them.
  Fewer pixels than half of the smallest shape's are a speck.
  """
  palette = np.array([(0, 0, 0), *COLOURS.values()], float)
  nearest = ((picture[:, :, None].astype(float) - palette)**2).sum(-1).argmin(-1)
  marks, _ = ndimage.label(nearest > 0, np.ones((3, 3)))
  scale, found = len(picture) // 16, []
  for number, box in enumerate(ndimage.find_objects(marks), 1):
    inside = marks[box] == number
    if inside.sum() < 4 * scale**2:
      continue
    mean = picture[box][inside].mean(0)
    colour = list(COLOURS)[((palette[1:] - mean)**2).sum(-1).argmin()]
    rows, columns = ((np.arange(size) * 4 // size) for size in inside.shape)
    wrong = {name: (mask[np.ix_(rows, columns)] != inside).mean() for name, mask in MASKS.items()}
    found.append(Shape(min(wrong, key=wrong.get), colour, box[0].start, box[1].start, box[0].stop, box[1].stop))
  return found


def right(picture: np.ndarray, facts: Facts) -> dict[str, bool]:
  """Whether a picture shows each of the facts that are given: every shape must, and none shown is wrong in all."""
  found, half = read(picture), len(picture) // 2
  within = {'left': lambda each: each.right <= half, 'right': lambda each: each.left >= half,
            'top': lambda each: each.bottom <= half, 'bottom': lambda each: each.top >= half}
  every = lambda test: bool(found) and all(map(test, found))
  tests = {'colour': lambda: every(lambda each: each.colour == facts.colour),
           'shape': lambda: every(lambda each: each.shape == facts.shape),
           'position': lambda: every(within[facts.position]), 'count': lambda: len(found) == facts.count}
  return {name: tests[name]() for name in WHAT if getattr(facts, name) is not None}


def score(samples: np.ndarray, prompts: list[str]) -> dict[str, dict]:
  """Of the samples whose prompt says a fact, the share that shows it, apart for pairs of colour and shape that were never
  seen; 'all' asks for all that is said. With Wilson's interval of 95 %."""
  said_of = [said(prompt) for prompt in prompts]
  rows = [(facts[:2] in UNSEEN, right(sample, facts)) for sample, facts in zip(samples, said_of, strict=True)]
  scores = {}
  for group, unseen in (('', False), ('unseen_', True)):
    answers = [answer for other, answer in rows if other == unseen and answer]
    named = {what: [answer[what] for answer in answers if what in answer] for what in WHAT}
    named['all'] = [all(answer.values()) for answer in answers]
    scores |= {f'{group}{name}': share(values) for name, values in named.items() if values}
  return scores
