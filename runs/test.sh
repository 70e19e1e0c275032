#!/usr/bin/env bash
# All tests, from nothing: about 1 minute of set-up, then minutes on 2 cores. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ruff check --quiet .
ruff format --check --quiet .
export OMP_NUM_THREADS=1
python -m pytest -q --durations=10 "$@"
