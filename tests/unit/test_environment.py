"""The scripts that make the environment ask for what the package offers, pinned."""

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def _names(requirements: str) -> set[str]:
    lines = [line for line in requirements.splitlines() if line.strip() and not line.startswith("#")]
    return {re.split(r"[<>=!~ ;\[]", line.strip(), maxsplit=1)[0].lower().replace("_", "-") for line in lines}


@pytest.mark.parametrize("script", ["run.sh", "tests/run.sh"])
def test_the_extras_exist_and_old_pips_find_them(setup, script):
    asked = re.search(r'local/env\.sh" (\S+)', (ROOT / script).read_text()).group(1).split(",")
    extras = setup["options.extras_require"]
    assert set(asked) <= set(extras)
    # Metadata has names with "-", and pip before 23.3 looks for what it was told, letter by letter.
    assert all(re.fullmatch("[a-z0-9]+", name) for name in extras)


PYTHON_THAT_FAILS = """#!/usr/bin/env bash
case "$*" in
    *kdrecipe.cli.main*) exit 1 ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *--index-url*) for i in {1..50}; do echo "ERROR: ResolutionImpossible $i"; done; exit 1 ;;
esac
"""


def test_a_bad_index_for_torch_is_named(tmp_path):
    for name in ("constraints.txt", "setup.cfg", "pyproject.toml", "local"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / "python"
    python.write_text(PYTHON_THAT_FAILS)
    python.chmod(0o755)
    command = f'set -eu; root="{tmp_path}"; . "$root/local/env.sh" espeak; echo went on'
    env = {
        "PATH": os.environ["PATH"],
        "KDRECIPE_PYTHON": str(python),
        "KDRECIPE_TORCH_INDEX": "https://no/whl",
    }
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "KDRECIPE_TORCH_INDEX=https://no/whl does not give torch==" in done.stderr
    assert "unset KDRECIPE_TORCH_INDEX" in done.stderr
    assert len(done.stderr.splitlines()) < 10


def test_every_requirement_has_a_lower_bound_that_tests_floors_tries(setup):
    for group in (setup["options"]["install_requires"], *setup["options.extras_require"].values()):
        for line in group.split():
            assert re.fullmatch(r"[\w.-]+>=[\w.]+(,[^;]*)?(;\S+)?", line), line


def test_everything_that_is_installed_is_pinned(setup):
    pinned = _names((ROOT / "constraints.txt").read_text())
    wanted = _names(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        wanted |= _names(extra)
    assert wanted <= pinned, wanted - pinned
