"""Makes vision.npz, the numbers of transformers' CLIP image encoder that tests/networks/test_vision.py replays.

Run by hand, in an environment of its own:

  python3.11 -m venv /tmp/gold
  /tmp/gold/bin/pip install torch==2.13.0 transformers==5.23.0
  /tmp/gold/bin/python tests/goldens/make_vision.py

The encoders are tiny and every parameter is drawn, so that each matters; they compute in float64.
"""
import importlib.metadata
import pathlib

import numpy as np
import torch
import transformers

SIZES = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 24}


def randomised(module):
  """The module in float64 with every parameter drawn, in float32: matrices small, scales around 1, biases around 0."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, value in module.named_parameters():
      std = value[0].numel()**-0.5 if value.ndim > 1 else 0.3
      value.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, std)
  return module.double().eval()


def clip(activation):
  config = transformers.CLIPVisionConfig(image_size=12, patch_size=4, hidden_act=activation, projection_dim=10, **SIZES)
  module = randomised(transformers.CLIPVisionModelWithProjection(config))
  x = torch.randn(3, 3, 12, 12)
  out = module(x.double())
  yield from {'x': x.permute(0, 2, 3, 1), 'sequence': out.last_hidden_state, 'pooled': out.image_embeds}.items()
  yield from ((f'weights/{name}', value) for name, value in module.named_parameters())


def count():
  """How many parameters ViT-L/14 has."""
  with torch.device('meta'):
    module = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
      image_size=224, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
      intermediate_size=4096))
  return sum(each.numel() for each in module.parameters())


def main():
  values = {f'{activation}/{name}': value.detach().numpy().astype(np.float32)
            for activation in ('quick_gelu', 'gelu') for name, value in clip(activation)}
  versions = {name: importlib.metadata.version(name) for name in ('torch', 'transformers', 'numpy')}
  path = pathlib.Path(__file__).with_name('vision.npz')
  np.savez_compressed(path, versions=str(versions), count=count(), **values)
  print(f'{path}: {len(values)} arrays, {path.stat().st_size} bytes; {versions}; ViT-L/14 {count():,}')


if __name__ == '__main__':
  main()
