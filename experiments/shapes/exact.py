"""How far a network is from the exact denoiser of coloured shapes: python -m experiments.shapes.exact --workdir=runs/shapes

The law of the pictures is known: of every number of shapes, all sets of places that lie apart are as likely. So the mean of
the pictures given a noisy one is a finite sum, and so is what a caption changes. Writes exact.csv beside this file: squared
errors of the exact means and of the network beyond them, level by level, and what the sampler makes of the exact denoiser.
"""
import functools
import itertools
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from jax import numpy as jnp
from jaxtyping import Array, Float, PyTree
from numpy.typing import NDArray

from diffusion_jax.core import sampling
from diffusion_jax.core.guidance import dropped
from diffusion_jax.core.types import Estimate, Level, example_keys
from diffusion_jax.method import make_sampling
from diffusion_jax.run import Run, chosen_ema, open_run
from diffusion_jax.runtime.checkpoints import read_sampled
from diffusion_jax.runtime.workdir import load_complete, write_csv
from diffusion_jax.tasks import shapes

SIDE, LARGE = 16, 4
TIMES = 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.94
SCALES = 1.0, 2.0
BATCH = 20  # pictures at once
PAIRS = [pair for pair in itertools.product(shapes.COLOURS, shapes.FORMS) if pair not in shapes.UNSEEN]
GROUPS = list(itertools.product(PAIRS, shapes.PLACES))
"""What all shapes of a picture have in common."""
HERE = Path(__file__).parent


@functools.cache
def places() -> tuple[NDArray, NDArray, NDArray]:
  """Of each group [G] and of its 65 corners: what a shape there adds to black [G, 65, D], which lie apart [G, 65, 65], and
  how many sets of one, two and three there are [G, 3]."""
  added, apart = np.zeros((len(GROUPS), 65, SIDE, SIDE, 3)), np.zeros((len(GROUPS), 65, 65))
  for group, ((colour, form), place) in enumerate(GROUPS):
    first, size = shapes.half(place, SIDE)
    corners = first + list(np.ndindex(*(size - LARGE + 1)))
    for at, (top, left) in enumerate(corners):
      added[group, at, top:top + LARGE, left:left + LARGE][shapes.MASKS[form]] = np.array(shapes.COLOURS[colour]) / 127.5
    apart[group] = shapes.apart(corners, LARGE)
  sets = np.stack([np.full(len(GROUPS), 65), apart.sum((1, 2)) / 2, (apart @ apart * apart).sum((1, 2)) / 6], -1)
  return added.reshape(len(GROUPS), 65, -1), apart, sets


def allowed(facts: shapes.Facts) -> NDArray[np.bool_]:
  """Which groups and numbers of shapes have the facts, [G, 3]."""
  is_ = lambda said, true: said is None or said == true
  return np.array([[is_(facts.colour, colour) and is_(facts.shape, form) and is_(facts.position, place)
                    and is_(facts.count, count) for count in (1, 2, 3)] for (colour, form), place in GROUPS])


def fits(prompts: list[str]) -> NDArray[np.bool_]:
  """What each of the prompts allows, [B, G, 3]."""
  return np.stack([allowed(shapes.said(prompt)) for prompt in prompts])


def exact_mean(x: Float[Array, 'D'], alpha: Array, sigma: Array, fit: Array) -> Float[Array, 'D']:
  """E(x0 | alpha x0 + sigma noise = x, the facts that `fit`), in float64.

  A set of places has the weight prod_i e_i, log e_i = (alpha <x - alpha black, d_i> - alpha^2 |d_i|^2 / 2) / sigma^2 with
  the difference d_i that a shape makes, as those of a set share no pixels. Sums over pairs and triples are products of
  matrices. Lest they underflow, no less noise than 0.8 alpha is taken for true, where one picture is nearly certain: the
  mean squared error of a picture is a few hundredths there.
  """
  added, apart, sets = places()
  numbers, sigma, x = np.array([[1, 2, 3]]), jnp.maximum(sigma, 0.8 * alpha), x.astype(float)
  logs = (alpha * (added @ (x + alpha)) - alpha**2 * (added**2).sum(-1) / 2) / sigma**2  # black is -1
  most = logs.max(-1, keepdims=True)
  e = jnp.exp(logs - most)
  pairs = apart * e[:, None]  # [i, j]: j beside i
  holding = jnp.stack([e, e * pairs.sum(-1), e * (pairs @ pairs * apart).sum(-1)], 1)  # ordered sets that begin at i
  total = holding.sum(-1, keepdims=True) + 1e-300
  weight = jnp.log(total[..., 0] / np.array([[1, 2, 6]]) / sets) + most * numbers
  weight = jax.nn.softmax(jnp.where(fit, weight, -jnp.inf), (0, 1))
  there = jnp.einsum('gn,gni->gi', weight * numbers, holding / total)
  return jnp.einsum('gi,gid->d', there, added) - 1


