"""ImageNet at 256x256 through TFDS with the network of ADM: 553,838,086 parameters, and 1,024 of the null class.

paper     ADM (arXiv:2105.05233), table 11: linear betas, learned variance, Adam 1e-4, batch 256, EMA 0.9999
COMMAND   python -m diffusion_jax.main --config=configs/imagenet_256.py --workdir=runs/imagenet_256
hardware  V100 GPUs in the paper; see --mode=plan for TPU slices
hours     1,980,000 steps; not measured here
expected  FID 10.94 in 250 steps, without its classifier (table 5); not measured here (no Inception features yet)

Unlike the paper, 16 bits are bfloat16, kernels start as DDPM's do, and images are resized by Lanczos. TFDS prepares the set
from the archives of image-net.org, which have to be fetched by hand.
"""
from configs import imagenet_64


def get_config():
  config = imagenet_64.get_config()
  config.schedule = 'discrete(linear_betas(1000))'
  config.network = ('UNet(channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, '
                    'attention=(False, False, False, True, True, True), head_channels=64, '
                    'modulation="scale_shift", resample="block", dtype="bfloat16")')
  config.data.size = (256, 256)
  config.train.steps = 1_980_000
  config.train.batch = 256
  config.optimizer.rate = 1e-4
  return config
