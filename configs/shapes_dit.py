"""Coloured shapes with the transformer in place of the U-Net: what is not here is as in shapes.py.

paper     adaLN-zero (arXiv:2212.09748) with cross-attention to the text (arXiv:2310.00426), a depthwise
          convolution before each block (arXiv:2102.10882)
COMMAND   bash run.sh configs/shapes_dit.py
hardware  2 CPU cores
hours     1.8, on one of the cores, with 1,000 samples and their scores
expected  of 1,000 samples: colour and position right on 1.00, shape on 0.98, count on 0.96; pairs never seen as well
"""
from configs import shapes


def get_config():
  config = shapes.get_config()
  config.network = 'DiT(width=128, depth=6, heads=4, patch=2, attend="cross", qk_norm=True, conv=3)'
  config.train.steps = 9000
  config.train.batch = 32
  config.optimizer.rate = 4e-3
  config.transform = 'guide(3.0) | clip(1.0)'
  config.evaluate.transforms = (config.transform,)
  return config
