# Sourced by run.sh and tests/run.sh, with $root set to the repository:
#
#   . "$root/local/env.sh" [extras]     sets KDRECIPE_PY
#
# Uses the environment at hand if kdrecipe is installed there; otherwise makes .venv once, with the
# versions that constraints.txt pins. KDRECIPE_TORCH_INDEX=<url> takes torch and torchaudio from
# another package index (the CPU-only builds are a tenth of the size). KDRECIPE_PYTHON names another
# Python to make .venv with.

torch_versions() { grep -E '^torch(audio)?==' "$root/constraints.txt" | paste -sd, -; }

kdrecipe_env() {
    local extras=$1 python=${KDRECIPE_PYTHON:-python3} wanted="import kdrecipe.cli.main"
    if [[ $extras == *test* ]]; then wanted+=", hypothesis, pytest, pytest_timeout, xdist"; fi
    # From /, so that the source tree itself does not pass for an installation.
    if [[ ! -e $root/.venv/pyvenv.cfg ]] && (cd / && "$python" -c "$wanted") 2>/dev/null; then
        KDRECIPE_PY=$python
        return
    fi
    KDRECIPE_PY=$root/.venv/bin/python
    local state
    state=$(cd "$root" && cat constraints.txt setup.cfg pyproject.toml | cksum | tr ' ' '-')
    if [[ -e $root/.venv/.installed-$state-${extras//,/-} ]]; then
        return
    fi
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        echo "kdrecipe needs Python 3.10 to 3.13; '$python' is $("$python" --version 2>&1 || echo 'not found')." >&2
        echo "  -> install one and name it: KDRECIPE_PYTHON=/path/to/python3.11 $0" >&2
        return 1
    fi
    echo "Setting up .venv (once; torch is most of it: some minutes, 5 GB) ..." >&2
    [[ -x $root/.venv/bin/python ]] || "$python" -m venv "$root/.venv"
    local pip=("$KDRECIPE_PY" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt")
    if [[ -n ${KDRECIPE_TORCH_INDEX:-} ]]; then
        local log=$root/.venv/torch.log
        "${pip[@]}" --index-url "$KDRECIPE_TORCH_INDEX" torch torchaudio > "$log" 2>&1 || {
            tail -n 3 "$log" >&2
            echo "KDRECIPE_TORCH_INDEX=$KDRECIPE_TORCH_INDEX does not give $(torch_versions) (all of it: $log)." >&2
            echo "  -> correct the address, or take the usual index: unset KDRECIPE_TORCH_INDEX" >&2
            return 1
        }
    fi
    "${pip[@]}" -e "$root[$extras]" || {
        echo "The installation failed (messages above). -> fix the cause (network, disk space) and run again." >&2
        return 1
    }
    # By itself, since it is compiled: without a compiler, all but searches with a language model works.
    "${pip[@]}" -e "$root[kenlm]" > "$root/.venv/kenlm.log" 2>&1 ||
        echo "KenLM could not be compiled (.venv/kenlm.log): searches with a language model won't run." >&2
    touch "$root/.venv/.installed-$state-${extras//,/-}"
}

kdrecipe_env "${1:-espeak}"
