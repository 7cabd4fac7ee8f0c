"""The image task: sizes, values, pictures for people, scores, and sentences for contradictions."""
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image
from sklearn.datasets import load_digits

from configs import base
from diffusion_jax.tasks import images
from diffusion_jax.tasks.task import make_task

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def config(**fields):
  """configs/base.py with `fields` of data, or with names such as sample__labels."""
  result = base.get_config()
  full = {name.replace('__', '.') if '__' in name else f'data.{name}': value for name, value in fields.items()}
  result.update_from_flattened_dict(full)
  return result


def folder(root, count=3, size=(4, 4)):
  """Two classes of `count` images; image i of class k is all (100 k + i) * (1, 1, 1)."""
  for label in range(2):
    for i in range(count):
      path = root / str(label) / f'{i}.png'
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((*size, 3), 100 * label + i, np.uint8)).save(path)
  return dict(source='folder', path=str(root), holdout=1, size=size, channels=3)


@pytest.fixture(scope='module')
def digits():
  return make_task(config(evaluate__reference=400), True)


# Sizes


def stripes(height, width, vertical=True):
  """Quarters: red, green, green, blue, from left to right or from top to bottom."""
  colours = np.repeat(np.uint8([RED, GREEN, GREEN, BLUE]), (width if vertical else height) // 4, 0)
  return np.ascontiguousarray(np.broadcast_to(colours[None] if vertical else colours[:, None], (height, width, 3)))


@pytest.mark.parametrize('vertical', [True, False])
def test_crop_takes_the_middle_and_stretch_takes_all(vertical):
  picture = stripes(8, 16) if vertical else stripes(16, 8, False)
  crop = images.fit_to((4, 4), 3, 'crop')(picture, 'it')
  np.testing.assert_allclose(crop, np.broadcast_to(np.uint8(GREEN), (4, 4, 3)), atol=15)  # the filter sees past the cut
  stretched = images.fit_to((4, 4), 3, 'stretch')(picture, 'it')
  along = stretched[1] if vertical else stretched[:, 1]
  np.testing.assert_array_equal(along.argmax(-1), [0, 1, 1, 2])
  np.testing.assert_array_equal(stretched, np.broadcast_to(along[None] if vertical else along[:, None], (4, 4, 3)))


@pytest.mark.parametrize('old, size, whole', [
    ((8, 16), (4, 4), (4, 8)), ((16, 8), (2, 4), (8, 4)), ((6, 6), (12, 8), (12, 12))])
def test_crop_is_the_middle_of_the_resized_whole(old, size, whole):
  picture = np.random.default_rng(0).integers(0, 256, (*old, 3), np.uint8)
  resized = np.asarray(Image.fromarray(picture).resize(whole[::-1], Image.Resampling.LANCZOS)).astype(int)
  top, left = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
  expected = resized[top:top + size[0], left:left + size[1]]
  np.testing.assert_allclose(images.fit_to(size, 3, 'crop')(picture, 'it'), expected, atol=1)


@pytest.mark.parametrize('resize', ['crop', 'stretch'])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_resizing_keeps_what_is_plain_and_the_brightness(resize, channels):
  fit = images.fit_to((6, 10), channels, resize)
  plain = np.broadcast_to(np.uint8([77, 77, 77, 255] if channels == 4 else [77] * channels), (6, 10, channels))
  np.testing.assert_array_equal(fit(np.ascontiguousarray(plain[:3, :5]), 'it'), plain)
  noise = np.random.default_rng(0).integers(60, 200, (48, 80, channels), np.uint8)
  if channels == 4:
    noise[..., 3] = 255
  np.testing.assert_allclose(fit(noise, 'it').mean((0, 1)), noise.mean((0, 1)), atol=1.5)


def test_images_of_the_right_size_are_left_alone():
  picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  for resize in ('crop', 'stretch', 'none'):
    np.testing.assert_array_equal(images.fit_to((5, 7), 3, resize)(picture, 'it'), picture)


# Values


def test_encode_and_decode_undo_each_other():
  values = np.arange(256, dtype=np.uint8)
  x = np.asarray(images.encode(jnp.asarray(values)))
  assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
  np.testing.assert_allclose(x, np.linspace(-1, 1, 256), atol=1e-6)
  decoded = images.decode(x)
  assert decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, values)