def exact(x: Float[Array, 'B H W C'], level: Level, cond: dict) -> Estimate:
  """The exact denoiser, of the condition {'fit': what is allowed [B, G, 3]}, whose null allows all."""
  each = lambda value: jnp.broadcast_to(value, len(x))
  fit = cond['fit'] | cond['drop']['fit'][:, None, None] if 'drop' in cond else cond['fit']
  rows = x.reshape(len(x), -1), each(level.alpha), each(level.sigma), fit
  found = jax.lax.map(lambda row: exact_mean(*row), rows, batch_size=BATCH)
  return Estimate(found.reshape(x.shape).astype(x.dtype))


def excess(run: Run, params: PyTree, table: shapes.Shapes) -> list[dict]:
  """Squared errors of a picture, summed over its entries: of the exact mean, and of the network from the exact mean, with
  the caption and with none."""
  index, process, extra = np.arange(len(table)), run.method.process(params), run.method.init(jax.random.key(0))[1]
  x0 = jnp.asarray(np.stack([table[i]['x'] for i in index]) / 127.5 - 1, jnp.float32)
  @jax.jit
  def measure(x0, t, cond, fit, params):
    level = jax.tree.map(jnp.float32, process.level(jnp.full(len(index), t)))
    x, _ = process.corrupt(example_keys(jax.random.key(0), index), x0, level)
    denoise = run.method.denoiser(params, extra)
    away = lambda a, b: jnp.square(a - b).sum((1, 2, 3)).mean()
    row = {}
    for name, of in (('caption', lambda c: c), ('null', lambda c: dropped(x, c))):
      mean = exact(x, level, of(fit)).x0
      row |= {f'{name}_exact': away(mean, x0), f'{name}_beyond': away(denoise(x, level, of(cond)).x0, mean)}
    return row
  given = run.task.context(index), {'fit': fits(table.prompts)}, params
  return [{'t': t, **{name: float(value) for name, value in measure(x0, t, *given).items()}} for t in TIMES]


def drawn(run: Run, params: PyTree, prompts: list[str], scale: float) -> NDArray[np.uint8]:
  """Pictures of the exact denoiser, guided, by the run's own solver and grid."""
  process, parts = run.method.process(params), make_sampling(run.config, f'guide({scale}) | clip(1.0)')
  @jax.jit
  def sampler(index, cond):
    keys = example_keys(jax.random.key(run.config.sample.seed), index)
    return sampling.sample(keys, process, parts.solver, parts.transform(exact), parts.grid, run.task.shape, cond)
  return run.task.decode(np.asarray(sampler(np.arange(len(prompts)), {'fit': fits(prompts)})))


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # of Orbax
  jax.config.update('jax_enable_x64', True)
  workdir, table = Path(flags.FLAGS.workdir), shapes.Shapes(flags.FLAGS.count, SIDE, 2, unseen=False)
  config, prompts = load_complete(workdir), table.prompts
  config.sample.prompts = tuple(prompts)
  run = open_run(config, workdir, read=False)
  params = jax.device_put(read_sampled(workdir / 'checkpoints', chosen_ema(config)))
  if params is None:
    raise ValueError(f'{workdir} holds no checkpoint yet: train first, with --mode=train.')
  rows = [{'what': 'errors', **row} for row in excess(run, params, table)]
  for scale in SCALES:
    scores = shapes.score(drawn(run, params, prompts, scale), prompts)
    rows.append({'what': 'samples of the exact denoiser', 'guidance': scale,
                 **{name: row['samples'] for name, row in scores.items()}})
  write_csv(HERE / 'exact.csv', rows)
  for row in rows:
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})


if __name__ == '__main__':
  flags.DEFINE_string('workdir', 'runs/shapes', 'A trained run of configs/shapes.py.')
  flags.DEFINE_integer('count', 200, 'Held-out pictures and samples.')
  app.run(main)
