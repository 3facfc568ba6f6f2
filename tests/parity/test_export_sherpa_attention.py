"""``sherpa_attention``: encoder-decoders in a slot of sherpa-onnx that is made for another model."""

import numpy as np
import onnx
import pytest
import torch

from kdrecipe.data.features import extract
from kdrecipe.interfaces import SOS_EOS_ID, UNK_ID, float_copy
from kdrecipe.measure.parity import check_parity
from kdrecipe.measure.reference import reference
from kdrecipe.measure.runtime import measure_export
from kdrecipe.model.bundle import Bundle
from kdrecipe.recipe.sections import Parity
from kdrecipe_plugins.exporters.fbank_graph import FbankGraph
from kdrecipe_plugins.exporters.runtimes import names_of
from kdrecipe_plugins.exporters.sherpa import recognise
from kdrecipe_plugins.exporters.sherpa_attention import SherpaAttention, swapped

FEATURES = {"name": "fbank", "num_mel_bins": 80}


def exporter(**options) -> SherpaAttention:
    return SherpaAttention(SherpaAttention.Config(**options))


def test_every_weight_is_in_one_file(sherpa_attentions, attentions, all_heads):
    def size(directory, names):
        models = [onnx.load(directory / "float" / name) for name in names]
        weights = [w for m in models for w in m.graph.initializer if len(w.dims) > 1]
        return sum(int(np.prod(w.dims)) for w in weights)

    files = SherpaAttention.files["fp32"]
    ours = size(sherpa_attentions, [files["encoder"], files["uncached_decoder"], files["cached_decoder"]])
    with_ctc = size(attentions, ["encoder.onnx", "decoder.onnx"])
    ctc = sum(p.numel() for p in all_heads.bundle.model.heads["ctc"].parameters() if p.dim() > 1)
    assert ours == pytest.approx(with_ctc - ctc, rel=0.01)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_log_posteriors_along_a_path_equal_torch(sherpa_attentions, all_heads, kind):
    bundle = {"float": all_heads.bundle, "int8": all_heads.int8}[kind]
    model = float_copy(bundle.model)
    features = [extract(u.samples_S, 16000, FEATURES) for u in all_heads.utterances[:3]]
    wanted = [reference(model, "attention", f) for f in features]
    assert any(w.path for w in wanted)
    runner = exporter().load(sherpa_attentions / kind, "fp32")
    for features_TF, want in zip(features, wanted, strict=True):
        (found,) = runner.log_probs_along(features_TF[None], np.array([len(features_TF)]), [want.path])
        np.testing.assert_allclose(found[:, 3:], want.log_probs_MV[:, 3:], atol=2e-4)
        for token in (SOS_EOS_ID, UNK_ID):
            np.testing.assert_allclose(found[:, token], want.log_probs_MV[:, token], atol=2e-4)
        assert runner.greedy(features_TF) == want.tokens


def test_sherpa_onnx_hears_what_the_bundle_hears(sherpa_attentions, all_heads):
    for kind, bundle in (("float", all_heads.bundle), ("int8", all_heads.int8)):
        limits = Parity(max_token_error={"int8": 0.2})  # a handful of tokens
        found = check_parity(bundle, exporter(), sherpa_attentions / kind, all_heads.utterances, limits)
        assert found["fp32"]["token_error"] == found["fp32"]["runtime_token_error"] == 0.0
        assert found["fp32"]["rewritten"] == found["int8"]["rewritten"] == 0.0


def test_the_row_is_measured_in_sherpa_onnx(sherpa_attentions, all_heads):
    utterances = all_heads.utterances[:4]
    runner = exporter().load(sherpa_attentions / "int8", "int8")
    found = measure_export(SherpaAttention, sherpa_attentions / "int8", "int8", utterances)
    assert found.runtime.startswith("sherpa-onnx")
    for utterance, said in zip(utterances, found.utterances, strict=True):
        heard = runner.transcribe(utterance.samples_S, 16000)
        assert said.text == heard.text
        assert all_heads.bundle.tokens.decode(heard.tokens) == heard.text


def test_a_model_that_never_ends_says_a_token_per_frame(all_heads, tmp_path):
    bundle = Bundle.load(all_heads.bundle.path, all_heads.bundle.registry)
    head = bundle.model.heads["attention"]
    with torch.no_grad():
        head.proj.bias[SOS_EOS_ID] = -1e4
        head.proj.bias[UNK_ID] = 1e4  # which has a text, though not sherpa-onnx's end
    exporter().export(bundle, tmp_path)
    samples_S = all_heads.utterances[0].samples_S
    runner = exporter().load(tmp_path, "fp32")
    features_TF = extract(samples_S, 16000, FEATURES)
    own = reference(bundle.model, "attention", features_TF).tokens
    assert own == runner.greedy(features_TF) == [UNK_ID] * len(own)
    heard = runner.transcribe(samples_S, 16000)
    assert heard.text == "<unk>" * len(heard.tokens)
    assert len(heard.tokens) == len(own)


def test_tokens_have_the_ids_of_the_slot(sherpa_attentions, all_heads):
    lines = (sherpa_attentions / "float" / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1].split() == ["<unk>", "1"]
    assert lines[2].split()[1] == "2"
    assert lines[2].startswith("<sos/eos>")
    assert [swapped(swapped(i)) for i in range(9)] == list(range(9))
    assert len(lines) == len(all_heads.bundle.tokens)


@pytest.mark.parametrize("num", [1, 399, 400, 479, 480, 561, 16000, 40007])
def test_the_graphs_features_are_lhotses(num):
    rng = np.random.default_rng(num)
    samples_S = (0.1 * rng.standard_normal(num)).astype(np.float32)
    (found,) = FbankGraph(80)(torch.from_numpy(samples_S)[None])
    np.testing.assert_allclose(found[0].numpy(), extract(samples_S, 16000, FEATURES), atol=1e-3)


class PartOfALetter:
    """A recogniser that says two letters in three tokens, of which Python can't read two."""

    text, timestamps = " αa", ()

    @property
    def result(self):
        return self

    @property
    def tokens(self):
        return [b"\xce".decode()]

    def create_stream(self):
        return self

    def accept_waveform(self, sample_rate, samples_S):
        pass

    def decode_stream(self, stream):
        pass


def test_tokens_that_are_parts_of_letters_have_no_names():
    assert names_of(PartOfALetter()) == (["<0xCE>", "<0xB1>", "<0x61>"], False)
    ids = {"<0xCE>": 5, "<0xB1>": 6, "<0x61>": 7}
    heard = [
        recognise(PartOfALetter(), ids, np.zeros(1600, np.float32), 16000, 30.0, likely=likely)
        for likely in (None, lambda samples_S, sample_rate: [8, 9])
    ]
    assert [h.tokens for h in heard] == [[5, 6, 7], [8, 9]]
    assert {h.text for h in heard} == {"αa"}
