# Sourced by tests/gpu.sh and benchmarks/gpu.sh, with $root set to the repository: sets KDRECIPE_PY and
# DEVICE (cuda; DEVICE=cpu for a dry run).
#
# In a copy packed by local/pack.sh it unpacks the wheels that lie there, once, beside the torch of the
# Python at hand: no network, no pip, no installation. Elsewhere it takes the environment of local/env.sh.

# The packed wheels on PYTHONPATH, if there are any and they are for this Python.
kdrecipe_packed() {
    local python=${KDRECIPE_PYTHON:-python3} packed=$root/build/gpu state
    [[ -e $packed/python && ! -e $root/.venv/pyvenv.cfg ]] || return 1
    [[ $(cat "$packed/python") == $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ]] || {
        echo "The packed wheels are for Python $(cat "$packed/python"), not for '$python'." >&2
        echo "  -> name one: KDRECIPE_PYTHON=/path/to/python$(cat "$packed/python") $0" >&2
        return 1
    }
    state=$(cd "$packed/wheels" && cksum -- *.whl | cksum | tr ' ' '-')
    if [[ ! -e $packed/site/.unpacked-$state ]]; then
        rm -rf "$packed/site"
        mkdir -p "$packed/site"
        "$python" - "$packed" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

packed = Path(sys.argv[1])
for wheel in packed.glob("wheels/*.whl"):
    zipfile.ZipFile(wheel).extractall(packed / "site")
PYTHON
        ln -s ../../../plugins "$packed/site/kdrecipe_plugins"
        ln -s ../../../local "$packed/site/kdrecipe_local"
        touch "$packed/site/.unpacked-$state"
    fi
    KDRECIPE_PY=$python
    export PYTHONPATH=$packed/site:$root
}

export DEVICE=${DEVICE:-cuda}
if [[ $DEVICE == cpu ]]; then export CUDA_VISIBLE_DEVICES=; fi
kdrecipe_packed || . "$root/local/env.sh" test
"$KDRECIPE_PY" -c 'import os, torch; torch.zeros(1, device=os.environ["DEVICE"])' || {
    echo "No device '$DEVICE' here (above: what torch says)." >&2
    echo "  -> run it on a machine with a GPU, or DEVICE=cpu $0 for a dry run" >&2
    exit 1
}
