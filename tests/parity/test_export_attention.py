"""``onnx_attention``, the program that it ships, and several heads in one model."""

import copy
import json
import shutil
import subprocess
import sys
import wave

import numpy as np
import onnx
import pytest
import soundfile
import torch
import torchaudio
from onnx import numpy_helper

from kdrecipe.cli.bench import bench
from kdrecipe.cli.transcribe import BundleRunner, open_runner, transcribe
from kdrecipe.data.byte_bpe import byte_symbols
from kdrecipe.data.features import extract
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import KdrecipeError, ParityError
from kdrecipe.interfaces import UNK_ID, CompressContext, float_copy
from kdrecipe.measure.parity import check_parity
from kdrecipe.measure.reference import reference
from kdrecipe.measure.runtime import measure_export
from kdrecipe.model.bundle import Bundle
from kdrecipe.recipe.sections import Parity
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.integer_layers import Int8Linear
from kdrecipe_plugins.exporters import attention_runtime
from kdrecipe_plugins.exporters.attention_runtime import (
    Recogniser,
    RecogniserError,
    fbank,
    read_wav,
    resample,
)
from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention, OnnxAttentionRunner
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc
from kdrecipe_plugins.exporters.torchscript import TorchScript

FILES = [f"{part}{infix}.onnx" for infix in ("", ".int8") for part in ("encoder", "decoder")]
FEATURES = {"name": "fbank", "num_mel_bins": 80}


def exporter(**options) -> OnnxAttention:
    return OnnxAttention(OnnxAttention.Config(**options))


def initialisers(path) -> list[np.ndarray]:
    return [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


# ---------------------------------------------------------------- the files


def test_files_and_their_signatures(attentions, all_heads):
    names = sorted(p.name for p in (attentions / "float").iterdir())
    assert names == sorted([*FILES, "tokens.txt", "recognise.py"])
    shapes = {}
    for name in FILES[2:]:
        model = onnx.load(attentions / "float" / name)
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [d.dim_value or d.dim_param for d in dims]
    size = len(all_heads.bundle.tokens)
    assert shapes == {
        "x": ["N", "T", 80],
        "x_lens": ["N"],
        "ctc_log_probs": ["N", "T_out", size],
        "tokens": ["N"],
        "self_keys": [2, "N", 4, "P", 12],
        "self_values": [2, "N", 4, "P", 12],
        "cross_keys": [2, "M", 4, "T_out", 12],
        "cross_values": [2, "M", 4, "T_out", 12],
        "cross_lens": ["M"],
        "log_probs": ["N", size],
        "new_self_keys": [2, "N", 4, "P_new", 12],
        "new_self_values": [2, "N", 4, "P_new", 12],
    }


def test_a_model_without_ctc_has_one_output_less(all_heads, tmp_path):
    bundle = Bundle.load(all_heads.bundle.path, all_heads.bundle.registry)
    del bundle.model.heads["ctc"]
    exporter().export(bundle, tmp_path)
    assert len(onnx.load(tmp_path / "encoder.onnx").graph.output) == 3
    samples_S = all_heads.utterances[0].samples_S
    recogniser = Recogniser.load(tmp_path, "fp32")
    assert recogniser.recognise(samples_S, 16000).text
    assert recogniser.recognise(samples_S, 16000, beam=3).score is not None


def test_int8_files_hold_the_weights_of_an_int8_bundle_exactly(attentions, all_heads):
    stored = {
        w.tobytes()
        for name in FILES[2:]
        for w in initialisers(attentions / "int8" / name)
        if w.dtype == np.int8
    }
    model = all_heads.int8.model
    parts = (model.encoder, model.heads["attention"], model.heads["ctc"])
    layers = [m for part in parts for m in part.modules() if isinstance(m, Int8Linear)]
    assert len(layers) > 20
    for layer in layers:
        assert layer.weight.detach().t().contiguous().numpy().tobytes() in stored


def test_embeddings_are_stored_in_int8_unless_asked_otherwise(attentions, all_heads, tmp_path):
    table = all_heads.bundle.model.heads["attention"].embedding.weight.detach().numpy().tobytes()
    model = copy.deepcopy(all_heads.bundle.model)
    Int8Dynamic(Int8Dynamic.Config(others="float32")).apply(model, CompressContext(lambda: []))
    bundle = Bundle.load(all_heads.int8.path, all_heads.int8.registry)
    bundle.model = model
    exporter().export(bundle, tmp_path)
    for path, in_float in ((attentions / "int8", False), (tmp_path, True)):
        stored = {w.tobytes() for w in initialisers(path / "decoder.int8.onnx")}
        assert (table in stored) == in_float


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("kind", "num"), [("float", 1), ("float", 3), ("int8", 2)])
def test_log_posteriors_along_a_path_equal_torch(attentions, all_heads, kind, num):
    bundle = {"float": all_heads.bundle, "int8": all_heads.int8}[kind]
    model = float_copy(bundle.model)
    features = [extract(u.samples_S, 16000, FEATURES) for u in all_heads.utterances[:num]]
    wanted = [reference(model, "attention", f) for f in features]
    assert any(path.path for path in wanted)
    lens_B = np.array([len(f) for f in features])
    features_BTF = np.full((num, lens_B.max(), 80), 7.0, dtype=np.float32)
    for row, features_TF in zip(features_BTF, features, strict=True):
        row[: len(features_TF)] = features_TF
    runner = exporter().load(attentions / kind, "fp32")
    found = runner.log_probs_along(features_BTF, lens_B, [w.path for w in wanted])
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(b, a.log_probs_MV, atol=2e-4)
    assert [runner.greedy(f) for f in features] == [w.tokens for w in wanted]


