"""Pictures that are asked for: the same in any list and on any mesh, from an image, within a mask, between two, again."""
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import generate as module
from diffusion_jax import run as runs
from diffusion_jax.core.types import Level
from diffusion_jax.generate import again, load, read_settings
from diffusion_jax.jobs import generate as job
from diffusion_jax.jobs import train
from diffusion_jax.runtime import products
from diffusion_jax.runtime.workdir import load_complete
from diffusion_jax.tasks.shapes import Shapes
from tests.jobs.runs import tiny
from tests.test_readme import blocks

PROMPTS = ['two red rings at the top', 'a blue square', 'three white crosses', '', 'green triangles on the left']
IMAGE = Shapes(1, 16, 0, unseen=False)[0]['x']
MASK = np.zeros((16, 16), bool)
MASK[4:10, 5:12] = True


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run on shapes of two steps."""
  folder = tmp_path_factory.mktemp('shapes') / 'run'
  config = tiny(task='captions', data__source='shapes', data__size=(16, 16), data__channels=3, data__count=40,
                data__holdout=8, text__encoder='CLIPText(width=16, layers=1, heads=2)', text__length=32, train__steps=2,
                condition__known=True, condition__reference='CLIPVision(width=16, layers=1, heads=2, patch=8)',
                sample__batch=8, transform='guide(2.0) | clip(1.0)', mesh='data=1')
  assert train.run(config, folder) == 0
  return folder


@pytest.fixture(scope='module', autouse=True)
def noisy_weights():
  """Weights that are noise, so that everything makes a difference."""
  def trained(this):
    state, rng = runs.trained(this), np.random.default_rng(0)
    noisy = lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
    return state._replace(ema=jax.tree.map(noisy, state.ema))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, 'trained', trained)
    yield


@pytest.fixture(scope='module')
def generate(workdir):
  return load(workdir)


def near(a, b):
  """Within 1 / 255."""
  return np.abs(a.pixels.astype(int) - b.pixels).max() <= 1


def test_a_picture_is_the_same_alone_and_in_a_list_and_on_eight_devices(generate, workdir):
  listed = generate(PROMPTS, count=2, seed=3)
  assert [each.settings['prompt'] for each in listed] == [text for text in PROMPTS for _ in range(2)]
  alone, = generate(PROMPTS[2:3], first=1, seed=3)
  assert near(alone, listed[5]) and not near(listed[4], listed[5]) and not near(listed[3], listed[5])
  config = load_complete(workdir)
  config.mesh = 'data=8'
  assert all(map(near, load(workdir, config)(PROMPTS, count=2, seed=3), listed))
  assert not near(generate(PROMPTS[2:3], first=1, seed=4)[0], alone)


def test_a_picture_can_be_made_again_from_itself(generate, tmp_path):
  fields = dict(negative='red', guidance=1.5, seed=2, steps=3, solver='ancestral()', image=IMAGE, mask=MASK, strength=0.9,
                reference=255 - IMAGE)
  _, picture = generate(PROMPTS[:2], **fields)
  path = picture.save(tmp_path / 'a' / 'picture.png')
  np.testing.assert_array_equal(np.asarray(Image.open(path)), picture.pixels)
  remade = again(path)
  np.testing.assert_array_equal(remade.pixels, picture.pixels)
  assert remade.settings == {**picture.settings, 'outpaint': [0, 0, 0, 0]}
  assert read_settings(path)['transform'] == 'guide(1.5) | clip(1.0)' and read_settings(path)['grid'] == 'uniform(3)'


def test_fifty_guided_steps_are_fifty_calls_of_the_network(workdir):
  """By the FLOPs of the traced program: each step is one call of both branches, and there is nothing else."""
  config = load_complete(workdir)
  config.grid, config.sample.batch = 'uniform(50)', 4
  this = runs.open_run(config, workdir, read=False)
  params, extra = jax.eval_shape(this.method.init, jax.random.key(0))
  cond = jax.eval_shape(lambda: jax.tree.map(lambda leaf: np.repeat(leaf[None], 8, 0), this.task.null))
  x, level = jax.ShapeDtypeStruct((8, 16, 16, 3), np.float32), Level(*[jax.ShapeDtypeStruct((), np.float32)] * 3)
  denoise = lambda params, *of: this.method.denoiser(params, extra)(*of)
  call = jax.jit(denoise).trace(params, x, level, cond)
  flops = lambda traced: products.total(list(products.products(traced.jaxpr)))
  assert flops(runs.trace_sampler(this, this.config.transform, this.config.sample.batch)) == 50 * flops(call) > 0


def test_strength_is_where_it_starts(generate):
  plain, = generate([PROMPTS[0]], seed=1)
  kept, some, free = (generate([PROMPTS[0]], seed=1, image=IMAGE, strength=strength)[0] for strength in (0.0, 0.01, 1.0))
  np.testing.assert_array_equal(kept.pixels, IMAGE)
  np.testing.assert_array_equal(free.pixels, plain.pixels)
  assert 0 < np.abs(some.pixels.astype(int) - IMAGE).mean() < 10 < np.abs(free.pixels.astype(int) - IMAGE).mean()


def test_what_is_outside_of_the_mask_stays_and_what_is_inside_is_not_seen(generate):
  plain, = generate([PROMPTS[0]], image=IMAGE, mask=MASK)
  assert np.abs(plain.pixels.astype(int) - IMAGE)[~MASK].max() <= 1
  other, = generate([PROMPTS[0]], image=np.where(MASK[..., None], 255 - IMAGE, IMAGE), mask=MASK)
  np.testing.assert_array_equal(other.pixels, plain.pixels)


def test_inversion_leads_back_and_another_prompt_elsewhere(generate):
  """What the source prompt gives is the image, but for the error of steps and rounding; noise of that strength is not."""
  fields = dict(image=IMAGE, strength=0.5, guidance=1.0, steps=8)
  apart = lambda picture: np.abs(picture.pixels.astype(int) - IMAGE).mean()
  noised, back, other = (generate([prompt], source=source, **fields)[0] for prompt, source in (
    (PROMPTS[0], None), (PROMPTS[0], PROMPTS[0]), (PROMPTS[1], PROMPTS[0])))
  assert apart(back) < 0.2 * apart(noised) and apart(back) < 0.5 * apart(other)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{'solver': 'ancestral()', 'strength': 0.8}, {'inpaint': 'ddnm()', 'solver': 'heun()'}])
def test_any_solver_holds_what_is_known(generate, fields):
  plain, = generate([PROMPTS[0]], image=IMAGE, mask=MASK, **fields)
  assert np.abs(plain.pixels.astype(int) - IMAGE)[~MASK].max() <= 1


def test_a_network_that_was_trained_for_it_sees_what_is_known(generate):
  """dps with a std of a million pulls at nothing: what is outside of the mask acts by the condition alone."""
  fields = dict(mask=MASK, inpaint='dps(1e6)')
  plain, = generate([PROMPTS[0]])
  seen, inside, outside = (generate([PROMPTS[0]], image=image, **fields)[0] for image in (
    IMAGE, np.where(MASK[..., None], 255 - IMAGE, IMAGE), np.where(MASK[..., None], IMAGE, 255 - IMAGE)))
  np.testing.assert_array_equal(seen.pixels, inside.pixels)
  assert not near(seen, outside) and not near(seen, plain)


def test_a_reference_is_seen_in_any_size_and_guidance_leads_to_it(generate):
  plain, seen, large, other = (generate([PROMPTS[0]], **fields)[0] for fields in (
    {}, {'reference': IMAGE}, {'reference': IMAGE.repeat(2, 0).repeat(2, 1)}, {'reference': 255 - IMAGE}))
  apart = lambda picture: np.abs(picture.pixels.astype(int) - seen.pixels).mean()
  assert apart(large) < 0.3 * min(apart(plain), apart(other))  # resized, which blurs it
  null, same = (generate([PROMPTS[0]], guidance=0.0, **fields)[0] for fields in ({}, {'reference': IMAGE}))
  assert near(null, same)


def test_a_reference_for_a_network_without_one_gets_a_sentence(tmp_path):
  config = tiny(task='captions', data__source='shapes', data__size=(16, 16), data__channels=3, text__length=32)
  run = runs.open_run(config, tmp_path, read=False)
  with pytest.raises(ValueError, match='This run takes no reference: train one with --config.condition.reference='):
    module.check(module.Request(reference=IMAGE, seed=0, negative=''), run)


@pytest.mark.slow
def test_a_measurement_pulls_towards_the_known(generate):
  """dps, which does not replace, is nearer to the known pixels than a sample that does not know them."""
  apart = lambda picture: np.abs(picture.pixels.astype(int) - IMAGE)[~MASK].mean()
  plain, = generate([PROMPTS[0]], solver='ancestral()')
  pulled, = generate([PROMPTS[0]], solver='ancestral()', image=IMAGE, mask=MASK, inpaint='dps(0.5)')
  assert apart(pulled) < 0.9 * apart(plain)


def test_outpainting_keeps_the_picture_on_a_larger_canvas(generate):
  picture, = generate([PROMPTS[1]], image=IMAGE, outpaint=(4, 0, 2, 6))
  assert picture.pixels.shape == (22, 22, 3)
  assert np.abs(picture.pixels[:16, 4:20].astype(int) - IMAGE).max() <= 1
  assert picture.pixels[16:].std() > 0


def test_a_negative_and_a_scale_change_the_picture(generate):
  plain, same, away, far = (generate([PROMPTS[0]], **fields)[0] for fields in (
    {}, {'guidance': 2.0}, {'negative': 'a blue square'}, {'guidance': 1.0}))
  np.testing.assert_array_equal(plain.pixels, same.pixels)  # the run's own
  assert not near(plain, away) and not near(plain, far)


@pytest.mark.parametrize('ends, fields', [
  ({'seed': 5, 'prompts': PROMPTS[1]}, {}),
  pytest.param({'prompts': PROMPTS[1]}, {'negative': 'red', 'solver': 'ancestral()'}, marks=pytest.mark.slow),
  pytest.param({'prompts': PROMPTS[1]}, {'image': IMAGE, 'mask': MASK, 'strength': 0.9}, marks=pytest.mark.slow),
  pytest.param({'seed': 5}, {'image': IMAGE, 'outpaint': (2, 0, 0, 0), 'strength': 1.0}, marks=pytest.mark.slow),
  pytest.param({'seed': 5, 'prompts': ''}, {'guidance': 1.0, 'solver': 'heun()'}, marks=pytest.mark.slow),
])
def test_a_series_goes_from_one_picture_to_the_other(generate, ends, fields):
  """Its ends are the pictures of the two prompts, or seeds, asked for alone; the middle is neither."""
  towards = {{'prompts': 'towards', 'seed': 'towards_seed'}[name]: end for name, end in ends.items()}
  begin, middle, end = generate([PROMPTS[0]], seed=1, first=3, between=np.linspace(0, 1, 3), **towards, **fields)
  one, = generate([PROMPTS[0]], seed=1, first=3, **fields)
  other, = generate([ends.get('prompts', PROMPTS[0])], seed=ends.get('seed', 1), first=3, **fields)
  assert near(begin, one) and near(end, other)
  assert not near(middle, one) and not near(middle, other) and not near(one, other)


@pytest.mark.slow
def test_a_picture_of_a_series_can_be_made_again_from_itself(generate, workdir, tmp_path):
  """Alone and on eight devices, with the noise of the solver's steps and both ways at once."""
  fields = dict(towards=PROMPTS[1], towards_seed=7, between=(0.25, 0.5), solver='ancestral()', seed=2)
  series = generate(PROMPTS[:2], **fields)
  assert [each.settings['between'] for each in series] == [[0.25], [0.5]] * 2
  remade = again(series[1].save(tmp_path / 'picture.png'))
  assert near(remade, series[1]) and not near(remade, series[0])
  assert remade.settings == {**series[1].settings, 'outpaint': [0, 0, 0, 0]}
  config = load_complete(workdir)
  config.mesh = 'data=8'
  assert all(map(near, load(workdir, config)(PROMPTS[:2], **fields), series))


