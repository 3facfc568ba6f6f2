#!/usr/bin/env bash
# A recipe killed at random moments of all its jobs, resumed each time: tests/kill.sh [kills]
# Its results must be those of an undisturbed run. KDRECIPE_KILL_SEED=<n> repeats the moments of a run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. "$root/local/env.sh" espeak,test

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} KDRECIPE_KILLS=${1:-100}
exec "$KDRECIPE_PY" -m pytest -q -s --timeout 14400 tests/recipes/test_kills.py
