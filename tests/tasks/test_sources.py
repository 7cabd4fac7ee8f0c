"""Sources of images: what they read, how they split, and what they say of bad files."""
import csv
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chi2_contingency
from sklearn.datasets import load_digits

from diffusion_jax.tasks import sources

COLOURS = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}
as_it_is = lambda image, name: image


def save(path, picture, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(picture, np.uint8)).save(path, **options)


def plain(colour, size=(4, 4)):
  return np.broadcast_to(np.uint8(colour), (*size, 3))


def colours(root, count=4):
  """A sub-folder a colour with `count` images of it."""
  for name, colour in COLOURS.items():
    for i in range(count):
      save(root / name / f'{i}.png', plain(colour))
  return root


def listing(root, rows, columns=('file_name', 'label')):
  with (root / 'metadata.csv').open('w', newline='', encoding='utf-8') as file:
    csv.writer(file).writerows([columns, *rows])
  return root


def read(path, holdout=1, fit=as_it_is, mode='RGB', skip=False):
  return sources.folder(str(path), holdout, fit, mode, skip)


def examples(splits):
  return [source[i] for source in (splits.train, splits.test) for i in range(len(source))]


def one(path, mode):
  """The pixels of a single file."""
  return sources.Files([path], [{}], as_it_is, mode, False)[0]['x']


# Folders


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
  splits = read(colours(tmp_path), holdout=5)
  assert (len(splits.train), len(splits.test), splits.classes) == (7, 5, 3)
  seen = [(int(each['label']), tuple(each['x'][0, 0])) for each in examples(splits)]
  assert sorted(seen) == sorted((i, colour) for i, colour in enumerate(COLOURS.values()) for _ in range(4))
  assert all(each['x'].dtype == np.uint8 and each['x'].shape == (4, 4, 3) for each in examples(splits))


def test_the_split_is_fixed(tmp_path):
  colours(tmp_path)
  first, again = (read(tmp_path, holdout=4) for _ in range(2))
  assert first.train.paths == again.train.paths and first.test.paths == again.test.paths
  assert not set(first.train.paths) & set(first.test.paths)
  assert {path.parent.name for path in first.train.paths} == set(COLOURS)  # shuffled, not the first in the alphabet


def test_sub_folders_named_by_numbers_keep_them(tmp_path):
  for name in ('0', '2', '10'):
    save(tmp_path / name / 'a.png', plain((int(name),) * 3))
  splits = read(tmp_path)
  assert splits.classes == 11
  assert all(each['label'] == each['x'][0, 0, 0] for each in examples(splits))


def test_other_files_are_not_images(tmp_path):
  colours(tmp_path, 1)
  (tmp_path / 'red' / 'notes.txt').write_text('not an image')
  save(tmp_path / 'red' / 'LOUD.PNG', plain((255, 0, 0)))
  assert len(examples(read(tmp_path))) == 4


@pytest.mark.parametrize('names, labels, classes', [
    (('cat', 'ant', 'cat'), [1, 0, 1], 2), (('5', '0', '3'), [5, 0, 3], 6), (None, [0, 0, 0], 0)])
def test_metadata_csv(tmp_path, names, labels, classes):
  for i in range(3):
    save(tmp_path / 'images' / f'{i}.png', plain((i, i, i)))
  files = [f'images/{i}.png' for i in range(3)]
  if names:
    listing(tmp_path, zip(files, names, strict=True))
  else:
    listing(tmp_path, [[name] for name in files], ['file_name'])
  splits = read(tmp_path)
  assert splits.classes == classes
  assert sorted((each['x'][0, 0, 0], each['label']) for each in examples(splits)) == list(enumerate(labels))


@pytest.mark.parametrize('labels', [('cat', '', 'ant'), ('0', '', '1')])
def test_a_row_without_its_label_is_an_error(tmp_path, labels):
  """Not one more class, which would silently renumber the others."""
  for i in range(3):
    save(tmp_path / f'{i}.png', plain((i, i, i)))
  listing(tmp_path, [(f'{i}.png', label) for i, label in enumerate(labels)])
  with pytest.raises(ValueError, match='Row 2 of metadata.csv has no label'):
    read(tmp_path)


def test_folders_that_cannot_be_used_get_a_sentence(tmp_path):
  for path in ('', tmp_path / 'missing'):
    with pytest.raises(ValueError, match=rf"config.data.path is '{path}', which is not a folder: type --config"):
      read(path)
  with pytest.raises(ValueError, match=r'holds no images \(\.png, .*\) in sub-folders'):
    read(tmp_path)
  colours(tmp_path, 1)
  for holdout in (0, 3, 100):
    with pytest.raises(ValueError, match=rf'3 images; config.data.holdout is {holdout} and must be between 1 and 2'):
      read(tmp_path, holdout=holdout)
  listing(tmp_path, [], ['name', 'label'])
  with pytest.raises(ValueError, match=r"has the columns \['name', 'label'\]; it needs file_name, and label"):
    read(tmp_path)
  (tmp_path / 'metadata.csv').write_text('')
  with pytest.raises(ValueError, match='has the columns None; it needs file_name'):
    read(tmp_path)


