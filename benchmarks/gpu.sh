#!/usr/bin/env bash
# Figures of a GPU as a Markdown page: benchmarks/gpu.sh [--out FILE]
# DEVICE=cpu benchmarks/gpu.sh is a dry run with toy sizes. On a machine without network: local/pack.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/local/gpu_env.sh"
exec "$KDRECIPE_PY" "$root/benchmarks/gpu.py" "$@"
