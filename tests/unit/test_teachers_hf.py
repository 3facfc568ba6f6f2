"""wav2vec 2.0 and its kin as teachers say what transformers' own code says of each utterance alone."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from kdrecipe.cli.main import main
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.testing.contracts import teacher_contract
from kdrecipe.testing.pretrained import CTC_TOKENS, save_wav2vec2
from kdrecipe.testing.teacher_checks import TeacherCase
from kdrecipe_plugins.teachers.hf_ctc import HfCtc
from kdrecipe_plugins.teachers.hf_encoder import HfEncoder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed (it needs Python 3.11)",
)
CPU = torch.device("cpu")
FRAMES = (56, 23, 44)  # (1.13, 0.47, 0.9 s), each convolution without padding


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories by what they are."""
    parent = tmp_path_factory.mktemp("models")
    return {
        "group": save_wav2vec2(parent / "group"),
        "layer": save_wav2vec2(parent / "layer", norm="layer"),
        "wavlm": save_wav2vec2(parent / "wavlm", kind="WavLM", norm="layer", ctc=False),
        "hubert": save_wav2vec2(parent / "hubert", kind="Hubert", ctc=False),
    }


def loaded(cls, directory):
    teacher = cls(cls.Config(path=str(directory)))
    teacher.load(CPU)
    return teacher


def utterances():
    return TeacherCase(None, None).batch()


def alone(model, directory, batch, row, **options):
    """transformers' own model on one utterance, through its own feature extractor."""
    import transformers

    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(directory)
    samples = batch.samples_BS[row, : batch.sample_lens_B[row]].numpy()
    inputs = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, **options)


@pytest.mark.parametrize(
    ("cls", "model"), [(HfCtc, "group"), (HfCtc, "layer"), (HfEncoder, "wavlm"), (HfEncoder, "hubert")]
)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_contract(cls, model, models):
    results = teacher_contract(cls, {"path": str(models[model])}).results()
    assert [(r.check_id, r.reason) for r in results if not r.ok] == []
    assert sum(r.status == "passed" for r in results) >= 10


def test_the_command_checks_a_model_of_the_user_s(models, capsys):
    command = ["plugins", "test", "hf_ctc", "--option"]
    assert main([*command, f"path={models['layer']}"]) == 0
    assert "12 checks, 0 failed" in capsys.readouterr().out
    assert main([*command, "path"]) == 2
    assert "--option path: no value" in capsys.readouterr().err


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_posteriors_and_states_are_the_models_own(norm, models):
    import transformers

    model = transformers.Wav2Vec2ForCTC.from_pretrained(models[norm]).eval()
    teacher = loaded(HfCtc, models[norm])
    batch = utterances()
    targets = teacher.targets(batch, teacher.provides())
    posteriors, first = targets.posteriors(), targets.hidden("encoder.0")
    for row, frames in enumerate(FRAMES):
        out = alone(model, models[norm], batch, row, output_hidden_states=True)
        own = out.logits[0].log_softmax(-1)
        assert posteriors.lens_B[row] == first.lens_B[row] == len(own) == frames
        sentence = own[:, 1:3].logsumexp(-1, keepdim=True)
        wanted = torch.cat([own[:, :1], sentence, own[:, 3:]], -1)
        torch.testing.assert_close(posteriors.log_probs_BTK[row, :frames], wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            first.values_BTD[row, :frames], out.hidden_states[1][0], atol=1e-3, rtol=1e-3
        )


def test_an_encoders_last_states(models):
    import transformers

    model = transformers.HubertModel.from_pretrained(models["hubert"]).eval()
    teacher = loaded(HfEncoder, models["hubert"])
    batch = utterances()
    hidden = teacher.targets(batch, teacher.provides()[-1:]).hidden("encoder.out")
    for row, frames in enumerate(FRAMES):
        own = alone(model, models["hubert"], batch, row).last_hidden_state[0]
        torch.testing.assert_close(hidden.values_BTD[row, :frames], own, atol=1e-3, rtol=1e-3)
    with pytest.raises(DataError, match="recognises nothing"):
        teacher.hypotheses(batch)


def test_hypotheses_are_greedy(models):
    import transformers

    model = transformers.Wav2Vec2ForCTC.from_pretrained(models["group"]).eval()
    teacher = loaded(HfCtc, models["group"])
    batch = utterances()
    for row, found in enumerate(teacher.hypotheses(batch)):
        own = alone(model, models["group"], batch, row).logits[0].log_softmax(-1)
        best = own.argmax(-1).tolist()
        runs = [(i, v) for i, v in enumerate(best) if v and (i == 0 or best[i - 1] != v)]
        names = ["" if v in (1, 2) else CTC_TOKENS[v].replace("|", " ") for _, v in runs]
        assert found.text == " ".join("".join(names).split())
        assert len(found.tokens) > 5
        assert found.times_s == pytest.approx([0.02 * i for i, _ in runs])
        assert found.avg_log_prob < 0
        assert found.score == pytest.approx(float(own.amax(-1).sum()), rel=1e-2)


def test_a_student_with_the_same_pieces_has_the_same_vocabulary(tmp_path):
    tokenizer = Tokenizer.train(["ONE TWO", "TEN SIX"], "char", None, tmp_path / "tokens")
    own = [*tokenizer.pieces[3:], "</s>", "<unk>", "<s>", "<pad>"]  # blank is wherever it was
    words = ["|" if piece == "\u2581" else piece for piece in own]
    teacher = HfCtc(HfCtc.Config(path=str(save_wav2vec2(tmp_path / "model", tokens=words))))
    assert teacher.pieces == tokenizer.pieces
    assert teacher.provides()[0].vocab_id == tokenizer.vocab_id
    teacher.load(CPU)
    batch = utterances()
    plain = teacher.hypotheses(batch)
    assert [h.text for h in plain] == [tokenizer.decode(h.tokens) for h in plain]


def without_head(directory):
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if not name.startswith("lm_head")}
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_head_of_random_numbers_does_not_teach(tmp_path):
    directory = save_wav2vec2(tmp_path / "model")
    without_head(directory)
    with pytest.raises(RecipeError, match=r"the weights lack 2 tensors of the model: lm_head\.bias"):
        loaded(HfCtc, directory)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architectures": ["Wav2Vec2Model"]}, "the model has no CTC head: it is a Wav2Vec2Model"),
        ({"model_type": "whisper"}, "a model of type 'whisper', which teacher 'hf_ctc' does not know"),
        ({"add_adapter": True}, "has an adapter"),
    ],
)
def test_other_models_are_refused(changes, what, tmp_path):
    directory = save_wav2vec2(tmp_path / "model")
    rewrite(directory / "config.json", **changes)
    with pytest.raises(RecipeError, match=what):
        HfCtc(HfCtc.Config(path=str(directory)))


def test_tokens_per_language_and_other_rates_are_refused(tmp_path):
    directory = save_wav2vec2(tmp_path / "model")
    (directory / "vocab.json").write_text('{"eng": {"A": 0}, "deu": {"A": 0}}')
    with pytest.raises(RecipeError, match="a list of tokens per language"):
        HfCtc(HfCtc.Config(path=str(directory)))
    rewrite(directory / "preprocessor_config.json", sampling_rate=8000)
    with pytest.raises(RecipeError, match="hears audio of 8000 Hz"):
        HfEncoder(HfEncoder.Config(path=str(directory)))
