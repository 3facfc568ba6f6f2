"""Whisper as a teacher says what transformers' own code says, utterance by utterance."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch

from kdrecipe.errors import DataError, MissingExtra, RecipeError
from kdrecipe.interfaces import SAMPLE_RATE, TargetSpec
from kdrecipe.testing.contracts import teacher_contract
from kdrecipe.testing.pretrained import save_whisper
from kdrecipe.testing.teacher_checks import TeacherCase
from kdrecipe_plugins.teachers.whisper import Whisper
from kdrecipe_plugins.teachers.windows import WINDOW_STEP, split_text

CPU = torch.device("cpu")


def installed(package):
    return importlib.util.find_spec(package) is not None


pytestmark = pytest.mark.skipif(
    not installed("transformers"), reason="transformers is not installed (it needs Python 3.11)"
)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("several"), languages=("en", "de"))


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    return save_whisper(tmp_path_factory.mktemp("english"), seed=1)


def whisper(directory, **options):
    teacher = Whisper(Whisper.Config(path=str(directory), **options))
    teacher.load(CPU)
    return teacher


def utterances(lens=(113, 47, 90)):
    return TeacherCase(None, None).batch(lens)


@pytest.fixture(scope="module")
def reference(several, english):
    """transformers' own model, tokeniser and features, for one utterance at a time."""
    import transformers

    def load(directory):
        model = transformers.WhisperForConditionalGeneration.from_pretrained(directory).eval()
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)
        tokenizer = transformers.WhisperTokenizer.from_pretrained(directory)

        def features(batch, row):
            samples = batch.samples_BS[row, : batch.sample_lens_B[row]].numpy()
            return extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features

        return model, tokenizer, features

    return {several: load(several), english: load(english)}


@pytest.mark.parametrize(
    ("model", "options"),
    [("several", {"language": "de"}), ("several", {"batch_size": 2}), ("english", {"beam": 2})],
)
def test_contract(model, options, request):
    options = {"path": str(request.getfixturevalue(model)), **options}
    results = teacher_contract(Whisper, options).results()
    assert [(r.check_id, r.reason) for r in results if r.status != "passed"] == []


@pytest.mark.parametrize(("model", "language"), [("several", "de"), ("several", None), ("english", None)])
def test_hypotheses_are_those_of_generate(model, language, request, reference):
    directory = request.getfixturevalue(model)
    batch = utterances()
    options = {"language": language, "task": "transcribe"} if model == "several" else {}
    model, tokenizer, features = reference[directory]
    start = model.generation_config.decoder_start_token_id
    for row, found in enumerate(whisper(directory, language=language).hypotheses(batch)):
        told = model.generate(
            features(batch, row), return_dict_in_generate=True, output_scores=True, do_sample=False, **options
        )
        num = len(told.scores)
        ids = told.sequences[0, -num:].tolist()
        ended = ids[-1] == model.generation_config.eos_token_id
        assert found.tokens == (ids[:-1] if ended else ids)
        assert len(found.tokens) > 5
        log_probs = [float(s[0].log_softmax(-1)[i]) for s, i in zip(told.scores, ids, strict=True)]
        assert found.avg_log_prob == pytest.approx(sum(log_probs) / num, abs=1e-4)
        assert found.text == " ".join(tokenizer.decode(found.tokens).split())
        first = model(features(batch, row), decoder_input_ids=torch.tensor([[start]])).logits[0, 0].detach()
        silence = tokenizer.convert_tokens_to_ids("<|nospeech|>")
        assert found.no_speech_prob == pytest.approx(float(first.softmax(-1)[silence]), abs=1e-5)


def test_hidden_states_are_those_of_the_encoder(english, reference):
    batch = utterances()
    teacher = whisper(english)
    needs = [spec for spec in teacher.provides() if spec.kind == "hidden"]
    layers = [f"encoder.{i}{x}" for i in range(2) for x in ("", ".q", ".k", ".v")]
    assert [need.tap for need in needs] == [*layers, "encoder.out"]
    targets = teacher.targets(batch, needs)
    model, _, features = reference[english]
    for row, frames in enumerate([57, 24, 45]):  # half of the feature frames, rounded up
        out = model.get_encoder()(features(batch, row), output_hidden_states=True)
        wanted = {"encoder.0": out.hidden_states[1], "encoder.out": out.last_hidden_state}
        layer = model.get_encoder().layers[1]
        keys = layer.self_attn.k_proj(layer.self_attn_layer_norm(out.hidden_states[1]))
        wanted["encoder.1.k"] = keys
        for tap, states in wanted.items():
            hidden = targets.hidden(tap)
            assert hidden.lens_B[row] == frames
            torch.testing.assert_close(
                hidden.values_BTD[row, :frames], states[0, :frames], atol=1e-4, rtol=1e-4
            )
            assert not hidden.values_BTD[row, frames:].any()


