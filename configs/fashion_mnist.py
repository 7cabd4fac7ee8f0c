"""Fashion-MNIST through TFDS, 28x28, class-conditional.

paper     classifier-free guidance (arXiv:2207.12598) on v-prediction with the cosine schedule (arXiv:2202.00512)
COMMAND   python -m diffusion_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
hardware  one GPU
hours     not measured
expected  not measured
"""
from configs import base


def get_config():
  config = base.get_config()
  config.network = ('UNet(channels=64, multipliers=(1, 2, 2), blocks=2, attention=(False, False, True), dropout=0.1, '
                    'modulation="scale_shift")')
  config.data.source = 'tfds'
  config.data.name = 'fashion_mnist'
  config.data.size = (28, 28)
  config.data.flip = True
  config.train.steps = 50_000
  config.train.ema = (0.999, 0.9999)
  config.optimizer.rate = 3e-4
  config.optimizer.warmup = 1000
  config.checkpoint.every = 1000
  config.log.samples = 5000
  config.transform = 'guide(2.0) | clip(1.0)'
  config.evaluate.transforms = ('clip(1.0)', 'guide(2.0) | clip(1.0)')
  return config
