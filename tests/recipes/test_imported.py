"""A recipe whose teacher is a stranger's plugin beside it: it hears audio, at a rate of its own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from lhotse.supervision import SupervisionSet
from runs import kdrecipe, write_recipe

from kdrecipe.artifacts import read_json
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.recipe.load import Recipe, load_recipe
from kdrecipe.stages import labels
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.testing.corpus import make_corpus

PLUGIN = """
import json
from pathlib import Path
from typing import Annotated, ClassVar

import torch

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import Hidden, Hypothesis, Located, Options, Targets, TargetSpec


class Listener:
    class Config(Options):
        path: Annotated[str, Located]

    input: ClassVar[str] = "audio"
    num_params = None

    def __init__(self, config):
        self.files = [Path(config.path)]
        if not self.files[0].is_file():
            raise RecipeError(f"there is no file {config.path}")

    def provides(self):
        return [TargetSpec("hidden", "energy", dim=2, frame_shift_s=0.02)]

    def load(self, device):
        self.said = json.loads(self.files[0].read_text())

    def targets(self, batch, needs):
        frames_BTS = batch.samples_BS[:, : batch.samples_BS.shape[1] // 320 * 320].unflatten(1, (-1, 320))
        values_BTD = torch.stack([frames_BTS.abs().mean(-1), frames_BTS.std(-1)], -1)
        return Targets({"hidden:energy": Hidden(values_BTD, batch.sample_lens_B // 320)})

    def hypotheses(self, batch):
        return [Hypothesis(self.said.get(i, "")) for i in batch.ids]


@hookimpl
def register_teachers(register):
    register("listener", Listener)
"""

HIDDEN = '[TargetSpec("hidden", "energy", dim=2, frame_shift_s=0.02)]'

RECIPE = """
plugins: {files: [plugin.py]}
corpus: {name: manifests, root: "${CORPUS_ROOT}", subsets: {few: {utterances: 2}, rest: {except: few}}}
features: {name: fbank, num_mel_bins: 80, speed_perturb: [0.9]}
tokens: {name: char, data: few}
seeds: [1, 2]
training: {epochs: 1, precision: fp32, batch_duration_s: 10}
systems:
  listener: {pretrained: {name: listener, path: said.json}}
  student:
    distill:
      teachers: [listener]
      model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}
      losses: [{name: ctc}, {name: hidden_mse, layers: {encoder.0: energy}, align: mean}]
  pseudo:
    distill:
      data: few
      unlabelled: {subset: rest, labels: listener, keep: {chars_per_s: null}}
      teachers: [listener]
      model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}
      losses: [{name: ctc}]
  unheard:
    distill:
      data: none
      unlabelled: {subset: all, labels: listener, keep: {chars_per_s: null}}
      teachers: [listener]
      model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}
      losses: [{name: ctc}]
export: [{name: onnx_ctc}]
decode: {splits: [test], measure_max: 2, robustness: 2}
parity: {num_utterances: 2, max_wer_increase: 100, max_deletion_increase: 100}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Corpus, recipe and its work directory after a whole run."""
    directory = tmp_path_factory.mktemp("imported")
    make_corpus(directory / "corpus", num_speakers=4, utterances_per_speaker=4)
    recipe = write_recipe(directory / "one", RECIPE)
    (recipe / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    ids = [s.id for s in SupervisionSet.from_file(directory / "corpus" / "train_supervisions.jsonl.gz")]
    said = dict(zip(ids, itertools.cycle(["Hello there, abc!", "", "no " * 9]), strict=False))
    (recipe / "said.json").write_text(json.dumps(said), encoding="utf-8")
    done = run(directory)
    assert done.status == 0, done.said
    return directory


def run(directory: Path, *more: str):
    command = ("run", directory / "one", "--work", directory / "work", "--jobs", "1", *more)
    return kdrecipe(*command, CORPUS_ROOT=directory / "corpus")


def test_an_imported_teacher_teaches_and_has_a_row(site):
    record = read_json(site / "work" / "systems" / "listener" / "seed1" / "teacher.json")
    assert record["provides"][0]["tap"] == "energy"
    assert list(record["files"]) == ["said.json"]
    assert str(site) not in json.dumps(record), "no path of this machine"
    results = read_json(site / "work" / "report" / "results.json")
    row, student, *_ = results["systems"]
    assert (row["name"], row["seeds"], student["seeds"]) == ("listener", [1], [1, 2])
    assert row["splits"]["test"]["wer"]["mean"] == 1.0, "it says nothing"
    assert row["rtf"] is None
    assert "not measured" in row["runtime"]
    key = read_json(site / "work" / "targets" / "listener" / "seed1" / "key.json")
    assert [spec["frame_shift_s"] for spec in key["specs"]] == [0.02]


def test_live_targets_are_heard_too(site, tmp_path):
    live = ("--set", "targets.mode=live", "--stage", "5", "--stop-stage", "5")
    done = run(site, *live)
    assert done.status == 0, done.said
    log = (site / "work" / "systems" / "student" / "seed1" / "train" / "log.jsonl").read_text()
    [step] = [row for row in map(json.loads, log.splitlines()) if row["event"] == "step"][:1]
    assert step["terms"]["hidden_mse"] > 0


def test_hypotheses_are_labels(site):
    """A third of them is empty, a third loops; the others are kept, written as the transcripts are."""
    rows = [
        json.loads(line)
        for line in (site / "work" / "said" / "listener" / "seed1" / "hypotheses.jsonl")
        .read_text()
        .splitlines()
    ]
    num = len(rows)
    assert {row["text"] for row in rows} == {"Hello there, abc!", "", "no " * 9}
    kept = [row for row in rows if row["text"].startswith("Hello")]
    transcripts = {row["transcript"] for row in kept}
    assert len(transcripts) == 1
    assert transcripts.pop().casefold() == "hello there abc"
    facts = read_json(site / "work" / "systems" / "unheard" / "seed1" / "bundle.json")["labels"]
    assert (facts["kept"], facts["dropped"]) == (len(kept), num - len(kept))
    assert set(facts["reasons"]) == {"empty", "loop"}
    report = (site / "work" / "report" / "RESULTS.md").read_text()
    assert "Labels that are a teacher's hypotheses:" in report
    assert f"empty {facts['reasons']['empty']}" in report
    pseudo = read_json(site / "work" / "systems" / "pseudo" / "seed2" / "bundle.json")["labels"]
    assert pseudo["kept"] + pseudo["dropped"] == num - 2


def test_hypotheses_that_are_all_dropped_stop_stage_4(site, tmp_path):
    keep = "systems.unheard.distill.unlabelled.keep={chars_per_s: [29, 30]}"
    recipe = load_recipe(site / "one" / "recipe.yaml", overrides=[keep])
    with pytest.raises(DataError, match=r"none of \d+ hypotheses is kept \(.*chars_per_s 29-30: \d+"):
        labels.run(recipe, Layout(site / "work"), "listener", 1, tmp_path)
    assert (tmp_path / "heard.jsonl").exists(), "what was recognised need not be again"


def test_other_tokens_stop_stage_3(tmp_path, monkeypatch):
    """What they are is known when stage 2 has made the recipe's."""
    given = '[TargetSpec("frame_logits", "ctc", dim=5, frame_shift_s=0.04, vocab_id="elsewhere")]'
    loss = "{name: hidden_mse, layers: {encoder.0: energy}, align: mean}"
    recipe = changed(tmp_path, (HIDDEN, given), (loss, "{name: kl}"))
    monkeypatch.setenv("CORPUS_ROOT", str(tmp_path))
    layout = Layout(tmp_path / "work")
    Tokenizer.train(["ONE TWO"], "char", None, layout.tokens)
    job = build_plan(recipe, layout).jobs["listener/seed1"]
    assert "tokens" in job.needs
    with pytest.raises(RecipeError, match=r"the 5 tokens of 'listener' are not the \d+ that") as caught:
        job.run(tmp_path / "out")
    [problem] = caught.value.problems
    assert problem.where.endswith("recipe.yaml:9")
    assert "hidden_mse" in problem.remedy


@pytest.mark.parametrize("how", ["mean", "stride"])
def test_rates_without_a_whole_factor_are_named(tmp_path, how):
    hidden = HIDDEN.replace("0.02", "0.03")
    with pytest.raises(
        RecipeError, match=rf"align: {how} needs a whole .*0\.04 s is 1\.33 times 0\.03 s"
    ) as caught:
        changed(tmp_path, (HIDDEN, hidden), ("align: mean", f"align: {how}"))
    assert "interpolate" in caught.value.problems[0].remedy


def test_a_teacher_of_other_mel_bins_is_named(tmp_path):
    hears = 'input: ClassVar[str] = "features"\n    num_mel_bins = 128'
    with pytest.raises(RecipeError, match="hears 128 mel bins, the recipe has 80") as caught:
        changed(tmp_path, ('input: ClassVar[str] = "audio"', hears))
    assert "num_mel_bins: 128" in caught.value.problems[0].remedy


def changed(directory: Path, *changes: tuple[str, str]) -> Recipe:
    """The recipe and its plugin, with texts of either changed."""
    plugin, text = PLUGIN, RECIPE
    for old, new in changes:
        assert old in plugin + text
        plugin, text = plugin.replace(old, new), text.replace(old, new)
    recipe = write_recipe(directory / "one", text)
    (recipe / "plugin.py").write_text(plugin, encoding="utf-8")
    (recipe / "said.json").write_text("{}", encoding="utf-8")
    return load_recipe(recipe / "recipe.yaml")


def test_a_changed_file_is_imported_again(site):
    (site / "one" / "said.json").write_text(json.dumps({"x": "y"}), encoding="utf-8")
    said = run(site, "--stop-stage", "3", "--dry-run").said
    assert "listener/seed1" in said
    assert "files that it was made from have changed" in said


def test_an_environment_variable_that_is_not_set_is_said_before_any_work(site, tmp_path):
    recipe = write_recipe(tmp_path / "one", RECIPE.replace("path: said.json", 'path: "${NOBODY_SET_THIS}"'))
    (recipe / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    checked = kdrecipe("check", recipe, CORPUS_ROOT=site / "corpus")
    assert checked.status == 0, checked.said
    [line] = [line for line in checked.out.splitlines() if "to run it" in line]
    assert "NOBODY_SET_THIS is not set" in line
    done = kdrecipe("run", recipe, "--work", tmp_path / "work", CORPUS_ROOT=site / "corpus")
    assert done.status == 2
    assert "NOBODY_SET_THIS is not set" in done.err
    assert not done.ran


@pytest.mark.parametrize(
    ("change", "what", "remedy"),
    [
        (("path: said.json", "path: none.json"), "there is no file none.json", ""),
        (
            ("align: mean", "normalise: true"),
            "needs frame_shift_s 0.04, the teacher's is 0.02",
            "align: mean",
        ),
        (("{name: hidden_mse, layers: {encoder.0: energy}, align: mean}", "{name: kl}"), "lacks it", ""),
        (("encoder.0: energy", "encoder.0: energies"), "lacks it", "did you mean 'hidden:energy'"),
        (("name: listener", "name: listner"), "unknown teacher", "did you mean 'listener'"),
        (("path: said.json", "path: said.json, size: 3"), "size: unknown key", ""),
        (
            (
                "  student:",
                "  small: {compress: {from: listener, steps: [{name: int8_dynamic}]}}\n  student:",
            ),
            "'listener' is imported by a plugin",
            "distil a student",
        ),
    ],
)
def test_mistakes_are_found_by_check(site, tmp_path, change, what, remedy):
    recipe = write_recipe(tmp_path / "one", RECIPE.replace(*change))
    for name in ("plugin.py", "said.json"):
        (recipe / name).write_bytes((site / "one" / name).read_bytes())
    done = kdrecipe("check", recipe, CORPUS_ROOT=site / "corpus")
    assert done.status == 2, done.said
    assert what in done.said
    assert remedy in done.said
    assert "recipe.yaml:" in done.said


def test_check_names_what_this_machine_lacks_and_no_bundle(site, tmp_path):
    text = RECIPE.replace("path: said.json", 'path: "${NOT_SET}/said.json"')
    recipe = write_recipe(tmp_path / "one", text)
    (recipe / "plugin.py").write_bytes((site / "one" / "plugin.py").read_bytes())
    done = kdrecipe("check", recipe, CORPUS_ROOT=site / "corpus")
    assert done.status == 0, done.said
    assert "to run it: the environment variable NOT_SET is not set" in done.said
    assert kdrecipe("check", site / "one", CORPUS_ROOT=site / "corpus").said.count("to run it") == 0
