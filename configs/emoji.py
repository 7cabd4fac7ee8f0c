"""Text to image: emoji and their Unicode names, 64x64 on white.

paper     a text transformer that is trained with the model (arXiv:2112.10741, sec. 3) and guidance without a classifier
          (arXiv:2207.12598), on v-prediction with the cosine schedule (arXiv:2202.00512)
COMMAND   python -m diffusion_jax.main --config=configs/emoji.py --config.data.path=FOLDER --workdir=runs/emoji
hardware  one GPU
hours     not measured
expected  not measured

FOLDER has a metadata.csv of the columns file_name,text; experiments/emoji/README.md says where the pictures come from.
"""
from configs import base


def get_config():
  config = base.get_config()
  config.task = 'captions'
  config.data.source = 'folder'
  config.data.size = (64, 64)
  config.data.channels = 3
  config.network = ('UNet(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(False, False, True, True), '
                    'head_channels=64, dropout=0.1, modulation="scale_shift", resample="block", dtype="bfloat16")')
  config.text.encoder = 'CLIPText(width=256, layers=4, heads=4, dtype="bfloat16")'
  config.text.length = 24  # the longest name has 21
  config.text.vocabulary = 1024
  config.times = 'shift(stratified(), 2.0)'
  config.grid = 'shift(uniform(50), 2.0)'
  config.train.steps = 20_000
  config.train.ema = (0.999, 0.9999)
  config.optimizer.rate = 3e-4
  config.optimizer.warmup = 1000
  config.optimizer.weight_decay = 0.01
  config.checkpoint.every = 1000
  config.log.samples = 2000
  config.transform = 'guide(3.0) | clip(1.0)'
  config.evaluate.transforms = ('clip(1.0)', 'guide(3.0) | clip(1.0)')
  return config
