"""A stranger's package, made as the tutorial says, installed elsewhere, used in a recipe of theirs."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment, kdrecipe, write_recipe

from kdrecipe.testing.corpus import make_corpus

TUTORIAL = ROOT / "docs" / "writing-a-loss.md"

RECIPE = """
corpus: {name: manifests, root: "${CORPUS_ROOT}"}
features: {name: fbank, num_mel_bins: 80}
tokens: {name: char}
seeds: [1]
training: {epochs: 1, precision: fp32}
systems:
  teacher: {train: {model: &small {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
  kd_js: {distill: {teachers: [teacher], model: *small, losses: [{name: ctc, weight: 0.5}, {name: js_pair}]}}
  kd_rounded: {compress: {from: kd_js, steps: [{name: round_weights, bits: 5}]}}
export: [{name: onnx_ctc}]
decode: {splits: [test], measure_max: 2}
parity: {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100}
"""


def code_of(file: str) -> str:
    """A file of the tutorial."""
    found = re.search(
        rf"<!-- file: {re.escape(file)} -->\n```python\n(.*?)\n```",
        TUTORIAL.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert found, file
    return found[1] + "\n"


def core() -> dict[str, str]:
    files = [p for folder in ("kdrecipe", "plugins", "local", "recipes") for p in (ROOT / folder).rglob("*")]
    kept = [p for p in files if p.suffix in (".py", ".yaml", ".md") and "exp" not in p.parts]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory into which pip has installed the package."""
    directory = tmp_path_factory.mktemp("stranger")
    made = kdrecipe("new", "plugin", "js_pair", "--kind", "loss", "--dir", directory)
    assert made.status == 0, made.said
    package = directory / "js_pair"
    loss = code_of("plugin.py").replace('register("js"', 'register("js_pair"')
    (package / "kdrecipe_js_pair.py").write_text(loss, encoding="utf-8")
    (package / "kdrecipe_rounding.py").write_text(code_of("rounding.py"), encoding="utf-8")
    project = package / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = text.replace(
        'js_pair = "kdrecipe_js_pair"', 'js_pair = "kdrecipe_js_pair"\nrounding = "kdrecipe_rounding"'
    )
    text = text.replace(
        'py-modules = ["kdrecipe_js_pair"]', 'py-modules = ["kdrecipe_js_pair", "kdrecipe_rounding"]'
    )
    project.write_text(text, encoding="utf-8")
    target = directory / "site"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"),
            *("--no-deps", "--no-build-isolation", "--target", str(target), str(package)),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed")
    assert done.returncode == 0, done.stderr
    return target


def test_it_is_listed_with_its_package(site):
    listed = kdrecipe("plugins", "list", PYTHONPATH=site).out
    assert re.search(r"losses +js_pair +kdrecipe-js-pair 0\.1\.0", listed)
    assert re.search(r"compressors +round_weights +kdrecipe-js-pair 0\.1\.0", listed)
    assert "js_pair" not in kdrecipe("plugins", "list").out


def test_it_runs_in_a_recipe_and_shows_in_the_results(site, tmp_path):
    before = core()
    corpus = make_corpus(tmp_path / "corpus", num_speakers=4, utterances_per_speaker=4)
    recipe = write_recipe(tmp_path / "recipe", RECIPE)
    done = kdrecipe("run", recipe, "--jobs", "1", CORPUS_ROOT=corpus, PYTHONPATH=site)
    assert done.status == 0, done.said
    results = json.loads((recipe / "results.json").read_text(encoding="utf-8"))
    systems = {s["name"]: s for s in results["systems"]}
    assert [loss["name"] for loss in systems["kd_js"]["losses"]] == ["ctc", "js_pair"]
    [step] = systems["kd_rounded"]["compression"]
    assert step["name"] == "round_weights"
    assert step["options"]["bits"] == 5
    assert 0 < step["report"]["largest_change"] < 1
    assert systems["kd_rounded"]["splits"]["test"]["wer"]["mean"] >= 0
    assert "round_weights" in (recipe / "RESULTS.md").read_text(encoding="utf-8")
    log = (recipe / "exp" / "systems" / "kd_js" / "seed1" / "train" / "log.jsonl").read_text()
    assert "js_pair" in log
    assert core() == before


def test_without_the_package_the_recipe_says_what_is_missing(tmp_path):
    recipe = write_recipe(tmp_path / "recipe", RECIPE)
    done = kdrecipe("check", recipe)
    assert done.status == 2
    assert "unknown loss 'js_pair'" in done.err
    assert "unknown compressor 'round_weights'" in done.err
    assert "recipe.yaml:9" in done.err
