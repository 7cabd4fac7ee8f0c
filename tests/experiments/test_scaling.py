"""The sweep over slices."""
import math

import pytest

from diffusion_jax.jobs import plan
from diffusion_jax.runtime.workdir import write_csv
from experiments.scaling import sweep


def test_the_table_has_what_fits_and_what_does_not(tmp_path, monkeypatch, capsys):
  """Of two configs of which one was planned before; sampling is in the results, not in the table."""
  def planned(config, workdir, topologies):
    (workdir / 'plan').mkdir(parents=True)
    fits = {'topology': topologies.split(',')[0], 'program': 'train', 'batch': config.train.batch, 'peak_gib': 1.5}
    write_csv(workdir / 'plan' / 'table.csv', [
        fits, {'topology': 'v5e:4x4', 'program': 'train', 'batch': 512},
        {'topology': 'v5e:2x4', 'program': 'sample', 'batch': 7}])
  monkeypatch.setattr(plan, 'run', planned)
  monkeypatch.setattr(sweep, 'HERE', tmp_path)
  monkeypatch.setattr(sweep, 'KEPT', tmp_path / 'kept')
  sweep.main(['cifar10'])
  head, _, first, second = capsys.readouterr().out.splitlines()
  assert first.startswith('| cifar10 | v5e:2x4 |  | 128 | 1.5 |') and '512 | does not fit |' in second
  assert head.count('|') == first.count('|')
  results = (tmp_path / 'results.csv').read_text().splitlines()
  assert results[0] == 'config,topology,program,batch,peak_gib' and len(results) == 4
  with pytest.raises(KeyError):
    sweep.main(['digits'])


def test_every_slice_can_share_the_batch_of_its_chips():
  sizes = [math.prod(map(int, name.partition(':')[2].split('x'))) for name in sweep.SLICES]
  assert sizes[0] == min(sizes) == 8 and max(sizes) == 256
  assert all(batch % 8 == 0 for batch in sweep.BATCHES.values())
