"""Teachers in files: ``sherpa_onnx``, ``onnx``, ``torchscript`` and ``torchaudio``, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchaudio
from torch import Tensor, nn

from kdrecipe.data.features import extract
from kdrecipe.data.tokens import Tokenizer, tokens_txt
from kdrecipe.errors import DataError, KdrecipeError, RecipeError
from kdrecipe.interfaces import Batch, TargetSpec
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.corpus import speak
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc, OnnxRunner
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer, OnnxTransducerRunner
from kdrecipe_plugins.teachers.onnx_file import OnnxTeacher
from kdrecipe_plugins.teachers.own_tokens import CtcTokens
from kdrecipe_plugins.teachers.sherpa_files import check_kind, find_files
from kdrecipe_plugins.teachers.sherpa_folder import SherpaOnnxTeacher
from kdrecipe_plugins.teachers.torchaudio_model import TorchaudioTeacher
from kdrecipe_plugins.teachers.torchscript_file import TorchScriptTeacher

CPU = torch.device("cpu")
FEATURES = {"name": "fbank", "num_mel_bins": 80}
LETTERS = ["|", "A", "B", "<blk>"]  # the blank is not the first
LOGITS = "frame_logits:ctc"


def spoken(*texts: str) -> list[np.ndarray]:
    return [(0.3 * speak(text)).astype(np.float32) for text in texts]


AUDIO = spoken("ONE TWO THREE", "FOUR", "FIVE SIX")


def batch_of(audio: list[np.ndarray], num_padding: int = 0) -> Batch:
    """A batch without labels; features beyond the end are noise, samples zeros."""
    features = [torch.from_numpy(extract(samples_S, 16000, FEATURES)) for samples_S in audio]
    lens, sizes = [len(x) for x in features], [len(x) for x in audio]
    features_BTF = torch.randn(len(audio), max(lens) + num_padding, 80)
    samples_BS = torch.zeros(len(audio), max(sizes) + 160 * num_padding)
    for row, (features_TF, samples_S) in enumerate(zip(features, audio, strict=True)):
        features_BTF[row, : lens[row]] = features_TF
        samples_BS[row, : sizes[row]] = torch.from_numpy(samples_S)
    none = torch.zeros(len(audio), dtype=torch.int64)
    ids = [f"u{i}" for i in range(len(audio))]
    return Batch(
        ids, features_BTF, torch.tensor(lens), none[:, None], none, none.bool(),
        samples_BS=samples_BS, sample_lens_B=torch.tensor(sizes),
    )  # fmt: skip


def loaded(teacher):
    teacher.load(CPU)
    return teacher


# ---------------------------------------------------------------- models


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Tokenizer:
    lines = ["ONE TWO THREE FOUR FIVE SIX SEVEN"]
    return Tokenizer.train(lines, "char", None, tmp_path_factory.mktemp("tokens"))


def exported(exporter, heads: dict, tokens: Tokenizer, directory: Path) -> tuple[Bundle, Path]:
    torch.manual_seed(0)
    registry = load_plugins().registry
    model = {"name": "conformer", "num_layers": 1, "dim": 16, "heads": heads}
    built = build_model(model, input_dim=80, vocab_size=len(tokens), registry=registry).eval()
    meta = {
        "name": "tiny", "kind": "trained", "parent": None, "seed": 0, "model": model,
        "features": FEATURES, "compression": [], "plugin_files": {},
    }  # fmt: skip
    Bundle.save(directory / "bundle", built, tokens, meta)
    bundle = Bundle.load(directory / "bundle", registry)
    exporter(exporter.Config()).export(bundle, directory / "export")
    return bundle, directory / "export"


@pytest.fixture(scope="module")
def ctc(tokens, tmp_path_factory) -> tuple[Bundle, Path]:
    return exported(OnnxCtc, {"ctc": {}}, tokens, tmp_path_factory.mktemp("ctc"))


@pytest.fixture(scope="module")
def transducer(tokens, tmp_path_factory) -> Path:
    heads = {"rnnt": {"predictor_dim": 16, "joiner_dim": 16}}
    return exported(OnnxTransducer, heads, tokens, tmp_path_factory.mktemp("transducer"))[1]


class Toy(nn.Module):
    """Audio to a frame every 0.02 s: logits of four tokens, and three hidden values, which see all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 320, stride=320)
        self.output = nn.Linear(3, 4)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.conv(samples.unsqueeze(1)).transpose(1, 2)
        hidden = hidden - hidden.mean(1, keepdim=True)
        return 20 * self.output(hidden), hidden


