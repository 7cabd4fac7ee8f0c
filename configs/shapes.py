"""Text to image on two CPU cores: coloured shapes, 16x16, whose captions can be checked by rule.

paper     a text transformer that is trained with the model (arXiv:2112.10741, sec. 3) and guidance without a classifier
          (arXiv:2207.12598), on v-prediction with the cosine schedule (arXiv:2202.00512)
COMMAND   bash run.sh configs/shapes.py
hardware  2 CPU cores
hours     0.4, by CPU time; not measured on a quiet machine
expected  of 1,000 samples at guidance 3: colour, shape, position right on 0.98 or more, count on 0.91
"""
from configs import base


def get_config():
  config = base.get_config()
  config.task = 'captions'
  config.data.source = 'shapes'
  config.data.size = (16, 16)
  config.data.channels = 3
  config.data.holdout = 2000
  config.network = ('UNet(channels=32, multipliers=(1, 2, 4), blocks=1, attention=(False, True, True), head_channels=16, '
                    'modulation="scale_shift")')
  config.text.encoder = 'CLIPText(width=64, layers=2, heads=4)'
  config.text.length = 10
  config.text.vocabulary = 384
  config.times = 'shift(stratified(), 2.5)'  # where the places and numbers of things are decided
  config.grid = 'shift(uniform(50), 2.5)'
  config.train.steps = 2600
  config.train.batch = 64
  config.train.ema = (0.995,)
  config.optimizer.rate = 2e-3
  config.optimizer.decay = 'cosine'
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.01
  config.checkpoint.every = 500
  config.transform = 'guide(3.0) | clip(1.0)'
  config.solver = 'dpm_2m(1.0)'
  config.evaluate.transforms = ('guide(3.0) | clip(1.0)',)
  return config
