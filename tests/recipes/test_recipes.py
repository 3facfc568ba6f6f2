"""Every shipped recipe, through the real command line, over a corpus made here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import ROOT, Done, kdrecipe

from kdrecipe.recipe.yaml import load_yaml
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.testing.pretrained import save_whisper

RECIPES = sorted(path.parent for path in ROOT.glob("recipes/*/*/recipe.yaml"))
NAMES = ["/".join(path.parts[-2:]) for path in RECIPES]

WHISPER_SIZES = {"whisper-tiny": (384, 6), "whisper-base": (512, 8)}
"""Width and attention heads."""

PARTS = {
    "voice_commands/losses": "teacher scratch kl symmetric_kl own_average ctc_nbest mvq kl_hidden "
    "teacher_rnnt rnnt_scratch rnnt_kl",
    "mini_librispeech/losses": "whisper_base assistant scratch kl ctc_nbest mvq kl_hidden",
}
"""Rows that are run here of a recipe with too many; ``check`` reads all of them."""

NOT_A_NUMBER = ("name", "kind", "parent", "seeds")
MEASURED = ("params", "size_mb", "rtf", "peak_rss_mb")


@dataclass
class Run:
    """A recipe, the tiny run of it, and how to give that command again."""

    recipe: Path
    work: Path
    env: dict[str, Path]
    options: tuple[str, ...]
    before: dict[str, str]
    first: Done

    def again(self, *more: str) -> Done:
        return kdrecipe(*arguments(self.recipe, self.work, self.options), *more, **self.env)

    def results(self) -> dict:
        return json.loads((self.work / "report" / "results.json").read_text())

    def one(self, kind: str) -> str:
        """The first system of a kind; a recipe that has none skips the test."""
        names = [s["name"] for s in self.results()["systems"] if s["kind"] == kind]
        return names[0] if names else pytest.skip(f"no {kind} system")


def arguments(recipe: Path, work: Path, options: tuple[str, ...]) -> list:
    return ["run", recipe, "--profile", "tiny", "--work", work, "--jobs", "1", *options]


def committed(recipe: Path) -> dict[str, str]:
    """Hash of every file of the recipe but those that runs make."""
    files = [p for p in recipe.rglob("*") if p.is_file() and "exp" not in p.relative_to(recipe).parts]
    return {str(p.relative_to(recipe)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stages_of(recipe: Path) -> set[int]:
    """Stages that have something to do: without teachers or compressed systems, some have not."""
    text = (recipe / "recipe.yaml").read_text()
    idle = set() if "distill:" in text else {3, 4}
    return set(range(11)) - idle - (set() if "compress:" in text else {6})


def part_of(recipe: Path) -> tuple[str, ...]:
    """Options that leave out the rows that are not run here."""
    kept = PARTS.get("/".join(recipe.parts[-2:]), "").split()
    written = load_yaml(recipe / "recipe.yaml").data
    left_out = [name for name in written["systems"] if kept and name not in kept]
    asked = [pair for pair in written["decode"].get("compare", []) if set(pair) <= set(kept)]
    changes = [f"systems.{name}=null" for name in left_out]
    changes += [f"decode.compare={json.dumps(asked)}"] if left_out else []
    return tuple(word for change in changes for word in ("--set", change))


def corpus_for(recipe: Path, root: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Environment and options that give the recipe a corpus of its layout."""
    kind = recipe.parent.name
    if "lm_weight" in (recipe / "recipe.yaml").read_text() and importlib.util.find_spec("kenlm") is None:
        pytest.skip("kenlm is not installed: python -m pip install kenlm")
    if kind == "an4":
        make_corpus(root, num_speakers=6, utterances_per_speaker=5, layout="an4")
        return {"AN4_ROOT": root}, ()
    if kind in ("mini_librispeech", "librispeech"):
        make_corpus(root, num_speakers=6, utterances_per_speaker=5, layout="librispeech")
        env = {"CORPUS_ROOT": root, "LIBRISPEECH_ROOT": root, **whispers_for(recipe, root.parent)}
        return env, part_of(recipe)
    if kind == "voice_commands":
        if importlib.util.find_spec("espeakng_loader") is None:
            pytest.skip("espeakng_loader is not installed: pip install 'kdrecipe[espeak]'")
        return {}, part_of(recipe)
    pytest.fail(f"no corpus for {recipe}: add one here")


