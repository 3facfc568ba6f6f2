"""Plain values of the wrong kind, files cut short, plugins that raise: one clear error for each."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrecipe.cli.main import main
from kdrecipe.corpus.manifests import finish
from kdrecipe.corpus.problems import DataProblem
from kdrecipe.data.tokens import read_pieces
from kdrecipe.errors import DataError, KdrecipeError
from kdrecipe.interfaces import Prepared
from kdrecipe.recipe.load import load_recipe
from kdrecipe.testing.corpus import make_corpus

MODEL = {"name": "conformer", "num_layers": 1, "dim": 16, "heads": {"ctc": {}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("made"), num_speakers=3, utterances_per_speaker=2)


class Place:
    """A recipe and a corpus of its own."""

    def __init__(self, folder: Path, made: Path, capsys) -> None:
        self.corpus, self.recipe, self.work = folder / "corpus", folder / "recipe", folder / "work"
        shutil.copytree(made, self.corpus)
        self.recipe.mkdir()
        self.capsys = capsys
        self.data: dict[str, Any] = {
            "corpus": {"name": "manifests", "root": str(self.corpus)},
            "tokens": {"name": "char"},
            "training": {"epochs": 1, "precision": "fp32"},
            "systems": {"scratch": {"train": {"model": MODEL}}},
            "export": [{"name": "onnx_ctc"}],
        }

    def call(self, *arguments: Any) -> str:
        """What an erroneous command says; one screen of it, and status 2."""
        (self.recipe / "recipe.yaml").write_text(yaml.safe_dump(self.data), encoding="utf-8")
        self.capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        said = self.capsys.readouterr().err
        assert status == 2, said
        assert said.startswith("kdrecipe: ")
        assert "Traceback" not in said
        assert len(said.splitlines()) < 25
        return said

    def run(self, last: int = 2) -> str:
        return self.call("run", self.recipe, "--work", self.work, "--stop-stage", last, "--jobs", "1")

    def check(self) -> str:
        return self.call("check", self.recipe)

    def change(self, file: str, **fields: Any) -> Path:
        """Other values of fields of the first line of a manifest."""
        path = self.corpus / f"train_{file}.jsonl.gz"
        with gzip.open(path, "rt") as stream:
            rows = [json.loads(line) for line in stream]
        rows[0] |= fields
        with gzip.open(path, "wt") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
        return path


@pytest.fixture
def place(tmp_path, made, capsys) -> Place:
    return Place(tmp_path, made, capsys)


# ---------------------------------------------------------------- manifests

WRONG = [
    ("supervisions", "text", 911, "text is 911, it must be text"),
    ("supervisions", "text", float("nan"), "text is nan, it must be text"),
    ("supervisions", "text", ["RED"], "text is ['RED'], it must be text"),
    ("supervisions", "text", "RED \ud800", r"text is 'RED \ud800'"),
    ("supervisions", "duration", "1.5", "duration is '1.5', it must be a finite number"),
    ("supervisions", "duration", float("inf"), "duration is inf, it must be a finite number"),
    ("supervisions", "duration", None, "duration is None, it must be a finite number"),
    ("supervisions", "duration", 10**400, "duration is 1000000"),
    ("supervisions", "start", "0", "start is '0', it must be a finite number"),
    ("supervisions", "start", True, "start is True, it must be a finite number"),
    ("supervisions", "id", 7, "id is 7, it must be text that is not empty"),
    ("supervisions", "speaker", 84, "speaker is 84, it must be text"),
    ("supervisions", "channel", "0", "channel is '0', it must be a channel's number"),
    ("supervisions", "recording_id", "", "recording_id is '', it must be text that is not empty"),
    ("recordings", "sampling_rate", "16000", "sampling_rate is '16000', it must be a whole number of Hz"),
    ("recordings", "num_samples", -1, "num_samples is -1, it must be a whole number"),
    ("recordings", "sources", [], "sources is [], it must be a list"),
    (
        "recordings",
        "sources",
        [{"type": "file", "channels": [0], "source": 5}],
        "sources is [AudioSource(type='file'",
    ),
]


@pytest.mark.parametrize(("file", "name", "value", "what"), WRONG, ids=range(len(WRONG)))
def test_a_field_of_the_wrong_kind_is_named_with_its_line(place, file, name, value, what):
    path = place.change(file, **{name: value})
    said = place.run(last=0)
    assert f"1 line that can't be read: {path}:1 ({what}" in said
    assert "fix the file" in said


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00garbage", b"", b"text", None])
def test_a_damaged_manifest_is_named(place, content):
    path = place.corpus / "train_supervisions.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    said = place.run(last=0)
    assert str(path) in said or "1 split without utterances: train" in said


def test_what_a_plugin_makes_is_looked_at_as_well(place):
    (place.recipe / "plugin.py").write_text(OTHER_CORPUS)
    place.data |= {"corpus": {"name": "mine"}, "plugins": {"files": ["plugin.py"]}}
    assert "1 line that can't be read: u1 (train: text is 5, it must be text)" in place.run(last=0)


OTHER_CORPUS = """
from kdrecipe import hookimpl
from kdrecipe.interfaces import Options, Prepared

