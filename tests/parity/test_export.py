"""Exports in the runtimes they are for: onnxruntime, sherpa-onnx, libtorch."""

import shutil
import warnings
import zipfile

import numpy as np
import onnx
import pytest
import soundfile
import torch
from onnx import helper, numpy_helper

from kdrecipe.cli.main import main
from kdrecipe.errors import KdrecipeError, ParityError
from kdrecipe.interfaces import float_copy
from kdrecipe.measure.edits import Edits, edits
from kdrecipe.measure.parity import check_parity
from kdrecipe.model.bundle import Bundle
from kdrecipe.recipe.sections import Parity
from kdrecipe_plugins.compressors.integer_layers import Int8Linear
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc, OnnxRunner
from kdrecipe_plugins.exporters.onnx_graph import halve, slim
from kdrecipe_plugins.exporters.torchscript import TorchScript


def exporter(**options) -> OnnxCtc:
    return OnnxCtc(OnnxCtc.Config(**options))


def random_batch(num: int, num_frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lens_B = np.array([num_frames, *rng.integers(1, num_frames + 1, num - 1)])
    return (rng.standard_normal((num, num_frames, 80)) * 4 - 8).astype(np.float32), lens_B


def expected_of(model, features_BTF, lens_B) -> list[np.ndarray]:
    with torch.no_grad():
        out = model(torch.from_numpy(features_BTF), torch.from_numpy(lens_B))
    log_probs_BTV = out.logits["ctc"].log_softmax(-1).numpy()
    return [row[:length] for row, length in zip(log_probs_BTV, out.lens_B, strict=True)]


def found_of(runner, features_BTF, lens_B) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(*runner.log_probs(features_BTF, lens_B), strict=True)]


def bytes_of_weights(path) -> int:
    """Bytes of a TorchScript file's tensors, without its code, which holds the paths of its sources."""
    with zipfile.ZipFile(path) as archive:
        return sum(i.file_size for i in archive.infolist() if i.filename.split("/")[1] == "data")


def initialisers(path) -> list[np.ndarray]:
    return [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_signature_is_the_one_of_sherpa_onnx(exports, trained, name):
    graph = onnx.load(exports / "float" / name).graph
    (x, x_lens), (log_probs, lens) = graph.input, graph.output
    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in (x, x_lens, log_probs, lens)
    }
    assert shapes == {
        "x": ["N", "T", 80],
        "x_lens": ["N"],
        "log_probs": ["N", "T_out", len(trained.bundle.tokens)],
        "log_probs_len": ["N"],
    }
    types = [v.type.tensor_type.elem_type for v in (x, x_lens, log_probs, lens)]
    assert types == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64] * 2


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_files_use_standard_operators_of_an_old_opset(exports, name):
    model = onnx.load(exports / "float" / name)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.ir_version <= 8
    assert {p.key: p.value for p in model.metadata_props}["vocab_size"].isdigit()


def test_int8_file_is_a_third_of_the_fp32_file_even_if_small(exports):
    for kind in ("float", "int8"):
        fp32, int8 = ((exports / kind / n).stat().st_size for n in ("model.onnx", "model.int8.onnx"))
        assert int8 < fp32 / 3


