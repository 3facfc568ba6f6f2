#!/usr/bin/env bash
# ./run.sh [RECIPE] [--stage N] [--stop-stage N] [--dry-run] [--set key=value] [--profile tiny] ...
# RECIPE is <corpus>/<recipe> below recipes/; without one, the default recipe, which needs no data.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/local/env.sh" espeak

recipe=voice_commands/ctc_kd
if [[ $# -gt 0 && $1 != -* ]]; then
    recipe=${1#recipes/} # as the shell completes it, too
    shift
fi
exec "$KDRECIPE_PY" -m kdrecipe.cli run "$root/recipes/$recipe" "$@"