def test_a_run_has_a_negative_of_its_own(generate, workdir):
  config = load_complete(workdir)
  config.sample.negative = 'a blue square'
  own, asked = load(workdir, config)([PROMPTS[0]])[0], generate([PROMPTS[0]], negative='a blue square')[0]
  np.testing.assert_array_equal(own.pixels, asked.pixels)


def test_the_empty_prompt_is_the_null(generate):
  null, empty = generate([PROMPTS[0]], guidance=0.0)[0], generate([''])[0]
  assert near(null, empty)


def test_the_job_writes_a_picture_each_and_a_sheet(workdir, tmp_path, capsys):
  (tmp_path / 'prompts.txt').write_text('two red rings\n\na blue square\n')
  asked = {'prompts': str(tmp_path / 'prompts.txt'), 'guidance': (1.0, 2.0), 'count': 2, 'out': str(tmp_path / 'out')}
  assert job.run(load_complete(workdir), workdir, asked) == 0
  names = sorted(path.name for path in (tmp_path / 'out').iterdir())
  assert names == [*(f'{i:04d}.png' for i in range(8)), 'sheet.png'] and 'sheet.png' in capsys.readouterr().out
  assert np.asarray(Image.open(tmp_path / 'out' / 'sheet.png')).shape == (2 * 34, 4 * 34, 3)
  said = [read_settings(tmp_path / 'out' / f'{i:04d}.png') for i in range(8)]
  assert [(each['prompt'], each['transform'], each['number']) for each in said] == [
    (prompt, f'guide({scale}) | clip(1.0)', number) for prompt in ('two red rings', 'a blue square')
    for scale in (1.0, 2.0) for number in (0, 1)]
  assert job.run(load_complete(workdir), workdir, {'again': str(tmp_path / 'out' / '0003.png'), 'out': str(tmp_path)}) == 0
  np.testing.assert_array_equal(*(np.asarray(Image.open(path)) for path in (
    tmp_path / '0003_again.png', tmp_path / 'out' / '0003.png')))


