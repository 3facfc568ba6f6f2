"""Runs of the command line in processes of their own, and a recipe small enough to run often."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SMALL = """
corpus: {name: manifests, root: "${CORPUS_ROOT}"}
features: {name: fbank, num_mel_bins: 80, speed_perturb: [0.9, 1.0, 1.1]}
tokens: {name: char}
seeds: [1]
training: {epochs: 4, batch_duration_s: 10, precision: fp32, checkpoint_every_s: 0.001}
systems:
  teacher: {train: {model: {name: conformer, num_layers: 1, dim: 32, heads: {ctc: {}}}}}
  scratch: {train: {model: &small {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
  kd: {distill: {teachers: [teacher], model: *small, losses: [{name: ctc, weight: 0.5}, {name: kl}]}}
  kd_int8: {compress: {from: kd, steps: [{name: magnitude_prune, epochs: 1}, {name: int8_dynamic}]}}
export: [{name: onnx_ctc}]
decode: {splits: [test], measure_max: 3}
parity: {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100}
"""

ONE = """
corpus: {name: manifests, root: "${CORPUS_ROOT}"}
features: {name: fbank, num_mel_bins: 80}
tokens: {name: char}
seeds: [1]
training: {epochs: 1, precision: fp32}
systems:
  scratch: {train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
export: [{name: onnx_ctc}]
decode: {splits: [test], measure_max: 2}
parity: {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100}
"""


@dataclass
class Done:
    """A finished command; ``cpu_s`` is the processors' time, which a busy machine does not change."""

    status: int
    out: str
    err: str
    cpu_s: float

    @property
    def said(self) -> str:
        """All that it said."""
        return self.out + self.err

    @property
    def ran(self) -> list[str]:
        """Jobs that ran to their end."""
        return re.findall(r"^stage \d+ \w+: (\S+) done in", self.out, re.MULTILINE)


def environment(**more: Any) -> dict[str, str]:
    """One thread, no GPU, none of the caller's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KDRECIPE_")}
    mine = {"OMP_NUM_THREADS": "1", "KDRECIPE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **mine, **{name: str(value) for name, value in more.items()}}


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "kdrecipe.cli", *map(str, arguments)]


def kdrecipe(*arguments: Any, timeout_s: float = 400, **env: Any) -> Done:
    """Run ``kdrecipe`` to its end."""
    before = _children_s()
    done = subprocess.run(
        command(*arguments), env=environment(**env), capture_output=True, text=True, timeout=timeout_s
    )
    return Done(done.returncode, done.stdout, done.stderr, _children_s() - before)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kill_when(moment: Callable[[str], bool], log: Path, *arguments: Any, **env: Any) -> None:
    """Run ``kdrecipe`` and kill it as soon as ``moment`` holds for what it has said so far.

    Raises:
        AssertionError: it ended before.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(
            command(*arguments), env=environment(**env), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        while not moment(log.read_text()):
            assert process.poll() is None, f"ended before it could be killed:\n{log.read_text()}"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()


def write_recipe(directory: Path, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
    return directory
