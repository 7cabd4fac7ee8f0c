#!/usr/bin/env bash
# bash run.sh                      install, then the main job: configs/digits.py
# bash run.sh CONFIG [flags]       install, then python -m diffusion_jax.main --config=CONFIG [flags]
# bash run.sh test [pytest flags]  install what the tests need, then run them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { echo "ERROR: $*" >&2; exit 1; }

# The accelerator of this host: the extra of setup.cfg that JAX needs for it, or nothing for the CPU.
accelerator() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    local cuda
    cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
    if [ "${cuda:-12}" -ge 13 ]; then echo cuda13; else echo cuda12; fi
  elif ls /dev/accel* >/dev/null 2>&1 || [ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ]; then
    echo tpu
  fi
}

# Make .venv and install the package with the extras "$1" into it, once for each state of setup.cfg.
install() {
  local extras=$1 stamp python mark
  python=$(command -v python3 || command -v python) || fail "Python 3.11 or newer is needed, and there is no python3."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed; $python is $("$python" -V). Put a newer python3 first in PATH."
  mark=.venv/installed-${extras:-cpu} stamp="$PWD $(cksum < setup.cfg)"
  if [ "$(cat "$mark" 2>/dev/null)" = "$stamp" ]; then return; fi
  echo "Installing into .venv${extras:+ with [$extras]}; this takes a minute or more."
  if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
    uv pip install --quiet --python .venv/bin/python -e ".${extras:+[$extras]}"
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
  fi
  echo "$stamp" > "$mark"
}

# Never train on the CPU of a host with an accelerator in silence.
check_accelerator() {
  [ -n "$1" ] && [ -z "${JAX_PLATFORMS:-}" ] || return 0
  local backend
  backend=$(.venv/bin/python -c 'import jax; print(jax.default_backend())')
  [ "$backend" != cpu ] || fail "This host has an accelerator ($1), but JAX finds only the CPU. Mend the driver, or" \
    "type JAX_PLATFORMS=cpu bash run.sh ... to use the CPU on purpose."
}

host=$(accelerator)
if [ "${1:-}" = test ]; then
  shift
  install test
  exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"
fi

echo "Accelerator of this host: ${host:-none, the CPU is used}"
install "$host"
check_accelerator "$host"
if [ $# -gt 0 ] && [[ $1 != -* ]]; then config=$1; shift; else config=configs/digits.py; fi
[ -f "$config" ] || fail "$config is no config. There are: $(ls configs/*.py | tr '\n' ' ')"
workdir=(--workdir="runs/$(basename "$config" .py)")
for word in "$@"; do case $word in --workdir|--workdir=*) workdir=() ;; esac; done
exec .venv/bin/python -m diffusion_jax.main --config="$config" ${workdir[@]+"${workdir[@]}"} "$@"
