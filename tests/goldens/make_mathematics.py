"""Makes mathematics.npz, the numbers of other people's code that tests/core/test_goldens.py replays.

Run by hand, in an environment of its own:

  python3.11 -m venv /tmp/gold
  /tmp/gold/bin/pip install torch==2.15.0 diffusers==0.42.1 k-diffusion==0.1.1.post1 'numpy<2' scipy 'setuptools<81'
  git clone https://github.com/openai/guided-diffusion /tmp/peers/guided-diffusion
  git clone https://github.com/NVlabs/edm /tmp/peers/edm
  /tmp/gold/bin/python tests/goldens/make_mathematics.py /tmp/peers/guided-diffusion /tmp/peers/edm

EDM may not be copied: only what its modules answer to probes is stored. Every peer computes in float64: where its code
asks for float32 by name, it gets float64. Images are stored with the channels last.

Not stored: the 'laplace' table of diffusers 0.42.1, whose products are alpha where they should be alpha^2; its 'sigma_sqrt'
weight, which we do not have.
"""
import contextlib
import importlib.metadata
import math
import pathlib
import subprocess
import sys
from unittest import mock

import k_diffusion
import numpy as np
import torch
from diffusers import DDPMScheduler, training_utils
from diffusers.schedulers import scheduling_ddpm

STEPS = 50  # of ADM's chains
COUNT = 12


@contextlib.contextmanager
def double():
  """float64 for code that asks for float32."""
  torch.set_default_dtype(torch.float64)
  with mock.patch.object(torch, 'float32', torch.float64), mock.patch.object(torch.Tensor, 'float', torch.Tensor.double):
    yield


def seeded(function, *arguments, **keywords):
  """What the function returns when it draws from the same bits as `torch.manual_seed(0)` gives."""
  torch.manual_seed(0)
  return function(*arguments, **keywords)