class Narrow(nn.Module):
    """Features to a quarter of the frames, of which the front end drops some, as a Zipformer's does."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv1d(80, 8, 5), nn.ReLU(), nn.Conv1d(8, vocab_size, 5, stride=2))

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        found = self.convs(x.transpose(1, 2)).transpose(1, 2)[:, ::2].log_softmax(-1)
        return found, ((x_lens - 7) // 2 + 1) // 2


def to_onnx(module: nn.Module, example: tuple, path: Path, inputs: list[str], outputs: list[str]) -> None:
    axes = {
        name: {0: "N", 1: "T"} if name not in ("x_lens", "lens") else {0: "N"} for name in inputs + outputs
    }
    torch.onnx.export(
        module.eval(), example, str(path), input_names=inputs, output_names=outputs,
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def toy() -> Toy:
    torch.manual_seed(1)
    return Toy().eval()


@pytest.fixture(scope="module")
def toy_files(toy, tmp_path_factory) -> Path:
    """``toy.onnx`` and ``toy.pt`` with their tokens."""
    folder = tmp_path_factory.mktemp("toy")
    to_onnx(toy, (torch.randn(1, 3200),), folder / "toy.onnx", ["samples"], ["logits", "middle"])
    torch.jit.save(torch.jit.script(toy), folder / "toy.pt")
    (folder / "tokens.txt").write_text(tokens_txt(LETTERS), encoding="utf-8")
    return folder


def toy_options(path: Path, logits: str | int = 0, hidden: str | int = 1, **more) -> dict:
    outputs = {
        "frame_logits": {"name": logits, "frame_shift_s": 0.02},
        "hidden": {"middle": {"name": hidden, "dim": 3, "frame_shift_s": 0.02}},
    }
    return {"path": str(path), "input": "audio", "outputs": outputs, **more}


def make(cls, options: dict):
    return cls(cls.Config.model_validate(options))


W2V = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(8, 10, 5), (8, 8, 8), (8, 8, 8)],
    "extractor_conv_bias": False, "encoder_embed_dim": 16, "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 3, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2,
    "encoder_num_heads": 2, "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 16,
    "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0, "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def wav2vec(tmp_path_factory):
    """A model of torchaudio, and the folder of its weights and tokens."""
    torch.manual_seed(2)
    folder, model = tmp_path_factory.mktemp("wav2vec"), torchaudio.models.wav2vec2_model(**W2V, aux_num_out=4)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "tokens.txt").write_text(tokens_txt(["-", "|", "A", "B"]), encoding="utf-8")
    return model.eval(), folder


def w2v_options(folder: Path, **more) -> dict:
    path, tokens = str(folder / "model.pt"), str(folder / "tokens.txt")
    return {"model": "wav2vec2_model", "path": path, "tokens": tokens, "options": W2V, **more}


@pytest.fixture(scope="module")
def teachers(ctc, transducer, toy_files, wav2vec) -> dict:
    features = {"frame_logits": {"name": "log_probs", "frame_shift_s": 0.04}}
    ctc_options = {"path": str(ctc[1] / "model.onnx"), "input": "features", "outputs": features}
    made = {
        "zipformer_ctc": make(SherpaOnnxTeacher, {"path": str(ctc[1]), "model": "zipformer_ctc"}),
        "zipformer_ctc_int8": make(
            SherpaOnnxTeacher, {"path": str(ctc[1]), "model": "zipformer_ctc", "int8": True}
        ),
        "transducer": make(SherpaOnnxTeacher, {"path": str(transducer), "model": "transducer"}),
        "onnx": make(OnnxTeacher, toy_options(toy_files / "toy.onnx", "logits", "middle")),
        "onnx_features": make(OnnxTeacher, {**ctc_options, "lens_output": "log_probs_len"}),
        "torchscript": make(TorchScriptTeacher, toy_options(toy_files / "toy.pt")),
        "torchaudio": make(TorchaudioTeacher, w2v_options(wav2vec[1])),
    }
    return {name: loaded(teacher) for name, teacher in made.items()}


NAMES = (
    "zipformer_ctc", "zipformer_ctc_int8", "transducer", "onnx", "onnx_features", "torchscript", "torchaudio",
)  # fmt: skip

# ---------------------------------------------------------------- what holds of all


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


# ---------------------------------------------------------------- sherpa_onnx


def test_zipformer_ctc_says_what_the_bundle_says(ctc, teachers, tokens):
    bundle, _ = ctc
    teacher, batch = teachers["zipformer_ctc"], batch_of(AUDIO)
    (spec,) = teacher.provides()
    assert (spec.dim, spec.frame_shift_s, spec.vocab_id) == (len(tokens), 0.04, tokens.vocab_id)
    with torch.no_grad():
        out = bundle.model(batch.features_BTF, batch.lens_B)
    found = teacher.targets(batch, [spec]).posteriors()
    assert found.lens_B.tolist() == out.lens_B.tolist(), "as many frames as the student has"
    for row, num in enumerate(found.lens_B.tolist()):
        expected = out.logits["ctc"][row, :num].log_softmax(-1)
        torch.testing.assert_close(found.log_probs_BTK[row, :num], expected, rtol=1e-3, atol=1e-3)


def test_the_added_mark_of_the_export_is_no_other_token(ctc, tokens, tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text(
        tokens.tokens_txt.replace("<sos/eos>", "<sos/eos>…") + "#0 99\n".replace("99", str(len(tokens)))
    )
    assert CtcTokens(path).vocab_id == tokens.vocab_id


def test_texts_and_times_are_those_of_sherpa_onnx(ctc, transducer, teachers):
    runners = {
        "zipformer_ctc": OnnxRunner(ctc[1] / "model.onnx"),
        "zipformer_ctc_int8": OnnxRunner(ctc[1] / "model.int8.onnx"),
        "transducer": OnnxTransducerRunner(transducer, "fp32"),
    }
    for name, runner in runners.items():
        for samples_S, found in zip(AUDIO, teachers[name].hypotheses(batch_of(AUDIO)), strict=True):
            expected = runner.transcribe(samples_S, 16000)
            assert (found.text, found.tokens) == (expected.text, expected.tokens)
            assert found.times_s == pytest.approx(expected.times_s)


def test_long_audio_is_cut_at_a_pause(teachers):
    pause = np.zeros(8000, np.float32)
    long = np.concatenate([np.tile(np.concatenate([*AUDIO, pause]), 9)])
    assert len(long) > 30 * 16000
    (found,) = teachers["transducer"].hypotheses(batch_of([long]))
    assert found.times_s[-1] > 25
    assert found.avg_log_prob < 0


def test_frames_that_the_front_end_drops_are_made_up_for(tokens, tmp_path):
    torch.manual_seed(3)
    example = torch.randn(1, 60, 80), torch.tensor([60])
    names = ["x", "x_lens"], ["log_probs", "lens"]
    to_onnx(Narrow(len(tokens)), example, tmp_path / "model.onnx", *names)
    (tmp_path / "tokens.txt").write_text(tokens.tokens_txt, encoding="utf-8")
    teacher = loaded(make(SherpaOnnxTeacher, {"path": str(tmp_path), "model": "zipformer_ctc"}))
    audio = [AUDIO[0][: 16000 - 160 * cut] for cut in range(5)]
    batch = batch_of(audio)
    found = teacher.targets(batch, teacher.provides()).posteriors()
    assert found.lens_B.tolist() == [-(-num // 4) for num in batch.lens_B.tolist()]


PUBLISHED = [
    ("transducer", ["encoder-epoch-99-avg-1.onnx", "decoder-epoch-99-avg-1.onnx",
                    "joiner-epoch-99-avg-1.onnx", "tokens.txt"],
     ["encoder-epoch-99-avg-1.int8.onnx", "bpe.model", "README.md"]),
    ("whisper", ["tiny.en-encoder.onnx", "tiny.en-decoder.onnx", "tiny.en-tokens.txt"],
     ["tiny.en-encoder.int8.onnx", "tiny.en-decoder.int8.onnx"]),
    ("moonshine", ["preprocess.onnx", "encode.int8.onnx", "uncached_decode.int8.onnx",
                   "cached_decode.int8.onnx", "tokens.txt"], []),
    ("moonshine_v2", ["encoder_model.ort", "decoder_model_merged.ort", "tokens.txt"], []),
    ("sense_voice", ["model.onnx", "tokens.txt"], ["model.int8.onnx"]),
    ("paraformer", ["model.int8.onnx", "tokens.txt"], []),
    ("wenet_ctc", ["model.onnx", "tokens.txt"], ["model-streaming.onnx"]),
    ("telespeech_ctc", ["ctc.int8.onnx", "tokens.txt"], []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "files", "beside"), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_files_are_found_by_published_names(tmp_path, kind, files, beside):
    for name in files + beside:
        (tmp_path / name).touch()
    parts = check_kind(kind, {})
    found = find_files(tmp_path, parts, {}, int8=False)
    assert sorted(p.name for p in found.values()) == sorted(files)
    assert list(found) == parts
    if kind == "moonshine":
        assert found["cached_decoder"].name == "cached_decode.int8.onnx"
    if kind == "transducer":
        assert find_files(tmp_path, parts, {}, int8=True)["encoder"].name == beside[0]
        assert find_files(tmp_path, parts, {"joiner": "bpe.model"}, int8=False)["joiner"].name == "bpe.model"


def sherpa(folder: Path, **options):
    return make(SherpaOnnxTeacher, {"path": str(folder), "model": "zipformer_ctc", **options})


def test_what_is_wrong_with_a_folder_is_named(ctc, transducer, tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        sherpa(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"no kind 'zipformer_ct'\n.*did you mean 'zipformer_ctc'"):
        sherpa(ctc[1], model="zipformer_ct")
    with pytest.raises(RecipeError, match=r"from_whisper has no option 'langage'\n.*'language'"):
        sherpa(ctc[1], model="whisper", options={"langage": "de"})
    with pytest.raises(RecipeError) as error:
        sherpa(ctc[1], model="transducer")
    assert [p.what.split()[1] for p in error.value.problems] == ["encoder", "decoder", "joiner"]
    with pytest.raises(RecipeError, match=r"it is no zipformer_ctc: its inputs are encoder_out, decoder_out"):
        sherpa(transducer, files={"model": "joiner.onnx"})
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).touch()
    with pytest.raises(RecipeError, match=r"several files may be its model: a\.onnx, b\.onnx"):
        sherpa(tmp_path)
    with pytest.raises(RecipeError, match="its tokens is missing"):
        sherpa(tmp_path, files={"model": "a.onnx"})


@pytest.mark.parametrize(("kind", "graph"), [("zipformer_ctc", "model"), ("transducer", "joiner")])
def test_tokens_of_another_model_are_refused(ctc, transducer, tokens, tmp_path, kind, graph):
    folder = ctc[1] if kind == "zipformer_ctc" else transducer
    for path in folder.glob("*.onnx"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokens.txt").write_text(tokens_txt(tokens.pieces[:-1]), encoding="utf-8")
    with pytest.raises(RecipeError, match=f"lists {len(tokens) - 1} tokens.*{len(tokens)} classes"):
        sherpa(tmp_path, model=kind)


def test_a_model_of_another_kind_does_not_end_the_process(ctc):
    teacher = sherpa(ctc[1], model="paraformer")
    with pytest.raises(RecipeError, match=r"can't run it as 'paraformer'.*lfr_window_size"):
        teacher.load(CPU)


# ---------------------------------------------------------------- onnx and torchscript


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_outputs_are_those_of_the_model_with_the_blank_first(teachers, toy, name):
    teacher = teachers[name]
    found = teacher.targets(batch_of(AUDIO), teacher.provides())
    with torch.no_grad():
        logits, hidden = toy(torch.from_numpy(AUDIO[0])[None])
    num = logits.shape[1]
    expected = logits[0].log_softmax(-1)[:, [3, 0, 1, 2]]
    torch.testing.assert_close(found.posteriors().log_probs_BTK[0, :num], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.hidden("middle").values_BTD[0, :num], hidden[0], rtol=1e-4, atol=1e-5)
    assert teacher.frames.tokens.pieces == ["<blk>", "|", "A", "B"]


def test_posteriors_are_not_taken_for_logits(toy_files):
    own = CtcTokens(toy_files / "tokens.txt")
    logits = torch.randn(5, 4)
    expected = logits.log_softmax(-1)[:, [3, 0, 1, 2]]
    for values in (logits, logits.log_softmax(-1), logits.softmax(-1)):
        torch.testing.assert_close(own.log_probs(values), expected)


def test_the_best_path_is_spelled(toy_files):
    own = CtcTokens(toy_files / "tokens.txt")
    path = [1, 1, 0, 1, 2, 0, 0, 3]  # by ids with the blank first: | | . | A . . B
    log_probs = nn.functional.one_hot(torch.tensor(path), 4).float().mul(9).log_softmax(-1)
    found = own.hypothesis(log_probs, 0.02)
    assert (found.text, found.tokens) == ("AB", [1, 1, 2, 3])
    assert found.times_s == [0.0, 0.06, 0.08, 0.14]
    assert found.avg_log_prob == pytest.approx(float(log_probs.max()), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"logits": "logit"}, r"outputs.frame_logits.name: .*no output 'logit'\n.*did you mean 'logits'"),
        ({"hidden": 7}, r"outputs.hidden.middle.name: .*no output 7\n.*logits, middle"),
        ({"input_name": "sample"}, r"input_name: .*no input 'sample'\n.*did you mean 'samples'"),
        ({"lens_output": "lens"}, r"lens_output: .*no output 'lens'"),
        ({"input": "features"}, r"input: .*'samples' has 2 axes, features has \(batch, frames, mel bins\)"),
    ],
)
def test_what_an_onnx_file_contradicts_is_an_error_at_once(toy_files, change, what):
    options = {"logits": "logits", "hidden": "middle", **change}
    with pytest.raises(RecipeError, match=what) as error:
        make(OnnxTeacher, toy_options(toy_files / "toy.onnx", **options))
    assert "toy.onnx" in str(error.value)


def test_dimensions_of_an_onnx_file_must_be_as_declared(toy_files, ctc, tokens, tmp_path):
    options = toy_options(toy_files / "toy.onnx", "logits", "middle")
    options["outputs"]["hidden"]["middle"]["dim"] = 5
    with pytest.raises(RecipeError, match=r"outputs.hidden.middle.dim: .*3 classes, not 5"):
        make(OnnxTeacher, options)
    (tmp_path / "few.txt").write_text(tokens_txt(LETTERS[1:]), encoding="utf-8")
    options = toy_options(toy_files / "toy.onnx", "logits", "middle")
    options["outputs"]["frame_logits"]["tokens"] = str(tmp_path / "few.txt")
    with pytest.raises(RecipeError, match=r"outputs.frame_logits.tokens: .*4 classes, .*few.txt lists 3"):
        make(OnnxTeacher, options)
    outputs = {"frame_logits": {"name": "log_probs", "frame_shift_s": 0.04}}
    options = {"path": str(ctc[1] / "model.onnx"), "input": "features", "outputs": outputs}
    with pytest.raises(RecipeError, match=r"num_mel_bins: .*takes 80 mel bins, not 40"):
        make(OnnxTeacher, {**options, "num_mel_bins": 40})


def test_features_of_another_recipe_are_refused(teachers):
    batch = batch_of(AUDIO[:1])
    batch.features_BTF = batch.features_BTF[..., :40]
    assert teachers["onnx_features"].num_mel_bins == 80
    with pytest.raises(RecipeError, match="takes 80 mel bins, the recipe's features have 40"):
        teachers["onnx_features"].hypotheses(batch)


@pytest.mark.parametrize(("cls", "name"), [(OnnxTeacher, "toy.onnx"), (TorchScriptTeacher, "toy.pt")])
def test_a_wrong_frame_shift_shows_when_it_is_loaded(toy_files, cls, name):
    options = toy_options(toy_files / name)
    options["outputs"]["frame_logits"]["frame_shift_s"] = 0.04
    with pytest.raises(RecipeError, match=r"200 frames of 4 s, that is one every 0.02 s, not every 0.04 s"):
        make(cls, options).load(CPU)


@pytest.mark.parametrize(("cls", "name"), [(OnnxTeacher, "toy.onnx"), (TorchScriptTeacher, "toy.pt")])
def test_files_must_be_there_and_whole(toy_files, tmp_path, cls, name):
    with pytest.raises(RecipeError, match=f"{name}: there is no such file"):
        make(cls, toy_options(tmp_path / name))
    (tmp_path / name).write_bytes((toy_files / name).read_bytes())
    with pytest.raises(RecipeError, match=r"tokens.txt: there is no such file of tokens"):
        make(cls, toy_options(tmp_path / name))
    (tmp_path / "tokens.txt").write_text("A\nB\n")
    with pytest.raises(RecipeError, match=r"tokens.txt: no list of tokens"):
        make(cls, toy_options(tmp_path / name))
    (tmp_path / "tokens.txt").write_text(tokens_txt(["A", "B", "C", "D"]))
    with pytest.raises(RecipeError, match=r"no token is called as a blank is .*\n.*set blank"):
        make(cls, toy_options(tmp_path / name))
    (tmp_path / name).write_bytes((toy_files / name).read_bytes()[:500])
    (tmp_path / "tokens.txt").write_text(tokens_txt(LETTERS))
    with pytest.raises(RecipeError, match=f"{name}: not an? (ONNX|TorchScript) file"):
        make(cls, toy_options(tmp_path / name))


def test_torchscript_of_other_dimensions_shows_when_it_is_loaded(toy_files):
    options = toy_options(toy_files / "toy.pt", logits=1, hidden=0)
    with pytest.raises(RecipeError, match=r"its posteriors are 200 x 3, not frames x 4"):
        make(TorchScriptTeacher, options).load(CPU)
    with pytest.raises(RecipeError, match=r"outputs.frame_logits.name: the file has no output 'x'"):
        make(TorchScriptTeacher, toy_options(toy_files / "toy.pt", logits="x")).load(CPU)


def test_hidden_states_alone_recognise_nothing(toy_files):
    options = toy_options(toy_files / "toy.onnx", "logits", "middle")
    del options["outputs"]["frame_logits"]
    teacher = loaded(make(OnnxTeacher, options))
    assert [spec.key for spec in teacher.provides()] == ["hidden:middle"]
    with pytest.raises(DataError, match=r"onnx toy.onnx recognises nothing"):
        teacher.hypotheses(batch_of(AUDIO))


def test_audio_is_normalised_where_asked(toy_files):
    options = toy_options(toy_files / "toy.onnx", "logits", "middle", normalise=True)
    teacher = loaded(make(OnnxTeacher, options))
    loud, soft = (teacher.targets(batch_of([x * AUDIO[0]]), teacher.provides()) for x in (1.0, 0.5))
    torch.testing.assert_close(
        loud.hidden("middle").values_BTD, soft.hidden("middle").values_BTD, rtol=1e-3, atol=1e-3
    )


# ---------------------------------------------------------------- torchaudio


def test_torchaudio_gives_layers_and_posteriors(wav2vec, teachers):
    model, _ = wav2vec
    teacher = teachers["torchaudio"]
    assert [spec.key for spec in teacher.provides()] == [LOGITS, "hidden:encoder.0", "hidden:encoder.1"]
    found = teacher.targets(batch_of(AUDIO[:1]), teacher.provides())
    with torch.no_grad():
        layers, _ = model.extract_features(torch.from_numpy(AUDIO[0])[None])
        logits, _ = model(torch.from_numpy(AUDIO[0])[None])
    torch.testing.assert_close(found.hidden("encoder.0").values_BTD, layers[0])
    torch.testing.assert_close(found.hidden("encoder.1").values_BTD, layers[1])
    torch.testing.assert_close(found.posteriors().log_probs_BTK, logits.log_softmax(-1))


def test_weights_of_an_older_torch_are_read(wav2vec, tmp_path):
    model, folder = wav2vec
    news = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = model.state_dict()
    for new, old in news.items():
        weights = {name.replace(new, old): weight for name, weight in weights.items()}
    assert any(name.endswith("weight_g") for name in weights)
    torch.save(weights, tmp_path / "model.pt")
    (tmp_path / "tokens.txt").write_bytes((folder / "tokens.txt").read_bytes())
    teacher = loaded(make(TorchaudioTeacher, w2v_options(tmp_path)))
    assert teacher.num_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": "wav2vec2_bse"}, r"no model 'wav2vec2_bse'.*\n.*did you mean 'wav2vec2_base'"),
        ({"model": "wav2vec2_base", "options": {}}, r"no weights of wav2vec2_base: the file lacks .* more"),
        ({"options": {**W2V, "encoder_num_layers": 1}}, r"the model has no encoder.transformer.layers.1"),
        ({"options": {**W2V, "encoder_ff_interm_features": 8}}, r"another shape of encoder.transformer"),
        ({"options": {**W2V, "encoder_layers": 1}}, r"no argument 'encoder_layers'"),
        ({"tokens": None}, r"output layer has 4 tokens, and tokens names no list"),
    ],
)  # fmt: skip
def test_torchaudio_names_what_does_not_fit(wav2vec, change, what):
    with pytest.raises(RecipeError, match=what):
        make(TorchaudioTeacher, w2v_options(wav2vec[1], **change))


def test_torchaudio_refuses_other_files(wav2vec, tmp_path):
    _, folder = wav2vec
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(tokens_txt(["-", "A"]))
    with pytest.raises(RecipeError, match=r"tokens.txt: it lists 2 tokens, the model has 4 outputs"):
        make(TorchaudioTeacher, w2v_options(folder, tokens=str(tokens)))
    for content in (b"no weights", json.dumps({}).encode()):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(KdrecipeError, match=r"model.pt: torch can't load it"):
            make(TorchaudioTeacher, w2v_options(tmp_path))
    torch.save({"model": {}}, tmp_path / "model.pt")
    with pytest.raises(RecipeError, match=r"no state dict"):
        make(TorchaudioTeacher, w2v_options(tmp_path))
