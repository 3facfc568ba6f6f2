"""One command makes every committed table again."""

from __future__ import annotations

import json
import textwrap
from types import SimpleNamespace

import pytest

from kdrecipe.artifacts import write_json
from kdrecipe.cli import regenerate
from kdrecipe.cli.main import main
from kdrecipe.interfaces import Options, Runtime
from kdrecipe.plugin.registry import Registry, Source
from kdrecipe.recipe.sections import Named
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.report import closing
from kdrecipe.testing.corpus import make_corpus

RECIPE = """
corpus: {name: manifests, root: "${KDRECIPE_TEST_ROOT}"}
features: {num_mel_bins: 20}
tokens: {name: char}
training: {epochs: 1, precision: fp32}
systems:
  scratch: {train: {model: {name: conformer, num_layers: 1, dim: 16, num_heads: 2, heads: {ctc: {}}}}}
export: [{name: onnx_ctc}]
decode: {measure_max: 2}
parity: {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100}
"""
TABLE = """# Results of toy/{name}

## How this was made

```sh
kdrecipe run toy/{name}
```

- git: 0000
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """recipes/toy/ with first and second, which have a table, and third, which has none."""
    for name in ("first", "second", "third"):
        folder = tmp_path / "recipes" / "toy" / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(textwrap.dedent(RECIPE), encoding="utf-8")
        if name != "third":
            (folder / "RESULTS.md").write_text(TABLE.format(name=name), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDRECIPE_TEST_ROOT", raising=False)
    return tmp_path / "recipes"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    root = make_corpus(tmp_path / "corpus", num_speakers=4, utterances_per_speaker=3)
    monkeypatch.setenv("KDRECIPE_TEST_ROOT", str(root))


def test_all_recipes_with_a_table_by_the_commands_that_these_name(recipes, corpus, capsys):
    assert main(["regenerate", "--dry-run"]) == 0
    expected = [f"kdrecipe run {recipes / 'toy' / name}" for name in ("first", "second")]
    assert capsys.readouterr().out.splitlines() == expected
    assert main(["regenerate", "--dry-run", "toy/second", "--work", "/scratch"]) == 0
    assert capsys.readouterr().out == f"kdrecipe run {recipes / 'toy/second'} --work /scratch/toy/second\n"


def test_what_is_missing_is_told_of_all_recipes_before_anything_runs(recipes, capsys):
    assert main(["regenerate"]) == 2
    said = capsys.readouterr().err
    for name in ("first", "second"):
        assert f"toy/{name}: the environment variable KDRECIPE_TEST_ROOT is not set" in said
    assert not list(recipes.rglob("exp"))


def test_a_bundle_that_is_missing_is_told_too(recipes, corpus, capsys):
    file = recipes / "toy" / "second" / "recipe.yaml"
    importing = "systems:\n  big: {pretrained: {bundle: made/elsewhere}}\n"
    file.write_text(file.read_text(encoding="utf-8").replace("systems:\n", importing), encoding="utf-8")
    assert main(["regenerate", "toy/second"]) == 2
    absent = recipes / "toy" / "second" / "made" / "elsewhere"
    assert f"toy/second: there is no bundle {absent}" in capsys.readouterr().err


def test_without_finished_runs_there_is_nothing_to_render(recipes, corpus, capsys):
    assert main(["regenerate", "--render", "toy/first"]) == 2
    assert "toy/first: nothing to render" in capsys.readouterr().err


def test_a_recipe_without_a_table_is_refused(recipes, corpus, capsys):
    assert main(["regenerate", "toy/third"]) == 2
    assert "no table with a command" in capsys.readouterr().err


def test_one_that_fails_stops_no_other(recipes, corpus, capsys, monkeypatch):
    ran = []

    def run(words, check):
        ran.append(words[-1])
        return type("Done", (), {"returncode": int("first" in words[-1])})

    monkeypatch.setattr(regenerate.subprocess, "run", run)
    assert main(["regenerate"]) == 1
    assert [word.rsplit("/", 1)[1] for word in ran] == ["first", "second"]
    assert "failed: toy/first" in capsys.readouterr().err


def test_a_run_outside_the_recipe_renews_its_table_and_ends_with_what_one_wants(
    recipes, corpus, tmp_path, capfd
):
    """The whole way: a real run with --work, then its report once more."""
    work = tmp_path / "work"
    assert main(["regenerate", "toy/first", "--work", str(work)]) == 0
    folder = recipes / "toy" / "first"
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "RESULTS.md").read_text() == (work / "toy/first/report/RESULTS.md").read_text()
    assert results["seconds"]["scratch/seed1"] > 0
    assert ", the sum of all jobs" in (folder / "RESULTS.md").read_text()
    table, report, use = capfd.readouterr().out.rstrip().rsplit("\n", 2)
    assert report == "report: work/toy/first/report/report.html"
    assert use.endswith("transcribe work/toy/first/exports/scratch/seed1/onnx_ctc your.wav")
    assert "| system  |" in table
    assert "95 % interval" in table

    (folder / "RESULTS.md").write_text(TABLE.format(name="first"))
    assert main(["regenerate", "toy/first", "--work", str(work), "--render"]) == 0
    said = capfd.readouterr().out
    assert "2 jobs to run (score 1, report 1): about" in said
    assert "Systems on test" in (folder / "RESULTS.md").read_text()
    assert json.loads((folder / "results.json").read_text())["systems"] == results["systems"]

    (folder / "RESULTS.md").write_text(TABLE.format(name="first"))
    assert main(["regenerate", "toy/first", "--work", str(work)]) == 0
    assert "report up to date" in capfd.readouterr().out
    assert "Systems on test" in (folder / "RESULTS.md").read_text(), "also if nothing had to run"


@pytest.mark.parametrize("package", ["", "strangers-kd"], ids=["a file", "installed"])
def test_the_command_at_the_end_works_without_the_recipes_own_files(tmp_path, monkeypatch, package):
    class Mine:
        head = "ctc"
        runtime = Runtime("box", "nowhere:start", {})

        class Config(Options):
            """None."""

    registry = Registry()
    registry.add("exporters", "mine", Mine, Source("plugin.py", package))
    recipe = SimpleNamespace(
        plugins=SimpleNamespace(registry=registry),
        export=[Named("mine")],
        heads_of=lambda name: ("ctc",),
        decode=SimpleNamespace(decoders={}),
    )
    layout = Layout(tmp_path)
    layout.export("kd", 1).joinpath("mine").mkdir(parents=True)
    write_json(layout.system("kd", 1) / "bundle.json", {"plugin_files": {"plugin.py": "00"}})
    row = {"name": "kd", "kind": "distilled", "seeds": [1], "splits": {"test": {"wer": {"mean": 0.1}}}}
    write_json(layout.report / "results.json", {"systems": [row]})
    monkeypatch.setattr("kdrecipe.report.text.brief", lambda results: "the table")
    monkeypatch.chdir(tmp_path)
    expected = "exports/kd/seed1/mine" if package else "--trust-plugins systems/kd/seed1"
    assert closing(recipe, layout).endswith(f"transcribe {expected} your.wav")


@pytest.mark.parametrize("change", [["--set", "training.epochs=2"], ["--profile", "tiny"]])
def test_a_changed_recipe_leaves_the_table_alone(recipes, corpus, tmp_path, change):
    folder = recipes / "toy" / "first"
    assert main(["run", "toy/first", "--work", str(tmp_path / "work"), "--jobs", "1", *change]) == 0
    assert (folder / "RESULTS.md").read_text() == TABLE.format(name="first")
    assert not (folder / "results.json").exists()
