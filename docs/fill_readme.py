"""Fills the generated blocks of the README and of which-loss.md from the recipes and their committed results.

    python docs/fill_readme.py            # after recipes or their results have changed
    python docs/fill_readme.py --check    # exit status 1 if a page is out of date

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import which_loss

from kdrecipe.recipe.load import Recipe, load_recipe
from kdrecipe.report.write import FORMAT

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# What the headline compares: a recipe, its teacher, and students with a teacher and without one, of which the
# best counts.
SHOWN, TEACHER = "an4/ctc_kd", "teacher"
FEW, FULL, INT8 = ("kd_unlabelled", "scratch", "cr_ctc"), ("kd_full", "scratch_full"), "kd_int8"

EARLIER = (
    "made by an earlier version: its error rates are those of the bundles in torch, not of what ships, "
    "and its intervals and p-values cover utterances only, so they claim too much"
)


def results_of(name: str) -> dict[str, Any] | None:
    """The results that are committed beside a recipe; None before its first whole run."""
    path = ROOT / "recipes" / name / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def is_earlier(results: dict[str, Any]) -> bool:
    """Whether a table was made before rows were what ships and intervals knew speakers and seeds."""
    return bool(results["format"] < FORMAT)


# ---------------------------------------------------------------- the headline


def headline() -> str:
    """What a teacher is worth in one committed table: two comparisons, whichever way they came out."""
    results = results_of(SHOWN)
    assert results is not None, f"{SHOWN} has no results"
    recipe = load_recipe(ROOT / "recipes" / SHOWN / "recipe.yaml")
    systems = {system["name"]: system for system in results["systems"]}
    split, facts = next(iter(results["splits"].items()))
    student = systems[FEW[0]]
    few = recipe.corpus.subsets[student["data"]]["speakers"]
    speakers = results["corpus_summary"]["splits"]["train"]["speakers"]

    def rate(name: str) -> float:
        return 100 * float(systems[name]["splits"][split]["wer"]["mean"])

    def wer(name: str) -> str:
        return f"{rate(name):.1f} %"

    def row(labels: str, names: tuple[str, ...]) -> str:
        taught, alone = names[0], min(names[1:], key=rate)
        pair = (taught, alone, split)
        found = next(c for c in results["comparisons"] if (c["a"], c["b"], c["split"]) == pair)
        low, high = (100 * end for end in found["ci95"])
        difference = f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
        return f"| {labels} | {wer(alone)} (`{alone}`) | {wer(taught)} (`{taught}`) | {difference} |"

    path = f"recipes/{SHOWN}"
    return "\n".join(
        [
            "| labels for | WER without a teacher | with a teacher | difference, points (95 % interval) |",
            "|---|---:|---:|---:|",
            row(f"{few} of {speakers} speakers", FEW),
            row("all speakers", FULL),
            "",
            f"Corpus: AN4, {facts['utterances']} test utterances by {facts['speakers']} speakers, "
            f"[not the official test part]({path}/README.md#data).",
            f"Student: {millions(student)}, {seeds(student)}; {systems[INT8]['size_mb']:.2f} MB in int8 "
            f"(`{INT8}`, {wer(INT8)}). Teacher: {millions(systems[TEACHER])}, {seeds(systems[TEACHER])}, "
            f"{wer(TEACHER)}.",
            f"The teacher has the labels of all speakers. `{FEW[0]}` also hears the other speakers, without "
            "labels. Without a teacher, the better of a student by itself and one that teaches itself "
            "(CR-CTC) counts. "
            f"All rows, and what the intervals cover: [RESULTS.md]({path}/RESULTS.md).",
            *([f"This table was {EARLIER}."] if is_earlier(results) else []),
        ]
    )


def millions(system: dict[str, Any]) -> str:
    return f"{system['params'] / 1e6:.2g} M parameters"


def seeds(system: dict[str, Any]) -> str:
    number = len(system["seeds"])
    return f"{number} seed{'s' if number > 1 else ''}"


# ---------------------------------------------------------------- the table of recipes


def recipes() -> str:
    """A row per recipe: its README's title, its heads, systems and seeds, and its table if it has one."""
    lines = ["| recipe | what it is | heads | systems | seeds | table |", "|---|---|---|---:|---:|---|"]
    earlier = False
    for path in sorted((ROOT / "recipes").glob("*/*/recipe.yaml"), key=order):
        recipe = load_recipe(path)
        title = path.with_name("README.md").read_text(encoding="utf-8").splitlines()[0]
        what = title.removeprefix(f"# {recipe.name}: ")
        results = results_of(recipe.name)
        here = f"recipes/{recipe.name}"
        table = f"[{results['recipe']['date']}]({here}/RESULTS.md)" if results else "none yet"
        if results and is_earlier(results):
            table, earlier = f"{table} †", True
        figures = f"{heads(recipe)} | {len(recipe.systems)} | {len(recipe.seeds)} | {table}"
        lines.append(f"| [{recipe.name}]({here}/README.md) | {what} | {figures} |")
    return "\n".join([*lines, *(["", f"† {EARLIER}."] if earlier else [])])


def order(path: Path) -> tuple[int, str]:
    """Corpora from the smallest to the largest, as a newcomer meets them."""
    corpora = ("voice_commands", "an4", "mini_librispeech", "librispeech")
    corpus = path.parts[-3]
    return (corpora.index(corpus) if corpus in corpora else len(corpora), str(path))


def heads(recipe: Recipe) -> str:
    named = [head for s in recipe.systems.values() if s.model for head in s.model.get("heads", {})]
    return ", ".join(dict.fromkeys(named))


# ---------------------------------------------------------------- filling in


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"headline": headline, "recipes": recipes},
    ROOT / "docs" / "which-loss.md": which_loss.BLOCKS,
}


def filled(path: Path) -> str:
    """The text of a page with each block generated again.

    Raises:
        ValueError: a block is missing or there twice.
    """
    text = path.read_text(encoding="utf-8")
    for name, make in PAGES[path].items():
        start, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"{path.name} needs one block named {name!r}")
        before, rest = text.split(start)
        text = f"{before}{start}{make()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    new = {path: filled(path) for path in PAGES}
    old = [path for path, text in new.items() if text != path.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        for path in old:
            print(f"{path.name} is out of date -> python docs/fill_readme.py", file=sys.stderr)
        return int(bool(old))
    for path in old:
        path.write_text(new[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
