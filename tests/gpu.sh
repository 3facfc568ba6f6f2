#!/usr/bin/env bash
# The tests that hold a GPU's results to the CPU's: tests/gpu.sh [pytest's arguments]
# DEVICE=cpu tests/gpu.sh is a dry run of the tests themselves. On a machine without network: local/pack.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. "$root/local/gpu_env.sh"

# Only the plugins of pytest that are meant: a machine may have others, for another pytest.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
exec "$KDRECIPE_PY" -m pytest -p pytest_timeout -p no:cacheprovider tests/gpu "$@"
