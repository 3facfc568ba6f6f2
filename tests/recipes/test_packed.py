"""The copy for a GPU machine: packed, put where there is torch and little else, run dry without network."""

from __future__ import annotations

import importlib.metadata as md
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from runs import ROOT

MAX_MB = 60
THERE = ("torch", "torchaudio", "onnxruntime", "sentencepiece", "numpy", "pluggy")
"""What a GPU machine is expected to have, with what these need."""


@dataclass(frozen=True)
class Copy:
    """A packed copy and the machine it runs on; ``missing`` says why there are no wheels, if so.

    Without wheels the same commands run in the tree and the environment of these tests.
    """

    root: Path
    python: Path
    missing: str

    def run(self, script: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the copy from an empty directory, without network and with an empty environment."""
        elsewhere = self.python.parents[1] / "empty"
        elsewhere.mkdir(exist_ok=True)
        env = {"HOME": str(elsewhere), "PATH": f"{self.python.parent}:/usr/bin:/bin"}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", **more}
        return subprocess.run(
            [*without_network(), "bash", self.root / script, *map(str, arguments)],
            cwd=elsewhere, env=env, text=True, capture_output=True, timeout=550,
        )  # fmt: skip


def without_network() -> list[str]:
    """A prefix that cuts a command off the network, where that is allowed."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return []


def needed_by(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require, here."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        for line in md.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


def bare_machine(directory: Path) -> Path:
    """A Python that sees what a GPU machine has, linked from this one's packages, and no more."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    packages = next(directory.glob("lib/python*/site-packages"))
    for name in needed_by(THERE):
        distribution = md.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / entry).exists():
                (packages / entry).symlink_to(Path(str(distribution.locate_file(entry))).resolve())
    return directory / "bin" / "python3"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    directory = tmp_path_factory.mktemp("packed")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packed = subprocess.run(
        ["bash", ROOT / "local" / "pack.sh", "--python", version, directory / "copy"],
        env={**os.environ, "KDRECIPE_PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    if packed.returncode:
        return Copy(ROOT, Path(sys.executable), (packed.stderr.strip().splitlines() or ["?"])[-1])
    return Copy(directory / "copy", bare_machine(directory / "machine"), "")


def test_the_packed_copy_is_small_and_needs_nothing_else(copy, tmp_path):
    if copy.missing:
        pytest.skip(f"the wheels can't be fetched: {copy.missing}")
    size = sum(f.stat().st_size for f in copy.root.rglob("*") if f.is_file() and "site" not in f.parts)
    assert size < MAX_MB * 2**20
    code = (
        "import importlib.util as u; print([n for n in ('lhotse', 'pydantic', 'pytest') if u.find_spec(n)])"
    )
    seen = subprocess.run([copy.python, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]", "the machine of these tests has more than a GPU machine"
    done = copy.run("tests/gpu.sh")
    assert done.returncode == 1
    assert "No device 'cuda' here" in done.stderr
    assert "DEVICE=cpu" in done.stderr


def test_the_gpu_tests_run_dry(copy):
    done = copy.run("tests/gpu.sh", "-q", DEVICE="cpu", KDRECIPE_PYTHON=str(copy.python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "no DEVICE is named" not in done.stdout


def test_the_gpu_benchmarks_run_dry(copy, tmp_path):
    page = tmp_path / "page.md"
    done = copy.run("benchmarks/gpu.sh", "--out", page, DEVICE="cpu", KDRECIPE_PYTHON=str(copy.python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == page.read_text().strip()
    for part in ("A dry run", "of matrix rate", "over plain training", "over torchaudio"):
        assert part in done.stdout


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    done = subprocess.run(["bash", ROOT / "local" / "pack.sh", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
