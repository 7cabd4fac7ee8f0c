"""Makes text.npz, the numbers of transformers' text encoders and tokenizers that the tests replay.

Run by hand, in an environment of its own:

  python3.11 -m venv /tmp/gold
  /tmp/gold/bin/pip install torch==2.15.0 transformers==5.23.0
  /tmp/gold/bin/python tests/goldens/make_text.py

The encoders are tiny and every parameter is drawn, also the scales and biases of the norms, so that each matters. They
compute in float64; tests/networks/test_text.py and tests/tasks/test_tokenizers.py read the numbers, rounded to float32.
Tokenizers have the form of the published ones and a small vocabulary; their tokens are those of transformers.
"""
import importlib.metadata
import json
import pathlib
import tempfile

import numpy as np
import tokenizers
import torch
import transformers

SIZES = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 24}
END, LENGTH = 31, 10
TEXTS = ['', 'a panda on a bike', 'Two  RED squares, left of a café!', 'panda ' * 20, "it's a <|endoftext|> </s> 12 😀"]
CAPTIONS = ['a panda on a bike', 'two red squares left of a blue circle', 'a café', "it's 12 pandas"] * 3


def randomised(module):
  """The module in float64 with every parameter drawn, in float32: matrices small, scales around 1, biases around 0."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, value in module.named_parameters():
      std = value.shape[-1]**-0.5 if value.ndim == 2 else 0.3
      value.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, std)
  return module.double().eval()


def tokens_of(counts, length):
  """Random tokens with the end token behind the first counts - 1, then zeros; and their mask."""
  rows, mask = torch.randint(1, END, (len(counts), length)), torch.arange(length) < torch.tensor(counts)[:, None]
  rows[torch.arange(len(counts)), torch.tensor(counts) - 1] = END
  return rows * mask, mask


def clip(activation):
  config = transformers.CLIPTextConfig(
    vocab_size=END + 1, max_position_embeddings=LENGTH, hidden_act=activation, projection_dim=12, eos_token_id=END,
    bos_token_id=0, **SIZES)
  module = randomised(transformers.CLIPTextModelWithProjection(config))
  tokens, mask = tokens_of([1, 4, 7, LENGTH], LENGTH)
  out = module(tokens, output_hidden_states=True)  # as Stable Diffusion calls it: without the mask
  yield from {'tokens': tokens, 'mask': mask, 'sequence': out.last_hidden_state, 'penultimate': out.hidden_states[-2],
              'pooled': out.text_embeds}.items()
  yield from ((f'weights/{name}', value) for name, value in module.named_parameters())


def t5(form):
  config = transformers.T5Config(
    vocab_size=END + 1, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj=form)
  module = randomised(transformers.T5EncoderModel(config))
  tokens, mask = tokens_of([1, 9, 24, 40], 40)
  out = module(tokens, attention_mask=mask).last_hidden_state
  yield from {'tokens': tokens, 'mask': mask, 'sequence': out}.items()
  yield from ((f'weights/{name}', value) for name, value in module.named_parameters())


def buckets():
  distance = torch.arange(-300, 301)
  attention = transformers.models.t5.modeling_t5.T5Attention
  return torch.stack([distance, attention._relative_position_bucket(distance)])


def counts():
  """How many parameters the published sizes have."""
  clips = {'vit_l_14': {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'intermediate_size': 3072},
           'vit_h_14': {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096}}
  t5s = {'small': (512, 64, 1024, 8, 6), 'base': (768, 64, 2048, 12, 12), 'large': (1024, 64, 2816, 24, 16),
         'xl': (2048, 64, 5120, 24, 32), 'xxl': (4096, 64, 10240, 24, 64)}
  with torch.device('meta'):
    for name, sizes in clips.items():
      yield f'clip/{name}', transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    for name, (d_model, d_kv, d_ff, layers, heads) in t5s.items():
      yield f't5/{name}', transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=32128, d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_layers=layers, num_heads=heads,
        feed_forward_proj='gated-gelu'))


def clip_tokenizer():
  """CLIP's, with merges learned from the captions."""
  empty = transformers.CLIPTokenizer().backend_tokenizer
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix='</w>', show_progress=False)
  learner = tokenizers.Tokenizer(tokenizers.models.BPE())
  learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
  learner.train_from_iterator(CAPTIONS, trainer)
  merges = [tuple(pair) for pair in json.loads(learner.to_str())['model']['merges']]
  pieces = sorted(alphabet)
  pieces += [piece + '</w>' for piece in pieces] + [''.join(pair) for pair in merges]
  pieces = [*dict.fromkeys(pieces), '<|startoftext|>', '<|endoftext|>']
  return transformers.CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def t5_tokenizer():
  """T5's, with pieces of equal weight a character."""
  words = sorted({f'▁{word}' for caption in CAPTIONS for word in caption.split()})
  letters = sorted(set(''.join(TEXTS + CAPTIONS)) - {' ', '😀'})
  pieces = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -2.0)]
  return transformers.T5Tokenizer(
    vocab=pieces + [(word, -3.0) for word in words] + [(letter, -5.0) for letter in letters], extra_ids=0)


def tokenized(tokenizer):
  """The file of a tokenizer and what it makes of the texts; a special token in a text is text, not a command."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save_pretrained(folder)
    yield 'file', (pathlib.Path(folder) / 'tokenizer.json').read_text()
  out = tokenizer(TEXTS, padding='max_length', max_length=LENGTH, truncation=True, split_special_tokens=True)
  yield 'texts', TEXTS
  yield 'tokens', out.input_ids
  yield 'mask', out.attention_mask


def main():
  groups = {'clip/quick_gelu': clip('quick_gelu'), 'clip/gelu': clip('gelu'), 't5/gated-gelu': t5('gated-gelu'),
            't5/relu': t5('relu'), 'tokenizer/clip': tokenized(clip_tokenizer()), 'tokenizer/t5': tokenized(t5_tokenizer())}
  values = {f'{group}/{name}': value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            for group, rows in groups.items() for name, value in rows}
  values['t5/buckets'] = buckets().numpy()
  values |= {f'count/{name}': sum(each.numel() for each in module.parameters()) for name, module in counts()}
  values = {name: value.astype(np.float32) if np.asarray(value).dtype == np.float64 else value
            for name, value in values.items()}
  versions = {name: importlib.metadata.version(name) for name in ('torch', 'transformers', 'tokenizers', 'numpy')}
  path = pathlib.Path(__file__).with_name('text.npz')
  np.savez_compressed(path, versions=str(versions), **values)
  print(f'{path}: {len(values)} arrays, {path.stat().st_size} bytes; {versions}')
  print({name: int(value) for name, value in values.items() if name.startswith('count')})


if __name__ == '__main__':
  main()
