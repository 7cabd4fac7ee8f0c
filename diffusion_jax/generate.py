"""Pictures from a trained run: of prompts, from a picture, within a mask, on a larger canvas, between two.

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
from diffusion_jax.tasks.task import Task

ABOUT = 'diffusion_jax'  # the name of the settings in a PNG
# Of the request, in the settings of each picture.
KEPT = 'negative', 'strength', 'source', 'outpaint', 'inpaint', 'seed', 'towards', 'towards_seed'


class Request(NamedTuple):
  """What to generate: `count` pictures of each prompt, a title of the run, such as a caption or a class.

  A picture's noise follows from `seed` and its number, from `first` on, among those of its prompt; so it is the same
  alone and in any list of prompts. `image`, uint8 [H, W, C], is noised to time `strength` and sampled from there: 0 gives
  it back, 1 is free of it. Where `source` says what it shows, it is led there by the inverse of DDIM in place of noise, so
  that the source as a prompt gives it back, and another changes what they differ in. With `mask` [H, W], bool, only what
  is True may change; `outpaint` adds pixels on the left, top, right and bottom, which may too; the rest is held by
  `inpaint`: 'replace()', 'ddnm()', 'dps(0.1)' or 'pigdm()' of constraints.py, and shown to a network that was trained for
  it. `reference`, uint8 [H, W, C], is what the picture is to be like. `between` are places from 0 to 1, a picture for each
  in place of `count`, on the way from the prompt to that of `towards`, and from the noise at the start to that of
  `towards_seed`; the noise of a stochastic solver's steps stays. What is None is as the run has it.
  """
  prompts: Sequence[str] = ('',)
  negative: str | None = None
  guidance: float | None = None
  image: np.ndarray | None = None
  strength: float | None = None
  source: str | None = None
  mask: np.ndarray | None = None
  outpaint: tuple[int, int, int, int] = (0, 0, 0, 0)
  inpaint: str = 'replace()'
  reference: np.ndarray | None = None
  count: int = 1
  first: int = 0
  seed: int | None = None
  towards: str | None = None
  towards_seed: int | None = None
  between: Sequence[float] = ()
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
  def program(transform: str, grid: str, solver: str, shape: tuple[int, ...], strength: float | None, inpaint: str):
    config = this.config.copy_and_resolve_references()
    config.grid, config.solver = grid, solver
    run = this._replace(config=config, task=this.task._replace(shape=shape))
    return jax.jit(sampling_program(run, transform, strength=strength, inpaint=inpaint))
  def generate(prompts: Sequence[str] = ('',), **fields) -> list[Picture]:
    request = completed(Request(prompts, **fields), this.config)
    check(request, this)
    if request.reference is not None:
      request = request._replace(reference=images.fit_of(this.config.data)(request.reference, 'The reference'))
    config = configured(this.config, request)
    canvas, known = on_canvas(request)
    settings = describe(request, this._replace(config=config), state)
    way = [{'number': request.first, 'between': [place]} for place in request.between]
    way = way or [{'number': request.first + i} for i in range(request.count)]
    about = [{**settings, 'prompt': prompt, **each} for prompt in request.prompts for each in way]
    if request.strength == 0:
      return [Picture(canvas, each) for each in about]
    shape = this.task.shape if canvas is None else canvas.shape
    run = program(config.transform, config.grid, config.solver, shape, request.strength, request.inpaint)
    pictures = draw(this, run, state, request, about, canvas, known)
    return [Picture(*each) for each in zip(pictures, about, strict=True)]
  return generate


def draw(this: Run, program: Callable, state, request: Request, about: list[dict], canvas, known) -> np.ndarray:
  """The pictures that have these settings, config.sample.batch at a time."""
  total = len(about)
  batch = shared(this, min(1 << (total - 1).bit_length(), this.config.sample.batch))  # few sizes, each of which is compiled
  seed, parts = jax.device_put(np.uint32(request.seed), meshes.replicated(this.mesh)), []
  for first in range(0, total, batch):
    rows = [about[min(row, total - 1)] for row in range(first, first + batch)]  # filled up; the surplus is cut off
    every = lambda array: np.broadcast_to(array, (batch, *np.shape(array))).copy()
    given = jax.tree.map(every, shown(this.task, request, canvas, known))
    cond = {**(this.task.ask([row['prompt'] for row in rows]) or {}), **given}
    if request.negative:
      cond['negative'] = without(this.task.ask([request.negative] * batch), 'known')
    share = np.array([row.get('between', [0])[0] for row in rows], np.float32)
    if request.towards is not None:
      cond['towards'] = share, without(this.task.ask([request.towards] * batch), 'known', 'reference')
    number = np.array([row['number'] for row in rows], np.int32)
    edit = {} if canvas is None else {'image': every(np.asarray(images.encode(canvas)))}
    edit |= {} if known is None else {'known': every(known[..., None])}
    edit |= {} if request.source is None else {'source': {**(this.task.ask([request.source] * batch) or {}), **given}}
    if request.towards_seed is not None:
      edit['turn'] = np.full(batch, request.towards_seed, np.uint32), share
    with jax.transfer_guard('disallow'):
      number, cond, edit = meshes.place((number, cond, edit), this.mesh)
      samples = meshes.gather(program(chosen_params(this, state), state.extra, number, cond, seed, **edit))
    parts.append(this.task.decode(samples))
  return np.concatenate(parts)[:total]


def shown(task: Task, request: Request, canvas: np.ndarray | None, known: np.ndarray | None) -> dict:
  """The conditions of conditions.py that a request has, of one example."""
  found = {}
  if request.reference is not None:
    found['reference'] = {'image': images.encode(request.reference), 'given': np.True_}
  if canvas is not None and 'known' in (task.null or {}):
    where = np.zeros(canvas.shape[:2], bool) if known is None else known
    found['known'] = {'values': images.encode(canvas), 'where': where[..., None]}
  return found


def without(cond: dict, *names: str) -> dict:
  return {name: value for name, value in cond.items() if name not in names}


def completed(request: Request, config: ConfigDict) -> Request:
  """The request with the run's own negative and seed where it gives none, and `between` as a tuple of floats."""
  own = {'negative': config.sample.negative, 'seed': config.sample.seed}
  own = {name: value for name, value in own.items() if getattr(request, name) is None}
  return request._replace(**own, between=tuple(map(float, request.between)))