def test_what_the_decoder_says_is_what_the_whole_sentence_says(all_heads):
    """The reference goes token by token; teacher forcing sees all at once."""
    from kdrecipe.interfaces import Batch

    model = all_heads.bundle.model
    features_TF = extract(all_heads.utterances[0].samples_S, 16000, FEATURES)
    found = reference(model, "attention", features_TF)
    tokens_BU = torch.tensor([found.tokens])
    features_BTF, lens_B = torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)])
    lengths_B = torch.tensor([len(found.tokens)])
    batch = Batch(["a"], features_BTF, lens_B, tokens_BU, lengths_B, torch.tensor([True]))
    with torch.no_grad():
        logits_BPV = model(features_BTF, lens_B, batch=batch).logits["attention"]
    np.testing.assert_allclose(found.log_probs_MV, logits_BPV[0].log_softmax(-1).numpy(), atol=1e-4)


def test_several_hypotheses_share_the_memory_of_one_utterance(attentions, all_heads):
    recogniser = Recogniser.load(attentions / "float", "fp32")
    features = [extract(u.samples_S, 16000, FEATURES) for u in all_heads.utterances[:1]]
    encoded = recogniser.encode(features[0][None], np.array([len(features[0])]))
    together, _ = recogniser.step(np.array([1, 5, 7]), recogniser.start(3), encoded)
    alone = [recogniser.step(np.array([t]), recogniser.start(1), encoded)[0][0] for t in (1, 5, 7)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_texts_equal_those_of_torch(attentions, all_heads):
    ours = BundleRunner(all_heads.bundle.path, "attention_greedy")
    theirs = exporter().load(attentions / "float", "fp32")
    int8 = exporter().load(attentions / "float", "int8")
    num_words = num_same = 0
    for utterance in all_heads.utterances:
        expected = ours.transcribe(utterance.samples_S, 16000)
        found = theirs.transcribe(utterance.samples_S, 16000)
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        num_same += found.text == int8.transcribe(utterance.samples_S, 16000).text
        num_words += len(found.text.split())
    assert num_words > 10
    assert num_same > len(all_heads.utterances) / 2  # after a near tie a model like this runs astray


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam": 1},
        {"beam": 3, "ctc_weight": 0.0},
        {"beam": 4, "length_bonus": 0.5},
        {"beam": 3, "max_len_ratio": 0.1},
    ],
)
def test_texts_of_the_beam_search_equal_those_of_torch(attentions, all_heads, options):
    bundle = all_heads.bundle
    cls = bundle.registry.get("decoders", "attention_beam")
    decoder = cls(cls.Config(**options), bundle.tokens, 0.04, None)
    recogniser = Recogniser.load(attentions / "float", "fp32")
    for utterance in all_heads.utterances[:6]:
        features_TF = extract(utterance.samples_S, 16000, FEATURES)
        with torch.no_grad():
            out = bundle.model(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
        (expected,) = decoder.decode(bundle.model, out)
        found = recogniser.recognise(utterance.samples_S, 16000, **{"beam": 8, **options})
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        assert found.score == pytest.approx(expected.score, abs=1e-2)


def test_single_bytes_are_spelled_as_tokens_spell_them(tmp_path):
    teacher = tmp_path / "tokenizer.json"
    before = {"type": "ByteLevel", "use_regex": True}
    vocab = {symbol: i for i, symbol in enumerate([*byte_symbols(), "Ġr"])}
    model = {"vocab": vocab, "merges": ["Ġ r"]}
    teacher.write_text(json.dumps({"model": model, "pre_tokenizer": before, "added_tokens": []}))
    tokens = Tokenizer.trimmed(teacher, ["red"], tmp_path)
    for text in ("red", "a red café", "谢谢", "I rode"):
        ids = tokens.encode(text)
        assert attention_runtime._spelled(tokens.pieces[i] for i in ids) == tokens.decode(ids) == text
    halves = [*tokens.encode("é")[1:2], UNK_ID, *tokens.encode("é")[2:]]
    assert attention_runtime._spelled(tokens.pieces[i] for i in halves) == tokens.decode(halves)


def test_parity_of_both_bundles(attentions, all_heads):
    for kind, bundle in (("float", all_heads.bundle), ("int8", all_heads.int8)):
        limits = Parity(max_token_error={"int8": 0.2})  # a handful of tokens
        figures = check_parity(bundle, exporter(), attentions / kind, all_heads.utterances, limits)
        assert figures["fp32"]["max_log_prob_diff"] < 1e-3
        assert figures["fp32"]["runtime_token_error"] < 0.02
        assert 0 < figures["int8"]["kl"] < 0.05


def test_parity_sees_a_decoder_that_is_not_the_bundles(all_heads, tmp_path):
    bundle = Bundle.load(all_heads.bundle.path, all_heads.bundle.registry)
    with torch.no_grad():
        bundle.model.heads["attention"].proj.bias[1] -= 12.0  # sentences that do not end
    exporter().export(bundle, tmp_path)
    with pytest.raises(ParityError) as error:
        check_parity(all_heads.bundle, exporter(), tmp_path, all_heads.utterances)
    text = str(error.value)
    assert "fp32: share of tokens that differ" in text
    assert "divergence, nats per token" in text


# ---------------------------------------------------------------- audio


@pytest.mark.parametrize("num_samples", [400, 1600, 16079, 16080, 48000])
def test_features_are_lhotses(num_samples):
    rng = np.random.default_rng(num_samples)
    samples_S = (0.2 * rng.standard_normal(num_samples)).astype(np.float32)
    samples_S[: num_samples // 3] *= 1e-4
    for num_bins in (80, 40):
        expected_TF = extract(samples_S, 16000, {"name": "fbank", "num_mel_bins": num_bins})
        found_TF = fbank(samples_S, num_bins)
        assert found_TF.shape == expected_TF.shape
        assert np.abs(found_TF - expected_TF).max() < 5e-3  # float32 rounding, where there is hardly sound
        assert np.abs(found_TF - expected_TF).mean() < 1e-5


def test_silence_has_lhotses_floor():
    samples_S = np.zeros(16000, dtype=np.float32)
    np.testing.assert_allclose(fbank(samples_S, 80), extract(samples_S, 16000, FEATURES), atol=1e-5)


@pytest.mark.parametrize("sample_rate", [8000, 22050, 44100, 48000])
def test_resampling_is_torchaudios(sample_rate):
    samples_S = np.random.default_rng(0).standard_normal(5001).astype(np.float32)
    expected_S = torchaudio.functional.resample(torch.from_numpy(samples_S), sample_rate, 16000).numpy()
    np.testing.assert_allclose(resample(samples_S, sample_rate), expected_S, atol=1e-4)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
def test_wav_files_are_read(tmp_path, subtype):
    samples_SC = np.random.default_rng(0).uniform(-0.9, 0.9, (100, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples_SC, 8000, subtype=subtype)
    expected_SC, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    blocks, sample_rate = read_wav(tmp_path / "a.wav")
    assert sample_rate == 8000
    np.testing.assert_allclose(np.concatenate(list(blocks)), expected_SC.mean(1), atol=1e-6)


def test_next_to_no_sound_is_no_text(attentions):
    found = Recogniser.load(attentions / "float").recognise(np.zeros(50, dtype=np.float32), 16000)
    assert (found.text, found.tokens) == ("", [])


# ---------------------------------------------------------------- the program


def run(directory, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", str(directory / "recognise.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


@pytest.fixture
def shipped(attentions, tmp_path):
    return shutil.copytree(attentions / "float", tmp_path / "shipped")


def test_the_directory_runs_by_itself(shipped, attentions, all_heads, tmp_path):
    utterance = all_heads.utterances[0]
    soundfile.write(tmp_path / "a.wav", utterance.samples_S, 16000, subtype="PCM_16")
    samples_S, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    expected = exporter().load(attentions / "float", "fp32").transcribe(samples_S, 16000)
    done = run(shipped, tmp_path / "a.wav", "--variant", "fp32")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'a.wav'}: {expected.text}\n"
    beam = run(shipped, tmp_path / "a.wav", tmp_path / "a.wav", "--beam", 4)
    assert beam.returncode == 0
    assert len(beam.stdout.splitlines()) == 2


def test_the_program_imports_neither_torch_nor_kdrecipe(shipped):
    code = (
        f"import sys; sys.path.insert(0, {str(shipped)!r}); import recognise\n"
        "print([m for m in ('torch', 'lhotse', 'kdrecipe', 'soundfile') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_program_names_what_is_wrong(shipped, tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    (tmp_path / "b.wav").write_text("hello")
    for arguments, message in [
        (["none.wav"], "none.wav: there is no such file"),
        ([tmp_path / "b.wav"], "no WAV file of integers"),
    ]:
        done = run(shipped, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert run(shipped, tmp_path / "a.wav", "--beam", 0).returncode == 2
    (shipped / "decoder.int8.onnx").write_bytes(b"no model")
    done = run(shipped, tmp_path / "a.wav")
    assert "decoder.int8.onnx: onnxruntime can't load the model" in done.stderr
    assert done.returncode == 1


# ---------------------------------------------------------------- around it


def test_measured_by_its_own_program(attentions, all_heads):
    utterances = all_heads.utterances[:4]
    measured = measure_export(OnnxAttention, attentions / "float", "int8", utterances)
    runner = exporter().load(attentions / "float", "int8")
    for utterance in utterances:
        assert measured.texts[utterance.id] == runner.transcribe(utterance.samples_S, 16000).text
    assert measured.size_mb == sum((attentions / "float" / n).stat().st_size for n in FILES[2:]) / 1e6
    assert 10 < measured.baseline_rss_mb < measured.peak_rss_mb < 150
    assert measured.runtime.startswith("onnxruntime")
    assert measured.runtime.endswith("1 thread, int8")


def test_what_measures_it_loads_neither_torch_nor_lhotse():
    code = (
        "import sys, kdrecipe.measure.worker as worker\n"
        f"worker._named({OnnxAttention.runtime.start!r})()\n"
        "print([m for m in ('torch', 'lhotse', 'pydantic', 'sherpa_onnx', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transcribe_and_bench_take_the_export_and_the_bundle(attentions, all_heads, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", all_heads.utterances[0].samples_S, 16000)
    runner, _ = open_runner(attentions / "float")
    assert isinstance(runner, OnnxAttentionRunner)
    assert runner.variant == "int8"
    assert open_runner(attentions / "float" / "decoder.onnx")[0].variant == "fp32"
    (found,) = transcribe(attentions / "float", [tmp_path / "a.wav"], variant="fp32")
    (expected,) = transcribe(all_heads.bundle.path, [tmp_path / "a.wav"], decoder="attention_greedy")
    assert found.text == expected.text
    assert found.text in capsys.readouterr().out
    (first,) = transcribe(all_heads.bundle.path, [tmp_path / "a.wav"])
    assert first.times_s  # its first head is a transducer, which knows when
    with pytest.raises(KdrecipeError, match="nor an export in int8"):
        open_runner(tmp_path, variant="int8")
    rows = bench(all_heads.bundle.path, [tmp_path / "a.wav"])
    assert [row["model"] for row in rows] == ["encoder.onnx +2", "encoder.int8.onnx +2"]


def test_a_decoder_of_another_head_is_refused(trained):
    with pytest.raises(
        KdrecipeError, match=r"searches the head 'attention', the model has ctc\n.*ctc_greedy"
    ):
        BundleRunner(trained.bundle.path, "attention_greedy")


def test_missing_and_damaged_files_are_named(shipped, all_heads):
    (shipped / "encoder.onnx").write_bytes(b"no model")
    with pytest.raises(KdrecipeError, match=r"encoder\.onnx: onnxruntime can't load"):
        exporter().load(shipped, "fp32").transcribe(np.zeros(16000), 16000)
    with pytest.raises(KdrecipeError, match="not an ONNX model"):
        measure_export(OnnxAttention, shipped, "fp32", all_heads.utterances[:1])
    (shipped / "decoder.int8.onnx").unlink()
    with pytest.raises(KdrecipeError, match=r"decoder\.int8\.onnx: there is no such file"):
        exporter().load(shipped, "int8")
    (shipped / "decoder.int8.onnx").write_bytes(b"no model")
    with pytest.raises(KdrecipeError, match="onnxruntime could not run the model"):
        measure_export(OnnxAttention, shipped, "int8", all_heads.utterances[:1])
    with pytest.raises(RecogniserError, match=r"encoder\.onnx: there is no such file"):
        Recogniser.load(shipped.parent, "fp32")


def test_a_model_without_attention_is_refused(trained, tmp_path):
    with pytest.raises(KdrecipeError, match="exports the head 'attention', the model has ctc"):
        exporter().export(trained.bundle, tmp_path)


@pytest.mark.parametrize("cls", [OnnxCtc, TorchScript])
def test_ctc_exports_of_a_model_of_several_heads_hold_encoder_and_ctc_only(all_heads, tmp_path, cls):
    ctc = cls(cls.Config())
    ctc.export(all_heads.bundle, tmp_path)
    model = all_heads.bundle.model
    wanted = sum(p.numel() for part in (model.encoder, model.heads["ctc"]) for p in part.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert whole > 1.3 * wanted
    (path,) = (tmp_path / name for name in ctc.files["fp32"].values())
    assert 4 * wanted < path.stat().st_size < 4 * wanted + 120_000
    figures = check_parity(all_heads.bundle, ctc, tmp_path, all_heads.utterances[:4], variants=["fp32"])
    assert figures["fp32"]["max_log_prob_diff"] < 1e-3