def test_int8_file_of_an_int8_bundle_holds_its_weights_exactly(exports, trained):
    stored = {w.tobytes() for w in initialisers(exports / "int8" / "model.int8.onnx") if w.dtype == np.int8}
    layers = [m for m in trained.int8.model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 10
    for layer in layers:
        assert layer.weight.detach().t().contiguous().numpy().tobytes() in stored


def test_layers_that_an_int8_bundle_keeps_in_float_stay_so(exports, trained, tmp_path):
    bundle = Bundle.load(trained.int8.path, trained.int8.registry)
    head = bundle.model.heads["ctc"].proj.to_float()
    bundle.model.heads["ctc"].proj = head
    exporter().export(bundle, tmp_path)
    weight_IO = head.weight.detach().t().contiguous().numpy()
    kept = [w for w in initialisers(tmp_path / "model.int8.onnx") if w.dtype == np.float32 and w.ndim == 2]
    assert [w.tobytes() for w in kept if w.shape == weight_IO.shape] == [weight_IO.tobytes()]


def test_export_says_nothing_on_the_terminal(trained, tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exporter().export(trained.bundle, tmp_path / "onnx")
        TorchScript(TorchScript.Config()).export(trained.bundle, tmp_path / "torch")
        TorchScript(TorchScript.Config()).load(tmp_path / "torch", "fp32")
    assert [str(w.message) for w in caught] == []
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(("num", "num_frames"), [(1, 1), (1, 50), (3, 333), (2, 1601)])
def test_onnx_fp32_equals_torch_for_any_batch_and_length(exports, trained, num, num_frames):
    features_BTF, lens_B = random_batch(num, num_frames)
    runner = exporter().load(exports / "float", "fp32")
    expected = expected_of(trained.bundle.model, features_BTF, lens_B)
    for a, b in zip(expected, found_of(runner, features_BTF, lens_B), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_onnx_int8_is_near_torch(exports, trained, kind):
    bundle = {"float": trained.bundle, "int8": trained.int8}[kind]
    features_BTF, lens_B = random_batch(1, 400)
    (expected,) = expected_of(bundle.model, features_BTF, lens_B)
    (found,) = found_of(exporter().load(exports / kind, "int8"), features_BTF, lens_B)
    # what an int8 bundle scores is what its file computes, but for roundings at a tie
    assert (np.exp(expected) * (expected - found)).sum(-1).mean() < {"float": 5e-3, "int8": 1e-4}[kind]
    (fp32,) = found_of(exporter().load(exports / kind, "fp32"), features_BTF, lens_B)
    assert np.abs(fp32 - found).max() > 1e-4  # it does compute in int8


def test_sherpa_onnx_recognises_what_the_bundle_does_and_when(exports, trained):
    from kdrecipe.cli.transcribe import BundleRunner

    torch_runner = BundleRunner(trained.bundle.path)
    runners = [exporter().load(exports / "float", v) for v in ("fp32", "int8")]
    num_words = 0
    for utterance in trained.utterances[:6]:
        expected = torch_runner.transcribe(utterance.samples_S, 16000)
        num_words += len(expected.text.split())
        found = runners[0].transcribe(utterance.samples_S, 16000)
        assert (found.text, found.tokens) == (expected.text, expected.tokens)
        assert found.times_s == pytest.approx(expected.times_s, abs=1e-4)
        int8 = runners[1].transcribe(utterance.samples_S, 16000)
        assert edits(expected.tokens, int8.tokens).errors <= 1
    assert num_words > 6


def test_exports_without_utterances_of_16_khz_resample(exports, trained):
    utterance = trained.utterances[0]
    runner = exporter().load(exports / "float", "fp32")
    twice = np.repeat(utterance.samples_S, 2)  # 32 kHz, with images above 8 kHz that resampling removes
    assert (
        edits(
            runner.transcribe(utterance.samples_S, 16000).tokens, runner.transcribe(twice, 32000).tokens
        ).rate
        < 0.5
    )


def test_torchscript_of_float_and_int8_bundles(trained, tmp_path):
    scripts = TorchScript(TorchScript.Config())
    assert scripts.export(trained.bundle, tmp_path / "float") == {"fp32": ["model.pt", "tokens.txt"]}
    assert list(scripts.export(trained.int8, tmp_path / "int8")) == ["fp32", "int8"]
    features_BTF, lens_B = random_batch(3, 200)
    for model, kind, variant in [
        (trained.bundle.model, "float", "fp32"),
        (float_copy(trained.int8.model), "int8", "fp32"),
        (trained.int8.model, "int8", "int8"),
    ]:
        runner = scripts.load(tmp_path / kind, variant)
        expected = expected_of(model, features_BTF, lens_B)
        for a, b in zip(expected, found_of(runner, features_BTF, lens_B), strict=True):
            np.testing.assert_allclose(b, a, atol=1e-4)
    sizes = [bytes_of_weights(tmp_path / "int8" / n) for n in ("model.pt", "model.int8.pt")]
    assert sizes[1] < sizes[0] * 0.4
    figures = check_parity(
        trained.int8, scripts, tmp_path / "int8", trained.utterances[:3], variants=["fp32", "int8"]
    )
    assert figures["int8"]["kl"] < 1e-6


# ---------------------------------------------------------------- mistakes


def test_a_model_with_another_frame_rate_is_refused(trained, tmp_path):
    bundle = Bundle(
        trained.bundle.path, {**trained.bundle.meta, "frame_shift_s": 0.08}, trained.bundle.registry
    )
    with pytest.raises(KdrecipeError, match=r"every 0.08 s.*\n.*torchscript"):
        exporter().export(bundle, tmp_path)


@pytest.mark.parametrize("cls", [OnnxCtc, TorchScript])
def test_a_model_without_ctc_is_refused(trained, tmp_path, cls):
    bundle = Bundle.load(trained.bundle.path, trained.bundle.registry)
    bundle.model.heads["other"] = bundle.model.heads.pop("ctc")
    with pytest.raises(KdrecipeError, match="the model has other"):
        cls(cls.Config()).export(bundle, tmp_path)


def test_missing_and_damaged_files_are_named(exports, trained, tmp_path):
    with pytest.raises(KdrecipeError, match=r"model\.onnx: there is no such file"):
        exporter().load(tmp_path, "fp32")
    shutil.copy(exports / "float" / "tokens.txt", tmp_path)
    for name in ("model.onnx", "model.pt"):
        (tmp_path / name).write_bytes(b"no model")
    with pytest.raises(KdrecipeError, match=r"model\.onnx: onnxruntime can't load"):
        exporter().load(tmp_path, "fp32").transcribe(np.zeros(1600), 16000)
    with pytest.raises(KdrecipeError, match=r"model\.pt: torch can't load"):
        TorchScript(TorchScript.Config()).load(tmp_path, "fp32")


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize(
    "kind", ["onnx_ctc", "torchscript", "onnx_transducer", "onnx_attention", "sherpa_attention"]
)
@pytest.mark.parametrize("kept", ["lines", "half a line", "nothing"])
def test_a_list_of_tokens_that_was_cut_short_is_named(
    exports, transducers, attentions, sherpa_attentions, trained, tmp_path, capsys, kind, kept
):
    copy = tmp_path / "copy"
    if kind == "torchscript":
        TorchScript(TorchScript.Config()).export(trained.bundle, copy)
    else:
        made = {"onnx_ctc": exports, "onnx_transducer": transducers, "onnx_attention": attentions}
        shutil.copytree(made.get(kind, sherpa_attentions) / "float", copy)
    text = (copy / "tokens.txt").read_text()
    lines = "".join(text.splitlines(keepends=True)[:6])
    (copy / "tokens.txt").write_text({"lines": lines, "half a line": lines[:-3]}.get(kept, ""))
    audio = tmp_path / "a.wav"
    soundfile.write(audio, trained.utterances[0].samples_S, 16000)
    commands = [["transcribe", copy, audio]]
    if kind != "torchscript":  # which nothing measures
        commands.append(["bench", copy, audio])
    for command in commands:
        assert main([str(word) for word in command]) == 2
        said = capsys.readouterr().err
        assert "tokens.txt" in said
        assert "lists 6 tokens" in said or "no list of tokens" in said
        assert len(said.splitlines()) < 5


def test_parity_gives_figures(exports, trained):
    figures = check_parity(
        trained.int8, exporter(), exports / "int8", trained.utterances, variants=["fp32", "int8"]
    )
    assert figures["num_utterances"] == len(trained.utterances)
    assert figures["fp32"]["max_log_prob_diff"] < 1e-3
    assert 0 < figures["int8"]["kl"] < 0.01
    assert figures["int8"]["max_log_prob_diff"] > figures["int8"]["mean_log_prob_diff"] > 0
    assert 0 < figures["bundle"]["wer"] < 0.8


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_log_prob_diff": 1e-9}, r"tiny, ctc fp32: largest difference.*parity.max_log_prob_diff"),
        ({"max_kl": {"int8": 1e-9}}, r"tiny, ctc int8: divergence.*parity.max_kl"),
    ],
)
def test_parity_names_the_bound_that_breaks(exports, trained, limit, message):
    with pytest.raises(ParityError, match=message):
        check_parity(trained.bundle, exporter(), exports / "float", trained.utterances[:2], Parity(**limit))


def sabotaged(exports, trained, tmp_path, change) -> dict:
    """Parity of an export whose model is not the bundle's."""
    bundle = Bundle.load(trained.bundle.path, trained.bundle.registry)
    with torch.no_grad():
        change(bundle.model)
    exporter().export(bundle, tmp_path)
    return check_parity(trained.bundle, exporter(), tmp_path, trained.utterances)


def test_parity_sees_an_export_that_leaves_words_out(exports, trained, tmp_path):
    def favour_blanks(model):
        model.heads["ctc"].proj.bias[0] += 8.0

    with pytest.raises(ParityError) as error:
        sabotaged(exports, trained, tmp_path, favour_blanks)
    broken = {p.what.rpartition("parity.")[2].rstrip(")") for p in error.value.problems}
    assert broken == {
        "max_log_prob_diff", "max_kl", "max_token_error", "max_wer_increase", "max_deletion_increase",
    }  # fmt: skip


def test_parity_sees_nan(exports, trained, tmp_path):
    def spoil(model):
        model.heads["ctc"].proj.bias[5] = float("nan")

    with pytest.raises(ParityError, match="largest difference of log-probabilities: nan"):
        sabotaged(exports, trained, tmp_path, spoil)


def test_parity_sees_other_features_in_the_runtime(exports, trained):
    class Quiet(OnnxRunner):
        """Its features are off by a constant."""

        def transcribe(self, samples_S, sample_rate):
            return super().transcribe(samples_S / 32768, sample_rate)

    class Exporter(OnnxCtc):
        def load(self, directory, variant, *, num_threads=1):
            return Quiet(directory / "model.onnx")

    with pytest.raises(ParityError, match="share of tokens that the runtime changes"):
        check_parity(
            trained.bundle,
            Exporter(Exporter.Config()),
            exports / "float",
            trained.utterances,
            variants=["fp32"],
        )


def test_parity_needs_utterances(exports, trained):
    with pytest.raises(ParityError, match="no utterance"):
        check_parity(trained.bundle, exporter(), exports / "float", [])


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c", "a b c", (0, 0, 0)),
        ("a b c", "a c", (0, 1, 0)),
        ("a b c", "a x c d", (1, 0, 1)),
        ("a b", "", (0, 2, 0)),
        ("", "a", (0, 0, 1)),
        ("a b c d", "b c d e", (0, 1, 1)),
    ],
)
def test_edits(reference, hypothesis, expected):
    found = edits(reference.split(), hypothesis.split())
    assert found == Edits(*expected, length=len(reference.split()))


