"""ImageNet at 64x64 through TFDS with the network of ADM: 295,904,454 parameters, and 768 of the null class.

paper     ADM with dropout (arXiv:2105.05233), table 11: cosine betas, learned variance, Adam 3e-4, batch 2048, EMA 0.9999
COMMAND   python -m diffusion_jax.main --config=configs/imagenet_64.py --workdir=runs/imagenet_64
hardware  V100 GPUs in the paper; see --mode=plan for TPU slices
hours     540,000 steps; not measured here
expected  FID 2.07 in 250 steps (table 5); not measured here (no Inception features yet)

Unlike the paper, 16 bits are bfloat16, kernels start as DDPM's do, and images are resized by Lanczos. TFDS prepares the set
from the archives of image-net.org, which have to be fetched by hand.
"""
from configs import base


def get_config():
  config = base.get_config()
  config.schedule = 'discrete(cosine_betas(1000))'
  config.target = 'learned_variance(iddpm(1000))'
  config.space = 'noise()'
  config.loss = 'hybrid(1000)'
  config.times = 'discrete(1000)'
  config.solver = 'ancestral()'
  config.grid = 'linspace(250)'
  config.network = ('UNet(channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(False, True, True, True), '
                    'head_channels=64, dropout=0.1, modulation="scale_shift", resample="block", dtype="bfloat16")')
  config.data.source = 'tfds'
  config.data.name = 'imagenet2012'
  config.data.test = 'validation'
  config.data.size = (64, 64)
  config.data.channels = 3
  config.data.flip = True
  config.data.classes = 1000
  config.train.steps = 540_000
  config.train.batch = 2048
  config.train.drop = 0.0
  config.train.ema = (0.9999,)
  config.optimizer.rate = 3e-4
  config.optimizer.clip = 0.0
  config.checkpoint.every = 5000
  config.log.samples = 20_000
  return config