class Mine:
    class Config(Options):
        pass

    def __init__(self, config):
        pass

    def prepare(self, corpus_dir, out_dir):
        from lhotse import SupervisionSegment
        segment = SupervisionSegment("u1", "u1", 0.0, 1.0, text=5)
        return Prepared({split: ([], [segment]) for split in ("train", "test")})

@hookimpl
def register_corpora(register):
    register("mine", Mine)
"""


def test_skipping_is_not_advised_where_it_is_set(place):
    for name in ("supervisions", "recordings"):
        file = place.corpus / f"train_{name}.jsonl.gz"
        with gzip.open(file, "wt") as stream:
            stream.write('{"id": 1}\n')
    place.data["corpus"]["on_error"] = "skip"
    said = place.run()
    assert "1 split without utterances: train" in said
    assert "left out" in said, "the cause"
    assert "on_error" not in said


def test_skipping_is_not_advised_by_the_features(place):
    shutil.rmtree(place.corpus)
    make_corpus(place.corpus, num_speakers=3, utterances_per_speaker=1)
    place.data["corpus"]["on_error"] = "skip"
    (place.recipe / "recipe.yaml").write_text(yaml.safe_dump(place.data), encoding="utf-8")
    run = ["run", str(place.recipe), "--work", str(place.work), "--jobs", "1"]
    assert main([*run, "--stop-stage", "0"]) == 0
    audio = place.corpus / "audio" / "spk00-0000.wav"
    state = audio.stat()
    audio.write_bytes(b"RIFF" + bytes(state.st_size - 4))
    os.utime(audio, ns=(state.st_atime_ns, state.st_mtime_ns))
    said = place.call(*run, "--stage", "1", "--stop-stage", "1")
    assert "spk00-0000: can't read its audio" in said
    assert "on_error" not in said


def test_an_empty_split_names_what_was_left_out(tmp_path):
    problem = DataProblem("5", "list:3", kind="empty_text", id="u1")
    with pytest.raises(DataError, match=r"train \(1 left out, such as list:3: empty transcript: 5\)"):
        finish(Prepared({"train": ([], [])}, [problem]), tmp_path, "skip")


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("corpus", "splits"),
    [
        ({}, "test"),
        ({"splits": {"train": "train", "held_out": "test"}}, "held_out"),
        ({"name": "an4"}, "test"),
        ({"name": "librispeech", "parts": {"train": ["a"], "test_other": ["b"]}}, "test_other"),
    ],
)
def test_a_split_that_the_corpus_lacks_is_found_before_any_work(place, corpus, splits):
    place.data["corpus"] |= corpus
    place.data["decode"] = {"splits": [splits]}
    (place.recipe / "recipe.yaml").write_text(yaml.safe_dump(place.data), encoding="utf-8")
    load_recipe(place.recipe)
    place.data["decode"] = {"splits": [splits, "nope"]}
    said = place.check()
    assert "decode.splits[1]: the corpus has no split 'nope'" in said
    assert splits in said


def test_a_corpus_that_can_not_say_is_found_out_in_stage_0(place):
    (place.recipe / "plugin.py").write_text(OTHER_CORPUS)
    place.data |= {"corpus": {"name": "mine"}, "plugins": {"files": ["plugin.py"]}}
    place.data["decode"] = {"splits": ["nope"]}
    assert "the corpus has no split 'nope'" in place.run(last=0)


def test_a_corpus_without_train(place):
    place.data["corpus"]["splits"] = {"test": "test"}
    assert "corpus: has no split 'train'" in place.check()


@pytest.mark.parametrize("speeds", [[0.9, 1.1], [1.1, 0.9], [0.9, 1.0, 1.1]])
def test_the_speed_1_is_always_there(place, speeds):
    place.data["features"] = {"speed_perturb": speeds}
    (place.recipe / "recipe.yaml").write_text(yaml.safe_dump(place.data), encoding="utf-8")
    assert load_recipe(place.recipe).features.speed_perturb == (0.9, 1.0, 1.1)


def test_ids_like_those_of_copies_are_named_before_training(place):
    place.change("supervisions", id="spk00-0001_sp0.9")
    place.data["features"] = {"speed_perturb": [0.9, 1.0]}
    said = place.run(last=1)
    assert "spk00-0001_sp0.9: this id is also that of a copy at another speed" in said


def test_a_model_that_would_never_be_built_is_refused(place):
    place.data["systems"]["scratch"]["train"]["model"] = {**MODEL, "num_layers": 10**9}
    assert "it has more than 10000 weight tensors" in place.check()


def test_a_head_that_does_not_fit_is_found_before_any_work(place):
    heads = {"attention": {"num_heads": 3, "num_layers": 1}}
    place.data["systems"]["scratch"]["train"] = {"model": {**MODEL, "heads": heads}}
    place.data["systems"]["scratch"]["train"]["losses"] = [{"name": "attention"}]
    place.data["export"] = [{"name": "onnx_attention"}]
    assert "dim 16 is not a multiple of num_heads 3" in place.check()


def test_options_of_plugins_are_finite(place):
    place.data["corpus"] = {"name": "voice_commands", "snr_db": [float("nan"), 20.0]}
    assert "corpus.snr_db[0]: is nan" in place.check()


# ---------------------------------------------------------------- plugins that raise

LOSS = """
from kdrecipe import hookimpl
from kdrecipe.interfaces import LossOutput, Options

