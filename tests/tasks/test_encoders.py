"""A text encoder taken from another run: what it says, what is kept on disk, what is trained, and what is refused."""
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import generate as module
from diffusion_jax import run as runs
from diffusion_jax.build import build
from diffusion_jax.jobs import train
from diffusion_jax.networks.text import encoders as rows
from diffusion_jax.runtime.workdir import load_complete, open_workdir, write_json
from diffusion_jax.tasks import captions, encoders, tokenizers
from diffusion_jax.tasks.task import make_task
from tests.jobs.runs import losses, tiny, trained_state

CLIP = 'CLIPText(width=16, layers=1, heads=2)'
T5 = 'T5Encoder(width=16, layers=1, heads=2, head_channels=8, mlp=16, param_dtype="bfloat16")'
PROMPTS = ('two red rings at the top', 'a blue square', '')


def config(**fields):
  return tiny(**dict(task='captions', data__source='shapes', data__size=(16, 16), data__channels=3, data__count=40,
                     data__holdout=8, text__encoder=CLIP, text__length=32, train__steps=2, sample__batch=8,
                     network='DiT(width=8, depth=1, heads=2, patch=4)', transform='guide(2.0) | clip(1.0)',
                     evaluate__transforms=(), mesh='data=1') | fields)


def noisy(tree):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), tree)


def sayer(folder, fields):
  """What the encoder in the network of a run says of texts, one at a time, with the parameters that are sampled."""
  this = runs.open_run(fields, folder, read=False)
  params = jax.device_get(runs.chosen_params(this, runs.trained(this)))['params']['embedders_text']['encoder']
  apply = jax.jit(build(fields.text.encoder, rows(fields.text.vocabulary, fields.text.length)).apply)
  tokenizer = tokenizers.load(folder / captions.TOKENIZER)
  def say(texts):
    tokens, mask = tokenizer.encode(texts, fields.text.length)
    said = [apply({'params': params}, tokens[i:i + 1], mask[i:i + 1]) for i in range(len(texts))]
    parts = {name: np.concatenate([getattr(each, name) for each in said]) for name in ('sequence', 'pooled')}
    return {**parts, 'mask': mask}
  return say


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """(workdir, what its encoder says) of a run of two steps."""
  folder, fields = tmp_path_factory.mktemp('clip') / 'run', config()
  assert train.run(fields, folder) == 0
  return folder, sayer(folder, fields)


@pytest.fixture(scope='module')
def t5(tmp_path_factory):
  """The same of a run that stands at its first step, with averages that are far from the parameters."""
  folder, fields = tmp_path_factory.mktemp('t5') / 'run', config(text__encoder=T5)
  this = runs.open_run(fields, folder, read=True)
  open_workdir(this.config, folder)
  this.task.save(folder)
  checkpoints, state = runs.open_checkpoints(this), runs.new_state(this)
  checkpoints.save(1, state._replace(ema=noisy(state.ema)))
  checkpoints.close()
  return folder, sayer(folder, fields)


@contextmanager
def counting():
  """How many texts are encoded, call by call."""
  counts, batches = [], encoders.Frozen._batches
  def counted(self, tokens, mask):
    counts.append(len(tokens))
    return batches(self, tokens, mask)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(encoders.Frozen, '_batches', counted)
    yield counts


@pytest.fixture
def counts():
  with counting() as found:
    yield found


@pytest.fixture(scope='module')
def taken(clip, tmp_path_factory):
  """(workdir, config) of a run with the encoder of `clip`, of two steps and, when nothing of that was left, two more."""
  folder = tmp_path_factory.mktemp('taken')
  shutil.copytree(clip[0], folder / 'source')
  fields = config(text__frozen=str(folder / 'source'))
  assert train.run(fields, folder / 'run') == 0
  shutil.rmtree(folder / 'source')
  fields.train.steps = 4
  with counting() as counts:
    assert train.run(fields, folder / 'run') == 0
  assert not counts  # all was on the disk
  return folder / 'run', fields