def test_a_listed_file_that_is_missing_is_named(tmp_path):
  listing(tmp_path, [('a.png', 'x'), ('b.png', 'y')])
  with pytest.raises(ValueError, match=r'The image .*/[ab]\.png cannot be read: .*No such file.*bad_files=skip'):
    examples(read(tmp_path))


# Colours


def test_transparency_becomes_white(tmp_path):
  clear, half = [10, 20, 30, 0], [100, 0, 200, 128]
  save(tmp_path / 'a.png', [[clear, half, [1, 2, 3, 255]]])
  expected = [[[255] * 3, np.array([100, 0, 200]) * 128 / 255 + 127, [1, 2, 3]]]
  np.testing.assert_allclose(one(tmp_path / 'a.png', 'RGB'), expected, atol=1)
  np.testing.assert_array_equal(one(tmp_path / 'a.png', 'RGBA'), [[clear, half, [1, 2, 3, 255]]])
  Image.fromarray(np.uint8([[[0, 0], [0, 255]]]), 'LA').save(tmp_path / 'b.png')
  np.testing.assert_array_equal(one(tmp_path / 'b.png', 'L'), [[[255], [0]]])


def test_palettes(tmp_path):
  picture = Image.new('P', (2, 1))
  picture.putpalette([255, 0, 0, 0, 0, 255])
  picture.putpixel((1, 0), 1)
  picture.save(tmp_path / 'a.png')
  np.testing.assert_array_equal(one(tmp_path / 'a.png', 'RGB'), [[[255, 0, 0], [0, 0, 255]]])
  picture.save(tmp_path / 'b.png', transparency=1)
  np.testing.assert_array_equal(one(tmp_path / 'b.png', 'RGB'), [[[255, 0, 0], [255, 255, 255]]])


def test_grey_and_colour(tmp_path):
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
  Image.fromarray(ramp).save(tmp_path / 'grey.png')
  np.testing.assert_array_equal(one(tmp_path / 'grey.png', 'L'), ramp[..., None])
  np.testing.assert_array_equal(one(tmp_path / 'grey.png', 'RGB'), np.stack([ramp] * 3, -1))
  opaque = np.stack([ramp] * 3 + [np.full_like(ramp, 255)], -1)
  np.testing.assert_array_equal(one(tmp_path / 'grey.png', 'RGBA'), opaque)
  save(tmp_path / 'colour.png', [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])
  luma = 255 * np.array([0.299, 0.587, 0.114])  # ITU-R 601
  np.testing.assert_allclose(one(tmp_path / 'colour.png', 'L')[0, :, 0], luma, atol=1)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
  ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
  Image.fromarray(ramp * 257).save(tmp_path / 'a.png')
  np.testing.assert_allclose(one(tmp_path / 'a.png', 'L').squeeze(-1), ramp, atol=1)


# Files that cannot be read


def empty(path):
  path.write_bytes(b'')


def truncate(path):
  path.write_bytes(path.read_bytes()[:-30])


def no_image(path):
  path.write_text('<html>404</html>')


def broken_header(path):
  """The length of the first chunk says 0."""
  content = path.read_bytes()
  chunk = b'IHDR'
  path.write_bytes(content[:8] + struct.pack('>I', 0) + chunk + struct.pack('>I', zlib.crc32(chunk)) + content[16:])


HARM = {empty: 'it is empty', truncate: 'truncated', no_image: 'cannot identify', broken_header: ''}


@pytest.mark.parametrize('harm', HARM)
def test_a_bad_file_is_named(tmp_path, harm):
  path = colours(tmp_path, 1) / 'red' / '0.png'
  save(path, np.random.default_rng(0).integers(0, 256, (8, 8, 3)))
  harm(path)
  with pytest.raises(ValueError, match=rf'The image .*red/0\.png cannot be read: .*{HARM[harm]}.*bad_files=skip'):
    examples(read(tmp_path))


