"""Coloured shapes with a reference image as a second condition, and trained to inpaint; else as shapes.py.

paper     an image encoder's tokens beside those of the text (arXiv:2308.06721, trained with the network here), and channels
          with what is known beside x (arXiv:2112.10741)
COMMAND   bash run.sh configs/shapes_edit.py
hardware  2 CPU cores
hours     0.7, on one of the cores, beside other work, without samples and scores, with the network that the figures are of
expected  experiments/editing/README.md
"""
from configs import shapes


def get_config():
  config = shapes.get_config()
  config.condition.reference = 'CLIPVision(width=64, layers=2, heads=4, patch=4)'
  config.condition.known = True
  config.train.drop_each = 0.3
  return config
