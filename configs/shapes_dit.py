"""Coloured shapes with the transformer in place of the U-Net: what is not here is as in shapes.py.

paper     adaLN-zero (arXiv:2212.09748) with cross-attention to the text (arXiv:2310.00426)
COMMAND   bash run.sh configs/shapes_dit.py
hardware  2 CPU cores
hours     0.78, on one of the cores
expected  of 873 samples of pairs that were trained on: colour and position right on 0.995, count on 0.82, shape on 0.50
"""
from configs import shapes


def get_config():
  config = shapes.get_config()
  config.network = 'DiT(width=128, depth=6, heads=4, patch=2, attend="cross", qk_norm=True)'
  config.optimizer.rate = 4e-3
  return config
