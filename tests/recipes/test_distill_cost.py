"""benchmarks/distill_cost.py at toy sizes: every kind of target and every distilling loss has its row."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from runs import ROOT, environment

from kdrecipe.plugin.loader import load_plugins
from kdrecipe.targets.kinds import KINDS

SCRIPT = ROOT / "benchmarks" / "distill_cost.py"


def test_all_kinds_of_targets_and_all_losses_are_measured():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    costs = {row[0]: row for row in rows if len(row) == 10}
    assert {name.split(",")[0] for name in costs} - {"targets"} == {*KINDS, "hypotheses as labels"}
    for name, row in costs.items():
        if name not in ("targets", "hypotheses as labels"):
            assert all(float(re.match(r"[\d.]+", figure)[0]) > 0 for figure in row[1:6] + row[9:]), row
    losses = {row[0].strip("`"): row for row in rows if len(row) == 4 and row[0].startswith("`")}
    registry = load_plugins().registry
    installed = [name for name in registry.names("losses") if registry.problem("losses", name) is None]
    distilling = {n for n in installed if not getattr(registry.get("losses", n), "supervised", False)}
    assert set(losses) == distilling
    assert all(float(row[3]) > 0 for row in losses.values())
    if importlib.util.find_spec("transformers") is not None:
        assert {row[0].split(",")[0] for row in rows if len(row) == 4} >= {"whisper", "hf_ctc"}
