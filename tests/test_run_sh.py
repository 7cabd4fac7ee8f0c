"""run.sh on a cluster, with stand-ins for its programs: they write down how they are called, and do what is asked."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = 'basename bash cat chmod cksum cp dirname env flock git grep gzip mkdir mktemp rm sed sleep tar'.split()
STANDS_IN = {
    'uv': """[ $1 = pip ] || { sleep 0.2; mkdir -p .venv/bin; cp "$(command -v installed_python)" .venv/bin/python; }""",
    'installed_python': '[ $1 != -c ] || echo gpu',
    # Two hosts, with a home each.
    'gcloud': """for host in 0 1; do
  cd "$HOSTS/$host"
  case $4 in
    scp) cp "$5" . ;;
    ssh) for word in "$@"; do case $word in --command=*) HOME=$PWD bash -c "${word#*=}" ;; esac; done ;;
  esac
done""",
    # A copy of the script, run elsewhere, as Slurm does; two tasks a node.
    'sbatch': """cat > "$HOSTS/script-$$"; cd "$HOSTS"; SLURM_TASKS_PER_NODE='2(x2)' bash "script-$$" """,
    'srun': """while [[ $1 = -* ]]; do shift; done
for i in 0 1 2 3; do SLURM_PROCID=$i "$@" & done; wait""",
}


class Cluster:
  """A checkout with a config, and a PATH that holds `TOOLS` and those that stand in."""

  def __init__(self, folder: Path):
    self.checkout, self.bin, self.hosts, self.log = (folder / name for name in ('check out', 'bin', 'hosts', 'log'))
    for path in (self.checkout / 'configs', self.bin, self.hosts / '0', self.hosts / '1', self.log):
      path.mkdir(parents=True)
    for name in ('run.sh', 'setup.cfg', '.gitignore'):
      shutil.copy(ROOT / name, self.checkout)
    (self.checkout / 'configs' / 'digits.py').write_text('committed')
    for words in (['init', '-q'], ['add', '.'], ['-c', 'user.name=a', '-c', 'user.email=b', 'commit', '-qm', 'first']):
      self.git(*words)
    for name in TOOLS:
      (self.bin / name).symlink_to(shutil.which(name))
    # One file a call, so that calls at once do not mix: the name of the program, its words, and what it is told besides.
    told = '"${SLURM_PROCID:-} ${JAX_PLATFORMS:-} ${DIFFUSION_JAX_COMMIT:-}"'
    (self.bin / 'write_down').write_text(f'printf "%s\\n" "$@" {told} > "$(mktemp -p "$LOG")"; shift\n')
    for name, does in STANDS_IN.items():
      (self.bin / name).write_text(f'#!/bin/bash\n. write_down {name} "$@"\n{does}\n')
      (self.bin / name).chmod(0o755)

  def git(self, *words) -> str:
    return subprocess.run(['git', *words], cwd=self.checkout, check=True, capture_output=True, text=True).stdout.strip()

  def start(self, *words, **environment):
    paths = {'PATH': str(self.bin), 'HOME': str(self.hosts), 'HOSTS': str(self.hosts), 'LOG': str(self.log)}
    return subprocess.Popen(['bash', self.checkout / 'run.sh', *words], env=paths | environment, text=True, cwd='/',
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def run(self, *words, **environment):
    """(exit status, what went to stderr)."""
    process = self.start(*words, **environment)
    error = process.communicate(timeout=60)[1]
    return process.returncode, error

  def calls(self, name: str) -> list[list[str]]:
    """The words of each call of a program, and last its task, JAX_PLATFORMS and DIFFUSION_JAX_COMMIT; sorted."""
    calls = [path.read_text().splitlines() for path in self.log.iterdir()]
    return sorted(call[1:] for call in calls if call[0] == name)


@pytest.fixture
def cluster(tmp_path):
  return Cluster(tmp_path)


ODD = "--config.transform=guide(2.0, during=(0.2, 0.8)) | clip('$HOME')"  # words that a shell would take apart


def test_tpu_runs_the_files_as_they_are_on_all_hosts(cluster):
  (cluster.checkout / 'configs' / 'digits.py').write_text('edited')
  (cluster.checkout / 'configs' / 'mine.py').write_text('added')
  (cluster.checkout / 'untracked').write_text('')
  cluster.git('add', 'configs/mine.py')
  status = cluster.git('status', '--porcelain')
  assert cluster.run('tpu', 'slice', 'us-east5-a', 'configs/mine.py', '--workdir=/shared/run', ODD) == (0, '')
  copy, run = cluster.calls('gcloud')
  assert copy[:4] == ['compute', 'tpus', 'tpu-vm', 'scp'] and copy[5:-1] == ['slice:', '--zone=us-east5-a', '--worker=all']
  assert run[:4] == ['compute', 'tpus', 'tpu-vm', 'ssh'] and run[4:7] == ['slice', '--zone=us-east5-a', '--worker=all']
  assert not Path(copy[4]).exists()  # the archive was a temporary file
  for host in ('0', '1'):
    files = cluster.hosts / host / 'diffusion_jax_copy'
    assert (files / 'configs' / 'digits.py').read_text() == 'edited' and (files / 'configs' / 'mine.py').exists()
    assert not (files / 'untracked').exists()
  words = ['-m', 'diffusion_jax.main', '--config=configs/mine.py', '--workdir=/shared/run', ODD]
  assert cluster.calls('installed_python') == [[*words, f' tpu,cpu {cluster.git("rev-parse", "HEAD")}+']] * 2
  assert [call[0] for call in cluster.calls('uv')] == ['pip', 'pip', 'venv', 'venv']
  assert all('.[tpu]' in call for call in cluster.calls('uv') if call[0] == 'pip')
  assert cluster.git('status', '--porcelain') == status and cluster.git('stash', 'list') == ''


@pytest.mark.parametrize('given, used', [({}, 'glibc.malloc.hugetlb=1'), ({'GLIBC_TUNABLES': 'mine'}, 'mine')])
def test_a_cpu_gets_large_pages_unless_the_user_says_else(cluster, given, used):
  (cluster.bin / 'installed_python').write_text('#!/bin/bash\necho "$GLIBC_TUNABLES" > "$HOSTS/tunables"\n')
  assert cluster.run('configs/digits.py', **given)[0] == 0
  assert (cluster.hosts / 'tunables').read_text().strip() == used


def test_slurm_installs_once_and_starts_the_tasks(cluster):
  """Two jobs that begin at once, in one folder."""
  words = 'slurm', '--nodes=2', '--ntasks-per-node=2', 'configs/digits.py', ODD
  jobs = [cluster.start(*words) for _ in range(2)]
  for job in jobs:
    assert job.communicate(timeout=60)[1] == '' and job.returncode == 0
  submitted = ['--job-name=digits', '--output=runs/slurm-%j.txt', '--nodes=2', '--ntasks-per-node=2', '  ']
  assert cluster.calls('sbatch') == [submitted] * 2
  assert cluster.calls('srun') == [['--kill-on-bad-exit=1', 'bash', 'run.sh', 'configs/digits.py', ODD, '  ']] * 2
  assert [call[0] for call in cluster.calls('uv')] == ['pip', 'venv']
  program = ['-m', 'diffusion_jax.main', '--config=configs/digits.py', '--workdir=runs/digits', ODD]
  assert cluster.calls('installed_python') == [[*program, f'{task}  '] for task in range(4) for _ in jobs]


def test_the_tasks_of_a_job_do_not_all_ask_the_gpus(cluster):
  """The first node does, once; each task then may take no other device."""
  (cluster.bin / 'nvidia-smi').write_text('#!/bin/bash\necho "GPU 0, CUDA Version: 13.0"\n')
  (cluster.bin / 'nvidia-smi').chmod(0o755)
  assert cluster.run('slurm', 'configs/digits.py', SLURM_GPUS_ON_NODE='2', SLURM_CPUS_PER_TASK='12') == (0, '')
  assert cluster.calls('srun')[0][:2] == ['--cpus-per-task=12', '--kill-on-bad-exit=1'][::-1]
  assert '.[cuda13]' in cluster.calls('uv')[0]
  asked, *tasks = cluster.calls('installed_python')
  assert asked[0] == '-c' and [task[-1] for task in tasks] == [f'{task} cuda,cpu ' for task in range(4)]
  status, error = cluster.run('slurm', 'configs/digits.py', SLURM_GPUS_ON_NODE='8')
  assert status == 1 and 'This job has 8 GPUs and 2 task(s) a node' in error and '--ntasks-per-node=8' in error


TPU, SLICE = ['tpu', 'slice', 'zone'], ['tpu', 'slice', 'zone', 'configs/digits.py']
SENTENCES = {
    'too few words': (TPU, 'Type bash run.sh tpu NAME ZONE CONFIG --workdir=/FOLDER [flags].'),
    'no such config': ([*TPU, 'digits', '--workdir=/a'], 'digits is no config. There are: configs/digits.py'),
    'no workdir': (SLICE, "--workdir is ''; for a TPU slice it must be an absolute"),
    'own disk': ([*SLICE, '--workdir=runs/a'], "--workdir is 'runs/a'; for a TPU slice it must be an absolute"),
    'bucket': ([*SLICE, '--workdir=gs://a/b'], 'A bucket, gs://, will not do'),
    'no gcloud': ([*SLICE, '--workdir=/a'], 'There is no gcloud in PATH'),
    'only options': (['slurm', '--nodes=2'], 'Type bash run.sh slurm [options of sbatch, each one word] CONFIG [flags].'),
    'an option of two words': (['slurm', '--nodes', '2', 'configs/digits.py'], '2 is no config. There are:'),
    'no sbatch': (['slurm', 'configs/digits.py'], 'There is no sbatch in PATH'),
    'no job': (['job', 'configs/digits.py'], 'type bash run.sh slurm configs/digits.py to submit it'),
    'alone': (['configs/digit.py'], 'configs/digit.py is no config. There are: configs/digits.py'),
}


@pytest.mark.parametrize('case', SENTENCES)
def test_bad_words_get_a_sentence_before_anything_is_done(cluster, case):
  words, sentence = SENTENCES[case]
  if case.startswith('no '):
    for name in ('gcloud', 'sbatch'):
      (cluster.bin / name).unlink()
  status, error = cluster.run(*words)
  assert status == 1 and error.startswith('ERROR: ') and sentence in error and error.count('\n') == 1, error
  assert list(cluster.log.iterdir()) == [] and os.listdir(cluster.hosts / '0') == []


def test_a_tpu_needs_a_checkout(cluster):
  shutil.rmtree(cluster.checkout / '.git')
  status, error = cluster.run('tpu', 'slice', 'zone', 'configs/digits.py', '--workdir=/a')
  assert status == 1 and 'check out is no git checkout: which files to copy is not known.' in error
  assert list(cluster.log.iterdir()) == []