def test_the_job_writes_a_row_of_frames_a_prompt_and_a_gif(workdir, tmp_path):
  (tmp_path / 'prompts.txt').write_text('two red rings\na blue square\n')
  asked = {'prompts': str(tmp_path / 'prompts.txt'), 'towards': 'green', 'frames': 3, 'out': str(tmp_path / 'out')}
  assert job.run(load_complete(workdir), workdir, asked) == 0
  assert [read_settings(tmp_path / 'out' / f'{i:04d}.png')['between'] for i in range(6)] == [[0.0], [0.5], [1.0]] * 2
  assert np.asarray(Image.open(tmp_path / 'out' / 'sheet.png')).shape == (2 * 34, 3 * 34, 3)
  with Image.open(tmp_path / 'out' / 'frames.gif') as gif:
    assert (gif.n_frames, gif.size) == (3, (34, 34))


@pytest.mark.parametrize('prompts, fields, sentence', [
  ([], {}, 'There are no prompts'),
  ('a ring', {}, "prompts is 'a ring'; it must be a list of texts: ['a ring']"),
  ([''], {'image': IMAGE / 255, 'strength': 0.5}, 'the type float64; legal are 3 axes of uint8'),
  ([''], {'image': IMAGE[..., 0], 'strength': 0.5}, 'image has the shape (16, 16)'),
  ([''], {'image': IMAGE, 'mask': MASK.astype(np.uint8)}, 'mask has the shape (16, 16) and the type uint8'),
  ([''], {'image': IMAGE, 'strength': 0.5, 'inpaint': 'dps(0.1)'}, 'nothing is to be held'),
  ([''], {'negative': 'red', 'guidance': 1.0}, "The negative 'red' would not be seen"),
  ([''], {'image': IMAGE, 'outpaint': ()}, 'four numbers of pixels'),
  ([''], {'count': 0}, 'count is 0 and first 0; legal are 1 or more'),
  ([''], {'first': -1}, 'first -1'),
  ([''], {'image': IMAGE, 'strength': 1.5}, 'strength is 1.5; legal is from 0'),
  ([''], {'strength': 0.5}, 'strength is for an image, and there is none: type --image=picture.png'),
  ([''], {'mask': MASK}, 'mask is for an image'),
  ([''], {'image': IMAGE, 'source': 'a ring'}, 'A source prompt needs a strength below 1'),
  ([''], {'source': 'a ring', 'strength': 0.5}, 'is for an image, and there is none'),
  ([''], {'outpaint': (0, 4, 0, 0)}, 'outpaint is for an image'),
  ([''], {'image': IMAGE}, 'What is to become of the image? Type --strength=0.6'),
  ([''], {'image': IMAGE, 'mask': MASK[:8]}, 'The mask has 8x16 pixels and the image 16x16'),
  ([''], {'image': IMAGE[..., :1], 'strength': 0.5}, 'The image has 1 channels; this run has 3'),
  ([''], {'reference': IMAGE[..., :1]}, 'The reference has 1 channels; this run has 3'),
  ([''], {'image': IMAGE, 'outpaint': (0, -4, 0, 0)}, 'four numbers of pixels: left, top, right, bottom'),
  ([''], {'image': IMAGE, 'outpaint': (4, 4)}, 'four numbers of pixels'),
  ([''], {'image': IMAGE, 'mask': MASK, 'inpaint': 'replce()'}, "'replce' is unknown. Did you mean 'replace'"),
  ([''], {'steps': 0}, 'steps is 0'),
  ([''], {'seed': -1}, 'seed is -1; legal are 0 to 4294967295'),
  ([''], {'towards_seed': 2**32, 'between': [0.5]}, 'towards_seed is 4294967296; legal are 0 to 4294967295'),
  ([''], {'towards': 'red'}, "towards is 'red', but no picture on the way there is asked for: type --frames=8"),
  ([''], {'towards_seed': 1}, 'towards_seed is 1, but no picture on the way there is asked for'),
  ([''], {'between': [0.5]}, "there is no other: type --towards='a blue square' or --towards_seed=1"),
  ([''], {'between': [0.5, 1.5], 'towards': ''}, 'between is (0.5, 1.5); legal are places from 0'),
  ([''], {'between': [0.5], 'towards': '', 'count': 2}, 'count is 2, but a prompt has a picture for each frame'),
  ([''], {'between': [0.5], 'towards_seed': 1, 'image': IMAGE, 'strength': 0.5}, 'noised to strength 0.5 alone'),
  ([''], {'guidance': float('nan')}, 'guidance is nan'),
  ([''], {'solver': 'eulr()'}, "'eulr' is unknown. Did you mean 'euler'"),
])
def test_bad_input_gets_a_sentence(generate, prompts, fields, sentence):
  with pytest.raises(ValueError) as error:
    generate(prompts, **fields)
  assert sentence in str(error.value)


