"""What training draws from the data: a view that is a crop, and boxes by their law; and a network that is given both."""
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image
from scipy.stats import binomtest

from diffusion_jax import method as methods
from diffusion_jax.core.guidance import guide
from diffusion_jax.core.types import Draw, Level
from diffusion_jax.tasks import conditions
from diffusion_jax.tasks.task import make_task
from tests.jobs.runs import tiny

VISION = 'CLIPVision(width=16, layers=1, heads=2, patch=4)'
FIELDS = {'condition.reference': VISION, 'condition.known': True, 'train.drop': 0.5,
          'network': 'UNet(channels=8, multipliers=(1,), blocks=1, attention=(True,))'}
LEVEL = Level(*map(np.float32, (0.5, 0.7, 0.7)))


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def test_a_view_is_a_part_of_the_image_resized():
  """A ramp along each axis stays one, flatter by the share that is shown, in its place and as often mirrored as not."""
  rows, columns = np.mgrid[:32, :32].astype(np.float32) + 0.5
  views = np.asarray(jax.vmap(conditions.view, (0, None))(keys(400), jnp.stack([rows, columns], -1)))
  inner = views[:, 2:-2, 2:-2]  # beyond the last pixel's middle the ramp has an end
  down, right = np.diff(inner[..., 0], axis=1), np.diff(inner[..., 1], axis=2)
  share = down.mean((1, 2))
  np.testing.assert_allclose(down, np.broadcast_to(share[:, None, None], down.shape), atol=1e-4)
  np.testing.assert_allclose(np.abs(right), np.broadcast_to(share[:, None, None], right.shape), atol=1e-4)
  assert conditions.LEAST <= share.min() < 0.52 and 0.98 < share.max() <= 1
  top = inner[:, 0, 0, 0] - 2.5 * share  # where the view begins, from 0 to what is left over
  assert (top > -1e-3).all() and (top < 32 * (1 - share) + 1e-3).all()
  assert np.abs(np.mean(top / (32 * (1 - share))) - 0.5) < 0.06
  assert binomtest(int((right.mean((1, 2)) < 0).sum()), 400).pvalue > 1e-3


def test_a_view_is_that_of_pillow():
  """The same box cut and resized by Pillow, where nothing is mirrored."""
  x = np.random.default_rng(0).random((16, 16, 1)).astype(np.float32)
  for key in keys(8, 3):
    size_key, place_key, flip_key = jax.random.split(key, 3)
    share = float(jax.random.uniform(size_key, minval=conditions.LEAST))
    top, left = np.asarray(jax.random.uniform(place_key, (2,))) * (1 - share) * 16
    source = x[:, ::-1] if jax.random.bernoulli(flip_key) else x
    box = (left, top, left + 16 * share, top + 16 * share)
    theirs = np.asarray(Image.fromarray(source[..., 0]).resize((16, 16), Image.Resampling.BILINEAR, box))
    ours = np.asarray(conditions.view(key, jnp.asarray(x)))[..., 0]
    np.testing.assert_allclose(ours[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-4)  # Pillow sees no pixel beyond the box


def test_boxes_have_their_law():
  """None a quarter of the time; else a box or its outside, each as often; a pixel of the middle is in the box by
  2 p (1 - p) for the share p of edges before it."""
  where = np.asarray(jax.vmap(lambda key: conditions.boxes(key, (8, 6)))(keys(4000)))
  assert where.shape == (4000, 8, 6, 1) and where.dtype == bool
  corners = where[:, [0, 0, -1, -1], [0, -1, 0, -1], 0]
  none, outside = ~where.any((1, 2, 3)), corners.sum(1) >= 3
  for row in where[~none & ~outside][:50, ..., 0]:
    np.testing.assert_array_equal(row, row.any(1)[:, None] & row.any(0)[None])
  def inside(place, size):  # of size + 1 edges, drawn twice: one at or before the place, the other after it
    before = (place + 1) / (size + 1)
    return 2 * before * (1 - before)
  law = 0.375 * inside(4, 8) * inside(3, 6) + 0.375 * (1 - inside(4, 8) * inside(3, 6))
  assert binomtest(int(where[:, 4, 3].sum()), 4000, law).pvalue > 1e-3
  corner = 0.375 * inside(0, 8) * inside(0, 6) + 0.375 * (1 - inside(0, 8) * inside(0, 6))
  assert binomtest(int(where[:, 0, 0].sum()), 4000, corner).pvalue > 1e-3


@pytest.fixture(scope='module')
def made():
  """Digits with both conditions: (task, gradient of the loss, denoiser), of noisy parameters."""
  config = tiny(**FIELDS)
  task = make_task(config, True)
  method = methods.make_method(config, task)
  params, extra = method.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), params)
  draw = Draw(jax.random.key(1), jnp.arange(16), 16)
  loss = lambda params, rows: method.loss(params, extra, draw, rows)[0].mean()
  return task, lambda rows: jax.jit(jax.grad(loss))(params, rows)['params'], jax.jit(method.denoiser(params, extra))