def test_token_posteriors_follow_the_text_or_the_hypothesis(several, reference):
    batch = utterances()
    teacher = whisper(several, language="en")
    need = teacher.provides()[-1]
    assert (need.kind, need.tap, need.dim) == ("token_logits", "attention", len(teacher.pieces))
    targets = teacher.targets(batch, [need])
    said = targets.posteriors("attention", "token_logits")
    model, tokenizer, features = reference[several]
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    own = teacher.hypotheses(batch)[1].tokens
    texts = [tokenizer.encode(" one two three", add_special_tokens=False), own]
    for row, text in enumerate(texts):
        assert targets.tokens_BU[row, : targets.token_lens_B[row]].tolist() == text
        ids = torch.tensor([[*tokenizer.convert_tokens_to_ids(prompt), *text]])
        logits = model(features(batch, row), decoder_input_ids=ids).logits[0, len(prompt) - 1 :]
        assert said.lens_B[row] == len(text) + 1
        torch.testing.assert_close(
            said.log_probs_BTK[row, : len(text) + 1], logits.log_softmax(-1), atol=1e-3, rtol=1e-3
        )


def test_long_audio_is_heard_in_windows_that_end_where_it_is_quiet(english):
    batch = utterances((440, 50))  # 4.4 s for a model that hears 2 s
    batch.samples_BS[0, 16 * WINDOW_STEP - 3000 : 41 * WINDOW_STEP] *= 1e-3  # quiet between 0.5 and 1.6 s
    teacher = whisper(english, batch_size=2)
    need = TargetSpec("hidden", "encoder.out")
    targets = teacher.targets(batch, [need, teacher.provides()[-1]])
    hidden = targets.hidden("encoder.out")
    assert hidden.lens_B.tolist() == [220, 25]

    def alone(start, end):
        part = utterances((1,))
        samples = batch.samples_BS[:1, start:end]
        return dataclasses.replace(part, samples_BS=samples, sample_lens_B=torch.tensor([end - start]))

    for cut in range(WINDOW_STEP, 2 * SAMPLE_RATE, WINDOW_STEP):  # the one at which the first window ends
        first = teacher.targets(alone(0, cut), [need]).hidden("encoder.out").values_BTD[0]
        if torch.allclose(first, hidden.values_BTD[0, : len(first)], atol=1e-4):
            break
    assert cut / SAMPLE_RATE == pytest.approx(1.3, abs=0.3)
    assert len(first) == cut // (WINDOW_STEP // 2)
    texts = [hypothesis.text for hypothesis in teacher.hypotheses(batch)]
    assert texts[0].startswith(teacher.hypotheses(alone(0, cut))[0].text)
    assert len(texts[0]) > len(texts[1])
    # along a text that is cut with the audio, only the last window's end is the end
    assert (targets.token_lens_B + 1).tolist() == targets.posteriors(
        "attention", "token_logits"
    ).lens_B.tolist()


@pytest.mark.parametrize(
    ("text", "said", "parts"),
    [
        ("ONE TWO THREE FOUR", ["One, too.", "three four"], ["ONE", "TWO THREE FOUR"]),
        ("ONE TWO", ["", "one two"], ["", "ONE TWO"]),
        ("ONE TWO THREE", ["one two", "", "three"], ["ONE TWO", "", "THREE"]),
        ("ONE", ["nothing of it"], ["ONE"]),
    ],
)
def test_a_text_is_split_by_what_was_heard(text, said, parts):
    assert split_text(text, said) == parts


def test_a_text_that_nobody_can_speak_is_named(english):
    batch = utterances((50,))
    batch.texts = ["a" * 40]
    with pytest.raises(DataError, match="41 of Whisper's tokens in 2 s") as caught:
        whisper(english).targets(batch, [TargetSpec("token_logits", "attention")])
    assert caught.value.problems[0].where == batch.ids[0]