def whispers_for(recipe: Path, directory: Path) -> dict[str, Path]:
    """A place with the Whispers that a recipe names: random ones, as wide as the real, of a layer each."""
    names = set(re.findall(r"\$\{WHISPER\}/(whisper-\S+?)[\"}]", (recipe / "recipe.yaml").read_text()))
    if names and importlib.util.find_spec("transformers") is None:
        pytest.skip(
            "transformers is not installed (it needs Python 3.11): pip install 'kdrecipe[transformers]'"
        )
    for name in names:
        dim, num_heads = WHISPER_SIZES[name.removesuffix(".en")]
        parts = {
            f"{part}_{key}": value
            for part in ("encoder", "decoder")
            for key, value in {"layers": 1, "attention_heads": num_heads, "ffn_dim": 4 * dim}.items()
        }
        config = {"d_model": dim, "num_mel_bins": 80, "max_target_positions": 448, "init_std": 0.1, **parts}
        languages = () if name.endswith(".en") else ("en",)
        save_whisper(directory / name, languages=languages, writes="abcdefghij", config=config)
    return {"WHISPER": directory} if names else {}


@pytest.fixture(scope="module", params=RECIPES, ids=NAMES)
def run(request, tmp_path_factory) -> Run:
    """A tiny run from nothing to the report; the tests of a recipe share it."""
    recipe, directory = request.param, tmp_path_factory.mktemp("recipe")
    env, options = corpus_for(recipe, directory / "corpus")
    before, work = committed(recipe), directory / "work"
    first = kdrecipe(*arguments(recipe, work, options), **env)
    assert first.status == 0, first.said
    return Run(recipe, work, env, options, before, first)


# ---------------------------------------------------------------- without a run


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_check_finds_no_mistakes_even_without_the_corpus(recipe):
    done = kdrecipe("check", recipe)
    assert done.status == 0, done.said
    assert "no mistakes found, also with --profile tiny" in done.out
    assert (recipe / "run.sh").stat().st_mode & 0o111
    assert (recipe / "README.md").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_dry_run_lists_all_stages_and_makes_nothing(recipe, tmp_path):
    env, options = corpus_for(recipe, tmp_path / "corpus")
    done = kdrecipe(*arguments(recipe, tmp_path / "work", options), "--dry-run", **env)
    assert done.status == 0, done.said
    assert {n for n in range(11) if f"stage {n:2d} " in done.out} == stages_of(recipe)
    assert "prepare                            would run: no finished output" in done.out
    assert "up to date" not in done.out
    assert not (tmp_path / "work").exists()


def test_two_recipes_share_the_assistant_and_all_before_it():
    losses, whole = (
        load_yaml(ROOT / f"recipes/mini_librispeech/{n}/recipe.yaml") for n in ("losses", "whisper_kd")
    )
    for key in ("corpus", "features", "tokens"):
        assert losses.data[key] == whole.data[key]
    for key in ("precision", "batch_duration_s"):
        assert losses.data["training"][key] == whole.data["training"][key]
    mine, theirs = (document.data["systems"] for document in (losses, whole))
    assert mine["whisper_base"] == theirs["whisper_base"]
    assert {**mine["assistant"]["train"], "seeds": None} == {**theirs["assistant"]["train"], "seeds": None}


# ---------------------------------------------------------------- what a run leaves


def test_every_system_has_its_figures(run):
    results = run.results()
    systems = {s["name"]: s for s in results["systems"]}
    listed = kdrecipe("check", run.recipe, "--profile", "tiny", *run.options).out
    assert set(systems) == {line.split()[0] for line in listed.splitlines() if " stage " in line}
    for system in systems.values():
        assert {*NOT_A_NUMBER, *MEASURED, "runtime", "parity", "fidelity"} <= set(system), system["name"]
        if str(system["runtime"]).startswith("not measured"):
            assert system["rtf"] is None
        else:
            assert all(system[key] for key in MEASURED)
            assert set(system["rtf"]) == {"median", "p95", "total"}
            assert system["same_text_as_bundle"] >= 0.5
        assert system["seeds"] == [1]
        for metric in ("wer", "cer"):
            rate = system["splits"]["test"][metric]
            assert rate["mean"] >= 0
            assert {"mean", "std", "ci95"} <= set(rate)
            low, high = rate["ci95"]
            assert low <= rate["mean"] <= high
        assert (system["kind"] == "distilled") == ("gap_recovered" in system)
    kinds = {s["kind"] for s in systems.values()}
    stages, text = stages_of(run.recipe), (run.recipe / "recipe.yaml").read_text()
    wanted = {
        "trained": True,
        "distilled": 4 in stages,
        "compressed": 6 in stages,
        "pretrained": "pretrained:" in text,
    }
    assert kinds == {kind for kind, there in wanted.items() if there}
    assert bool(results["comparisons"]) == (len(kinds) > 1)
    assert results["recipe"]["profile"] == "tiny"


