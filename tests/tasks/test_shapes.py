"""Coloured shapes: what is drawn is what is said, and the reader knows."""
import itertools

import numpy as np
import pytest

from diffusion_jax.tasks import shapes
from diffusion_jax.tasks.shapes import Facts


def test_the_reader_finds_every_caption_of_a_real_picture_true():
  """In all sizes; and the full caption of another picture false in just what differs."""
  for side, count in ((16, 200), (32, 40), (48, 20)):
    source = shapes.Shapes(count, side, 3, unseen=True)
    pictures = [source[i] for i in range(count)]
    for each in pictures:
      assert each['x'].shape == (side, side, 3) and each['x'].dtype == np.uint8
      for text in each['captions']:
        assert all(shapes.right(each['x'], shapes.said(text)).values()), text
    for one, other in itertools.pairwise(pictures):
      truth, asked = (shapes.said(each['captions'][0]) for each in (one, other))
      answers = shapes.right(one['x'], asked)
      same = {name: getattr(truth, name) == getattr(asked, name) for name in ('colour', 'shape', 'count')}
      assert {name: answers[name] for name in same} == same


def test_the_reader_knows_where_shapes_are():
  picture = shapes.draw(Facts('green', 'ring', 'left', 1), 16, np.random.default_rng(0))
  assert shapes.right(picture, Facts(position='left')) == {'position': True}
  assert shapes.right(picture, Facts(position='right')) == {'position': False}
  assert shapes.right(np.roll(picture, 8, 1), Facts(position='right')) == {'position': True}
  middle = np.zeros((16, 16, 3), np.uint8)
  middle[6:10, 6:10] = 255
  for place in shapes.PLACES:
    assert shapes.right(middle, Facts(position=place)) == {'position': False}


def test_one_wrong_shape_is_enough():
  """Two green rings and one of them turned red; an empty picture shows nothing."""
  picture = shapes.draw(Facts('green', 'ring', 'top', 2), 16, np.random.default_rng(1))
  first, _ = shapes.read(picture)
  box = np.s_[first.top:first.bottom, first.left:first.right]
  picture[box] = np.where(picture[box].any(-1, keepdims=True), [255, 0, 0], 0)
  asked = Facts('green', 'ring', 'top', 2)
  assert shapes.right(picture, asked) == {'colour': False, 'shape': True, 'position': True, 'count': True}
  assert not any(shapes.right(picture * 0, asked).values())


def test_the_reader_bears_blur_and_noise():
  rng, source = np.random.default_rng(0), shapes.Shapes(100, 16, 5, unseen=True)
  for i in range(100):
    each = source[i]
    noisy = np.clip(each['x'] + rng.normal(0, 12, each['x'].shape), 0, 255).astype(np.uint8)
    assert all(shapes.right(noisy, shapes.said(each['captions'][0])).values())


def test_a_half_drawn_shape_is_not_that_shape():
  """A ring with its hole filled in is a square, a triangle is no square."""
  for drawn, asked in itertools.permutations(shapes.FORMS, 2):
    picture = shapes.draw(Facts('blue', drawn, 'top', 1), 16, np.random.default_rng(0))
    assert shapes.right(picture, Facts(shape=asked)) == {'shape': False}


def test_captions_are_read_as_they_are_written():
  every = [Facts(*each) for each in itertools.product(
    (*shapes.COLOURS, None), (*shapes.FORMS, None), (*shapes.PLACES, None), (1, 2, 3, None))]
  assert all(shapes.said(shapes.caption(facts)) == facts for facts in every)
  assert shapes.caption(Facts('red', 'cross', 'top', 2)) == 'two red crosses at the top'
  assert shapes.said('One white Ring, on the right') == Facts('white', 'ring', 'right', 1)


def test_the_source_says_all_that_it_can_say():
  source = shapes.Shapes(300, 16, 0, unseen=False)
  examples = [source[i] for i in range(300)]
  assert {text for each in examples for text in each['captions']} <= set(source.texts)
  assert len(set(source.texts)) == len(source.texts) == (6 * 4 - 3 + 6 + 4 + 1) * 5 * 4
  assert source.prompts == [each['captions'][0] for each in examples]
  again = shapes.Shapes(300, 16, 0, unseen=False)[7]
  np.testing.assert_array_equal(again['x'], examples[7]['x'])
  assert again['captions'] == examples[7]['captions']


def test_unseen_pairs_are_held_out():
  pair = lambda source: {shapes.said(text)[:2] for text in source.prompts}
  train, test = (pair(shapes.Shapes(2000, 16, 0, unseen)) for unseen in (False, True))
  assert not train & set(shapes.UNSEEN) and test == train | set(shapes.UNSEEN) and len(test) == 24


def test_the_score_counts_what_is_said_and_keeps_the_unseen_apart():
  source = shapes.Shapes(60, 16, 1, unseen=True)
  samples = np.stack([source[i]['x'] for i in range(60)])
  prompts = list(source.prompts)
  unseen = sum(shapes.said(text)[:2] in shapes.UNSEEN for text in prompts)
  scores = shapes.score(samples, prompts)
  assert unseen and all(row['samples'] == 1 for row in scores.values())
  assert scores['all']['count'] == 60 - unseen and scores['unseen_all']['count'] == unseen
  samples[::2] = 0
  assert abs(shapes.score(samples, ['a ring'] * 60)['shape']['samples'] - np.mean(
    [shapes.said(text).shape == 'ring' for text in prompts[1::2]]) / 2) < 1e-9
  assert 'colour' not in shapes.score(samples, ['a ring'] * 60)


@pytest.mark.parametrize('side', [8, 20, 17])
def test_sizes_that_cannot_be_drawn_get_a_sentence(side):
  with pytest.raises(ValueError, match=f'multiple of 8 pixels, 16 or more; config.data.size is .{side}, {side}.'):
    shapes.Shapes(3, side, 0, unseen=False)
