#!/usr/bin/env bash
# ./run.sh [RECIPE] [--stage N] [--stop-stage N] [--dry-run] [--set key=value] [--profile tiny] ...
# RECIPE is <corpus>/<recipe> below recipes/; without one, the default recipe, which needs no data.
#
# Each model on several GPUs, by torchrun:
#   ./run.sh RECIPE --nproc 8 ...                                       on one machine
#   ./run.sh RECIPE --nproc 8 --nnodes 2 --rdzv HOST:PORT ...           on each of two
# --max-restarts, --rdzv-id, --node-rank, --master-addr and --master-port are passed on to it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/local/env.sh" espeak

recipe=voice_commands/ctc_kd
if [[ $# -gt 0 && $1 != -* ]]; then
    recipe=${1#recipes/} # as the shell completes it, too
    shift
fi

nproc='' rdzv='' launch=() rest=()
while [[ $# -gt 0 ]]; do
    option=${1%%=*}
    case $option in
        --nproc | --nnodes | --rdzv | --rdzv-id | --max-restarts | --node-rank | --master-addr | --master-port)
            if [[ $1 != *=* ]]; then
                [[ $# -gt 1 ]] || { echo "$option needs a value" >&2; exit 2; }
                set -- "$1=$2" "${@:3}"
            fi ;;
    esac
    case $option in
        --nproc) nproc=${1#*=} ;;
        --rdzv) rdzv=${1#*=} ;;
        --nnodes | --rdzv-id | --max-restarts | --node-rank | --master-addr | --master-port) launch+=("$1") ;;
        *) rest+=("$1") ;;
    esac
    shift
done
run=("$KDRECIPE_PY")
if [[ $nproc || $rdzv || ${#launch[@]} -gt 0 ]]; then
    if [[ $rdzv ]]; then
        launch=(--rdzv-backend c10d --rdzv-endpoint "$rdzv" --rdzv-id "${SLURM_JOB_ID:-kdrecipe}" "${launch[@]}")
    elif [[ "${launch[*]}" != *--nnodes* ]]; then
        launch=(--standalone "${launch[@]}")
    fi
    # An equal share of the cores for each; torchrun would say that it takes one.
    [[ $nproc =~ ^[1-9][0-9]*$ ]] && cores=$(nproc) && threads=$((cores / nproc)) || threads=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    run+=(-m torch.distributed.run --nproc-per-node "${nproc:-1}" "${launch[@]}")
fi
exec "${run[@]}" -m kdrecipe.cli run "$root/recipes/$recipe" "${rest[@]}"
