"""--mode=sample with a prompt, an image or another flag of options.py: the pictures that are asked for."""
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import pictures
from diffusion_jax.generate import Picture, load
from diffusion_jax.generate import again as make_again
from diffusion_jax.runtime.logs import say
from diffusion_jax.tasks import images, sources


def run(config: ConfigDict, workdir: Path, asked: dict) -> int:
  paths = write(config, workdir, **asked)
  say('\n'.join(['The pictures are in', *(f'  {path}' for path in paths)]))
  return 0


def write(config: ConfigDict, workdir: Path, out: str | None = None, again: str | None = None, **asked) -> list[Path]:
  """A PNG for each picture, a sheet of all where there are several, and a GIF of the first prompt's frames."""
  folder = Path(out) if out else workdir / 'generated'
  if again:
    if asked:
      raise ValueError(f'--again takes all from the PNG; leave --{next(iter(asked))} out.')
    picture = make_again(again, workdir, config)
    return [] if jax.process_index() else [picture.save(folder / f'{Path(again).stem}_again.png')]
  made, columns = generate(config, workdir, **asked)
  if jax.process_index():
    return []
  paths = [picture.save(folder / f'{i:04d}.png') for i, picture in enumerate(made)]
  if len(made) > 1:
    paths.append(pictures.save_png(folder / 'sheet.png', images.render(np.stack([each.pixels for each in made]), columns)))
  if 'frames' in asked:
    frames = [images.render(each.pixels[None], 1) for each in made[:asked['frames']]]
    paths.append(pictures.save_gif(folder / 'frames.gif', frames, 100))
  return paths


def generate(config: ConfigDict, workdir: Path, prompt: str | None = None, prompts: str | None = None,
             guidance: tuple[float, ...] = (), mask: str | None = None, frames: int | None = None,
             **fields) -> tuple[list[Picture], int]:
  """The pictures, and in how many columns to show them: a row a prompt, those of each scale of guidance together."""
  if prompt is not None and prompts is not None:
    raise ValueError('Both --prompt and --prompts are given: type one of them.')
  texts = read_lines(prompts) if prompts is not None else [prompt or '']
  for name in ('image', 'reference'):
    if name in fields:
      fields[name] = read_image(fields[name], images.MODES[config.data.channels])
  if mask:
    fields['mask'] = read_image(mask, 'L')[..., 0] >= 128
  if frames is not None:
    if frames < 2:
      raise ValueError(f'--frames is {frames}; a way has two ends: type 2 or more.')
    fields['between'] = np.linspace(0, 1, frames)
  ask = load(workdir, config)
  scales = [ask(texts, **fields, **({} if scale is None else {'guidance': scale})) for scale in guidance or (None,)]
  count = len(scales[0]) // len(texts)
  made = [picture for i in range(len(texts)) for scale in scales for picture in scale[i * count:(i + 1) * count]]
  return made, min(10, len(made)) if len(texts) == len(scales) == 1 else count * len(scales)


def read_lines(path: str) -> list[str]:
  """The prompts of a file, one a line. Raises ValueError where there are none."""
  if not Path(path).is_file():
    raise ValueError(f'--prompts={path} is not a file: give one with a prompt a line.')
  try:
    found = [line.strip() for line in Path(path).read_text('utf-8').splitlines() if line.strip()]
  except UnicodeDecodeError as error:
    raise ValueError(f'The file {path} is no text in UTF-8: {error}.') from error
  if not found:
    raise ValueError(f'The file {path} holds no prompts: write one a line.')
  return found


def read_image(path: str, mode: str) -> np.ndarray:
  """A picture as uint8 [H, W, C]. Raises ValueError where it cannot be read."""
  try:
    with Image.open(path) as picture:
      return sources.pixels(picture, mode)
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise ValueError(f'The picture {path} cannot be read: {error}.') from error