@pytest.mark.parametrize('harm', HARM)
def test_a_bad_file_is_left_out_once(tmp_path, harm):
  path = colours(tmp_path, 2) / 'red' / '0.png'
  save(path, np.random.default_rng(0).integers(0, 256, (8, 8, 3)))
  harm(path)
  splits = read(tmp_path, holdout=2, skip=True)
  source = splits.train if path in splits.train.paths else splits.test
  with pytest.warns(UserWarning, match=rf'red/0\.png cannot be read and is left out: .*{HARM[harm]}') as caught:
    found = examples(splits)
  assert len(caught) == 1 and source.skipped == {path}
  assert all(tuple(each['x'][0, 0]) == list(COLOURS.values())[each['label']] for each in found)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert len(examples(splits)) == 6  # said once


def test_nothing_but_bad_files(tmp_path):
  for path in colours(tmp_path, 1).glob('*/*'):
    empty(path)
  splits = read(tmp_path, skip=True)
  with pytest.warns(UserWarning, match='left out'), pytest.raises(ValueError, match='None of the 2 images, such as'):
    splits.train[0]


def test_a_contradiction_is_not_a_bad_file(tmp_path):
  """What `fit` objects to stops the run, with skip too."""
  def fit(image, name):
    raise ValueError(f'{name} is too small.')
  with pytest.raises(ValueError, match=r'png is too small'):
    read(colours(tmp_path), fit=fit, skip=True).train[0]


# Digits


def test_digits_are_split_once_and_for_all():
  splits, again = sources.digits(as_it_is), sources.digits(as_it_is)
  assert (len(splits.train), len(splits.test), splits.classes) == (1500, 297, 10)
  rows = lambda arrays: np.concatenate([arrays.images.reshape(len(arrays), -1), arrays.labels[:, None]], 1).astype(int)
  both = np.concatenate([rows(splits.train), rows(splits.test)])
  data = load_digits()
  whole = np.concatenate([np.rint(data.data * 255 / 16), data.target[:, None]], 1).astype(int)
  # As multisets equal: nothing is lost, nothing in both. Half grey values may be rounded either way.
  np.testing.assert_array_equal(both[np.lexsort(both.T)], whole[np.lexsort(whole.T)])
  np.testing.assert_array_equal(splits.train.images, again.train.images)
  counts = [np.bincount(source.labels, minlength=10) for source in (splits.train, splits.test)]
  assert chi2_contingency(counts).pvalue > 0.01
  assert splits.train.images.min() == 0 and splits.train.images.max() == 255
  assert splits.train[3]['x'].shape == (8, 8, 1) and splits.train[3]['label'].dtype == np.int32


# TFDS


def test_an_unknown_tfds_name(tmp_path):
  with pytest.raises(ValueError, match=r"TFDS knows no set named 'fashion_mnistt' \(config.data.name\)"):
    sources.tfds('fashion_mnistt', str(tmp_path), 'train', 'test', as_it_is)


@pytest.mark.parametrize('tensorflow, advice', [
    (None, r"needs tensorflow: type pip install 'diffusion_jax\[tfds\]'"), ('there', 'Name or service not known')])
def test_a_tfds_set_that_is_not_prepared(tmp_path, monkeypatch, tensorflow, advice):
  """Nothing is downloaded here: the preparation fails as it does without tensorflow, and without a network."""
  from tensorflow_datasets.core import DatasetBuilder
  def fail(self, **options):
    raise OSError('Name or service not known')
  monkeypatch.setattr(DatasetBuilder, 'download_and_prepare', fail)
  monkeypatch.setattr(sources.importlib.util, 'find_spec', lambda name: tensorflow)
  with pytest.raises(ValueError, match=rf'fashion_mnist is not prepared in {tmp_path}.*{advice}.*'
                     'set TFDS_DATA_DIR or --config.data.path'):
    sources.tfds('fashion_mnist', str(tmp_path), 'train', 'test', as_it_is)


@pytest.mark.skipif('TFDS_DATA_DIR' not in os.environ, reason='TFDS_DATA_DIR names no folder of prepared sets')
def test_a_prepared_tfds_set():
  splits = sources.tfds('fashion_mnist', '', 'train[:500]', 'test', as_it_is)
  assert (len(splits.train), len(splits.test), splits.classes) == (500, 10_000, 10)
  assert [splits.test[i]['label'] for i in range(5)] == [splits.test[np.int64(i)]['label'] for i in range(5)]
  example = splits.train[499]
  assert example['x'].shape == (28, 28, 1) and example['x'].dtype == np.uint8
  labels = [int(splits.train[i]['label']) for i in range(500)]
  assert set(labels) == set(range(10))
  # Trousers (1) are narrow and ankle boots (9) wide: the labels belong to the images.
  widths = np.array([(splits.train[i]['x'].max((0, 2)) > 50).sum() for i in range(500)])
  width = lambda label: widths[np.array(labels) == label].mean()
  assert width(1) + 5 < width(9)
