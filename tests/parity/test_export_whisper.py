"""Students made from Whisper, in the slots and programs that all students go to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdrecipe.data.features import extract
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.corpus import speak
from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.sherpa_attention import SherpaAttention

FEATURES = {"name": "fbank", "num_mel_bins": 80}
DECODER = {"num_layers": 2, "num_heads": 2, "positions": "learned", "max_positions": 9, "tied": True}
MODEL = {
    **{"name": "whisper_encoder", "num_layers": 2, "dim": 32, "num_heads": 2, "num_mels": 24},
    "heads": {"attention": {**DECODER, "activation": "gelu"}, "ctc": {}},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """An untrained student."""
    directory = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    tokens = Tokenizer.train(["GO LEFT", "STOP"], "char", None, directory / "tokens")
    model = build_model(MODEL, input_dim=80, vocab_size=len(tokens), registry=load_plugins().registry)
    model.norm.set_stats(torch.full((80,), -8.0), torch.full((80,), 3.0))
    meta = {"name": "student", "kind": "trained", "model": MODEL, "features": FEATURES, "compression": []}
    Bundle.save(directory / "bundle", model.eval(), tokens, {**meta, "plugin_files": {}})
    return Bundle.load(directory / "bundle")


@pytest.fixture(scope="module")
def batch():
    """Features (B, T, F) of two utterances and their lengths; the first is of odd length at every rate."""
    texts = ("GO LEFT STOP", "STOP")
    found = [extract((0.3 * speak(text)).astype(np.float32), 16000, FEATURES) for text in texts]
    lens_B = np.array([len(found[0]), len(found[1])])
    features_BTF = np.full((2, lens_B.max() + 3, 80), 7.0, dtype=np.float32)
    for row, features_TF in zip(features_BTF, found, strict=True):
        row[: len(features_TF)] = features_TF
    return features_BTF, lens_B


def test_ctc_runs_in_the_slot_of_sherpa_onnx(bundle, batch, tmp_path):
    exporter = OnnxCtc(OnnxCtc.Config())
    exporter.export(bundle, tmp_path)
    with torch.no_grad():
        out = bundle.model(*map(torch.from_numpy, batch))
    want_BTV = out.logits["ctc"].log_softmax(-1).numpy()
    for variant, bound in (("fp32", 1e-4), ("int8", 0.2)):
        runner = exporter.load(tmp_path, variant)
        log_probs_BTV, lens_B = runner.log_probs(*batch)
        assert lens_B.tolist() == out.lens_B.tolist() == [-(-n // 4) for n in batch[1]]
        for row, length in enumerate(lens_B):
            np.testing.assert_allclose(
                log_probs_BTV[row, :length], want_BTV[row, :length], atol=bound, err_msg=variant
            )
        assert isinstance(runner.transcribe(0.3 * speak("GO"), 16000).text, str)


@pytest.mark.parametrize("cls", [OnnxAttention, SherpaAttention])
def test_the_decoder_runs_in_our_own_program_and_in_sherpa_onnx(bundle, batch, tmp_path, cls):
    exporter = cls(cls.Config())
    exporter.export(bundle, tmp_path)
    runner = exporter.load(tmp_path, "fp32")
    text = [3, 5, 4, 6, 3, 3, 4, 5, 6, 4, 3]  # longer than there are positions
    tokens = torch.tensor([text, text])
    with torch.no_grad():
        out = bundle.model(*map(torch.from_numpy, batch), batch=type("Batch", (), {"tokens_BU": tokens})())
    want = out.logits["attention"].log_softmax(-1).numpy()
    for row, found in enumerate(runner.log_probs_along(*batch, [text, text])):
        np.testing.assert_allclose(found, want[row], atol=1e-4)