def check(request: Request, this: Run) -> None:
  """Raise ValueError, with a sentence, where a field is illegal."""
  if isinstance(request.prompts, str):
    raise ValueError(f'prompts is {request.prompts!r}; it must be a list of texts: [{request.prompts!r}].')
  for name, array, axes, kind in (('image', request.image, 3, np.uint8), ('mask', request.mask, 2, np.bool_),
                                  ('reference', request.reference, 3, np.uint8)):
    if array is not None and (array.ndim != axes or array.dtype != kind):
      raise ValueError(f'{name} has the shape {array.shape} and the type {array.dtype}; legal are {axes} axes of '
                       f'{np.dtype(kind)}.')
  if not request.prompts:
    raise ValueError('There are no prompts: type --prompt="...", or a line for each in the file of --prompts.')
  if request.count < 1 or request.first < 0:
    raise ValueError(f'count is {request.count} and first {request.first}; legal are 1 or more, and 0 or more.')
  if request.strength is not None and not 0 <= request.strength <= 1:
    raise ValueError(f'strength is {request.strength}; legal is from 0, the image itself, to 1, free of it.')
  for name in ('seed', 'towards_seed'):
    seed = getattr(request, name)
    if seed is not None and not 0 <= seed < 2**32:
      raise ValueError(f'{name} is {seed}; legal are 0 to {2**32 - 1}.')
  if request.steps is not None and request.steps < 1:
    raise ValueError(f'steps is {request.steps}; it must be 1 or more.')
  if request.guidance is not None and not math.isfinite(request.guidance):
    raise ValueError(f'guidance is {request.guidance}; it must be finite.')
  if len(request.outpaint) != 4 or min(request.outpaint) < 0:
    raise ValueError(f'outpaint is {request.outpaint}; legal are four numbers of pixels: left, top, right, bottom.')
  if request.source is not None and request.strength in (None, 1):
    raise ValueError('A source prompt needs a strength below 1, to which the image is led: type --strength=0.8')
  given = {'strength': request.strength is not None, 'source': request.source is not None,
           'mask': request.mask is not None, 'outpaint': any(request.outpaint)}
  for name in given:
    if given[name] and request.image is None:
      raise ValueError(f'{name} is for an image, and there is none: type --image=picture.png')
  check_way(request, this)
  for name, array in (('image', request.image), ('reference', request.reference)):
    if array is not None and array.shape[2] != this.task.shape[-1]:
      raise ValueError(f'The {name} has {array.shape[2]} channels; this run has {this.task.shape[-1]}.')
  if request.reference is not None and 'reference' not in (this.task.null or {}):
    raise ValueError('This run takes no reference: train one with --config.condition.reference='
                     "'CLIPVision(width=64, layers=2, heads=4, patch=4)'.")
  if request.image is not None and request.strength is None and request.mask is None and not any(request.outpaint):
    raise ValueError('What is to become of the image? Type --strength=0.6, --mask=mask.png or --outpaint=8,0,8,0.')
  if request.inpaint != 'replace()' and request.mask is None and not any(request.outpaint):
    raise ValueError(f'inpaint is {request.inpaint!r}, but nothing is to be held: type --mask=mask.png or '
                     '--outpaint=8,0,8,0.')
  if request.mask is not None and request.mask.shape != request.image.shape[:2]:
    raise ValueError('The mask has {}x{} pixels and the image {}x{}: they must have the same.'.format(
        *request.mask.shape, *request.image.shape[:2]))


