"""Makes networks.npz, what other people's transformers say with random parameters, and how many parameters published ones
have; tests/networks/test_dit.py replays it.

Run by hand, in the environment of make_mathematics.py:

  /tmp/gold/bin/python tests/goldens/make_networks.py

Every parameter is drawn, none is 0, and stored under the name and in the layout that it has with us, in float16 where that
holds it exactly; the peers compute in float64. Images are stored with the channels last.
"""
import importlib.metadata
import math
import pathlib

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from make_mathematics import double, last

HEADS, HEAD, DEPTH = 2, 8, 2
WIDTH = HEADS * HEAD
ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'mix': 'to_out.0'}
ADDED = {'sequence_query': 'add_q_proj', 'sequence_key': 'add_k_proj', 'sequence_value': 'add_v_proj',
         'sequence_mix': 'to_add_out'}
MLP = {'mlp_in': 'net.0.proj', 'mlp_out': 'net.2'}
NORMS = {'query_norm': 'norm_q', 'key_norm': 'norm_k', 'sequence_query_norm': 'norm_added_q',
         'sequence_key_norm': 'norm_added_k'}


def fill(net):
  """Draw all parameters: kernels of unit gain, biases around 0, scales around 1."""
  generator = torch.Generator().manual_seed(0)
  for name, parameter in net.named_parameters():
    value = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1 and 'table' not in name:
      value /= math.sqrt(math.prod(parameter.shape[1:]))
    elif parameter.ndim == 1:
      value = 0.2 * value + name.endswith('weight')
    parameter.data.copy_(value.half())
  return net.eval()


def dense(layer):
  return {'kernel': layer.weight.T, 'bias': layer.bias}


