"""``sherpa_onnx``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from teacher_toys import AUDIO, CPU, Narrow, batch_of, loaded, make, to_onnx

from kdrecipe.data.tokens import tokens_txt
from kdrecipe.errors import RecipeError
from kdrecipe_plugins.exporters.onnx_ctc import OnnxRunner
from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducerRunner
from kdrecipe_plugins.teachers.own_tokens import CtcTokens
from kdrecipe_plugins.teachers.sherpa_files import check_kind, find_files
from kdrecipe_plugins.teachers.sherpa_folder import SherpaOnnxTeacher


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


def test_what_is_taken_for_byte_level_bpe_is_spelled_by_sherpa_onnx(ctc, tokens, tmp_path):
    (tmp_path / "model.onnx").symlink_to(ctc[1] / "model.onnx")
    (tmp_path / "tokens.txt").write_text(tokens_txt([*tokens.pieces[:-1], "ƙ"]), encoding="utf-8")
    teacher = loaded(make(SherpaOnnxTeacher, {"path": str(tmp_path), "model": "zipformer_ctc"}))
    expected = [OnnxRunner(tmp_path / "model.onnx").transcribe(samples_S, 16000) for samples_S in AUDIO]
    assert [h.text for h in teacher.hypotheses(batch_of(AUDIO))] == [h.text for h in expected]
    assert teacher.runtime.startswith("sherpa-onnx")


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