def test_a_run_without_conditions_has_no_other_prompt_to_go_to():
  this = SimpleNamespace(task=SimpleNamespace(null=None))
  with pytest.raises(ValueError, match="towards is '', but this run has no conditions to go to: type --towards_seed=1"):
    module.check_way(module.Request(towards='', between=(0.5,)), this)


def test_a_run_without_guidance_says_what_to_type(workdir):
  config = load_complete(workdir)
  config.transform = 'clip(1.0)'
  generate = load(workdir, config)
  with pytest.raises(ValueError, match="has no weight to set: type --config.transform='guide"):
    generate([''], guidance=2.0)
  with pytest.raises(ValueError, match="The negative 'red' would not be seen: config.transform is 'clip"):
    generate([''], negative='red')


@pytest.mark.parametrize('asked, sentence', [
  ({'prompt': 'a', 'prompts': 'b'}, 'Both --prompt and --prompts are given'),
  ({'prompts': 'nowhere.txt'}, '--prompts=nowhere.txt is not a file'),
  ({'prompts': 'empty.txt'}, 'holds no prompts'),
  ({'towards': 'a', 'frames': 1}, '--frames is 1; a way has two ends: type 2 or more.'),
  ({'frames': 3}, "there is no other: type --towards='a blue square'"),
  ({'image': 'nowhere.png', 'strength': 0.5}, 'The picture nowhere.png cannot be read'),
  ({'again': 'plain.png'}, 'plain.png holds no settings'),
  ({'again': 'nowhere.png'}, 'The picture nowhere.png cannot be read'),
  ({'again': 'empty.txt'}, 'The picture empty.txt cannot be read'),
  ({'prompts': 'plain.png'}, 'is no text in UTF-8'),
  ({'again': 'plain.png', 'count': 3}, '--again takes all from the PNG; leave --count out'),
])
def test_bad_files_get_a_sentence(workdir, tmp_path, monkeypatch, asked, sentence):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty.txt').write_text('\n \n')
  Image.fromarray(IMAGE).save('plain.png')
  with pytest.raises(ValueError) as error:
    job.run(load_complete(workdir), workdir, asked)
  assert sentence in str(error.value)


def test_a_run_that_went_on_makes_another_picture(generate, workdir, tmp_path):
  picture, = generate([PROMPTS[0]])
  path = picture._replace(pixels=255 - picture.pixels, settings={**picture.settings, 'step': 1}).save(tmp_path / 'old.png')
  with pytest.raises(ValueError, match='was made at step 1 of the run in .*, at step 2, makes another picture'):
    again(path)


def test_the_readme_s_three_lines(workdir, tmp_path, monkeypatch, generate):
  block, = (block for block in blocks() if 'diffusion_jax.generate' in block)
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'shapes').symlink_to(workdir)
  monkeypatch.chdir(tmp_path)
  exec(block, {})
  picture, = generate(['two red rings at the top'], guidance=3.0)
  np.testing.assert_array_equal(np.asarray(Image.open('rings.png')), picture.pixels)
