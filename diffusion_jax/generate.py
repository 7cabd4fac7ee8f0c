"""Pictures from a trained run: of prompts, from a picture, within a mask, on a larger canvas.

  generate = load('runs/shapes')
  picture, = generate(['two red rings at the top'], guidance=3.0)
  picture.save('rings.png')
"""
import json
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, PngImagePlugin

from diffusion_jax.build import with_argument
from diffusion_jax.method import GRIDS, TRANSFORMS
from diffusion_jax.run import Run, chosen_params, open_run, provenance, sampling_program, shared, trained
from diffusion_jax.runtime import mesh as meshes
from diffusion_jax.runtime.workdir import commit, load_complete
from diffusion_jax.tasks import images, sources

ABOUT = 'diffusion_jax'  # the name of the settings in a PNG


class Request(NamedTuple):
  """What to generate: `count` pictures of each prompt, a title of the run, such as a caption or a class.

  A picture's noise follows from `seed` and its number, from `first` on, among those of its prompt; so it is the same
  alone and in any list of prompts. `image`, uint8 [H, W, C], is noised to time `strength` and sampled from there: 0 gives
  it back, 1 is free of it. With `mask` [H, W], bool, only what is True may change; `outpaint` adds pixels on the
  left, top, right and bottom, which may too; the rest is held by `inpaint`: 'replace()', 'ddnm()', 'dps(0.1)' or
  'pigdm()' of constraints.py. What is None is as the run has it.
  """
  prompts: Sequence[str] = ('',)
  negative: str = ''
  guidance: float | None = None
  image: np.ndarray | None = None
  strength: float | None = None
  mask: np.ndarray | None = None
  outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
  inpaint: str = 'replace()'
  count: int = 1
  first: int = 0
  seed: int = 0
  steps: int | None = None
  solver: str | None = None


