"""The scripts that make the environment ask for what the package offers, pinned."""

import configparser
import re
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


def test_everything_that_is_installed_is_pinned(setup):
    pinned = _names((ROOT / "constraints.txt").read_text())
    wanted = _names(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        wanted |= _names(extra)
    assert wanted <= pinned, wanted - pinned
