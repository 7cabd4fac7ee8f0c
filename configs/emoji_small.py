"""Text to image on two CPU cores: emoji and their Unicode names, 32x32 on white.

paper     as configs/emoji.py
COMMAND   bash run.sh configs/emoji_small.py --config.data.path=FOLDER
hardware  2 CPU cores
hours     0.35, on one of the cores
expected  of 100 held-out names 0.30 found among their real pictures, chance 0.01 (experiments/emoji/README.md)
"""
from configs import emoji


def get_config():
  config = emoji.get_config()
  config.data.size = (32, 32)
  config.network = ('UNet(channels=16, multipliers=(1, 2, 4, 8), blocks=1, attention=(False, False, True, True), '
                    'modulation="scale_shift")')
  config.text.encoder = 'CLIPText(width=128, layers=2, heads=4)'
  config.train.steps = 1600
  config.train.batch = 32
  config.train.ema = (0.995,)
  config.optimizer.rate = 2e-3
  config.optimizer.warmup = 100
  config.optimizer.decay = 'cosine'
  config.optimizer.b2 = 0.99
  config.checkpoint.every = 400
  config.log.samples = 0
  config.sample.count = 20
  config.sample.batch = 20
  config.evaluate.count = 0
  return config
