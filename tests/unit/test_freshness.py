"""Stale results are not taken for fresh: changed audio, texts, bundles; copied work directories."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lhotse.audio import RecordingSet
from lhotse.supervision import SupervisionSet

from kdrecipe.corpus.manifests import audio_files, finish
from kdrecipe.data.features import compute_features, load_cuts
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.interfaces import Prepared
from kdrecipe.jobs.stamps import describe_change
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.stages.run import run_recipe
from kdrecipe.testing.corpus import make_corpus

RECIPE = """
corpus:
  {name: manifests, root: ROOT, recordings: "{part}_recordings.jsonl", supervisions: "{part}_sups.jsonl"}
features: {name: fbank, num_mel_bins: 40, speed_perturb: [1.0, 1.1]}
tokens: {name: char}
seeds: [1]
systems:
  scratch: {train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
export: [{name: onnx_ctc}]
decode: {splits: [test]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), num_speakers=4, utterances_per_speaker=2)


class Place:
    """Manifests in one folder, their audio in another, a recipe in a third."""

    def __init__(self, folder: Path, made: Path) -> None:
        self.root, self.audio = folder / "root", folder / "audio"
        self.recipe, self.work = folder / "recipe", folder / "recipe" / "exp"
        self.root.mkdir(parents=True)
        self.recipe.mkdir()
        self.audio.mkdir()
        for file in made.glob("*.jsonl.gz"):
            rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
            for row in rows:
                for source in row.get("sources", ()):
                    path = (made / source["source"]).absolute()
                    shutil.copy(path, self.audio / path.name)
                    source["source"] = str(self.audio / path.name)
            name = file.name.removesuffix(".gz").replace("supervisions", "sups")
            (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.recipe / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(self.root)))

    def run(self, last: int = 1, work: Path | None = None) -> None:
        run_recipe(load_recipe(self.recipe), 0, last, work=work or self.work)

    def would_run(self, capsys, last: int = 1, work: Path | None = None) -> str:
        capsys.readouterr()
        run_recipe(load_recipe(self.recipe), 0, last, dry_run=True, work=work or self.work)
        return capsys.readouterr().out

    def wavs(self) -> list[Path]:
        return sorted(self.audio.iterdir())


@pytest.fixture
def place(made, tmp_path) -> Place:
    place = Place(tmp_path / "here", made)
    place.run()
    return place


def test_what_did_not_change_is_up_to_date(place, capsys):
    assert "would run" not in place.would_run(capsys)


def test_a_process_that_runs_another_job_does_not_walk_the_corpus(place, monkeypatch):
    def walk(root):
        raise AssertionError(f"{root} was walked")

    monkeypatch.setattr("kdrecipe.stages.prepare.raw_digest", walk)
    run_recipe(load_recipe(place.recipe), 1, 1, work=place.work, job="features")


def test_a_file_that_is_gone_from_a_result_of_very_many(place, capsys, monkeypatch):
    monkeypatch.setattr("kdrecipe.artifacts.MANY_FILES", 1)
    monkeypatch.setattr("kdrecipe.artifacts._LARGE_FOLDER", 1)
    run_recipe(load_recipe(place.recipe), 1, 1, work=place.work, force=True)
    assert "would run" not in place.would_run(capsys)
    next((place.work / "features" / "storage" / "train").rglob("*.npy")).unlink()
    assert "would run: files in storage/train/000/ are missing or damaged" in place.would_run(capsys)


def cut_short(place: Place) -> None:
    for path in place.wavs():
        path.write_bytes(path.read_bytes()[:-2000])


def other_sounds(place: Place) -> None:
    """Of the same size."""
    data = place.wavs()[0].read_bytes()
    place.wavs()[0].write_bytes(data[:100] + bytes(len(data) - 100))


@pytest.mark.parametrize("change", [cut_short, other_sounds, lambda p: p.wavs()[0].unlink()])
def test_audio_outside_the_root_counts(place, capsys, change):
    change(place)
    assert "prepare                            would run: files that it was made from" in place.would_run(
        capsys
    )


