"""CIFAR-10 through TFDS with the network of DDPM, 35,746,307 parameters, unconditional.

paper     DDPM (arXiv:2006.11239), app. B: linear betas, noise prediction, dropout 0.1, Adam 2e-4, batch 128, EMA 0.9999
COMMAND   python -m diffusion_jax.main --config=configs/cifar10.py --workdir=runs/cifar10
hardware  one TPU v3-8 in the paper
hours     10.6 in the paper for 800,000 steps (21 steps a second); not measured here
expected  FID 3.17 in the paper; not measured here (this package has no Inception features yet)

Unlike the paper, time is continuous and a step draws it stratified over the batch.
"""
from configs import base


def get_config():
  config = base.get_config()
  config.schedule = 'linear()'
  config.target = 'noise()'
  config.space = 'noise()'
  config.times = 'stratified(1e-3, 1.0)'
  config.solver = 'ancestral()'
  config.grid = 'uniform(1000)'
  config.network = ('UNet(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(False, True, False, False), '
                    'dropout=0.1, frequency_shift=1)')
  config.data.source = 'tfds'
  config.data.name = 'cifar10'
  config.data.size = (32, 32)
  config.data.channels = 3
  config.data.flip = True
  config.data.classes = 0
  config.train.steps = 800_000
  config.train.drop = 0.0
  config.train.ema = (0.9999,)
  config.optimizer.rate = 2e-4
  config.optimizer.warmup = 5000
  config.checkpoint.every = 5000
  config.log.samples = 20_000
  return config
