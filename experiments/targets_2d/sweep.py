"""Every target with every weight on a mixture of which the denoiser is known: python -m experiments.targets_2d.sweep

Trains a small network for each pair and three seeds, compares it with E[x0 | xt] in closed form, and writes results.csv
and excess.png beside this file. Ten minutes of one CPU core.
"""
import csv
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from jax import numpy as jnp

from diffusion_jax.core import losses, schedules, targets, times, weights
from diffusion_jax.core.processes import Gaussian
from diffusion_jax.core.types import Draw, example_keys
from diffusion_jax.networks.layers import sinusoid
from tests.oracles import Mixture

TARGETS = {'noise': targets.noise(), 'x0': targets.x0(), 'v': targets.v(), 'velocity': targets.velocity(),
           'score': targets.score(), 'edm': targets.edm(1.0), 'vp': targets.vp(), 've': targets.ve(),
           'iddpm': targets.iddpm()}
WEIGHTS = {'constant': weights.constant(), 'elbo': weights.elbo(), 'snr(0.5)': weights.snr(0.5),
           'truncated_snr': weights.truncated_snr(), 'min_snr': weights.min_snr(), 'soft_min_snr': weights.soft_min_snr(),
           'p2': weights.p2(), 'edm(1)': weights.edm(1.0), 'measure(sigmoid)': weights.measure(weights.sigmoid()),
           'rectified_flow': weights.rectified_flow(), 'logit_normal': weights.logit_normal(), 'cosmap': weights.cosmap()}
LAW = Mixture([0.25, 0.25, 0.3, 0.2], [[1.2, 0.8], [-1.2, 0.8], [0.0, -1.3], [0.2, 0.3]], [0.15, 0.3, 0.2, 0.1])
PROCESS = Gaussian(schedules.cosine())
BAND = (0.01, 0.99)  # of t that is trained: noise and score are singular at t = 1, and the weights are unbounded
SEEDS, STEPS, BATCH, RATE = 3, 2000, 256, 4e-3
LOGSNR = np.linspace(-6, 6, 25)  # where networks and truth are compared, nats
HERE = Path(__file__).parent


class Network(nn.Module):
  """Three layers with the time feature added to each; the same for every target."""
  width: int = 64

  @nn.compact
  def __call__(self, x, feature):
    time = nn.Dense(self.width)(jnp.concatenate([sinusoid(feature, 32), sinusoid(100 * feature, 32)], -1))
    for _ in range(3):
      x = nn.silu(nn.Dense(self.width)(x) + nn.Dense(self.width)(nn.silu(time)))
    return nn.Dense(2)(x)


def train(target: targets.Target) -> tuple[np.ndarray, np.ndarray]:
  """(excess bound, error of x0), [weights, seeds] each, of networks that were trained with every weight, all at once."""
  net = Network()
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, STEPS)))

  def one(which, seed):
    weight = lambda logsnr, density: jnp.stack([row(logsnr, density) for row in WEIGHTS.values()])[which]
    loss = losses.regression(PROCESS, target, times.stratified(*BAND), weight, targets.noise())
    network = lambda params: lambda x, feature, cond: net.apply(params, x, feature)
    def step(carry, i):
      params, moments = carry
      key = jax.random.fold_in(jax.random.key(seed), i)
      draw = Draw(key, jnp.arange(BATCH), BATCH)
      x0 = LAW.sample(example_keys(jax.random.fold_in(key, 7), draw.index))
      grads = jax.grad(lambda params: loss(network(params), draw, x0, None, None).mean())(params)
      updates, moments = optimizer.update(grads, moments)
      return (optax.apply_updates(params, updates), moments), None
    params = net.init(jax.random.key(seed), jnp.zeros((1, 2)), jnp.zeros(1))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))
    return compare(targets.denoiser(PROCESS, target, network(params)))

  count = len(WEIGHTS)
  pairs = jnp.repeat(jnp.arange(count), SEEDS), jnp.tile(jnp.arange(SEEDS), count)
  excess, error = jax.jit(jax.vmap(one))(*pairs)
  return np.asarray(excess).reshape(count, SEEDS), np.asarray(error).reshape(count, SEEDS)


def compare(denoiser) -> tuple[jax.Array, jax.Array]:
  """How much the denoiser adds to the bound between the ends of LOGSNR, integral of E|noise_hat - truth|^2 / 2 over logsnr,
  in nats an entry (arXiv:2107.00630, eq. 17), and the root mean square of its error of x0."""
  keys = example_keys(jax.random.key(99), jnp.arange(500))
  def at(logsnr):
    level = PROCESS.level_at(logsnr)
    xt, _ = PROCESS.corrupt(keys, LAW.sample(example_keys(jax.random.key(98), jnp.arange(500))), level)
    return jnp.mean(jnp.square(denoiser(xt, level).x0 - LAW.denoiser(PROCESS)(xt, level).x0))
  errors = jax.lax.map(at, jnp.asarray(LOGSNR))
  return jnp.trapezoid(0.5 * jnp.exp(jnp.asarray(LOGSNR)) * errors, LOGSNR), jnp.sqrt(errors.mean())


def run() -> list[dict]:
  """A row for each target, weight and seed."""
  rows = []
  for name, target in TARGETS.items():
    excess, error = train(target)
    for i, weight in enumerate(WEIGHTS):
      rows += [{'target': name, 'weight': weight, 'seed': seed, 'excess_nats': float(excess[i, seed]),
                'rms_x0': float(error[i, seed])} for seed in range(SEEDS)]
    means = zip(WEIGHTS, excess.mean(1), strict=True)
    print(f'{name:10}', *(f'{weight} {value:.3f}' for weight, value in means), flush=True)
  return rows


def table(rows: list[dict], field: str) -> np.ndarray:
  """Means over the seeds, [targets, weights]."""
  mean = lambda target, weight: np.mean([row[field] for row in rows if (row['target'], row['weight']) == (target, weight)])
  return np.array([[mean(target, weight) for weight in WEIGHTS] for target in TARGETS])


def draw(values: np.ndarray, path: Path) -> None:
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axis = plt.subplots(figsize=(10, 5), layout='constrained')
  logs = np.log10(values)
  image = axis.imshow(logs, cmap='viridis_r', aspect='auto')
  axis.set_xticks(range(len(WEIGHTS)), WEIGHTS, rotation=35, ha='right')
  axis.set_yticks(range(len(TARGETS)), TARGETS)
  for i, line in enumerate(values):
    for j, value in enumerate(line):
      dark = logs[i, j] > logs.mean()
      axis.text(j, i, f'{value:.3f}', ha='center', va='center', fontsize=8, color='white' if dark else 'black')
  figure.colorbar(image, label='log10 of the excess of the bound, nats an entry')
  figure.savefig(path, dpi=100)
  plt.close(figure)


def main() -> None:
  rows = run()
  with open(HERE / 'results.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    short = lambda cell: f'{cell:.4g}' if isinstance(cell, float) else cell
    writer.writerows({name: short(cell) for name, cell in row.items()} for row in rows)
  draw(table(rows, 'excess_nats'), HERE / 'excess.png')


if __name__ == '__main__':
  main()
