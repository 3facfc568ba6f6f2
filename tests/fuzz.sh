#!/usr/bin/env bash
# Recipes, manifests, --set and command lines with plain values in the wrong places: tests/fuzz.sh [tries]
# Says how many were tried in what time; fails with the smallest input that gives a traceback.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. "$root/local/env.sh" espeak,test

export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export KDRECIPE_FUZZ=${1:-2000} KDRECIPE_FUZZ_LOG=/dev/stderr
exec "$KDRECIPE_PY" -m pytest -q -s --timeout 7200 tests/unit/test_fuzz.py
