"""What runtimes write: texts other than the tokens spell are found, named, and never taken for chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdrecipe.data.byte_bpe import ByteBpe, byte_symbols
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import ParityError
from kdrecipe.interfaces import Hypothesis
from kdrecipe.measure.parity import check_parity
from kdrecipe.model.bundle import Bundle
from kdrecipe.recipe.sections import Parity
from kdrecipe.text import clean
from kdrecipe_plugins.exporters import sherpa
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc, OnnxRunner
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer, OnnxTransducerRunner

NOISE_S = (0.1 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32)

# ---------------------------------------------------------------- sherpa-onnx's own rules, as known here


def parrot(kind: str, pieces: list[str], ids: list[int], directory: Path):
    """A runner of a model that says ``ids`` whatever it hears."""
    directory.mkdir()
    (directory / "tokens.txt").write_text(
        "".join(f"{p} {i}\n" for i, p in enumerate(pieces)), encoding="utf-8"
    )
    frames = [x for i in ids for x in (i, 0)] or [0]
    scores_NTV = np.full((1, len(frames), len(pieces)), -20, dtype=np.float32)
    scores_NTV[0, np.arange(len(frames)), frames] = 0
    spoken = {"scores": scores_NTV, "lens": np.array([len(frames)])}
    value, size = helper.make_tensor_value_info, len(pieces)
    heard = [value("x", TensorProto.FLOAT, ["N", "T", 80]), value("x_lens", TensorProto.INT64, ["N"])]

    def write(name, inputs, outputs, nodes, constants):
        weights = [numpy_helper.from_array(array, key) for key, array in constants.items()]
        model = helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs, weights),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=8,
        )
        about = {"vocab_size": size, "context_size": 2, "joiner_dim": size, "model_type": "conformer"}
        onnx.helper.set_model_props(model, {key: str(x) for key, x in about.items()})
        (directory / name).write_bytes(model.SerializeToString())

    same = lambda source, target: helper.make_node("Identity", [source], [target])  # noqa: E731
    said = [value("out", TensorProto.FLOAT, ["N", "T2", size]), value("out_lens", TensorProto.INT64, ["N"])]
    nodes = [same("scores", "out"), same("lens", "out_lens")]
    if kind == "ctc":
        write("model.onnx", heard, said, nodes, spoken)
        return OnnxRunner(directory / "model.onnx")
    write("encoder.onnx", heard, said, nodes, spoken)
    side = value("side", TensorProto.FLOAT, ["N", size])
    write(
        "decoder.onnx",
        [value("y", TensorProto.INT64, ["N", 2])],
        [side],
        [same("zeros", "side")],
        {"zeros": np.zeros((1, size), dtype=np.float32)},
    )
    write(
        "joiner.onnx",
        [
            value("encoder_out", TensorProto.FLOAT, ["N", size]),
            value("decoder_out", TensorProto.FLOAT, ["N", size]),
        ],
        [value("logit", TensorProto.FLOAT, ["N", size])],
        [helper.make_node("Add", ["encoder_out", "decoder_out"], ["logit"])],
        {},
    )
    return OnnxTransducerRunner(directory, "fp32")


SAID = {
    "dropped": ["▁RED", "▁FOS", "SIL", "▁SIL", "</s>", "▁BA", "SIL"],
    "punctuation": [
        "▁TAKE",
        "▁'EM",
        "▁",
        "-",
        "▁DOG",
        "'S",
        "▁(",
        "OH",
        ")",
        "▁,",
        "▁$",
        "5",
        "▁¿",
        "▁’TIS",
        "▁~",
    ],
    "cjk": ["▁你", "▁好", "▁a", "▁们", "▁", "吗", "▁。", "▁カ", "▁ｶ", "▁한", "▁글", "▁ㄱ", "▁！", "▁５"],
    "first": ["▁'EM", "▁", "'"],
    "bytes": [f"<0x{i:02X}>" for i in "ü你A!".encode()] + ["▁RED"],
    "unknown": ["▁R", "<unk>", "D"],
}


@pytest.mark.parametrize("case", SAID)
@pytest.mark.parametrize("kind", ["ctc", "transducer"])
def test_the_speller_writes_what_sherpa_onnx_writes(kind, case, tmp_path):
    pieces = ["<blk>", "<sos/eos>", "<unk>"]
    if case == "bytes":
        pieces += [f"<0x{i:02X}>" for i in range(256)]
    pieces += [piece for piece in dict.fromkeys(SAID[case]) if piece not in pieces] + ["Ω"]
    ids = [pieces.index(piece) for piece in SAID[case]]
    if kind == "transducer":
        ids = [i for i in ids if i != 2]  # it is the blank there
    speller = getattr(sherpa, f"{kind}_speller")(pieces)
    found = parrot(kind, pieces, ids, tmp_path / "export").transcribe(NOISE_S, 16000)
    assert clean(found.text) == clean(speller(ids))
    if case == "punctuation":  # what this is about
        assert ("TAKE 'EM" in found.text) == (kind == "ctc")


@pytest.mark.parametrize("piece", ["▁ƙ", "ơ", "ƀ"])
def test_letters_are_not_taken_for_bytes(piece, tmp_path):
    pieces = ["<blk>", "<sos/eos>", "<unk>", "▁RED", piece, "é"]
    plain = parrot("ctc", pieces, [3, 4, 3, 5], tmp_path / "plain")
    spelled = "".join(pieces[i] for i in (3, 4, 3, 5)).replace("▁", " ").strip()
    assert plain.transcribe(NOISE_S, 16000).text != spelled, "else sherpa-onnx guesses no more"
    named = parrot("ctc", pieces, [3, 4, 3, 5], tmp_path / "named")
    sherpa.write_tokens(tmp_path / "named")
    assert named.transcribe(NOISE_S, 16000).text == spelled
    before = (tmp_path / "named" / "tokens.txt").read_bytes()
    sherpa.write_tokens(tmp_path / "named")
    assert (tmp_path / "named" / "tokens.txt").read_bytes() == before


@pytest.mark.parametrize("kind", ["ctc", "transducer"])
def test_sherpa_onnx_reads_tokens_that_are_another_models(kind, tmp_path):
    merges = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"], ["Ã", "¼"]]
    symbols = [*byte_symbols(), "Ġthe", "Ã¼"]
    content = {"symbols": symbols, "origin": list(range(258)), "end_of_text": 258, "merges": merges}
    tokens = Tokenizer(ByteBpe(json.dumps(content).encode()))
    ids = tokens.encode("the über 你 a1 the")
    assert {tokens.pieces[i] for i in ids} > {"▁the", "ü", "<0x20>", "<0x61>"}
    assert parrot(kind, tokens.pieces, ids, tmp_path / "export").transcribe(
        NOISE_S, 16000
    ).text == tokens.decode(ids)


# ---------------------------------------------------------------- the gate


def renamed(bundle: Bundle, names: dict[str, str], directory: Path) -> Bundle:
    """The bundle with some pieces called otherwise, as one from elsewhere may call them."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((bundle.path / "spm.model").read_bytes())
    for piece in proto.pieces:
        piece.piece = names.get(piece.piece, piece.piece)
    Bundle.save(directory, bundle.model, Tokenizer(proto.SerializeToString()), bundle.meta)
    return Bundle.load(directory, bundle.registry)


