"""What holds of every teacher in a runtime or a file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from teacher_toys import AUDIO, batch_of

from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.contracts import teacher_contract

NAMES = (
    "zipformer_ctc", "zipformer_ctc_int8", "transducer", "onnx", "onnx_features", "torchscript", "torchaudio",
)  # fmt: skip
SKIPPED = {"transducer": {"normalised"}, "onnx_features": {"next_to_no_audio"}}


def test_all_are_registered():
    names = load_plugins().registry.names("teachers")
    assert {"sherpa_onnx", "onnx", "torchscript", "torchaudio"} <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_contract(classes, name):
    """Skipped is what a teacher says it has not: posteriors of a transducer, next to no audio of features."""
    cls, options = classes[name]
    results = teacher_contract(cls, options).results()
    assert [(r.check_id, r.reason) for r in results if not r.ok] == []
    assert {r.check_id for r in results if r.status != "passed"} == SKIPPED.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_hypotheses_have_times_and_a_score(teachers, name):
    found = teachers[name].hypotheses(batch_of(AUDIO))
    assert any(hypothesis.text for hypothesis in found)
    for hypothesis, samples_S in zip(found, AUDIO, strict=True):
        assert len(hypothesis.times_s) == len(hypothesis.tokens)
        assert hypothesis.times_s == sorted(hypothesis.times_s)
        assert all(time_s <= len(samples_S) / 16000 for time_s in hypothesis.times_s)
        if hypothesis.tokens:
            assert hypothesis.avg_log_prob < 0


@pytest.mark.parametrize("name", NAMES)
def test_next_to_no_audio_is_no_text(teachers, name):
    teacher = teachers[name]
    batch = batch_of([np.zeros(399, np.float32), AUDIO[0]])
    if teacher.input == "audio":
        assert teacher.hypotheses(batch)[0].text == ""
    if teacher.provides():
        teacher.targets(batch, teacher.provides())


def test_parameters_are_counted(teachers, toy, wav2vec, transducer):
    sizes = {"onnx": toy, "torchscript": toy, "torchaudio": wav2vec[0]}
    for name, model in sizes.items():
        assert teachers[name].num_params == sum(p.numel() for p in model.parameters())
    noted = {p.key: p.value for p in onnx.load(transducer / "joiner.onnx").metadata_props}
    positions = 3000
    assert 0 <= teachers["transducer"].num_params - int(noted["num_params"]) < positions
