#!/usr/bin/env bash
# The whole test suite, in an environment that it makes if there is none: tests/run.sh [pytest's arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. "$root/local/env.sh" espeak,numbers,whisperwer,test

# A test process per core, with one thread each; threads that wait sleep.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$KDRECIPE_PY" -m pytest -n auto --dist loadfile "$@"
