"""Tiny random models in files, and teachers made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchaudio
from teacher_toys import LETTERS, W2V, Toy, exported, loaded, make, to_onnx, toy_options, w2v_options

from kdrecipe.data.tokens import Tokenizer, tokens_txt
from kdrecipe.model.bundle import Bundle
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer
from kdrecipe_plugins.teachers.onnx_file import OnnxTeacher
from kdrecipe_plugins.teachers.sherpa_folder import SherpaOnnxTeacher
from kdrecipe_plugins.teachers.torchaudio_model import TorchaudioTeacher
from kdrecipe_plugins.teachers.torchscript_file import TorchScriptTeacher


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Tokenizer:
    lines = ["ONE TWO THREE FOUR FIVE SIX SEVEN"]
    return Tokenizer.train(lines, "char", None, tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def ctc(tokens, tmp_path_factory) -> tuple[Bundle, Path]:
    return exported(OnnxCtc, {"ctc": {}}, tokens, tmp_path_factory.mktemp("ctc"))


@pytest.fixture(scope="session")
def transducer(tokens, tmp_path_factory) -> Path:
    heads = {"rnnt": {"predictor_dim": 16, "joiner_dim": 16}}
    return exported(OnnxTransducer, heads, tokens, tmp_path_factory.mktemp("transducer"))[1]


@pytest.fixture(scope="session")
def toy() -> Toy:
    torch.manual_seed(1)
    return Toy().eval()


@pytest.fixture(scope="session")
def toy_files(toy, tmp_path_factory) -> Path:
    """``toy.onnx`` and ``toy.pt`` with their tokens."""
    folder = tmp_path_factory.mktemp("toy")
    to_onnx(toy, (torch.randn(1, 3200),), folder / "toy.onnx", ["samples"], ["logits", "middle"])
    torch.jit.save(torch.jit.script(toy), folder / "toy.pt")
    (folder / "tokens.txt").write_text(tokens_txt(LETTERS), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def wav2vec(tmp_path_factory):
    """A model of torchaudio, and the folder of its weights and tokens."""
    torch.manual_seed(2)
    folder, model = tmp_path_factory.mktemp("wav2vec"), torchaudio.models.wav2vec2_model(**W2V, aux_num_out=4)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "tokens.txt").write_text(tokens_txt(["-", "|", "A", "B"]), encoding="utf-8")
    return model.eval(), folder


@pytest.fixture(scope="session")
def classes(ctc, transducer, toy_files, wav2vec) -> dict:
    """By name, a teacher's class and its options."""
    features = {"frame_logits": {"name": "log_probs", "frame_shift_s": 0.04}}
    ctc_options = {"path": str(ctc[1] / "model.onnx"), "input": "features", "outputs": features}
    return {
        "zipformer_ctc": (SherpaOnnxTeacher, {"path": str(ctc[1]), "model": "zipformer_ctc"}),
        "zipformer_ctc_int8": (
            SherpaOnnxTeacher, {"path": str(ctc[1]), "model": "zipformer_ctc", "int8": True}
        ),
        "transducer": (SherpaOnnxTeacher, {"path": str(transducer), "model": "transducer"}),
        "onnx": (OnnxTeacher, toy_options(toy_files / "toy.onnx", "logits", "middle")),
        "onnx_features": (OnnxTeacher, {**ctc_options, "lens_output": "log_probs_len"}),
        "torchscript": (TorchScriptTeacher, toy_options(toy_files / "toy.pt")),
        "torchaudio": (TorchaudioTeacher, w2v_options(wav2vec[1])),
    }  # fmt: skip


@pytest.fixture(scope="session")
def teachers(classes) -> dict:
    return {name: loaded(make(*of)) for name, of in classes.items()}
