"""Stage 1 tells of utterances that are longer than a batch, with the memory that they will take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet

from kdrecipe.model.asr import AsrModel, build_model
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages import features as stage_1
from kdrecipe.stages.layout import Layout
from kdrecipe.testing.corpus import speak
from kdrecipe.train import memory
from kdrecipe.train.memory import batch_bytes, free_bytes

RECIPE = """
corpus: {name: manifests, root: ".", subsets: {one: {utterances: 1}, rest: {except: one}}}
features: {num_mel_bins: 16, speed_perturb: [0.8, 1.0]}
tokens: {name: char}
training: {batch_duration_s: 6, precision: fp32}
systems:
  teacher: {train: {model: {name: conformer, num_layers: 4, dim: 64, heads: {ctc: {}}}}}
  wide: {train: {model: &small {name: conformer, num_layers: 1, dim: 8, num_heads: 2, heads: {ctc: {}}},
         training: {batch_duration_s: 9}}}
  rest: {train: {model: *small, data: rest}}
  kd: {distill: {teachers: [teacher], model: *small, losses: [{name: kl}, {name: cr_ctc}]}}
"""


def model_of(**options: int) -> AsrModel:
    described = {
        "name": "conformer",
        "num_layers": 1,
        "dim": 8,
        "num_heads": 2,
        "heads": {"ctc": {}},
        **options,
    }
    return build_model(described, input_dim=16, vocab_size=9, registry=load_plugins().registry).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_long_utterance_takes_is_told_from_short_ones(precision: str) -> None:
    """In bf16, attention on a CPU takes memory by the square."""
    model = model_of()
    saved = memory._saved_bytes(model, 6000, precision)
    assert batch_bytes(model, 6000, precision=precision) == pytest.approx(
        memory.BEYOND_SAVED * saved, rel=0.05
    )
    assert batch_bytes(model, 6000, precision=precision, num_views=2) == pytest.approx(
        2 * batch_bytes(model, 6000, precision=precision), rel=1e-6
    )
    short = batch_bytes(model, 1500, precision=precision)
    assert saved / short > (6 if precision == "bf16" else 2)


def test_a_larger_model_takes_more_and_nothing_is_left_behind() -> None:
    small, large = model_of(), model_of(num_layers=4)
    assert 2 < batch_bytes(large, 3000) / batch_bytes(small, 3000) < 5
    assert all(p.grad is None for p in small.parameters())
    assert free_bytes() > 0


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A corpus of an utterance of 2 s, one of 4 s and one of 8 s, prepared; at speed 0.8 they are longer."""
    recordings, sups = [], []
    for name, text in {"short": "A A", "middle": "A B C D E F", "long": "A B C D E F G H I J K L"}.items():
        samples_S = torch.nn.functional.pad(torch.from_numpy(speak(text)), (0, 16000)).numpy()
        seconds = {"short": 2, "middle": 4, "long": 8}[name]
        samples_S = samples_S[: seconds * 16000].repeat(1 + seconds * 16000 // len(samples_S))
        soundfile.write(tmp_path / f"{name}.wav", 0.5 * samples_S[: seconds * 16000], 16000)
        recordings.append(Recording.from_file(tmp_path / f"{name}.wav", recording_id=name))
        sups.append(SupervisionSegment(name, name, 0.0, float(seconds), text=text, speaker="s"))
    manifests = Layout(tmp_path).manifests
    manifests.mkdir(parents=True)
    RecordingSet.from_recordings(recordings).to_file(manifests / "train_recordings.jsonl.gz")
    SupervisionSet.from_segments(sups).to_file(manifests / "train_supervisions.jsonl.gz")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_stage_1_names_them(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(work)
    stage_1.run(load_recipe(work / "recipe.yaml"), layout, layout.features)
    assert len(CutSet.from_file(layout.features / "train.jsonl.gz")) == 6
    lines = capsys.readouterr().out.splitlines()
    warnings = [i for i, line in enumerate(lines) if line.startswith("  warning: ")]
    (six, nine) = [lines[i : i + 3] for i in warnings]
    assert six[0] == (
        "  warning: 2 utterances of train are longer than training.batch_duration_s (6 s): "
        "long_sp0.8 (10 s), long (8 s)"
    )
    told = dict(re.findall(r"(\w+) about (\d+\.\d\d) GB", six[1]))
    assert set(told) == {"teacher", "kd"}, "the long one is not in rest"
    assert 0.02 < float(told["teacher"]) < 0.2
    assert re.search(r"; \d+\.\d GB are free$", six[1])
    assert "1 utterance of train is longer than training.batch_duration_s (9 s): long_sp0.8 (10 s)" in nine[0]
    assert re.search(r"training takes: wide about", nine[1])


def test_it_says_when_memory_does_not_suffice(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(work)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    stage_1.run(load_recipe(work / "recipe.yaml"), layout, layout.features)
    assert "0.0 GB are free: not enough" in capsys.readouterr().out


def test_shorter_ones_need_no_word(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(work)
    (work / "recipe.yaml").write_text(
        RECIPE.replace("duration_s: 6", "duration_s: 60").replace(": 9}", ": 60}")
    )
    stage_1.run(load_recipe(work / "recipe.yaml"), layout, layout.features)
    assert "warning" not in capsys.readouterr().out