def same(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(np.asarray(found[name]), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['clip', pytest.param('t5', marks=pytest.mark.slow)])
def test_the_network_is_given_what_the_encoder_says(request, tmp_path, counts, name):
  folder, say = request.getfixturevalue(name)
  fields = config(text__encoder=load_complete(folder).text.encoder, text__frozen=str(folder), sample__prompts=PROMPTS,
                  sample__negative='red')
  task, said, data = make_task(fields, True, tmp_path), say(PROMPTS), captions.load(fields)
  cond = task.context(np.arange(3))
  assert not counts  # before somebody reads it
  same(cond['text'], said)
  same(cond['negative']['text'], say(['red'] * 3))
  same(task.null['text'], {name: value[2] for name, value in said.items()})
  same(task.ask([*PROMPTS, *PROMPTS])['text'], {name: np.concatenate([value] * 2) for name, value in said.items()})
  held = task.examples('held_out', 8)
  same({name: held[name] for name in said}, say(data.test.prompts))
  assert counts == [3, 1, 1, 3, len(set(data.test.prompts))]
  batch = next(task.batches(0, 8, 0, 1))
  assert counts[5:] == [len(data.train.texts)]
  shown = {data.train[i]['x'].tobytes(): data.train[i]['captions'] for i in range(40)}
  for i in range(8):
    each = say(shown[batch['x'][i].tobytes()])
    apart = [np.abs(each[part] - batch[part][i]).reshape(4, -1).max(1) for part in ('sequence', 'pooled')]
    assert sum(apart).min() < 1e-5  # one of the four captions of its picture
  shape = lambda leaf: (leaf.shape, leaf.dtype)
  assert {name: shape(leaf[0]) for name, leaf in batch.items() if name != 'index'} == {
    name: shape(leaf) for name, leaf in task.row.items()}


def test_no_gradient_reaches_the_encoder(clip, taken):
  folder, fields = taken
  this = runs.open_run(fields, folder, read=False)
  assert set(runs.trained(this).params['params']['embedders_text']) == {'vector'}
  same(this.task.ask(PROMPTS)['text'], clip[1](PROMPTS))
  same(this.task.null['text'], {name: value[0] for name, value in clip[1](['']).items()})


def test_going_on_is_exact_and_every_caption_is_embedded_once(clip, taken, tmp_path, counts, capsys):
  whole, halves = config(text__frozen=str(clip[0]), train__steps=4), taken[1]
  assert train.run(whole, tmp_path / 'run') == 0
  assert counts == [1, 640]  # the null, and all captions that there are
  said = capsys.readouterr().out
  assert said.count('Embedding') == 1 and 'Embedding 640 captions with the frozen encoder, once: 1.3 MiB in ' in said
  assert losses(tmp_path / 'run') == losses(taken[0])
  for a, b in zip(trained_state(whole, tmp_path / 'run'), trained_state(halves, taken[0]), strict=True):
    np.testing.assert_array_equal(a, b)


def test_pictures_need_the_workdir_alone(taken, monkeypatch):
  folder, _ = taken
  def trained(this):
    state = runs.trained(this)
    return state._replace(ema=noisy(state.ema))
  monkeypatch.setattr(module, 'trained', trained)
  asked = dict(negative='red', guidance=3.0, image=np.zeros((16, 16, 3), np.uint8), strength=0.9, source='a red ring')
  picture, again, other = module.load(folder)([PROMPTS[0], PROMPTS[0], PROMPTS[1]], **asked)
  np.testing.assert_array_equal(picture.pixels, again.pixels)
  assert picture.pixels.std() > 0 and (picture.pixels != other.pixels).any()


def test_a_plan_has_the_shapes_without_the_run(taken, tmp_path):
  planned = runs.open_run(config(text__frozen='nowhere', sample__negative='red'), tmp_path, read=False)
  assert planned.task.row == make_task(taken[1], False, taken[0]).row
  runs.trace_step(planned, runs.state_shapes(planned), runs.batch_shapes(planned))
  runs.trace_sampler(planned, planned.config.transform, 8)
  assert not np.asarray(planned.task.context(np.arange(3))['text']['sequence']).any()


@pytest.mark.slow
def test_what_is_kept_follows_from_the_weights_and_the_texts(clip, t5, taken, tmp_path, counts):
  folder, say = clip
  tokenizer = tokenizers.load(folder / captions.TOKENIZER)
  tokens = lambda *texts: dict(zip(('tokens', 'mask'), tokenizer.encode(texts, 32), strict=True))
  there = lambda: {path.name for path in (tmp_path / 'text').glob('*')}
  def opened(source, workdir):
    fields = config(text__frozen=str(source), text__encoder=load_complete(source).text.encoder).text
    return encoders.open_frozen(fields, encoders.home(fields, workdir, True), workdir, tokens(''))
  keep = lambda source, *texts: opened(source, tmp_path).keep(tokens(*texts))
  same(keep(folder, *PROMPTS), say(PROMPTS))
  first, = there()
  same(keep(taken[0], *PROMPTS), say(PROMPTS))  # the same encoder, which that run has from `clip`
  assert there() == {first} and counts == [3]
  (tmp_path / 'text' / first).rename(tmp_path / 'text' / f'{first}.partial')  # what a kill leaves
  same(keep(folder, *PROMPTS), say(PROMPTS))
  assert there() == {first} and counts == [3, 3]
  same(keep(folder, *PROMPTS[:2]), say(PROMPTS[:2]))
  assert len(there()) == 2 and counts == [3, 3, 2]
  averaged = keep(t5[0], *PROMPTS)
  same(averaged, t5[1](PROMPTS))
  (tmp_path / 'run' / 'text').mkdir(parents=True)
  for _ in range(2):  # from the checkpoint, then from its own file
    there_or_here = opened(t5[0], tmp_path / 'run')
    same(there_or_here.embed(tokens(*PROMPTS)), averaged)
    there_or_here.save(tmp_path / 'run')
  shutil.copytree(t5[0], tmp_path / 'plain')
  fields = load_complete(t5[0])
  fields.sample.ema = 0.0  # the parameters themselves are what this one samples with
  write_json(tmp_path / 'plain' / 'config.json', fields.to_dict())
  assert np.abs(keep(tmp_path / 'plain', *PROMPTS)['pooled'] - averaged['pooled']).max() > 0.1 and len(there()) == 4


@pytest.mark.parametrize('fields, sentence', [
  ({'text__frozen': 'nowhere'}, "config.text.frozen is 'nowhere', where there is no run. Type the workdir of a run that"),
  ({'text__frozen': 'digits'}, "a run of the task 'images', which has no text encoder. Type"),
  ({'text__frozen': 'begun'}, 'in whose checkpoints there is no text encoder'),
  ({'text__length': 16, 'text__encoder': T5}, f"config.text.encoder: '{CLIP}' there, '{T5}' here"),
  ({'text__length': 16, 'text__encoder': T5}, f"Type --config.text.encoder='{CLIP}' --config.text.length=32"),
  ({'text__vocabulary': 384}, 'Type --config.text.vocabulary=512'),
  ({'text__tokenizer': 'clip.json'}, "Type --config.text.tokenizer=''"),
  ({'sample__prompts': ('a ring ' * 40,), 'text__long': 'refuse'}, 'Shorten it'),
])
def test_bad_input_gets_a_sentence(clip, tmp_path, monkeypatch, counts, fields, sentence):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(clip[0], 'begun', ignore=shutil.ignore_patterns('checkpoints'))
  Path('digits').mkdir()
  write_json(Path('digits/config.json'), tiny().to_dict())
  with pytest.raises(ValueError) as error:
    make_task(config(**{'text__frozen': str(clip[0])} | fields), True, tmp_path / 'run')
  assert sentence in str(error.value) and not counts


def test_a_file_that_is_cut_off_gets_a_sentence(taken, tmp_path):
  shutil.copytree(taken[0] / 'text', tmp_path / 'text')
  path = tmp_path / encoders.ENCODER
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(ValueError, match='encoder.npz is not whole. Bring it back, or type another --workdir'):
    make_task(taken[1], False, tmp_path)


def test_a_run_keeps_to_its_encoder(clip, taken):
  for frozen in ('', str(clip[0])):
    with pytest.raises(ValueError, match='config.text.frozen: .*source.* there, '):
      runs.open_run(config(text__frozen=frozen), taken[0], read=False)
  with pytest.raises(ValueError, match='the one in .* has begun. Bring it back, or type another --workdir'):
    runs.open_run(config(text__frozen='other'), clip[0], read=True)
