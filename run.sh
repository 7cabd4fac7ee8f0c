#!/usr/bin/env bash
# bash run.sh                       install, then the main job: configs/digits.py
# bash run.sh CONFIG [flags]        install, then python -m diffusion_jax.main --config=CONFIG [flags]
# bash run.sh test [pytest flags]   install what the tests need, then run them
# bash run.sh tpu NAME ZONE CONFIG --workdir=/FOLDER [flags]
#     copy the tracked files to ~/diffusion_jax_copy on all hosts of the TPU slice NAME, and run CONFIG there as one job.
#     The folder must be on a disk that all hosts mount. What the hosts print comes here; typed again, the run goes on.
# bash run.sh slurm [options] CONFIG [flags]
#     submit CONFIG with sbatch and its options, each one word: --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 (a task a
#     GPU, as JAX wants it), --time=24:00:00, --requeue. This folder must be on a disk that the nodes share. What the job
#     prints goes to runs/slurm-JOB.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH=$PATH:$HOME/.local/bin  # where uv is; a command over ssh does not know it

fail() { echo "ERROR: $*" >&2; exit 1; }

check_config() { [ -f "$1" ] || fail "$1 is no config. There are: $(echo configs/*.py)"; }

# The accelerator of this host: the extra of setup.cfg that JAX needs for it, or nothing for the CPU. A TPU is told by the
# numbers on the PCI bus by which JAX tells it.
accelerator() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    local cuda
    cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
    if [ "${cuda:-12}" -ge 13 ]; then echo cuda13; else echo cuda12; fi
  elif grep -qsE '^PCI_ID=1AE0:00(27|56|5E|62|63|6F|76)$' /sys/bus/pci/devices/*/uevent ||
    [ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ] || [[ ${JAX_PLATFORMS:-} = tpu* ]]; then
    echo tpu
  fi
}

# Make .venv and install the package with the extras "$1" into it, once for each state of setup.cfg. The lock, on that file,
# is for jobs that begin together on one disk.
install() {
  local extras=$1 stamp mark python
  mark=.venv/installed-${extras:-cpu} stamp="$PWD $(cksum < setup.cfg)"
  installed() { [ "$(cat "$mark" 2>/dev/null)" = "$stamp" ]; }
  if installed; then return; fi
  (
    if command -v flock >/dev/null; then flock 9; fi
    if installed; then exit; fi
    echo "Installing into .venv${extras:+ with [$extras]}; this takes a minute or more."
    if command -v uv >/dev/null; then  # it brings a Python where that of the host will not do
      [ -x .venv/bin/python ] || uv venv --quiet --python "$(find_python 2>/dev/null || echo '>=3.11')" .venv
      uv pip install --quiet --python .venv/bin/python -e ".${extras:+[$extras]}"
    else
      python=$(find_python)
      [ -x .venv/bin/python ] || "$python" -m venv .venv
      .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    fi
    echo "$stamp" > "$mark"
  ) 9>>setup.cfg
}

find_python() {
  local python
  python=$(command -v python3 || command -v python) || fail "Python 3.11 or newer is needed, and there is no python3."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed; $python is $("$python" -V). Put a newer python3 first in PATH, or install uv."
  echo "$python"
}

# Never train on the CPU of a host with an accelerator in silence: with this variable JAX ends where it does not find a TPU.
check_accelerator() {
  [ -n "$1" ] && [ -z "${JAX_PLATFORMS:-}" ] || return 0
  if [ "$1" = tpu ]; then export JAX_PLATFORMS=tpu,cpu; return; fi
  local backend
  backend=$(.venv/bin/python -c 'import jax; print(jax.default_backend())')
  [ "$backend" != cpu ] || fail "This host has an accelerator ($1), but JAX finds only the CPU. Mend the driver, or" \
    "type JAX_PLATFORMS=cpu bash run.sh ... to use the CPU on purpose."
  export JAX_PLATFORMS=cuda,cpu  # for the tasks of a job, which shall not all ask every GPU
}

tpu() {
  local name=${1:-} zone=${2:-} config=${3:-} workdir='' word state commit ssh
  [ $# -ge 3 ] || fail "Type bash run.sh tpu NAME ZONE CONFIG --workdir=/FOLDER [flags]."
  shift 3
  check_config "$config"
  for word in "$@"; do case $word in --workdir=*) workdir=${word#*=} ;; esac; done
  [[ $workdir = /* ]] || fail "--workdir is '$workdir'; for a TPU slice it must be an absolute path, /FOLDER, on" \
    "a disk that all its hosts mount, such as a Filestore share. A bucket, gs://, will not do: it cannot rename a folder."
  command -v gcloud >/dev/null || fail "There is no gcloud in PATH: install the Google Cloud CLI, then gcloud auth login."
  commit=$(git rev-parse HEAD) || fail "$PWD is no git checkout: which files to copy is not known."
  state=$(git -c user.name=run.sh -c user.email=run.sh stash create)  # a commit of the files as they are; '' if as in HEAD
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  git archive --prefix=diffusion_jax_copy/ --output="$folder/diffusion_jax_copy.tar.gz" "${state:-HEAD}"
  gcloud compute tpus tpu-vm scp "$folder/diffusion_jax_copy.tar.gz" "$name:" --zone="$zone" --worker=all
  ssh="tar -xzf diffusion_jax_copy.tar.gz && cd diffusion_jax_copy && JAX_PLATFORMS=tpu,cpu"
  ssh+=" DIFFUSION_JAX_COMMIT=$commit${state:++} bash run.sh $(printf '%q ' "$config" "$@")"
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$ssh"
}

slurm() {
  local options=()
  while [[ ${1:-} = -* ]]; do options+=("$1"); shift; done
  [ $# -ge 1 ] || fail "Type bash run.sh slurm [options of sbatch, each one word] CONFIG [flags]."
  check_config "$1"
  command -v sbatch >/dev/null || fail "There is no sbatch in PATH: type this where jobs are submitted to Slurm."
  mkdir -p runs
  sbatch --job-name="$(basename "$1" .py)" --output=runs/slurm-%j.txt ${options[@]+"${options[@]}"} <<END
#!/usr/bin/env bash
cd $(printf %q "$PWD") && exec bash run.sh job $(printf '%q ' "$@")
END
}

# What slurm submits, on the first node: install once for all, then start the tasks.
job() {
  [ -n "${SLURM_TASKS_PER_NODE:-}" ] || fail "This is no Slurm job: type bash run.sh slurm $* to submit it."
  local tasks=${SLURM_TASKS_PER_NODE%%[(,]*}
  [ "${SLURM_GPUS_ON_NODE:-$tasks}" = "$tasks" ] || fail "This job has $SLURM_GPUS_ON_NODE GPUs and $tasks task(s) a" \
    "node, and JAX gives each task one GPU. Submit it with --ntasks-per-node=$SLURM_GPUS_ON_NODE."
  install "$host"
  check_accelerator "$host"
  exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash run.sh "$@"
}

host=$(accelerator)
# A CPU gets its memory in large pages: every step of a training takes its buffers anew, and with small ones it is a quarter
# slower. It is glibc that asks for them, from 2.35 on.
[ -n "$host" ] || export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
case ${1:-} in
  tpu) shift; tpu "$@"; exit ;;
  slurm) shift; slurm "$@"; exit ;;
  job) shift; job "$@" ;;
  test) shift; install test; exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@" ;;
esac

echo "Accelerator of this host: ${host:-none, the CPU is used}"
if [ $# -gt 0 ] && [[ $1 != -* ]]; then config=$1; shift; else config=configs/digits.py; fi
check_config "$config"
install "$host"
check_accelerator "$host"
workdir=(--workdir="runs/$(basename "$config" .py)")
for word in "$@"; do case $word in --workdir|--workdir=*) workdir=() ;; esac; done
exec .venv/bin/python -m diffusion_jax.main --config="$config" ${workdir[@]+"${workdir[@]}"} "$@"