# ---------------------------------------------------------------- graphs


def test_slim_and_halve_keep_graphs_with_branches():
    """Names within ``If`` refer to tensors outside; shortened, they must still."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    then = helper.make_graph(
        [helper.make_node("Add", ["product", "one"], ["then_out"])],
        "then", [], [helper.make_tensor_value_info("then_out", 1, None)],
    )  # fmt: skip
    otherwise = helper.make_graph(
        [helper.make_node("Sub", ["product", "one"], ["else_out"])],
        "else", [], [helper.make_tensor_value_info("else_out", 1, None)],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"], name="a long name"),
            helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 4]), helper.make_tensor_value_info("flag", 9, [])],
        [helper.make_tensor_value_info("y", 1, ["N", 3])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.float32([1.0]), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    import onnxruntime

    small = slim(model)
    x = rng.standard_normal((5, 4)).astype(np.float32)
    for candidate, tolerance in [(small, 1e-6), (halve(small), 0.01)]:
        session = onnxruntime.InferenceSession(
            candidate.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for flag, shift in [(True, 1.0), (False, -1.0)]:
            (y,) = session.run(None, {"x": x, "flag": np.array(flag)})
            np.testing.assert_allclose(y, x @ weight + shift, atol=tolerance)


def test_an_increase_is_held_against_an_export_only_beyond_chance():
    from kdrecipe.measure.parity import _beyond_chance

    assert _beyond_chance([1, 1, 1], 3) == 0, "within the slack"
    assert _beyond_chance([1] * 10, 3) == 10, "one-sided"
    assert _beyond_chance([4, -3, 5, -4, 3, 2], 3) == 0, "as often better as worse"
    assert _beyond_chance([-1] * 10, 3) == 0, "better"
    assert _beyond_chance([], 3) == 0