def test_training_shows_what_it_draws_and_asking_shows_nothing(made):
  task, gradient_of, _ = made
  rows = jax.tree.map(jnp.asarray, next(task.batches(0, 16, 0, 1)))
  x0, cond = task.encode(rows)
  assert not cond['known']['where'].any() and not cond['reference']['given'].any()
  drawn = task.drawn(keys(16), x0, cond)
  np.testing.assert_array_equal(drawn['known']['values'], x0)
  np.testing.assert_array_equal(drawn['label'], cond['label'])
  assert drawn['reference']['given'].all() and 0 < drawn['known']['where'].mean() < 1
  assert jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, drawn, cond) == jax.tree.map(
    lambda leaf: True, cond)
  for asked in (task.context(np.arange(3)), task.ask(['1', '2', '3'])):
    assert set(asked) == {'label', 'known', 'reference'} and not asked['known']['where'].any()
  gradient = gradient_of(rows)
  learned = gradient['embedders_reference']
  for leaf in (learned['encoder']['patch_embedding']['kernel'], learned['encoder']['layers_0']['fc1']['kernel'],
               learned['vector']['kernel'], learned['none'], gradient['backbone']['in']['kernel'][:, :, 1:]):
    assert np.abs(leaf).max() > 0


def test_guidance_drops_the_reference_and_keeps_what_is_known(made):
  """The branch without conditions is that of the null label and reference with the same known pixels."""
  task, _, denoise = made
  cond = task.drawn(keys(4), jax.random.normal(jax.random.key(5), (4, 8, 8, 1)), task.ask(['1', '2', '3', '4']))
  x = jax.random.normal(jax.random.key(6), (4, 8, 8, 1))
  null = {**task.ask(['1'] * 4), 'label': jnp.full(4, 10), 'known': cond['known']}
  np.testing.assert_allclose(jax.jit(guide(0.0)(denoise))(x, LEVEL, cond).x0, denoise(x, LEVEL, null).x0, atol=1e-5)
  other = {**null, 'known': task.ask(['1'] * 4)['known']}
  assert np.abs(denoise(x, LEVEL, null).x0 - denoise(x, LEVEL, other).x0).max() > 1e-3


def test_what_is_unknown_is_not_seen(made):
  task, _, denoise = made
  cond = task.drawn(keys(4), jax.random.normal(jax.random.key(5), (4, 8, 8, 1)), task.ask(['1', '2', '3', '4']))
  x, where = jax.random.normal(jax.random.key(6), (4, 8, 8, 1)), cond['known']['where']
  see = lambda values: denoise(x, LEVEL, {**cond, 'known': {'values': values, 'where': where}}).x0
  values = cond['known']['values']
  np.testing.assert_array_equal(see(values), see(jnp.where(where, values, 7.0)))
  assert np.abs(see(values) - see(jnp.where(where, 7.0, values))).max() > 1e-3


def test_a_reference_that_is_not_given_is_not_seen(made):
  task, _, denoise = made
  x, cond = jax.random.normal(jax.random.key(6), (4, 8, 8, 1)), task.ask(['1', '2', '3', '4'])
  def see(given, seed):
    image = jax.random.normal(jax.random.key(seed), x.shape)
    return denoise(x, LEVEL, {**cond, 'reference': {'image': image, 'given': jnp.full(4, given)}}).x0
  np.testing.assert_array_equal(see(False, 0), see(False, 1))
  assert np.abs(see(True, 0) - see(True, 1)).max() > 1e-3


def test_encoders_of_two_widths_get_a_sentence():
  config = tiny(**FIELDS, task='captions', data__source='shapes', data__size=(16, 16), data__channels=3, data__count=40,
                text__encoder='CLIPText(width=32, layers=1, heads=2)', text__length=32)
  task = make_task(config, False)
  with pytest.raises(ValueError, match=r'sequences of \[16, 32\] channels|sequences of \[32, 16\] channels'):
    methods.make_method(config, task)
  config.condition.reference = 'CLIPVison(width=16, layers=1, heads=2, patch=4)'
  with pytest.raises(ValueError, match="config.condition.reference: .*'CLIPVison' is unknown. Did you mean 'CLIPVision'"):
    methods.make_method(config, make_task(config, False))
