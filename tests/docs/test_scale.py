"""docs/scale.md: its arithmetic, where its rates are from, and a way to Slurm for each LibriSpeech recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
HOURS = (960, 10_000, 1_000_000)
UNITS = {"": 1, "h": 1, "k": 1e3, "M": 1e6, "MB": 1e6, "GB": 1e9, "TB": 1e12}
NUMBER = re.compile(r"\$?([\d,.]+) ?([A-Za-z]*)")

ROWS = {
    row[0]: row[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and len(row := [cell.strip() for cell in line.strip("|").split("|")]) == 5
}
COUNTED = {what: cells for what, cells in ROWS.items() if cells[0] != "per hour of audio"}


def value(cell: str) -> float:
    found = NUMBER.fullmatch(cell)
    assert found, cell
    return float(found[1].replace(",", "")) * UNITS[found[2]]


@pytest.mark.parametrize("what", COUNTED)
def test_each_row_is_its_rate_times_the_hours(what):
    each, *cells = COUNTED[what]
    for hours, cell in zip(HOURS, cells, strict=True):
        assert value(cell) == pytest.approx(value(each) * hours, rel=0.01), cell


def test_the_rates_follow_from_what_was_measured():
    def rate(what: str) -> float:
        return value(next(cells[0] for row, cells in COUNTED.items() if row.startswith(what)))

    speeds = 1 / 0.9 + 1 + 1 / 1.1
    assert rate("features, 80 bins") == pytest.approx(3600 * 100 * 80 * 4, rel=0.01)
    assert rate("features, three") == pytest.approx(speeds * 3600 * 100 * 80 * 4, rel=0.01)
    assert rate("cuts, one") == pytest.approx(281_241 / 960, rel=0.01)
    assert rate("memory for the cuts") == pytest.approx(200 * speeds * 281_241 / 960, rel=0.01)
    for what, per_second in {
        "filter": 2350,
        "teacher's": 76,
        "one epoch of": 140,
        "one epoch at": 1300,
    }.items():
        assert rate(what) == pytest.approx(speeds / per_second, rel=0.01), what
    # `plain` and `live` of benchmarks/distill_cost.py: CPU seconds of a step over 53 s of audio
    assert pytest.approx(76, rel=0.02) == 53 / (1.069 - 0.377)
    assert pytest.approx(140, rel=0.02) == 53 / 0.377
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for printed in ("0.377", "1.069", "| 3.65 |", "| 1.86 |", "| 46.7 |", "| 0.278 |", "2,350"):
        assert printed in measured, printed


def test_each_librispeech_recipe_has_its_commands_for_slurm():
    recipes = {path.parent.name for path in (ROOT / "recipes" / "librispeech").glob("*/recipe.yaml")}
    found = re.findall(r"^kdrecipe run librispeech/(\w+) .*--executor slurm", PAGE, re.MULTILINE)
    assert sorted(found) == sorted(2 * list(recipes))
