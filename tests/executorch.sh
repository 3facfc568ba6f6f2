#!/usr/bin/env bash
# The tests of the exporter executorch: tests/executorch.sh [pytest's arguments]
#
# In an environment of their own (.venv-executorch, or $KDRECIPE_EXECUTORCH), made once: ExecuTorch needs an older
# pytest than the other tests, and brings packages that nothing else here needs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${KDRECIPE_EXECUTORCH:-$root/.venv-executorch}
if ! "$venv/bin/python" -c "import executorch, pytest_timeout" 2>/dev/null; then
    "${KDRECIPE_PYTHON:-python3}" -m venv "$venv"
    # The pinned versions, but for pytest's and its plugins'.
    grep -v "^pytest" constraints.txt > "$venv/constraints.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$venv/constraints.txt" \
        -e ".[executorch]" "pytest>=8,<9" "pytest-timeout>=2.3.1"
fi
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
if (($# == 0)); then set -- tests/parity/test_export_devices.py; fi
exec "$venv/bin/python" -m pytest "$@"