def gate(cls, bundle, utterances, directory, **limits):
    """Export and compare."""
    exporter = cls(cls.Config())
    exporter.export(bundle, directory)
    return check_parity(bundle, exporter, directory, utterances, Parity(**limits))


def test_a_token_that_the_runtime_leaves_out_is_the_cause(trained, tmp_path):
    """Twice in all, within the slack of three tokens; more of them would have been put on the features."""
    bundle = renamed(trained.bundle, {"IND": "SIL"}, tmp_path / "bundle")
    with pytest.raises(ParityError) as caught:
        gate(OnnxCtc, bundle, trained.utterances, tmp_path / "export")
    first, second = caught.value.problems
    assert first.where == "tiny, ctc fp32"
    assert second.where == "tiny, ctc int8"
    assert first.what.startswith("sherpa-onnx writes 2 of 12 texts otherwise than the tokens spell")
    assert "('WSIL' (tokens ▁W SIL) becomes 'W'; it leaves out SIL): 5.56%" in first.what
    assert "0.00% allowed (parity.max_rewritten)" in first.what
    assert "features" not in str(caught.value)
    figures = gate(OnnxCtc, bundle, trained.utterances, tmp_path / "again", max_rewritten=0.2)
    assert 0 < figures["fp32"]["rewritten"] < 0.2
    assert figures["fp32"]["runtime_token_error"] == 0


def test_a_transducers_punctuation_is_rewritten_and_told(all_heads, tmp_path):
    bundle = renamed(all_heads.bundle, {"▁TEA": "▁'EA", "▁TREE": "▁-"}, tmp_path / "bundle")
    spoken = all_heads.utterances[2:3] * 2 + all_heads.utterances[5:6] * 2
    with pytest.raises(ParityError, match=r"rnnt fp32: sherpa-onnx writes \d of 4 texts otherwise") as caught:
        gate(OnnxTransducer, bundle, spoken, tmp_path / "export")
    assert "features" not in str(caught.value)


class Rewrites(OnnxRunner):
    """A runtime with a rule of its own, that nobody foresaw."""

    def transcribe(self, samples_S, sample_rate):
        said = super().transcribe(samples_S, sample_rate)
        return Hypothesis(said.text.replace("RAIN", "RAI N"), said.tokens, said.times_s)


class Mishears(OnnxRunner):
    """Other tokens, with their text: what a near tie does."""

    def transcribe(self, samples_S, sample_rate):
        said = super().transcribe(samples_S, sample_rate)
        return Hypothesis("TEA", [27], [0.0]) if said.text == "BLUE" else said


def runs(runner):
    class Exporter(OnnxCtc):
        def load(self, directory, variant, *, num_threads=1):
            return runner(directory / OnnxCtc.files[variant]["model"])

    return Exporter(Exporter.Config())


def test_a_rule_of_the_runtime_is_no_chance(trained, exports):
    """In a few of many utterances, which no chance and no slack excuses."""
    with pytest.raises(ParityError) as caught:
        check_parity(
            trained.bundle, runs(Rewrites), exports / "float", trained.utterances, Parity(slack=1000)
        )
    assert [problem.where for problem in caught.value.problems] == ["tiny, ctc fp32", "tiny, ctc int8"]
    assert all("'RAIN' (tokens ▁RAIN) becomes 'RAI N'" in problem.what for problem in caught.value.problems)


def test_a_near_tie_is_no_rule_of_the_runtime(trained, exports):
    assert trained.bundle.tokens.pieces[27] == "▁TEA"
    figures = check_parity(trained.bundle, runs(Mishears), exports / "float", trained.utterances)
    assert figures["fp32"]["rewritten"] == figures["int8"]["rewritten"] == 0
    assert figures["fp32"]["runtime_token_error"] > 0
