"""The scores of edits, where the answer is known."""
import numpy as np
import pytest

from diffusion_jax.tasks import shapes
from experiments.editing import table


@pytest.fixture(scope='module')
def rows():
  return [row for row in table.examples(8) if row.facts.count < 3]  # three shapes by lot agree seldom


def test_a_hole_lies_over_the_first_shape(rows):
  for row in rows:
    first = shapes.read(row.picture)[0]
    assert row.hole.sum() == table.HOLE**2 and row.hole[first.top:first.bottom, first.left:first.right].all()


def test_what_the_rule_draws_agrees_outside_the_hole_and_shows_the_caption(rows):
  found = [table.by_rule(row) for row in rows]
  scores = table.judge('', found, rows)
  assert scores['right'] == 1 and scores['known pixels off by'] == 0
  assert any((each != each[0]).any() for each in found)
  truth = table.judge('', [row.picture[None] for row in rows], rows)
  assert truth['PSNR of the mean'] == np.inf and truth['truth among them'] == 1


def test_fills_by_hand():
  picture, hole = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), bool)
  picture[:, 8:], hole[4:12, 4:12] = 200, True
  row = table.Example(picture, shapes.Facts('white', 'square', 'right', 1), hole)
  assert (table.nearest_fill(row)[0, 7, 4] == 0).all() and (table.nearest_fill(row)[0, 7, 11] == 200).all()
  assert (table.mean_fill(row)[0][hole] == 100).all() and (table.mean_fill(row)[0][~hole] == picture[~hole]).all()
  assert table.judge('', [table.mean_fill(row)], [row])['PSNR of the mean'] == pytest.approx(20 * np.log10(255 / 100))
  # every pair across the edge differs by 100: from 0 on the left, from 200 on the right
  assert table.seam(table.mean_fill(row), hole) == 100
  assert table.seam(picture[None], hole) == 0
