"""The flags of --mode=sample, by which a trained run is asked for pictures."""
from absl import flags

STRINGS = {
  'prompt': 'What to generate; for a run with classes the number of one.',
  'prompts': 'A file with a prompt a line, in place of --prompt.',
  'negative': 'What guidance is to lead away from.',
  'towards': 'Another prompt, to which --frames lead.',
  'image': 'A picture to start from, with --strength, --mask or --outpaint.',
  'source': 'What --image shows: it is led to --strength by the inverse of DDIM, not noised, and then edited by --prompt.',
  'mask': 'A picture of the size of --image: white is what may change.',
  'inpaint': "How the rest is held: 'replace()', 'dps(0.1)', 'pigdm()'.",
  'reference': 'A picture to be like, for a run with config.condition.reference.',
  'solver': 'A row of config.solver.',
  'again': 'A PNG that was generated here, to make again; no other of these flags is needed.',
  'out': 'The folder for the PNGs; by default `generated` in the workdir.'}
FLOATS = {'strength': 'The time to which --image is noised: 0 leaves it as it is, 1 leaves nothing of it.'}
INTEGERS = {'count': 'Pictures of each prompt.', 'seed': 'Of the noise.', 'steps': "Of the run's grid.",
            'towards_seed': 'Another seed, to whose noise --frames turn.',
            'frames': 'Pictures of each prompt, evenly on the way to --towards, --towards_seed or both, with frames.gif.'}
LISTS = {'guidance': 'Scales of guidance, 3 or 1,3,7: a column of the sheet for each.',
         'outpaint': 'Pixels to add to --image: left,top,right,bottom.'}


def define() -> None:
  """Define the flags. None: not given."""
  for names, kind in ((STRINGS, flags.DEFINE_string), (FLOATS, flags.DEFINE_float), (INTEGERS, flags.DEFINE_integer),
                      (LISTS, flags.DEFINE_list)):
    for name, text in names.items():
      kind(name, None, text)


def given(values: flags.FlagValues) -> dict:
  """The flags that were given, lists as tuples of numbers."""
  found = {name: values[name].value for names in (STRINGS, FLOATS, INTEGERS) for name in names
           if values[name].value is not None}
  for name, number in (('guidance', float), ('outpaint', int)):
    if values[name].value is not None:
      try:
        found[name] = tuple(map(number, values[name].value))
      except ValueError as error:
        raise ValueError(f'--{name} is {",".join(values[name].value)}; legal are numbers with commas between them: '
                         f'{LISTS[name]}') from error
  return found