def check_way(request: Request, this: Run) -> None:
  """Raise ValueError, with a sentence, where `towards`, `towards_seed` and `between` contradict each other or the rest."""
  ends = {'towards': request.towards, 'towards_seed': request.towards_seed}
  ends = {name: end for name, end in ends.items() if end is not None}
  if request.between and not ends:
    raise ValueError("Frames lead from one picture to another, and there is no other: type --towards='a blue square' or "
                     '--towards_seed=1')
  for name, end in ends.items():
    if not request.between:
      raise ValueError(f'{name} is {end!r}, but no picture on the way there is asked for: type --frames=8, or '
                       'between=[0.5] in Python.')
  if not all(0 <= place <= 1 for place in request.between):
    raise ValueError(f'between is {request.between}; legal are places from 0, where it begins, to 1, where it ends.')
  if request.between and request.count != 1:
    raise ValueError(f'count is {request.count}, but a prompt has a picture for each frame: leave --count out.')
  if request.towards is not None and this.task.null is None:
    raise ValueError(f'towards is {request.towards!r}, but this run has no conditions to go to: type --towards_seed=1')
  if request.towards_seed is not None and request.strength not in (None, 1):
    raise ValueError(f'towards_seed turns pure noise, and the image is noised to strength {request.strength} alone: leave '
                     'one of them out, or type --strength=1')


def configured(config: ConfigDict, request: Request) -> ConfigDict:
  """The config of a run with what the request sets."""
  config = config.copy_and_resolve_references()
  def set_in(field, name, value, names, needs):
    text = with_argument(config[field], name, value, names)
    if text is None:
      raise ValueError(f'config.{field} is {config[field]!r}, which has no {name} to set: type {needs}')
    config[field] = text
  if request.guidance is not None:
    set_in('transform', 'weight', float(request.guidance), TRANSFORMS, "--config.transform='guide(3.0) | clip(1.0)'")
  unguided = with_argument(config.transform, 'weight', 1.0, TRANSFORMS)
  if request.negative and (unguided in (None, config.transform) or 'negative=' in config.transform):
    raise ValueError(f'The negative {request.negative!r} would not be seen: config.transform is {config.transform!r}. Type '
                     "--config.transform='guide(3.0) | clip(1.0)', or a guidance that is not 1.")
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
  given = {'image': request.image, 'mask': request.mask, 'reference': request.reference}
  files = {name: png(value) for name, value in given.items() if value is not None}
  about = provenance(this, state, request.count, this.config.transform)
  del about['samples']
  kept = {name: getattr(request, name) for name in KEPT}
  return {**about, **kept, **files, 'workdir': str(this.workdir), 'commit': commit()}


def again(path: str | Path, workdir: str | Path | None = None, config: ConfigDict | None = None) -> Picture:
  """Make a picture again from the settings that its PNG holds, with the run that it names or that of `workdir`.

  Raises ValueError where it comes out otherwise: where the run has been trained on since, or is another.
  """
  settings = read_settings(path)
  workdir = Path(workdir or settings['workdir'])
  config = config or load_complete(workdir)
  for name in ('transform', 'grid', 'solver'):
    config[name] = settings[name]
  config.sample.ema = float(settings['ema'])
  unpack = lambda text: sources.to_array(Image.open(BytesIO(b64decode(text))))
  kept = {name: unpack(settings[name]) for name in ('image', 'reference') if name in settings}
  kept |= {'mask': unpack(settings['mask'])[..., 0] > 0} if 'mask' in settings else {}
  same = {name: settings[name] for name in (*KEPT, 'between') if name in settings}  # older PNGs lack what came since
  picture, = load(workdir, config)([settings['prompt']], **same, **kept, first=settings['number'])
  with Image.open(path) as before:
    pixels = sources.to_array(before).astype(int)
  if pixels.shape != picture.pixels.shape or np.abs(pixels - picture.pixels).max() > 1:
    raise ValueError(f'{path} was made at step {settings["step"]} of the run in {settings["workdir"]}; the run in '
                     f'{workdir}, at step {picture.settings["step"]}, makes another picture.')
  return picture


def read_settings(path: str | Path) -> dict:
  """The settings that a PNG holds. Raises ValueError where it holds none."""
  try:
    with Image.open(path) as picture:
      text = getattr(picture, 'text', {}).get(ABOUT)
  except (OSError, SyntaxError) as error:
    raise ValueError(f'The picture {path} cannot be read: {error}.') from error
  if text is None:
    raise ValueError(f'{path} holds no settings: it was not made here, or another program has written it anew.')
  return json.loads(text)


def png(array: np.ndarray) -> str:
  """A picture or a mask as the text of a PNG."""
  file = BytesIO()
  (Image.fromarray(array) if array.ndim == 2 else sources.to_picture(array)).save(file, 'png')
  return b64encode(file.getvalue()).decode()