class Picture(NamedTuple):
  """A picture, uint8 [H, W, C], and all by which it can be made again."""
  pixels: np.ndarray
  settings: dict

  def save(self, path: str | Path) -> Path:
    """Write a PNG that holds the settings."""
    info, path = PngImagePlugin.PngInfo(), Path(path)
    info.add_itxt(ABOUT, json.dumps(self.settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    sources.to_picture(self.pixels).save(path, pnginfo=info)
    return path


def load(workdir: str | Path, config: ConfigDict | None = None) -> Callable[..., list[Picture]]:
  """A function that takes the fields of `Request` and gives the pictures, all of the first prompt first.

  Raises ValueError where the workdir holds no trained run, as the function does where a field contradicts the run.
  """
  workdir = Path(workdir)
  this = open_run(config or load_complete(workdir), workdir, read=False)
  state = trained(this)
  @cache
  def program(config_json: str, shape: tuple[int, ...], strength: float, inpaint: str):
    run = this._replace(config=ConfigDict(json.loads(config_json)), task=this.task._replace(shape=shape))
    return jax.jit(sampling_program(run, run.config.transform, strength=strength, inpaint=inpaint))
  def generate(prompts: Sequence[str] = ('',), **fields) -> list[Picture]:
    request = Request(tuple(prompts), **fields)
    check(request, this)
    config = configured(this.config, request)
    canvas, known = on_canvas(request)
    settings = describe(request, this._replace(config=config), state)
    numbers = range(request.first, request.first + request.count)
    about = [{**settings, 'prompt': prompt, 'number': number} for prompt in request.prompts for number in numbers]
    if request.strength == 0:
      return [Picture(canvas, each) for each in about]
    shape = this.task.shape if canvas is None else canvas.shape
    run = program(config.to_json_best_effort(), shape, request.strength, request.inpaint)
    pictures = draw(this, run, state, request, [each['prompt'] for each in about], canvas, known)
    return [Picture(*each) for each in zip(pictures, about, strict=True)]
  return generate


def draw(this: Run, program: Callable, state, request: Request, prompts: list[str], canvas, known) -> np.ndarray:
  """The pictures of the prompts, one each, config.sample.batch at a time."""
  total = len(prompts)
  batch = shared(this, min(1 << (total - 1).bit_length(), this.config.sample.batch))  # few sizes, each of which is compiled
  seed, parts = jax.device_put(np.uint32(request.seed), meshes.replicated(this.mesh)), []
  for first in range(0, total, batch):
    rows = np.minimum(np.arange(first, first + batch), total - 1)  # the last batch is filled up; the surplus is cut off
    cond = this.task.ask([prompts[row] for row in rows])
    if request.negative:
      cond = {**cond, 'negative': this.task.ask([request.negative] * batch)}
    number = (request.first + rows % request.count).astype(np.int32)
    every = lambda array: np.broadcast_to(array[None], (batch, *array.shape)).copy()
    edit = [] if canvas is None else [every(np.asarray(images.encode(canvas)))]
    edit += [] if known is None else [every(known[..., None])]
    with jax.transfer_guard('disallow'):
      inputs = meshes.place((number, cond, edit), this.mesh)
      samples = meshes.gather(program(chosen_params(this, state), state.extra, *inputs[:2], seed, *inputs[2]))
    parts.append(this.task.decode(samples))
  return np.concatenate(parts)[:total]


def check(request: Request, this: Run) -> None:
  """Raise ValueError, with a sentence, where a field is illegal."""
  if not request.prompts:
    raise ValueError('There are no prompts: type --prompt="...", or a line for each in the file of --prompts.')
  if request.count < 1 or request.first < 0:
    raise ValueError(f'count is {request.count} and first {request.first}; legal are 1 or more, and 0 or more.')
  if request.strength is not None and not 0 <= request.strength <= 1:
    raise ValueError(f'strength is {request.strength}; legal is from 0, the image itself, to 1, free of it.')
  if not 0 <= request.seed < 2**32:
    raise ValueError(f'seed is {request.seed}; legal are 0 to {2**32 - 1}.')
  if request.steps is not None and request.steps < 1:
    raise ValueError(f'steps is {request.steps}; it must be 1 or more.')
  if request.guidance is not None and not math.isfinite(request.guidance):
    raise ValueError(f'guidance is {request.guidance}; it must be finite.')
  if min(request.outpaint) < 0 or len(request.outpaint) != 4:
    raise ValueError(f'outpaint is {request.outpaint}; legal are four numbers of pixels: left, top, right, bottom.')
  for name, given in (('strength', request.strength is not None), ('mask', request.mask is not None),
                      ('outpaint', any(request.outpaint))):
    if given and request.image is None:
      raise ValueError(f'{name} is for an image, and there is none: type --image=picture.png')
  if request.image is not None and request.image.shape[2] != this.task.shape[-1]:
    raise ValueError(f'The image has {request.image.shape[2]} channels; this run has {this.task.shape[-1]}.')
  if request.image is not None and request.strength is None and request.mask is None and not any(request.outpaint):
    raise ValueError('What is to become of the image? Type --strength=0.6, --mask=mask.png or --outpaint=8,0,8,0.')
  if request.mask is not None and request.mask.shape != request.image.shape[:2]:
    raise ValueError('The mask has {}x{} pixels and the image {}x{}: they must have the same.'.format(
        *request.mask.shape, *request.image.shape[:2]))


def configured(config: ConfigDict, request: Request) -> ConfigDict:
  """The config of a run with what the request sets."""
  config = config.copy_and_resolve_references()
  def set_in(field, name, value, names, needs):
    text = with_argument(config[field], name, value, names)
    if text is None:
      raise ValueError(f'config.{field} is {config[field]!r}, which has no {name} to set: type {needs}')
    config[field] = text
  if request.guidance is not None:
    set_in('transform', 'weight', request.guidance, TRANSFORMS, "--config.transform='guide(3.0) | clip(1.0)'")
  elif request.negative and with_argument(config.transform, 'weight', 1.0, TRANSFORMS) is None:
    raise ValueError(f'A negative prompt needs guidance; config.transform is {config.transform!r}: type --guidance=3')
  if request.steps is not None:
    set_in('grid', 'steps', request.steps, GRIDS, "--config.grid='uniform(50)'")
  if request.solver is not None:
    config.solver = request.solver
  return config


def on_canvas(request: Request) -> tuple[np.ndarray | None, np.ndarray | None]:
  """(the image on the canvas, which of its pixels are known), both None where there is no image, the second where all may
  change."""
  if request.image is None:
    return None, None
  left, top, right, bottom = request.outpaint
  margins = ((top, bottom), (left, right))
  canvas = np.pad(request.image, (*margins, (0, 0)), mode='edge')
  if request.mask is None and not any(request.outpaint):
    return canvas, None
  fixed = np.ones(request.image.shape[:2], bool) if request.mask is None else ~request.mask
  return canvas, np.pad(fixed, margins)


def describe(request: Request, this: Run, state) -> dict:
  """The settings that all pictures of a request share."""
  plain = {name: value for name, value in request._asdict().items()
           if name not in ('prompts', 'image', 'mask', 'count', 'first', 'seed', 'steps', 'solver', 'guidance')}
  kept = {name: png(value) for name, value in (('image', request.image), ('mask', request.mask)) if value is not None}
  about = provenance(this, state, request.count, this.config.transform)
  return {**plain, **about, **kept, 'seed': request.seed, 'workdir': str(this.workdir), 'commit': commit()}


def again(path: str | Path, workdir: str | Path | None = None) -> Picture:
  """Make a picture again from the settings that its PNG holds, with the run that it names or that of `workdir`.

  Raises ValueError where the run has been trained on since.
  """
  settings = read_settings(path)
  workdir = Path(workdir or settings['workdir'])
  config = load_complete(workdir)
  config.transform, config.grid, config.sample.ema = settings['transform'], settings['grid'], float(settings['ema'])
  unpack = lambda text: sources.to_array(Image.open(BytesIO(b64decode(text))))
  kept = {'image': unpack(settings['image'])} if 'image' in settings else {}
  kept |= {'mask': unpack(settings['mask'])[..., 0] > 0} if 'mask' in settings else {}
  same = {name: settings[name] for name in ('negative', 'strength', 'inpaint', 'seed', 'solver')}
  picture, = load(workdir, config)([settings['prompt']], **same, **kept, outpaint=tuple(settings['outpaint']),
                                   first=settings['number'])
  if picture.settings['step'] != settings['step']:
    raise ValueError(f'{path} was made at step {settings["step"]}; the run in {workdir} is at step '
                     f'{picture.settings["step"]}, and makes another picture.')
  return picture


def read_settings(path: str | Path) -> dict:
  """The settings that a PNG holds. Raises ValueError where it holds none."""
  with Image.open(path) as picture:
    text = getattr(picture, 'text', {}).get(ABOUT)
  if text is None:
    raise ValueError(f'{path} holds no settings: it was not made here, or another program has written it anew.')
  return json.loads(text)


def png(array: np.ndarray) -> str:
  """A picture or a mask as the text of a PNG."""
  file = BytesIO()
  (Image.fromarray(array) if array.ndim == 2 else sources.to_picture(array)).save(file, 'png')
  return b64encode(file.getvalue()).decode()
