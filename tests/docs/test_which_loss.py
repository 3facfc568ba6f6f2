"""The tables of docs/which-loss.md: made from results, honest where there are none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COSTS = "| `kl` | 0.5 (1.0) | 0.6 (1.1) | 1.20 |\n| `cr_ctc` | 0.5 (1.0) | 0.95 (1.1) | 1.90 |\n"


@pytest.fixture(scope="module")
def which_loss():
    spec = importlib.util.spec_from_file_location("which_loss", ROOT / "docs" / "which_loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def system(name: str, wer: float, *losses: str, gap: dict | None = None) -> dict:
    scores = {"wer": {"mean": wer, "std": 0.01}, **({"gap_recovered": gap} if gap else {})}
    terms = [{"name": loss} for loss in losses]
    return {"name": name, "seeds": [1, 2, 3], "splits": {"test": scores}, "losses": terms}


def comparison(a: str, b: str, ends: tuple[float, float], p: float) -> dict:
    found = {"a": a, "b": b, "split": "test", "difference": sum(ends) / 2, "ci95": list(ends)}
    return {**found, "p_adjusted": p}


@pytest.fixture
def recipes(tmp_path) -> Path:
    systems = [
        system("scratch", 0.5, "ctc"),
        system("kl", 0.1, "ctc", "kl", gap={"mean": 0.9, "ci95": [0.8, 1.0]}),
        system("kl_cr", 0.09, "kl", "cr_ctc"),
    ]
    comparisons = [
        comparison("kl", "scratch", (-0.5, -0.3), 0.0001),
        comparison("kl", "kl_cr", (-0.03, 0.05), 0.9),
        comparison("kl_cr", "kl", (-0.03, 0.01), 0.3),
    ]
    results = {
        "recipe": {"date": "2026-12-01"},
        "splits": {"test": {"utterances": 1000, "speakers": 60}},
        "systems": systems,
        "comparisons": comparisons,
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "results.json").write_text(json.dumps(results))
    (tmp_path / "costs.md").write_text(COSTS)
    return tmp_path


def test_rows_are_sorted_and_say_against_what_they_were_tested(which_loss, recipes):
    page = which_loss.table("a", recipes, recipes / "costs.md")
    assert page.splitlines()[2:5] == [
        "| `kl_cr` | `kl` + `cr_ctc` | 9.00 ± 1.00 | – | `kl` | −1.00 (−3.00 to 1.00) | 0.3 | × 2.10 |",
        "| `kl` | `ctc` + `kl` | 10.00 ± 1.00 | 90 (80 to 100) | `scratch` | −40.00 (−50.00 to −30.00) "
        "| < 0.001 | × 1.20 |",
        "| `scratch` | `ctc` | 50.00 ± 1.00 | – | – | – | – | – |",
    ]
    assert "Better, p (Holm) below 0.05: `kl` (−40.00 against `scratch`).\nWorse: none." in page
    assert "TRIALS.md" not in page


def test_a_recipe_without_results_is_a_gap(which_loss, tmp_path):
    assert which_loss.table("b", tmp_path) == "Not run yet: `kdrecipe run b` makes this table."


def test_every_distilling_loss_has_its_step_time(which_loss):
    from kdrecipe.plugin.loader import load_plugins

    registry = load_plugins().registry
    known = [name for name in registry.names("losses") if registry.problem("losses", name) is None]
    distilling = {n for n in known if not getattr(registry.get("losses", n), "supervised", False)}
    assert set(which_loss.step_times((ROOT / "benchmarks" / "README.md").read_text())) == distilling