def swapped(parameters):
  """The halves of the last axis change places: theirs are (scale, shift) or (cos, sin), ours (shift, scale), (sin, cos)."""
  return {name: torch.roll(value, value.shape[-1] // 2, -1) for name, value in parameters.items()}


def ends(net, embedder, changes, out):
  """What is before and after the blocks."""
  kernel, first = net.pos_embed.proj.weight, dense(embedder.linear_1)
  return {
    'time_0': {'kernel': torch.roll(first['kernel'], 128, 0), 'bias': first['bias']}, 'time_1': dense(embedder.linear_2),
    'in': {'kernel': kernel.permute(2, 3, 1, 0).reshape(-1, WIDTH), 'bias': net.pos_embed.proj.bias},
    'modulation': changes, 'out': dense(out)}


def named(block, table):
  """{our name: parameters} of those layers of a module that it has."""
  layers = {ours: block.get_submodule(theirs) for ours, theirs in table.items()
            if getattr(block, theirs.partition('.')[0], None) is not None}
  return {ours: {'scale': layer.weight} if layer.weight.ndim == 1 else dense(layer) for ours, layer in layers.items()}


def flat(tree, prefix=''):
  for name, value in tree.items():
    yield from flat(value, f'{prefix}{name}/') if isinstance(value, dict) else [(prefix + name, value)]


def dit():
  """Its sinusoid has shift 1; the embedder of the first block, which the last layer uses, is that of all."""
  net = fill(DiTTransformer2DModel(HEADS, HEAD, 3, 5, DEPTH, sample_size=6, num_embeds_ada_norm=4, norm_eps=1e-6))
  first = net.transformer_blocks[0].norm1.emb
  for block in net.transformer_blocks:
    block.norm1.emb = first
  x, time, label = torch.randn(3, 3, 6, 6), torch.tensor([0.0, 13.5, 700.0]), torch.tensor([0, 2, 3])
  params = ends(net, first.timestep_embedder, dense(net.proj_out_1), net.proj_out_2)
  for i, block in enumerate(net.transformer_blocks):
    params[f'block_{i}'] = {'modulation': dense(block.norm1.linear), **named(block.attn1, ATTENTION),
                            **named(block.ff, MLP)}
  return {'params': params, 'x': last(x), 'time': time, 'vector': first.class_embedder(label),
          'out': last(net(x, time, label).sample)}


def sd3():
  """Its table of positions is as large as the longer side, so that it is neither cropped nor scaled. In the last block its
  queries of the sequence come to nothing; we have none."""
  net = fill(SD3Transformer2DModel(6, 2, 3, DEPTH, HEAD, HEADS, 7, WIDTH, 9, 5, 3, qk_norm='rms_norm'))
  x, time = torch.randn(3, 3, 6, 4), torch.tensor([0.0, 13.5, 700.0])
  sequence, pooled = torch.randn(3, 5, 7), torch.randn(3, 9)
  params = ends(net, net.time_text_embed.timestep_embedder, swapped(dense(net.norm_out.linear)), net.proj_out)
  params['sequence'] = dense(net.context_embedder)
  for i, block in enumerate(net.transformer_blocks):
    final, changes = i == DEPTH - 1, dense(block.norm1_context.linear)
    mine = {'modulation': dense(block.norm1.linear), 'sequence_modulation': swapped(changes) if final else changes,
            **named(block.attn, ATTENTION | ADDED | NORMS), **named(block.ff, MLP)}
    if final:
      mine = {name: value for name, value in mine.items() if name not in ('sequence_query', 'sequence_query_norm')}
    else:
      mine |= {f'sequence_{name}': value for name, value in named(block.ff_context, MLP).items()}
    params[f'block_{i}'] = mine
  return {'params': params, 'x': last(x), 'time': time, 'vector': net.time_text_embed.text_embedder(pooled),
          'sequence': sequence, 'out': last(net(x, sequence, pooled, time).sample)}


def pixart():
  """One block. What the time does is made outside of it, for all blocks at once, and a table of its own is added."""
  block = fill(BasicTransformerBlock(WIDTH, HEADS, HEAD, cross_attention_dim=7, activation_fn='gelu-approximate',
                                     attention_bias=True, norm_type='ada_norm_single', norm_elementwise_affine=False,
                                     norm_eps=1e-6))
  changes = fill(torch.nn.Linear(WIDTH, 6 * WIDTH))
  x, time, sequence = torch.randn(3, 6, WIDTH), torch.randn(3, WIDTH), torch.randn(3, 5, 7)
  mask = torch.arange(5)[None] < torch.tensor([5, 3, 1])[:, None]
  out = block(x, timestep=changes(torch.nn.functional.silu(time)), encoder_hidden_states=sequence,
              encoder_attention_mask=torch.where(mask, 0.0, -torch.inf)[:, None])
  bias = changes.bias + block.scale_shift_table.flatten()
  params = {'modulation': {'kernel': changes.weight.T, 'bias': bias}, **named(block.attn1, ATTENTION),
            **named(block.ff, MLP), **{f'cross_{name}': value for name, value in named(block.attn2, ATTENTION).items()}}
  return {'params': params, 'x': x, 'time': time, 'sequence': sequence, 'mask': mask, 'out': out}


def counts():
  """DiT-XL/2 with 1000 classes and the null, and Stable Diffusion 3 medium."""
  with torch.device('meta'):
    nets = {'dit_xl': DiTTransformer2DModel(16, 72, 4, 8, 28),
            'sd3_medium': SD3Transformer2DModel(128, 2, 16, 24, 64, 24, 4096, 1536, 2048, 16, 192)}
  return {name: torch.tensor(sum(parameter.numel() for parameter in net.parameters())) for name, net in nets.items()}


def main():
  with double(), torch.no_grad():
    torch.manual_seed(0)
    cases = {'dit': dit(), 'sd3': sd3(), 'pixart': pixart(), 'counts': counts()}
    values = {}
    for name, value in flat(cases):
      value = value.detach().numpy()
      small = value.astype(np.float16) if value.dtype == np.float64 else value
      values[name] = small if (small == value).all() else value
  versions = {name: importlib.metadata.version(name) for name in ('torch', 'diffusers', 'numpy')}
  assert all(np.isfinite(value).all() for value in values.values())
  path = pathlib.Path(__file__).with_name('networks.npz')
  np.savez_compressed(path, versions=str(versions), **values)
  print(f'{path}: {len(values)} arrays, {path.stat().st_size} bytes; {versions}')


if __name__ == '__main__':
  main()