def test_it_is_tiny(run):
    assert run.first.cpu_s < 60


def test_int8_is_smaller_and_names_its_parent(run):
    systems = {s["name"]: s for s in run.results()["systems"]}
    small = systems[run.one("compressed")]
    (teacher,) = systems[run.one("distilled")]["parent"]
    assert systems[teacher]["kind"] in ("trained", "pretrained")
    assert small["name"].endswith("_int8")
    assert small["size_mb"] < 0.5 * systems[small["parent"]]["size_mb"]
    assert small["params"] == systems[small["parent"]]["params"]


def test_the_report_is_there_to_read_and_names_nobodys_directories(run):
    report = run.work / "report"
    assert {"results.json", "RESULTS.md", "report.html"} <= {p.name for p in report.iterdir()}
    for name in ("results.json", "RESULTS.md", "report.html"):
        text = (report / name).read_text(encoding="utf-8")
        assert str(run.work) not in text, name
        assert all(system["name"] in text for system in run.results()["systems"])
    assert "Where they differ" in (report / "report.html").read_text(encoding="utf-8")
    assert "What the numbers say" in run.first.out


def test_what_ships_is_what_the_device_reads(run):
    exports = list((run.work / "exports" / run.one("compressed") / "seed1").glob("onnx_*"))
    assert exports
    for export in exports:
        names = {p.name for p in export.iterdir()}
        assert "tokens.txt" in names
        assert any(name.endswith(".int8.onnx") for name in names)


def test_the_recipe_itself_is_untouched(run):
    assert committed(run.recipe) == run.before


def test_nothing_half_done_is_left(run):
    left = [
        p for pattern in ("*.partial", "*.old", ".*.part", "started.json") for p in run.work.rglob(pattern)
    ]
    assert left == []


# ---------------------------------------------------------------- the same command again


def test_a_second_run_skips_everything_quickly(run):
    again = run.again()
    assert again.status == 0, again.said
    assert again.ran == []
    assert again.out.count("up to date, skipped") == len(stages_of(run.recipe))
    assert again.cpu_s < 10


def test_a_dry_run_of_one_stage(run):
    done = run.again("--stage", "5", "--stop-stage", "5", "--dry-run")
    assert done.status == 0, done.said
    head, *lines = done.out.splitlines()
    assert head == "stage  5 distill"
    assert f"{run.one('distilled')}/seed1" in {line.split()[0] for line in lines}
    assert all(line.endswith("up to date") for line in lines)


def test_changing_the_decoding_decodes_again_and_trains_nothing(run):
    change = ("--set", "decode.decoders.another={name: ctc_prefix_beam, beam: 2}")
    planned = run.again(*change, "--dry-run")
    would = {line.split()[0] for line in planned.out.splitlines() if "would run" in line}
    here = [s for s in run.results()["systems"] if s["kind"] != "pretrained"]  # others search by themselves
    decodes = {f"decode/{s['name']}/seed1" for s in here}
    assert {"score", "report"} < would <= {*decodes, "score", "report"}, "those that have a CTC head"
    assert "changed: searches" in planned.out


def test_changing_one_loss_trains_that_system_and_what_comes_from_it(run):
    kd = run.one("distilled")
    planned = run.again("--set", f"systems.{kd}.distill.losses.1.weight=0.25", "--dry-run")
    would = {line.split()[0] for line in planned.out.splitlines() if "would run" in line}
    made_of_kd = {s["name"] for s in run.results()["systems"] if s["parent"] == kd}
    changed = {f"{name}/seed1" for name in {kd, *made_of_kd}}
    derived = {f"{verb}/{name}" for verb in ("export", "decode") for name in changed}
    assert would == {*changed, *derived, "score", "report"}
    assert re.search(r"changed: system\.losses\[1\]\.weight [\d.]+ -> 0\.25", planned.out)


def test_changing_a_metric_scores_again(run):
    again = run.again("--set", "decode.metrics=[{name: wer}]")
    assert again.status == 0, again.said
    assert again.ran == ["score", "report"]
    assert "cer" not in run.results()["systems"][0]["splits"]["test"]
