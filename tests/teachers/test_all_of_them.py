"""What holds of every teacher in a runtime or a file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from teacher_toys import AUDIO, LOGITS, batch_of

from kdrecipe.interfaces import TargetSpec
from kdrecipe.plugin.loader import load_plugins

NAMES = (
    "zipformer_ctc", "zipformer_ctc_int8", "transducer", "onnx", "onnx_features", "torchscript", "torchaudio",
)  # fmt: skip


def test_all_are_registered():
    names = load_plugins().registry.names("teachers")
    assert {"sherpa_onnx", "onnx", "torchscript", "torchaudio"} <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_neither_padding_nor_neighbours_matter(teachers, name):
    teacher = teachers[name]
    needs = teacher.provides()
    together = teacher.targets(batch_of(AUDIO, num_padding=40), needs) if needs else None
    said = teacher.hypotheses(batch_of(AUDIO, num_padding=40))
    for row, samples_S in enumerate(AUDIO):
        alone = batch_of([samples_S])
        assert teacher.hypotheses(alone) == [said[row]]
        if together is None:
            continue
        for key, item in teacher.targets(alone, needs).items.items():
            name = "log_probs_BTK" if key == LOGITS else "values_BTD"
            num, found = int(item.lens_B[0]), getattr(together.items[key], name)[row]
            assert int(together.items[key].lens_B[row]) == num
            torch.testing.assert_close(found[:num], getattr(item, name)[0, :num], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_it_declares(teachers, name):
    teacher, batch = teachers[name], batch_of(AUDIO)
    for spec in teacher.provides():
        item = teacher.targets(batch, [spec]).items[spec.key]
        values_BTD = item.log_probs_BTK if spec.key == LOGITS else item.values_BTD
        assert (values_BTD.dtype, values_BTD.requires_grad) == (torch.float32, False)
        assert values_BTD.shape[2] == spec.dim
        for length, samples_S in zip(item.lens_B.tolist(), AUDIO, strict=True):
            assert abs(length - len(samples_S) / 16000 / spec.frame_shift_s) <= 1.001
        if spec.key == LOGITS:
            torch.testing.assert_close(values_BTD[0].logsumexp(-1), torch.zeros(values_BTD.shape[1]))
            kept = teacher.targets(batch, [TargetSpec("frame_logits", top_k=2)]).posteriors()
            assert kept.log_probs_BTK.shape[2] == 2
            assert kept.log_tail_BT is not None


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
