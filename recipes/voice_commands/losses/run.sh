#!/usr/bin/env bash
# The numbered stages of this recipe: ./run.sh [--stage N] [--stop-stage N] [--dry-run] [--help] ...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../../../run.sh" "$(basename "$(dirname "$here")")/$(basename "$here")" "$@"