def test_audio_of_the_same_length_with_other_sounds_gives_other_features(place, capsys):
    before = sorted(p.read_bytes() for p in (place.work / "features").rglob("*.npy"))
    other_sounds(place)
    place.run()
    assert sorted(p.read_bytes() for p in (place.work / "features").rglob("*.npy")) != before
    assert "would run" not in place.would_run(capsys)


def test_audio_that_was_only_touched_changes_nothing_below(place, capsys):
    for path in place.wavs():
        os.utime(path, (1, 1))
    place.run()
    said = capsys.readouterr().out
    assert "prepare done" in said
    assert "features up to date after all" in said


def test_one_letter_of_a_transcript_counts(place, capsys):
    file = place.root / "train_sups.jsonl"
    before = file.read_text()
    file.write_text(before.replace('"text": "R', '"text": "B').replace('"text": "T', '"text": "B'))
    assert len(file.read_text()) == len(before)
    assert file.read_text() != before
    os.utime(file, ns=(place.root.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert "would run: changed: raw" in place.would_run(capsys)


def test_a_linked_folder_of_audio_counts(place, capsys, tmp_path):
    (place.root / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more").mkdir()
    place.run()
    assert "would run" not in place.would_run(capsys)
    (tmp_path / "more" / "new.wav").write_bytes(b"1")
    assert "would run: changed: raw" in place.would_run(capsys)


def test_another_root_counts(place, capsys):
    shutil.copytree(place.root, place.root.with_name("copy"))
    text = RECIPE.replace("ROOT", str(place.root.with_name("copy")))
    (place.recipe / "recipe.yaml").write_text(text)
    assert "would run: changed: root" in place.would_run(capsys)


def test_a_copied_work_directory_reads_its_own_files(place, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place.work, copy)
    shutil.rmtree(place.work)
    assert "would run" not in place.would_run(capsys, work=copy)
    for cut in load_cuts(copy / "features", "train"):
        assert len(cut.load_features())
        assert Path(cut.features.storage_path).is_relative_to(copy)


def test_audio_within_a_work_directory_moves_with_it(tmp_path):
    """As synthesised and converted audio is."""
    manifests = make_corpus(tmp_path / "exp" / "manifests", num_speakers=3, utterances_per_speaker=2)
    recordings = RecordingSet.from_file(manifests / "train_recordings.jsonl.gz").to_eager()
    supervisions = SupervisionSet.from_file(manifests / "train_supervisions.jsonl.gz").to_eager()
    for file in manifests.glob("*.jsonl.gz"):
        file.unlink()
    finish(Prepared({"train": (recordings, supervisions)}), manifests, "stop")
    config = {"name": "fbank", "num_mel_bins": 40, "speed_perturb": [1.0]}
    compute_features(manifests, tmp_path / "exp" / "features", config)
    moved = Path(shutil.move(tmp_path / "exp", tmp_path / "moved"))
    assert all(path.is_relative_to(moved) for path in audio_files(moved / "manifests")["train"])
    for cut in load_cuts(moved / "features", "train"):
        assert cut.load_audio().size
        assert len(cut.load_features())


# ---------------------------------------------------------------- imported bundles

IMPORTING = RECIPE.replace("  scratch:", "  big: {pretrained: {bundle: bundle}}\n  scratch:")


HOOKS = """
from kdrecipe import hookimpl

@hookimpl
def build_optimizer(params, config):
    return None

@hookimpl
def report_sections(recipe, results):
    return [("Licence", "CC0")]
"""


def test_code_of_the_optimiser_and_of_report_sections_counts(place):
    def inputs() -> list[str]:
        plan = build_plan(load_recipe(place.recipe), Layout(place.work))
        return [json.dumps(plan.jobs[name].inputs) for name in ("scratch/seed1", "report", "features")]

    recipe, plugin = place.recipe / "recipe.yaml", place.recipe / "plugin.py"
    plugin.write_text(HOOKS)
    recipe.write_text(recipe.read_text() + "plugins: {files: [plugin.py]}\n")
    trained, report, features = inputs()
    plugin.write_text(HOOKS.replace("CC0", "CC BY 4.0"))
    now = inputs()
    assert trained != now[0]
    assert report != now[1]
    assert features == now[2]


COMPRESSOR = """
from kdrecipe import hookimpl
from kdrecipe.interfaces import Options

class Mine:
    num_epochs = 0
    class Config(Options):
        pass
    def __init__(self, config):
        self.scale = 1

@hookimpl
def register_compressors(register):
    register("mine", Mine)
"""


def test_code_that_may_change_what_the_same_weights_compute_counts_downstream(place):
    jobs = ("small/seed1", "export/small/seed1", "decode/small/seed1", "export/scratch/seed1")

    def inputs() -> list[str]:
        plan = build_plan(load_recipe(place.recipe), Layout(place.work))
        return [json.dumps(plan.jobs[name].inputs) for name in jobs]

    recipe, plugin = place.recipe / "recipe.yaml", place.recipe / "plugin.py"
    plugin.write_text(COMPRESSOR)
    text = recipe.read_text().replace(
        "systems:\n", "systems:\n  small: {compress: {from: scratch, steps: [{name: mine}]}}\n"
    )
    recipe.write_text(text + "plugins: {files: [plugin.py]}\n")
    before = inputs()
    plugin.write_text(COMPRESSOR.replace("scale = 1", "scale = 2"))
    changed = [a != b for a, b in zip(before, inputs(), strict=True)]
    assert changed == [True, True, True, False]


def test_the_report_names_the_command_that_made_it(place):
    def report(*overrides: str) -> dict:
        recipe = load_recipe(place.recipe, overrides=overrides)
        return build_plan(recipe, Layout(place.work)).jobs["report"].inputs

    assert report() != report("training.epochs=30"), "the default, said once more"


@pytest.fixture
def importing(made, tmp_path):
    """A recipe that imports a bundle, with that bundle beside it."""
    place = Place(tmp_path / "importing", made)
    (place.recipe / "recipe.yaml").write_text(IMPORTING.replace("ROOT", str(place.root)))
    tokens = Tokenizer.train(["RED TEA", "BLUE SUN"], "char", None, tmp_path / "tokens")
    described = {"name": "conformer", "num_layers": 1, "dim": 16, "heads": {"ctc": {}}}
    features = {"name": "fbank", "num_mel_bins": 40}
    meta = {"name": "big", "kind": "trained", "parent": None, "seed": 1, "model": described}
    meta |= {"compression": [], "features": features, "plugin_files": {}}

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        registry = load_plugins().registry
        model = build_model(described, input_dim=40, vocab_size=len(tokens), registry=registry)
        Bundle.save(place.recipe / "bundle", model, tokens, meta)

    save(1)
    place.save = save
    return place


def test_other_weights_of_the_same_shape_count(importing, capsys):
    recipe = load_recipe(importing.recipe)
    run_recipe(recipe, 5, 5, work=importing.work, job="big/seed1")
    capsys.readouterr()
    run_recipe(load_recipe(importing.recipe), 5, 5, dry_run=True, work=importing.work)
    assert "big/seed1                          up to date" in capsys.readouterr().out
    size = (importing.recipe / "bundle" / "weights.pt").stat().st_size
    importing.save(2)
    assert (importing.recipe / "bundle" / "weights.pt").stat().st_size == size
    run_recipe(load_recipe(importing.recipe), 5, 5, dry_run=True, work=importing.work)
    assert "would run: changed: bundle" in capsys.readouterr().out


def test_a_change_is_described_even_if_the_new_value_is_null():
    assert describe_change({"a": {}}, {"a": {"b": None}}) == "a.b absent -> null"
    assert describe_change({"a": {"b": None}}, {"a": {"b": 2}}) == "a.b null -> 2"
    assert describe_change({"a": 1, "b": [1, 2]}, {"b": [1, 3]}) == "a 1 -> absent, b[1] 2 -> 3"
