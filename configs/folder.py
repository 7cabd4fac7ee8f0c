"""Your own images: a folder with a sub-folder a class, or a metadata.csv with the columns file_name,label.

paper     classifier-free guidance (arXiv:2207.12598) on v-prediction with the cosine schedule (arXiv:2202.00512)
COMMAND   python -m diffusion_jax.main --config=configs/folder.py --config.data.path=FOLDER --workdir=runs/mine
hardware  one GPU
hours     not measured
expected  not measured
"""
from configs import base


def get_config():
  config = base.get_config()
  config.network = ('UNet(channels=64, multipliers=(1, 2, 3, 4), blocks=2, attention=(False, False, True, True), '
                    'head_channels=32, dropout=0.1, modulation="scale_shift", resample="block")')
  config.data.source = 'folder'
  config.data.size = (64, 64)
  config.data.channels = 3
  config.data.flip = True
  config.times = 'shift(stratified(), 2.0)'
  config.grid = 'shift(uniform(64), 2.0)'
  config.train.steps = 50_000
  config.train.batch = 64
  config.train.ema = (0.999, 0.9999)
  config.optimizer.rate = 3e-4
  config.optimizer.warmup = 1000
  config.checkpoint.every = 1000
  config.log.samples = 5000
  config.transform = 'guide(2.0) | clip(1.0)'
  config.evaluate.transforms = ('clip(1.0)', 'guide(2.0) | clip(1.0)')
  return config
