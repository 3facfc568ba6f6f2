"""Whisper's encoder and decoder as parts of our own, on features of our own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kdrecipe.data.features import extract
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import SOS_EOS_ID
from kdrecipe.model.asr import FeatureNorm, build_model
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.targets.live import ModelTeacher
from kdrecipe.testing.corpus import speak
from kdrecipe.testing.models import random_batch
from kdrecipe_plugins.architectures.whisper_encoder import WhisperEncoder, WhisperEncoderOptions
from kdrecipe_plugins.architectures.whisper_features import RANGE, WINDOW, log_mel
from kdrecipe_plugins.teachers import whisper_weights

FEATURES = {"name": "fbank", "num_mel_bins": 80}
START, END = 3, 2  # tokens of the Whisper made here


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    given = {"num_layers": 2, "dim": 16, "num_heads": 2, "dropout": 0.0, **options}
    return WhisperEncoder(WhisperEncoderOptions(**given), 80).eval()


def speech(text, seed=0):
    rng = np.random.default_rng(seed)
    samples_S = 0.3 * speak(text, pitch=rng.uniform(0.95, 1.05), tempo=rng.uniform(0.9, 1.1))
    return (samples_S + 0.003 * rng.standard_normal(len(samples_S))).astype(np.float32)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="pip install transformers (Python 3.11)")


@pytest.fixture(scope="module")
def whisper(transformers, tmp_path_factory):
    """A small Whisper with random weights, and the directory that it is saved in."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=23,
        num_mel_bins=80,
        d_model=24,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_ffn_dim=40,
        max_target_positions=12,
        **{"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START},
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # zeros and ones would hide what is not taken over
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.model.decoder.embed_tokens.weight.data.mul_(10)
    directory = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(directory)
    return model, directory


def taken_over(directory):
    """The model that the directory describes with its weights; features are Whisper's own log-mel values."""
    description = {**whisper_weights.description(directory), "silence_s": 0.0}
    model = build_model(description, input_dim=80, vocab_size=26, registry=load_plugins().registry)
    state = whisper_weights.state_dict(directory)
    own = {k for k in model.state_dict() if k.startswith(("norm.", "encoder.input_map."))}
    assert set(state) == set(model.state_dict()) - own
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.encoder.input_map.weight.copy_(torch.cat([torch.zeros(80, 80), torch.eye(80)], dim=1))
        model.encoder.input_map.bias.zero_()
    return model.eval()


# ---------------------------------------------------------------- what Whisper hears


def test_log_mel_is_that_of_transformers(transformers):
    audio = speech("GO LEFT STOP")
    extractor = transformers.WhisperFeatureExtractor()
    want_TM = extractor(audio, sampling_rate=16000, return_tensors="np")["input_features"][0].T
    found_TM = log_mel(torch.from_numpy(audio), 80)
    assert len(found_TM) == len(extract(audio, 16000, FEATURES))
    np.testing.assert_allclose(found_TM, want_TM[: len(found_TM)], atol=2e-4)


def test_longer_audio_is_heard_in_windows():
    audio = torch.from_numpy(np.concatenate([np.resize(speech("GO"), WINDOW), 0.01 * speech("STOP")]))
    found_TM = log_mel(audio, 80)
    assert len(found_TM) == round(len(audio) / 160)
    torch.testing.assert_close(found_TM[3000:], log_mel(audio[WINDOW:], 80))
    assert found_TM[3000:].max() < found_TM[:3000].max() - 0.5  # each has a largest value of its own


# ---------------------------------------------------------------- the same weights, the same numbers


@torch.no_grad()
def test_encoder_gives_what_transformers_give(whisper):
    theirs, directory = whisper
    features_BMT = torch.randn(2, 80, 3000, generator=torch.Generator().manual_seed(1)).clamp(-0.9, 0.9)
    projected = {}
    for x in "qkv":
        module = getattr(theirs.model.encoder.layers[1].self_attn, f"{x}_proj")
        module.register_forward_hook(lambda m, args, y, x=x: projected.update({x: y}))
    want = theirs.model.encoder(features_BMT, output_hidden_states=True)
    model = taken_over(directory)
    taps = ["encoder.0", "encoder.1", "encoder.1.q", "encoder.1.k", "encoder.1.v"]
    out = model(features_BMT.mT, torch.tensor([3000, 3000]), taps=taps)
    assert out.lens_B.tolist() == [1500, 1500]
    torch.testing.assert_close(out.hidden_BTD, want.last_hidden_state, atol=1e-4, rtol=1e-4)
    for number in (0, 1):
        found = out.taps[f"encoder.{number}"]
        torch.testing.assert_close(found, want.hidden_states[number + 1], atol=1e-4, rtol=1e-4)
    for x, values in projected.items():
        torch.testing.assert_close(out.taps[f"encoder.1.{x}"], values, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoder_gives_what_transformers_give(whisper):
    theirs, directory = whisper
    hidden_BTD = torch.randn(2, 1500, 24, generator=torch.Generator().manual_seed(2))
    text_BU = torch.tensor([[5, 7, 9, 20], [11, 22, 6, 4]])
    start_B1 = torch.full((2, 1), START)
    output = transformers_output(theirs, hidden_BTD, torch.cat([start_B1, text_BU], dim=1))
    head = taken_over(directory).heads["attention"]
    batch = type("Batch", (), {"tokens_BU": text_BU + whisper_weights.NUM_SPECIAL})()
    logits_BPV = head(hidden_BTD, torch.tensor([1500, 1500]), batch)
    torch.testing.assert_close(logits_BPV[..., 3:], output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_BPV[..., SOS_EOS_ID], output[..., END], atol=1e-4, rtol=1e-4)


def transformers_output(theirs, hidden_BTD, tokens_BP):
    decoded = theirs.model.decoder(input_ids=tokens_BP, encoder_hidden_states=hidden_BTD)
    return theirs.proj_out(decoded.last_hidden_state)


def test_pieces_are_as_many_as_the_model_has_and_named_as_in_a_trimmed_list(whisper, tmp_path):
    (tmp_path / "config.json").write_bytes((whisper[1] / "config.json").read_bytes())
    with pytest.raises(RecipeError, match=r"tokenizer.json: it does not hold a tokeniser"):
        whisper_weights.pieces(tmp_path)
    vocab = {"a": 0, "Ġgo": 1, "Ã©t": 4, "Ã": 5}
    content = {"model": {"vocab": vocab}, "added_tokens": [{"id": 2, "content": "<|end|>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = whisper_weights.pieces(tmp_path)
    assert found[:6] == ["<blk>", "<sos/eos>", "<unk>", "<0x61>", "▁go", "<|end|>"]
    assert found[6:9] == ["<3>", "ét", "<0xC3>"]
    assert len(found) == whisper[0].config.vocab_size + whisper_weights.NUM_SPECIAL


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.json: it does not describe a Whisper"),
        ({"d_model": 3}, "KeyError: 'encoder_layers'"),
    ],
)
def test_what_is_no_whisper_is_told(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        whisper_weights.description(tmp_path)


def test_weights_cut_short_are_told(whisper, tmp_path):
    (tmp_path / "config.json").write_bytes((whisper[1] / "config.json").read_bytes())
    with pytest.raises(RecipeError, match=r"model.safetensors: the weights can't be read"):
        whisper_weights.state_dict(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((whisper[1] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(RecipeError, match=r"model.safetensors: the weights can't be read"):
        whisper_weights.state_dict(tmp_path)


# ---------------------------------------------------------------- the fit of the input


@torch.no_grad()
def test_the_fitted_input_is_close_to_what_whisper_hears():
    audio = [speech(text, seed) for seed, text in enumerate(["GO LEFT STOP", "RIGHT GO", "LEFT STOP GO"] * 6)]
    features = [torch.from_numpy(extract(a, 16000, FEATURES)) for a in audio]
    norm = FeatureNorm.from_stats(torch.cat(features).mean(0), torch.cat(features).std(0))
    pairs = [(norm(f[None])[0], torch.from_numpy(a)) for f, a in zip(features, audio, strict=True)]
    model = encoder(num_mels=80)
    assert 0 < model.fit_input(pairs[:-1]) < 0.35
    features_TF, samples_S = pairs[-1]
    found_TM = model._log_mel(features_TF[None], torch.tensor([len(features_TF)]))[0].t()[: len(features_TF)]
    want_TM = log_mel(samples_S, 80)
    assert (found_TM - want_TM).square().mean().sqrt() < 0.4 * want_TM.std(0).square().mean().sqrt()
    assert found_TM.max() - found_TM.min() <= RANGE + 1e-4


# ---------------------------------------------------------------- true lengths


@torch.no_grad()
def test_pooling_takes_the_mean_of_pairs_and_a_last_one_alone():
    features_BTF = torch.randn(2, 22, 80)
    lens_B = torch.tensor([22, 17])  # 11 and 9 frames before pooling
    pooled, fine = encoder(pooling=2), encoder(pooling=1)
    hidden_BTD, out_lens_B = pooled(features_BTF, lens_B)
    want_BTD, fine_lens_B = fine(features_BTF, lens_B)
    assert (out_lens_B.tolist(), fine_lens_B.tolist()) == ([6, 5], [11, 9])
    torch.testing.assert_close(hidden_BTD[0, :5], want_BTD[0, :10].unflatten(0, (5, 2)).mean(1))
    torch.testing.assert_close(hidden_BTD[0, 5], want_BTD[0, 10])
    torch.testing.assert_close(hidden_BTD[1, 4], want_BTD[1, 8])


@torch.no_grad()
def test_silence_follows_every_utterance_and_is_not_given():
    """As if it were in the audio: Whisper's lowest values; frames beyond the utterance's end are cut off."""
    features_BTF, lens_B = torch.randn(2, 40, 80), torch.tensor([40, 29])
    hearing, deaf = encoder(silence_s=0.2, pooling=1), encoder(silence_s=0.0, pooling=1)
    hidden_BTD, out_lens_B = hearing(features_BTF, lens_B)
    assert (out_lens_B.tolist(), hidden_BTD.shape[1]) == ([20, 15], 20)
    for row, length in enumerate(lens_B.tolist()):
        heard = deaf._log_mel(features_BTF[row : row + 1, :length], lens_B[row : row + 1])
        silent = torch.nn.functional.pad(heard, (0, 20), value=float(heard.max()) - RANGE)
        deaf._log_mel = lambda *_, silent=silent: silent
        want_BTD, _ = deaf(torch.zeros(1, length + 20, 80), torch.tensor([length + 20]))
        del deaf._log_mel
        torch.testing.assert_close(hidden_BTD[row, : (length + 1) // 2], want_BTD[0, : (length + 1) // 2])


@torch.no_grad()
def test_positions_have_no_end():
    model = encoder(num_layers=1)
    hidden_BTD, lens_B = model(torch.randn(1, 3300, 80), torch.tensor([3300]))
    assert lens_B.tolist() == [825]
    assert hidden_BTD.isfinite().all()


def test_a_teacher_s_layers_have_the_frames_that_they_declare():
    description = {
        "name": "whisper_encoder",
        "num_layers": 1,
        "dim": 16,
        "num_heads": 2,
        "heads": {"ctc": {}},
    }
    model = build_model(description, input_dim=80, vocab_size=9, registry=load_plugins().registry)
    teacher, batch = ModelTeacher(model), random_batch([41, 30], input_dim=80, vocab_size=9)
    given = {spec.key: spec for spec in teacher.provides()}
    found = teacher.targets(batch, [given["hidden:encoder.0"], given["frame_logits:ctc"]])
    assert found.hidden("encoder.0").lens_B.tolist() == [21, 15]
    assert found.posteriors("ctc").lens_B.tolist() == [11, 8]
