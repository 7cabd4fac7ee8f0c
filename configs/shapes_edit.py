"""Coloured shapes with a reference image as a second condition, and trained to inpaint; else as shapes.py.

paper     an image encoder's tokens beside those of the text (arXiv:2308.06721, trained with the network here), and channels
          with what is known beside x (arXiv:2112.10741)
COMMAND   XLA_FLAGS=--xla_force_host_platform_device_count=2 bash run.sh configs/shapes_edit.py
hardware  2 CPU cores, as a device each
hours     0.3 on cores with AVX-512, without scores, other work beside for a tenth of it
expected  experiments/editing/README.md
"""
from configs import shapes


def get_config():
  config = shapes.get_config()
  config.condition.reference = 'CLIPVision(width=64, layers=2, heads=4, patch=4)'
  config.condition.known = True
  config.train.drop_each = 0.3
  return config
