#!/usr/bin/env bash
# The unit tests with the oldest versions that setup.cfg admits: tests/floors.sh [--torch] [pytest's arguments]
#
# Makes an environment of its own for them (.venv-floors, or $KDRECIPE_FLOORS), anew each time. torch and
# torchaudio are those of constraints.txt, since each of their versions is 5 GB: --torch takes their floors, too.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${KDRECIPE_FLOORS:-$root/.venv-floors}
python=${KDRECIPE_PYTHON:-python3}
pinned="torch torchaudio"
if [[ ${1:-} == --torch ]]; then
    pinned=""
    shift
fi

floors=$("$python" - "$pinned" <<'PYTHON'
"""Every requirement of setup.cfg at its lower bound, or as pinned where that is asked for."""
import configparser
import re
import sys

config = configparser.ConfigParser()
config.read("setup.cfg")
pins = dict(line.split(";")[0].strip().split("==") for line in open("constraints.txt") if "==" in line)
extras = dict(config["options.extras_require"])
del extras["executorch"]  # it admits no other torch than the newest: tests/executorch.sh
sections = [config["options"]["install_requires"], *extras.values()]
for line in "\n".join(sections).split():
    name, floor, marker = re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:,[^;]*)?(;.*)?", line).groups()
    print(f"{name}=={pins[name] if name in sys.argv[1].split() else floor}{marker or ''}")
PYTHON
)
echo "$floors"

rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check $floors
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# What ruff and mypy say depends on the libraries' own annotations: they judge the pinned versions only.
if (($# == 0)); then set -- tests/unit -k "not the_tool_is_content"; fi
exec "$venv/bin/python" -m pytest "$@"