def test_decode_rounds_and_clips():
  step = 2 / 255
  x = np.array([-7.0, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.51 * step, 1 - 0.49 * step, 1.3], np.float32)
  np.testing.assert_array_equal(images.decode(jnp.asarray(x)), [0, 0, 1, 254, 255, 255])


def test_flip_mirrors_every_second_time():
  picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
  rng = np.random.default_rng(0)
  results = [images.flip({'x': picture, 'label': 5}, rng) for _ in range(400)]
  mirrored = [not np.array_equal(each['x'], picture) for each in results]
  assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / 20
  np.testing.assert_array_equal(results[mirrored.index(True)]['x'], np.fliplr(picture))
  assert all(each['label'] == 5 for each in results)


# Pictures


def test_render_lays_out_a_grid():
  x = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), np.uint8)
  grid = images.render(x, 3)
  assert grid.shape == (2 * 34, 3 * 34, 3) and grid.dtype == np.uint8  # 8 pixels become 32, with a border of 1
  for i in range(6):
    tile = grid[34 * (i // 3):, 34 * (i % 3):][:34, :34]
    inner = tile[1:-1, 1:-1]
    expected = np.kron(x[i, ..., 0], np.ones((4, 4))) if i < 5 else np.full((32, 32), 255)
    np.testing.assert_array_equal(inner, np.stack([expected] * 3, -1))
    border = np.ones((34, 34), bool)
    border[1:-1, 1:-1] = False
    assert (tile[border] == 255).all()


def test_render_keeps_colours_and_large_images():
  x = np.random.default_rng(0).integers(0, 256, (2, 40, 36, 3), np.uint8)
  grid = images.render(x, 2)
  np.testing.assert_array_equal(grid[1:41, 1:37], x[0])
  np.testing.assert_array_equal(grid[1:41, 39:75], x[1])


def test_render_shows_transparency_on_white():
  x = np.zeros((1, 32, 32, 4), np.uint8)
  x[0, :16] = (10, 20, 30, 255)
  grid = images.render(x, 1)[1:-1, 1:-1]
  np.testing.assert_array_equal(grid[:16], np.broadcast_to(np.uint8((10, 20, 30)), (16, 32, 3)))
  np.testing.assert_array_equal(grid[16:], np.full((16, 32, 3), 255))


# Scores


def test_features_of_digits_are_their_pixels():
  x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
  np.testing.assert_allclose(images.features(x), x.reshape(3, 64) / 127.5 - 1, atol=1e-12)


def test_features_of_larger_images_are_means_of_blocks():
  x = np.random.default_rng(1).integers(0, 256, (2, 16, 24, 3), np.uint8)
  blocks = x.reshape(2, 8, 2, 8, 3, 3).mean((2, 4)) / 127.5 - 1
  np.testing.assert_allclose(images.features(x), blocks.reshape(2, -1), atol=1e-12)


@pytest.mark.parametrize('size', [(28, 28), (9, 13), (100, 8), (5, 20)])
def test_features_keep_the_mean_of_any_size(size):
  x = np.random.default_rng(2).integers(0, 256, (2, *size, 1), np.uint8)
  out = images.features(x)
  assert out.shape == (2, min(8, size[0]) * min(8, size[1]))
  np.testing.assert_allclose(out.mean(1), x.mean((1, 2, 3)) / 127.5 - 1, atol=1e-12)
  assert np.ptp(images.features(np.full_like(x, 91))) < 1e-12


def test_a_copy_of_the_held_out_data_scores_as_they_do(digits):
  test = images.load(config().data).test
  scores = digits.metrics(test.images, list(map(str, test.labels)))
  pairs = {name: value for name, value in scores.items() if isinstance(value, dict)}
  assert set(pairs) == {'frechet_distance', 'kernel_distance', 'nearest_training_distance_median', 'svm_accuracy'}
  for name, pair in pairs.items():
    assert pair['samples'] == pytest.approx(pair['held_out'], rel=1e-12), name
  assert pairs['svm_accuracy']['held_out'] > 0.93
  assert (scores['training_images'], scores['count_of_distances']) == (400, 297)


def test_bad_samples_score_badly(digits):
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (100, 8, 8, 1), np.uint8)
  scores = digits.metrics(noise, list(map(str, rng.integers(0, 10, 100))))
  assert scores['count_of_distances'] == 100
  for name in ('frechet_distance', 'kernel_distance', 'nearest_training_distance_median'):
    assert scores[name]['samples'] > 2 * scores[name]['held_out'], name
  assert scores['svm_accuracy']['samples'] < 0.3


def test_copies_of_the_training_data_are_seen(digits):
  train = images.load(config().data).train
  copies = train.images[np.random.default_rng(0).permutation(1500)[:400]]
  whole = make_task(config(evaluate__reference=1500), True)
  scores = whole.metrics(copies, ['0'] * 400)
  assert scores['nearest_training_distance_median']['samples'] < 1e-6
  assert scores['nearest_training_distance_median']['held_out'] > 0.5


def test_scores_without_classes_have_no_accuracy(tmp_path):
  task = make_task(config(**folder(tmp_path, 10) | {'holdout': 5, 'classes': 0}), True)
  scores = task.metrics(np.zeros((4, 4, 4, 3), np.uint8), [''] * 4)
  assert 'svm_accuracy' not in scores and scores['training_images'] == 15


# The task


def test_the_task_of_digits(digits):
  assert (digits.shape, digits.classes, digits.skipped()) == ((8, 8, 1), 10, 0)
  assert '1,500 training and 297 held-out images of 8x8x1, 10 classes' in digits.summary
  rows = next(digits.batches(0, 6, 0, 1))
  assert (rows['x'].shape, rows['x'].dtype, rows['label'].dtype) == ((6, 8, 8, 1), np.uint8, np.int32)
  x0, cond = digits.encode(rows)
  np.testing.assert_allclose(x0, rows['x'] / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(cond['label'], rows['label'])
  data = load_digits()  # each image comes with its own label
  grey = np.rint(data.data * 255 / 16)
  for image, label in zip(rows['x'], rows['label'], strict=True):
    assert label in data.target[(grey == image.reshape(-1)).all(1)]


def test_context_gives_the_labels_in_turn(digits):
  np.testing.assert_array_equal(digits.context(np.arange(5, 12))['label'], [5, 6, 7, 8, 9, 0, 1])
  chosen = make_task(config(sample__labels=(3, 7), classes=10), False)
  np.testing.assert_array_equal(chosen.context(np.array([0, 1, 4, 5]))['label'], [3, 7, 3, 7])
  assert chosen.context(np.arange(2))['label'].dtype == np.int32
  assert make_task(config(classes=0), False).context(np.arange(2)) is None


@pytest.mark.parametrize('label', [10, -1])
def test_labels_to_sample_that_there_are_not(label):
  task = make_task(config(sample__labels=(3, label), classes=10), False)
  with pytest.raises(ValueError, match=rf'config.sample.labels is \(3, {label}\); this run has the classes 0 to 9'):
    task.context(np.arange(1))


def test_skipped_held_out_files_are_counted(tmp_path):
  fields = folder(tmp_path, 4) | {'holdout': 4}
  images.load(config(**fields).data).test.paths[0].write_bytes(b'')
  task = make_task(config(**fields, bad_files='skip'), True)
  with pytest.warns(UserWarning, match='cannot be read'):
    task.metrics(np.zeros((4, *task.shape), np.uint8), task.titles(np.arange(4)))
  assert task.skipped() == 1


def test_skipped_files_are_counted(tmp_path):
  fields = folder(tmp_path, 4)
  (tmp_path / '1' / '2.png').write_bytes(b'')
  task = make_task(config(**fields, bad_files='skip'), True)
  stream = task.batches(0, 14, 0, 1)
  splits = images.load(config(**fields, bad_files='skip').data)
  in_train = any(path.name == '2.png' and path.parent.name == '1' for path in splits.train.paths)
  assert in_train  # or another file must be harmed for this test
  with pytest.warns(UserWarning, match=r'1/2\.png cannot be read'):
    rows = next(stream)
  assert task.skipped() == 1
  np.testing.assert_array_equal(rows['x'][:, 0, 0, 0] // 100, rows['label'])


def test_a_folder_brought_to_size(tmp_path):
  fields = folder(tmp_path, size=(6, 12)) | {'size': (4, 4), 'channels': 1, 'flip': True}
  task = make_task(config(**fields), True)
  rows = next(task.batches(0, 5, 0, 1))
  assert rows['x'].shape == (5, 4, 4, 1)
  assert {0, 1, 2, 100, 101, 102} >= set(rows['x'].ravel().tolist())
  assert 'images of 4x4x1, 2 classes' in task.summary


WRONG = {
    'channels': (dict(channels=2), 'config.data.channels is 2; images have 1, 3 or 4'),
    'digits in colour': (dict(channels=3), 'digits has images of 1 channels, config.data.channels is 3: type '
                                           '--config.data.channels=1'),
    'size': (dict(size=(16, 8), resize='none'), r'digits has an image of 8x8 pixels, config.data.size is \(16, 8\): '
                                                "type --config.data.resize=crop, or 'stretch', or another size"),
    'resize': (dict(resize='zoom'), "config.data.resize is 'zoom'; legal are 'crop', 'stretch' and 'none'"),
    'source': (dict(source='web'), "config.data.source is 'web'; legal are 'digits', 'tfds' and 'folder'"),
    'bad_files': (dict(bad_files='ignore'), "config.data.bad_files is 'ignore'; legal are 'stop' and 'skip'"),
    'classes': (dict(classes=9), 'labels from 0 to 9, config.data.classes is 9, so label 9 is out of range: type '
                                 '--config.data.classes=10'),
    'path': (dict(source='folder'), "config.data.path is '', which is not a folder: type --config.data.path=FOLDER"),
}


@pytest.mark.parametrize('name', WRONG)
def test_contradictions_get_a_sentence(name):
  fields, sentence = WRONG[name]
  with pytest.raises(ValueError, match=sentence):
    make_task(config(**fields), True)


def test_classes_without_labels_get_a_sentence(tmp_path):
  fields = folder(tmp_path)
  lines = ['file_name', *(f'{path.parent.name}/{path.name}' for path in tmp_path.glob('*/*.png'))]
  (tmp_path / 'metadata.csv').write_text('\n'.join(lines))
  assert make_task(config(**fields), True).classes == 0
  with pytest.raises(ValueError, match='data have no labels, config.data.classes is 2: type --config.data.classes=0'):
    make_task(config(**fields, classes=2), True)


def test_a_bad_first_image_shows_at_once(tmp_path):
  fields = folder(tmp_path)
  for path in tmp_path.glob('*/*.png'):
    path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(ValueError, match=r'The image .*\.png cannot be read: .*--config.data.bad_files=skip'):
    make_task(config(**fields), True)
  with pytest.warns(UserWarning, match='left out'), pytest.raises(ValueError, match='None of the 5 images'):
    make_task(config(**fields, bad_files='skip'), True)
