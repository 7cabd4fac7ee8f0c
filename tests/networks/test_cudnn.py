"""Attention by cuDNN's kernel: which programs have it. What it computes is JAX's and NVIDIA's to prove, on a GPU."""
import re

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from diffusion_jax.networks import layers
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.unet import UNet
from tests.networks.test_unet import fill, inputs, shapes_of

UNET = dict(channels=8, multipliers=(1,), blocks=1, attention=(True,), groups=4)
DIT = dict(width=32, depth=2, heads=4)


@pytest.fixture
def nvidia(monkeypatch):
  """The machine says that it has an NVIDIA GPU with a new cuDNN."""
  monkeypatch.setattr(layers, 'on_nvidia', lambda: True)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'check_compute_capability', lambda capability: True)


def kernels(net):
  """Names of cuDNN's programs in the gradient of a network, with a masked sequence, lowered for CUDA."""
  args = inputs()
  def objective(params):
    return net.apply(params, *args).sum()
  traced = jax.jit(jax.grad(objective)).trace(shapes_of(net, *args))
  return re.findall(r'__cudnn\$(\w+)', traced.lower(lowering_platforms=('cuda',)).as_text())


@pytest.mark.parametrize('net, count', [
    (UNet(**UNET, dtype='bfloat16', cudnn=True), 4),  # one down, one in the middle, two up
    (DiT(**DIT, dtype='bfloat16', cudnn=True, scan=True, remat='block'), 1),  # a loop
    (DiT(**DIT, dtype='bfloat16'), 0)])
def test_self_attention_is_cudnns_forward_and_backward(nvidia, net, count):
  found = kernels(net)
  assert found.count('fmhaSoftmaxBackward') == count
  assert found.count('fmhaSoftmax') >= count  # and again, where the backward pass computes it anew


@pytest.mark.parametrize('make, fields', [(UNet, UNET), (DiT, DIT)])
def test_elsewhere_it_is_the_same_program(make, fields):
  args = inputs()
  texts = [jax.jit(net.apply).lower(fill(shapes_of(net, *args)), *args).as_text()
           for net in (make(**fields, dtype='bfloat16'), make(**fields, dtype='bfloat16', cudnn=True))]
  assert texts[0] == texts[1]


@pytest.mark.parametrize('make, fields, sentence', [
    (UNet, UNET, "UNet got cudnn=True and dtype='float32'; cuDNN's attention takes dtype='bfloat16'"),
    (DiT, DIT, "DiT got cudnn=True and dtype='float32'"),
    (DiT, DIT | dict(heads=8, dtype='bfloat16'), 'cudnn=True needs heads of a multiple of 8 channels, and got 4')])
def test_what_it_cannot_compute_gets_a_sentence(make, fields, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    shapes_of(make(**fields, cudnn=True), *inputs())


def test_a_cpu_is_no_nvidia_gpu():
  assert not layers.on_nvidia()