def diffusers_tables():
  exponential = scheduling_ddpm.betas_for_alpha_bar(1000, alpha_transform_type='exp')
  tables = {
    'linear': DDPMScheduler(),
    'scaled_linear': DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'),
    'cosine': DDPMScheduler(beta_schedule='squaredcos_cap_v2'),
    'sigmoid': DDPMScheduler(beta_schedule='sigmoid'),
    'exponential': DDPMScheduler(trained_betas=exponential.numpy()),
    'zero_snr': DDPMScheduler(
      beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', rescale_betas_zero_snr=True),
  }
  steps = torch.arange(24, 1000, 25)
  for name, scheduler in tables.items():
    yield f'betas/{name}', scheduler.betas
    yield f'alphas_cumprod/{name}', scheduler.alphas_cumprod[steps]
  yield 'snr/linear', training_utils.compute_snr(tables['linear'], steps)


def diffusers_stable_diffusion_3():
  u, z = seeded(torch.rand, COUNT), seeded(torch.normal, 0.3, 0.8, (COUNT,))
  density = training_utils.compute_density_for_timestep_sampling
  yield 'times/mode', torch.stack([u, seeded(density, 'mode', COUNT, mode_scale=1.29)])
  t = seeded(density, 'logit_normal', COUNT, logit_mean=0.3, logit_std=0.8)
  yield 'times/logit_normal', torch.stack([torch.special.ndtr((z - 0.3) / 0.8), t])
  yield 'weights/cosmap', torch.stack([u, training_utils.compute_loss_weighting_for_sd3('cosmap', u)])


def k_diffusion_laws():
  """Rows (u, sigma). Its interpolation has u = 0 at the noise, where the others have the data; its least and largest sigma
  are so far out that they change nothing."""
  utils, u, options = k_diffusion.utils, seeded(torch.rand, COUNT), {'dtype': torch.float64}
  far = {'min_value': 1e-30, 'max_value': 1e30}
  # It keeps u this far from 0 and 1.
  yield 'log_normal', torch.stack([u * (1 - 2e-7) + 1e-7, seeded(utils.rand_log_normal, [COUNT], -1.2, 1.2, **options)])
  yield 'log_uniform', torch.stack([u, seeded(utils.rand_log_uniform, [COUNT], 0.02, 20.0, **options)])
  yield 'v_diffusion', torch.stack([u, seeded(utils.rand_v_diffusion, [COUNT], 0.5, 0.01, 50.0, **options)])
  sigma = seeded(utils.rand_cosine_interpolated, [COUNT], 256, noise_d_low=32, noise_d_high=256, **far, **options)
  yield 'cosine_interpolated', torch.stack([1 - u, sigma])


def k_diffusion_weights():
  """Rows (sigma, weight of the squared error of the noise), for sigma_data = 0.5."""
  layers, sigma = k_diffusion.layers, torch.logspace(-2, 2, COUNT)
  x, noise = seeded(torch.randn, 2, COUNT, 1, 1, 1)
  inner = lambda x, sigma: torch.cos(x)
  denoisers = {name: layers.Denoiser(inner, 0.5, name) for name in ('karras', 'soft-min-snr', 'snr')}
  for name, denoiser in {**denoisers, 'simple': layers.SimpleLossDenoiser(inner, 0.5)}.items():
    error = denoiser(x + noise * sigma[:, None, None, None], sigma).sub(x).flatten() / sigma
    yield name, torch.stack([sigma, denoiser.loss(x, noise, sigma) / error**2])


class Probe(torch.nn.Module):
  """A network that gives a constant and keeps what it was given."""
  def __init__(self, out_channels, **_):
    super().__init__()
    self.out_channels, self.constant = out_channels, 0.0

  def forward(self, x, feature, class_labels=None):
    self.x, self.feature = x, feature
    return torch.full([len(x), self.out_channels, 1, 1], self.constant)


def edm_preconditioning(networks):
  """Rows (sigma, c_skip, c_out, c_in, c_noise)."""
  networks.Probe = Probe
  make = lambda name: getattr(networks, name)(img_resolution=1, img_channels=1, model_type='Probe')
  steps = make('iDDPMPrecond').u[[0, 1, 2, 10, 100, 250, 500, 750, 900, 990, 998, 999]]
  sigmas = {'VP': torch.logspace(-2, 2, COUNT), 'VE': torch.logspace(-1.6, 2, COUNT), 'iDDPM': steps,
            'EDM': torch.logspace(-2.5, 1.9, COUNT)}
  for name, sigma in sigmas.items():
    net, x = make(f'{name}Precond'), torch.ones(len(sigma), 1, 1, 1)
    c_skip = net(x, sigma)
    c_in, c_noise = net.model.x, net.model.feature
    net.model.constant = 1.0
    yield name, torch.stack([each.flatten() for each in (sigma, c_skip, net(0 * x, sigma), c_in, c_noise)])


def edm_losses(loss):
  """Rows (u, sigma, weight of the squared error of the noise); u is uniform, or for EDM the probability of its normal."""
  uniform, normal = seeded(torch.rand, COUNT, 1, 1, 1), torch.special.ndtr(seeded(torch.randn, COUNT, 1, 1, 1))
  for name, u in {'VP': uniform, 'VE': uniform, 'EDM': normal}.items():
    seen = {}
    net = lambda x, sigma, *_, seen=seen, **__: seen.update(sigma=sigma, denoised=torch.cos(x)) or seen['denoised']
    data = torch.zeros(COUNT, 1, 1, 1)
    weight = seeded(getattr(loss, f'{name}Loss')(), net, data, None) / (seen['denoised'] / seen['sigma'])**2
    yield name, torch.stack([each.flatten() for each in (u, seen['sigma'], weight)])


def adm_decoder(losses):
  """Rows (x0, mean, variance, nats, nats with the exact normal law for the approximation by tanh)."""
  x = torch.arange(0, 256, 5) / 127.5 - 1
  for i, std in enumerate((0.005, 0.05, 0.5)):
    means = x + 1.5 * std * seeded(torch.randn, 3, len(x))[i]
    nats = lambda means=means, std=std: -losses.discretized_gaussian_log_likelihood(
      x, means=means, log_scales=torch.full_like(x, math.log(std)))
    approximate = nats()
    with mock.patch.object(losses, 'approx_standard_normal_cdf', torch.special.ndtr):
      yield str(std), torch.stack([x, means, torch.full_like(x, std**2), approximate, nats()])


def adm_bounds(adm, losses):
  """The terms of the bound, bits, and the hybrid loss with its gradient. The prior has the variance of q(x_T | x_0), not
  ADM's 1, and the decoder the exact normal law, not ADM's approximation."""
  t = torch.tensor([0, 0, 1, 2, 10, 25, 48, 49])
  x = seeded(torch.randint, 0, 256, (len(t), 3, 2, 2)) / 127.5 - 1
  x[0, :, 0, 0], x[1, :, 0, 0] = -1, 1
  noise, off, values = torch.randn(3, *x.shape)
  out = torch.cat([noise + 0.3 * off, values], 1).requires_grad_()
  yield from {'t': t, 'x0': last(x), 'noise': last(noise), 'out': last(out)}.items()
  for table in ('linear', 'cosine'):
    betas = adm.get_named_beta_schedule(table, STEPS)
    yield f'{table}/betas', betas
    for kind in ('FIXED_SMALL', 'FIXED_LARGE', 'LEARNED_RANGE'):
      chain = adm.GaussianDiffusion(
        betas=betas, model_mean_type=adm.ModelMeanType.EPSILON, model_var_type=adm.ModelVarType[kind],
        loss_type=adm.LossType.RESCALED_MSE)
      model = lambda *_, kind=kind: out if kind == 'LEARNED_RANGE' else out[:, :3]
      with mock.patch.object(losses, 'approx_standard_normal_cdf', torch.special.ndtr):
        yield f'{table}/{kind}', chain._vb_terms_bpd(model, x, chain.q_sample(x, t, noise), t, False)['output']
        if kind == 'LEARNED_RANGE':
          loss = chain.training_losses(model, x, t, noise=noise)['loss']
          yield f'{table}/hybrid', loss
          yield f'{table}/gradient', last(torch.autograd.grad(loss.sum(), out)[0])
    mean, _, log_variance = chain.q_mean_variance(x, torch.full_like(t, STEPS - 1))
    kl = losses.normal_kl(mean, log_variance, 0.0, log_variance)
    yield f'{table}/prior', kl.flatten(1).mean(1) / math.log(2)


def last(x):
  return x.movedim(1, -1)


def commit(path):
  return subprocess.check_output(['git', '-C', path, 'rev-parse', 'HEAD'], text=True).strip()


def main(adm_path, edm_path):
  sys.path[:0] = [adm_path, edm_path]
  from guided_diffusion import gaussian_diffusion, losses
  from training import loss, networks
  with double():
    groups = {
      'diffusers': [*diffusers_tables(), *diffusers_stable_diffusion_3()],
      'k_diffusion/times': k_diffusion_laws(),
      'k_diffusion/weights': k_diffusion_weights(),
      'edm': edm_preconditioning(networks),
      'edm/losses': edm_losses(loss),
      'adm/decoder': adm_decoder(losses),
      'adm': adm_bounds(gaussian_diffusion, losses),
    }
    values = {f'{group}/{name}': np.asarray(torch.as_tensor(value).detach())
              for group, rows in groups.items() for name, value in rows}
  versions = {name: importlib.metadata.version(name) for name in ('torch', 'diffusers', 'k-diffusion', 'numpy', 'scipy')}
  versions |= {'guided-diffusion': commit(adm_path), 'edm': commit(edm_path)}
  wrong = [name for name, value in values.items() if not np.isfinite(value).all()]
  assert not wrong, wrong
  path = pathlib.Path(__file__).with_name('mathematics.npz')
  np.savez_compressed(path, versions=str(versions), **values)
  print(f'{path}: {len(values)} arrays, {path.stat().st_size} bytes; {versions}')


if __name__ == '__main__':
  main(*sys.argv[1:])