def helper(out):
    raise IndexError("no such frame")

class Mine:
    class Config(Options):
        pass

    def __init__(self, config, setup):
        pass

    def __call__(self, out, targets, batch):
        return BODY

@hookimpl
def register_losses(register):
    register("mine", Mine)
"""
HOOK = """
from kdrecipe import hookimpl

@hookimpl
def HOOKS:
    raise KeyError("hours")
"""


def with_loss(place: Place, body: str) -> None:
    (place.recipe / "plugin.py").write_text(LOSS.replace("BODY", body))
    place.data["plugins"] = {"files": ["plugin.py"]}
    place.data["systems"]["scratch"]["train"]["losses"] = [{"name": "mine"}]


@pytest.mark.parametrize(
    ("body", "line", "what"),
    [
        ("1 / 0", 16, "loss 'mine' failed in __call__: ZeroDivisionError: division by zero"),
        ("helper(out)", 6, "loss 'mine' failed in __call__, by helper: IndexError: no such frame"),
        ("out.hidden_BTD @ out.lens_B", 16, "loss 'mine' failed in __call__: RuntimeError: "),
        ("__import__('sys').exit(3)", 16, "loss 'mine' failed in __call__: SystemExit: 3"),
    ],
)
def test_a_plugin_that_raises_is_named(place, monkeypatch, body, line, what):
    with_loss(place, body)
    said = place.run(last=5)
    assert f"{place.recipe / 'plugin.py'}:{line}: {what}" in said
    assert "KDRECIPE_TRACE=1 shows the whole traceback" in said
    monkeypatch.setenv("KDRECIPE_TRACE", "1")
    assert (
        main(["run", str(place.recipe), "--work", str(place.work), "--stop-stage", "5", "--jobs", "1"]) == 2
    )
    assert "Traceback (most recent call last)" in place.capsys.readouterr().err


@pytest.mark.parametrize("body", ["None", "out.hidden_BTD.sum()"])
def test_a_loss_that_returns_something_else(place, body):
    with_loss(place, body)
    assert "loss 'mine': __call__ returned " in place.run(last=5)


def test_a_hook_that_raises_is_named(place):
    (place.recipe / "plugin.py").write_text(HOOK.replace("HOOKS", "check_recipe(recipe)"))
    place.data["plugins"] = {"files": ["plugin.py"]}
    assert "the plugin 'plugin.py' failed in check_recipe: KeyError: 'hours'" in place.check()


def test_a_bug_of_the_core_is_no_plugins_fault(place, monkeypatch, capsys):
    with_loss(place, "1 / 0")
    (place.recipe / "recipe.yaml").write_text(yaml.safe_dump(place.data), encoding="utf-8")
    monkeypatch.setattr("kdrecipe.stages.run.run_recipe", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        main(["run", str(place.recipe)])
    assert "a plugin that does not keep to its interface: see kdrecipe plugins test for loss 'mine'" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "content", ["<blk> 0\nA 1\nB", "<blk> 0\nA 2\n", "<blk> 0\nA\n", "", "\xff", "A one\n"]
)
def test_a_damaged_list_of_tokens_is_named(tmp_path, content):
    path = tmp_path / "tokens.txt"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(KdrecipeError, match="no list of tokens: line"):
        read_pieces(path)
