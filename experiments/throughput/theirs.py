"""PyTorch's side of peers.py: diffusers' U-Net of the same shape, python theirs.py BATCH DTYPE MODE THREADS.

It needs torch and diffusers and nothing of this package, so that an interpreter without JAX can run it.
"""
import copy
import json
import sys
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

STEPS = 50  # of DDIM


def make_network() -> UNet2DModel:
  """The U-Net of ours.NETWORK: 6,472,195 parameters, one attention head, no dropout."""
  return UNet2DModel(
      sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128), layers_per_block=2,
      down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
      up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
      attention_head_dim=None, norm_num_groups=32, norm_eps=1e-6, dropout=0.0)


def make_jobs(batch: int, dtype: str, mode: str, device: str) -> dict:
  """{'train', 'sample'}: functions that do so many steps, or whole samplings, and return when they are done."""
  network = make_network().to(device, memory_format=torch.channels_last)
  average = copy.deepcopy(network).requires_grad_(False)
  call, call_average = (torch.compile(each) if mode == 'compiled' else each for each in (network, average))
  parameters, averages = list(network.parameters()), list(average.parameters())
  optimizer = torch.optim.AdamW(parameters, 2e-4, weight_decay=0.0, fused=True)
  forward, ddim = DDPMScheduler(), DDIMScheduler()
  ddim.set_timesteps(STEPS)
  mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')
  images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)

  def noise():
    return torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

  def step():
    x0, e = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last), noise()
    t = torch.randint(0, 1000, (batch,), device=device)
    with mixed:
      prediction = call(forward.add_noise(x0, e, t), t).sample
    loss = torch.nn.functional.mse_loss(prediction.float(), e)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    torch._foreach_lerp_(averages, parameters, 1e-4)

  def train(count):
    for _ in range(count):
      step()
    wait(device)

  @torch.no_grad()
  def sample(count):
    for _ in range(count):
      x = noise()
      for t in ddim.timesteps:
        with mixed:
          e = call_average(x, t).sample
        x = ddim.step(e.float(), t, x).prev_sample
    wait(device)
  return {'train': train, 'sample': sample}


def wait(device: str) -> None:
  if device == 'cuda':
    torch.cuda.synchronize()


def main(batch: str, dtype: str, mode: str, threads: str) -> None:
  torch.set_num_threads(int(threads))
  torch.set_float32_matmul_precision('high')
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  jobs, began = make_jobs(int(batch), dtype, mode, device), time.perf_counter()
  for job in jobs.values():
    job(1)
  name = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
  print(json.dumps({'parameters': sum(each.numel() for each in make_network().parameters()), 'device': name,
                    'version': f'torch {torch.__version__}', 'ready_seconds': time.perf_counter() - began}), flush=True)
  for line in sys.stdin:
    job, count = line.split()
    began = time.perf_counter()
    jobs[job](int(count))
    print(json.dumps({'seconds': (time.perf_counter() - began) / int(count)}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
