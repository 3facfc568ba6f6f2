"""``torchaudio``."""

from __future__ import annotations

import json

import pytest
import torch
from teacher_toys import AUDIO, LOGITS, W2V, batch_of, loaded, make, w2v_options

from kdrecipe.data.tokens import tokens_txt
from kdrecipe.errors import KdrecipeError, RecipeError
from kdrecipe_plugins.teachers.torchaudio_model import TorchaudioTeacher


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