def copy_of(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_what_old_versions_did_not_write(several, tmp_path):
    """Models that were fine-tuned years ago have a generation config without languages and tasks."""
    old = copy_of(several, tmp_path)
    path = old / "generation_config.json"
    kept = json.loads(path.read_text())
    for key in ("lang_to_id", "task_to_id", "no_timestamps_token_id"):
        del kept[key]
    path.write_text(json.dumps(kept))
    (old / "preprocessor_config.json").unlink()
    batch = utterances()
    same = [whisper(directory, language="de").hypotheses(batch) for directory in (old, several)]
    assert same[0] == same[1]


def damage_weights(directory):
    (directory / "model.safetensors").unlink()


def damage_pointer(directory):
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def damage_mels(directory):
    rewrite(directory / "preprocessor_config.json", feature_size=80)


def damage_kind(directory):
    rewrite(directory / "config.json", model_type="wav2vec2")


def damage_tokens(directory):
    (directory / "tokenizer.json").unlink()


def damage_nothing(directory):
    pass


@pytest.mark.parametrize(
    ("damage", "options", "what", "remedy"),
    [
        (damage_weights, {}, "the directory has no weights", "model.safetensors"),
        (damage_pointer, {}, "Git LFS's note", "git lfs pull"),
        (damage_mels, {}, "takes 16 mel bins, its feature extractor gives 80", "copy both from one"),
        (damage_kind, {}, "not a Whisper: its model_type is 'wav2vec2'", "hf_ctc"),
        (damage_tokens, {}, "the tokeniser lacks the tokens that begin a text", "copy tokenizer.json"),
        (damage_nothing, {"language": "fr"}, "does not know the language 'fr'", "de, en"),
        (damage_nothing, {"engine": "faster_whisper"}, "there is no model.bin", "ct2-transformers-converter"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(several, tmp_path, damage, options, what, remedy):
    directory = copy_of(several, tmp_path)
    damage(directory)
    with pytest.raises(RecipeError, match=what) as caught:
        Whisper(Whisper.Config(path=str(directory), **options))
    (problem,) = caught.value.problems
    assert remedy in problem.remedy
    assert str(directory) in problem.where


def test_an_english_model_is_told_no_language(english):
    with pytest.raises(RecipeError, match="knows English only") as caught:
        Whisper(Whisper.Config(path=str(english), language="en"))
    assert caught.value.problems[0].remedy == "leave language out"


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no/where/at/all", "there is no directory no/where/at/all"),
        ("openai/whisper-none", "hub gives no model of that name: no route"),
    ],
)
def test_what_is_not_there(path, what, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nmore of it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(RecipeError, match=what) as caught:
        Whisper(Whisper.Config(path=path))
    assert "directory" in caught.value.problems[0].remedy
    assert caught.value.problems[0].where == ""  # whoever knows the recipe adds its line


def test_a_name_on_the_hub_is_found_in_its_cache(english, monkeypatch):
    import huggingface_hub

    def cached(name, *, local_files_only, **kwargs):
        assert (name, local_files_only) == ("openai/whisper-none", True)
        return str(english)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert Whisper(Whisper.Config(path="openai/whisper-none")).files[0].parent == english


def test_without_transformers_the_command_that_installs_it(english, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a)
    )
    with pytest.raises(MissingExtra, match=r"teacher 'whisper' needs .*'transformers'") as caught:
        Whisper(Whisper.Config(path=str(english)))
    assert "pip install 'kdrecipe[transformers]'" in caught.value.problems[0].remedy


@pytest.mark.skipif(not installed("faster_whisper"), reason="faster-whisper is not installed")
def test_faster_whisper_makes_the_same_hypotheses(several, tmp_path):
    from ctranslate2.converters import TransformersConverter

    directory = copy_of(several, tmp_path)
    converter = TransformersConverter(str(directory), copy_files=["tokenizer.json"])
    converter.convert(str(directory / "ct2"))
    batch = utterances()
    by_both = [whisper(directory, language="de", engine=e) for e in ("transformers", "auto")]
    assert len(by_both[1].files) > len(by_both[0].files)
    slow, fast = (teacher.hypotheses(batch) for teacher in by_both)
    assert [h.tokens for h in slow] == [h.tokens for h in fast]
