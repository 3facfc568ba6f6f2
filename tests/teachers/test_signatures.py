"""``onnx`` and ``torchscript``: files with a declared signature."""

from __future__ import annotations

import pytest
import torch
from teacher_toys import AUDIO, CPU, LETTERS, batch_of, loaded, make, toy_options
from torch import nn

from kdrecipe.data.tokens import tokens_txt
from kdrecipe.errors import DataError, RecipeError
from kdrecipe_plugins.teachers.onnx_file import OnnxTeacher
from kdrecipe_plugins.teachers.own_tokens import CtcTokens
from kdrecipe_plugins.teachers.torchscript_file import TorchScriptTeacher


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
