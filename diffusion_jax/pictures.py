"""Pictures that let a person watch it happen: the schedule, and the way from noise to data and back."""
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


def save_png(path: Path, picture: np.ndarray) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(picture).save(path)
  return path


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int) -> Path:
  """An endless animation that rests on its last frame for a second and a half."""
  pictures = [Image.fromarray(frame).convert('P', palette=Image.Palette.ADAPTIVE) for frame in frames]
  durations = [milliseconds] * (len(frames) - 1) + [1500]
  pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
  return path


def schedule_figure(path: Path, t: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, logsnr: np.ndarray,
                    density: np.ndarray, grid_t: np.ndarray, grid_logsnr: np.ndarray, title: str) -> Path:
  """alpha, sigma and logsnr over time, and where over logsnr a network is trained and sampled."""
  figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout='constrained')
  figure.suptitle(title)
  left.plot(t, alpha, label='alpha')
  left.plot(t, sigma, label='sigma')
  left.set(xlabel='t, from data to noise', ylabel='scale')
  left.set_yscale('log' if sigma.max() > 3 else 'linear')
  left.legend()
  middle.plot(t, logsnr)
  middle.plot(grid_t, grid_logsnr, '|', color='black', label='sampling grid')
  middle.set(xlabel='t', ylabel='logsnr, nats')
  middle.legend()
  right.plot(logsnr, density, label='training times')
  right.plot(grid_logsnr, np.zeros_like(grid_logsnr), '|', color='black', label='sampling grid')
  right.set(xlabel='logsnr, nats', ylabel='density')
  right.legend()
  figure.savefig(path, dpi=100)
  plt.close(figure)
  return path


def trajectory_figure(path: Path, times: np.ndarray, rows: dict[str, list[np.ndarray]]) -> Path:
  """One picture [H, W, 3] a time in every named row, the times above: [len(times)] pictures a row."""
  figure, axes = plt.subplots(len(rows), len(times), layout='constrained', squeeze=False,
                              figsize=(1.15 * len(times) + 1, 1.15 * len(rows) * _aspect(rows)))
  for line, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(line, pictures, strict=True):
      axis.imshow(picture, interpolation='nearest')
      axis.set(xticks=[], yticks=[])
      axis.spines[:].set_visible(False)
    line[0].set_ylabel(name, fontsize=8)
  for axis, t in zip(axes[0], times, strict=True):
    axis.set_title(f't = {t:.2f}', fontsize=8)
  figure.savefig(path, dpi=100)
  plt.close(figure)
  return path


def _aspect(rows: dict[str, list[np.ndarray]]) -> float:
  picture = next(iter(rows.values()))[0]
  return picture.shape[0] / picture.shape[1]
