"""A language model in a search: exact where that can be counted out; in a recipe, stage and checks."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from lhotse.supervision import SupervisionSegment, SupervisionSet
from test_decoders import Letters, enumerate_texts, one_hot, output_of, random_log_probs

from kdrecipe.artifacts import write_json
from kdrecipe.data.ngram import BOS, NgramModel, estimate, load_lm
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import KdrecipeError, MissingExtra, RecipeError
from kdrecipe.lattice.ctc import prefix_beam_search
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages import lm as stage
from kdrecipe.stages import needed
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.run import build_plan
from kdrecipe_plugins.decoders.ctc_prefix_beam import CtcPrefixBeam
from kdrecipe_plugins.decoders.fusion import Fusion


class LongMemory:
    """A language model that forgets nothing: every text has random probabilities of its own."""

    def __init__(self, size, seed=0):
        self.size, self.seed = size, seed
        self.asked = []

    def _log_probs(self, state):
        rng = np.random.default_rng([self.seed, len(state), *state])
        return np.log(rng.dirichlet(np.ones(self.size)))  # the blank's place is the end's

    def start(self):
        return ()

    def score(self, state, token):
        self.asked.append((*state, token))
        return float(self._log_probs(state)[token]), (*state, token)

    def end(self, state):
        return float(self._log_probs(state)[0])


def fused(log_probs_TV, lm, lm_weight, length_bonus):
    """Every text's score, by summing over every path and asking the model token by token."""
    result = {}
    for text, log_prob in enumerate_texts(log_probs_TV).items():
        state, said = lm.start(), 0.0
        for token in text:
            score, state = lm.score(state, token)
            said += score
        result[text] = log_prob + lm_weight * (said + lm.end(state)) + length_bonus * len(text)
    return result


@pytest.mark.parametrize(("lm_weight", "length_bonus"), [(0.5, 0.0), (1.0, 0.7), (3.0, -0.4), (0.0, 1.5)])
@pytest.mark.parametrize(("num_frames", "size", "seed"), [(1, 3, 0), (4, 3, 1), (5, 4, 2), (6, 3, 3)])
def test_unpruned_fusion_is_exact(num_frames, size, seed, lm_weight, length_bonus):
    log_probs_TV = random_log_probs(num_frames, size, seed)
    lm = LongMemory(size, seed)
    expected = fused(log_probs_TV, lm, lm_weight, length_bonus)
    found = prefix_beam_search(log_probs_TV, 10_000, size, Fusion(lm, lm_weight, length_bonus))
    assert dict(found) == pytest.approx(expected)
    assert found[0][0] == max(expected, key=expected.get)


def test_an_n_gram_is_fused_exactly(tmp_path):
    pytest.importorskip("kenlm")
    lines = [
        "".join(line) for n in range(1, 5) for line in itertools.product("ab", repeat=n) if "bb" not in line
    ]
    estimate(lines, 3, vocabulary="abc").write_arpa(tmp_path / "a.arpa")
    lm = NgramModel(tmp_path / "a.arpa", ["<blk>", "a", "b", "c"])
    log_probs_TV = random_log_probs(6, 4, seed=0)
    found = prefix_beam_search(log_probs_TV, 10_000, 4, Fusion(lm, 0.8, 0.5))
    assert dict(found) == pytest.approx(fused(log_probs_TV, lm, 0.8, 0.5))


def test_each_extension_is_asked_for_once():
    lm = LongMemory(6)
    prefix_beam_search(random_log_probs(30, 6, seed=0), 8, 5, Fusion(lm, 0.5))
    assert lm.asked
    assert len(set(lm.asked)) == len(lm.asked)


def test_pruning_only_lowers_the_score():
    log_probs_TV, fusion = random_log_probs(7, 4, seed=5), Fusion(LongMemory(4), 0.6, 0.3)
    wide = dict(prefix_beam_search(log_probs_TV, 10_000, 4, fusion))
    for beam, num_tokens in [(1, 1), (2, 2), (8, 2)]:
        for text, score in prefix_beam_search(log_probs_TV, beam, num_tokens, fusion):
            assert score <= wide[text] + 1e-9


def test_a_bonus_makes_texts_longer():
    log_probs_TV = random_log_probs(12, 5, seed=1)
    lengths = [
        len(prefix_beam_search(log_probs_TV, 50, 4, Fusion(length_bonus=b))[0][0]) for b in (-9, -1, 0, 1, 9)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


class Prefers:
    """One token is ten times as probable as the others, and so is the end."""

    def __init__(self, token):
        self.token = token

    def start(self):
        return ()

    def score(self, state, token):
        return (-0.1 if token == self.token else -2.4), state

    def end(self, state):
        return -0.1


def test_the_model_decides_where_the_audio_does_not():
    logits_BTV = one_hot([[0, 1, 0, 2, 0]])
    logits_BTV[0, 1, 2] = logits_BTV[0, 1, 1] + 0.2  # b a little before a
    out = output_of(logits_BTV, [5])
    for token, text in ((1, "ab"), (2, "bb")):
        cls = CtcPrefixBeam
        decoder = cls(cls.Config(lm_weight=0.5), Letters(4), 0.04, Prefers(token))
        [found] = decoder.decode(torch.nn.Identity(), out)
        assert (found.text, found.times_s) == (text, pytest.approx([0.04, 0.12]))


def test_without_a_weight_there_is_no_model_to_ask():
    config, out = CtcPrefixBeam.Config(), output_of(torch.randn(1, 9, 5), [9])
    lm = LongMemory(5)
    built = [
        CtcPrefixBeam(config, Letters(5), 0.04),
        CtcPrefixBeam(config, Letters(5), 0.04, None),
        CtcPrefixBeam(config, Letters(5), 0.04, lm),
    ]
    found = [decoder.decode(torch.nn.Identity(), out)[0] for decoder in built]
    assert found[0] == found[1] == found[2]
    assert not lm.asked


def test_a_weight_without_a_model_is_refused():
    with pytest.raises(RecipeError, match="no language model"):
        CtcPrefixBeam(CtcPrefixBeam.Config(lm_weight=0.1), Letters(4), 0.04)


# ---------------------------------------------------------------- stage 2


RECIPE = """\
corpus: {name: manifests, root: /none, subsets: {few: {utterances: 1}}}
tokens: {name: char}
systems:
  only: {train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
decode:
  decoders:
    beam: {name: ctc_prefix_beam, lm_weight: 0.3}
"""


@pytest.fixture
def load(tmp_path):
    def load_text(lm="lm: {name: ngram}\n", recipe=RECIPE):
        (tmp_path / "recipe.yaml").write_text(recipe + lm, encoding="utf-8")
        return load_recipe(tmp_path)

    return load_text


def problems(load, *args):
    with pytest.raises(RecipeError) as error:
        load(*args)
    return [str(p).replace("\n    -> ", " | ") for p in error.value.problems]


def write_split(directory, split, texts):
    segments = [
        SupervisionSegment(f"{split}{i}", f"{split}{i}", 0.0, 1.0, text=t) for i, t in enumerate(texts)
    ]
    SupervisionSet.from_segments(segments).to_file(directory / f"{split}_supervisions.jsonl.gz")


TRAIN = ["the cat sat", "the dog sat", "a cat ran", "the dog ran", "the cat ran"]


@pytest.fixture
def layout(tmp_path):
    made = Layout(tmp_path / "exp")
    made.manifests.mkdir(parents=True)
    write_split(made.manifests, "train", [*TRAIN, ""])
    write_split(made.manifests, "dev", ["the cat sat", "a fox ran"])
    write_split(made.manifests, "test", ["quite other words"])
    Tokenizer.train([*TRAIN, "fx"], "char", None, made.tokens)
    # subsets name copies at other speeds as well
    write_json(made.features / "subsets.json", {"few": ["train0", "train0_sp0.9", "train2", "train2_sp0.9"]})
    return made


def made_by(recipe, layout, tmp_path):
    stage.run(recipe, layout, tmp_path / "lm")
    return json.loads((tmp_path / "lm" / "lm.json").read_text())


def test_the_models_are_made_of_the_training_transcripts(load, layout, tmp_path, capsys):
    facts = made_by(load(), layout, tmp_path)
    assert (facts["sentences"], facts["words"]) == (5, 15)
    assert facts["tokens"] == sum(len(t) + 1 for t in TRAIN), (
        "a mark of the word for every space and the start"
    )
    assert (facts["dev_words"], facts["dev_words_out_of_vocabulary"]) == (6, 1)
    assert 1 < facts["dev_perplexity"] < 12
    assert f"perplexity {facts['dev_perplexity']:.2f}" in capsys.readouterr().out
    words = (tmp_path / "lm" / "words.arpa").read_text()
    assert f"{BOS} the cat" in words
    assert "other" not in words
    tokens = (tmp_path / "lm" / "tokens.arpa").read_text(encoding="utf-8")
    assert "\tt h e\t" in tokens
    assert "\tx\t" in tokens, "in no sentence, but a token"
    assert "<blk>" not in tokens


def test_of_a_subset_each_utterance_counts_once(load, layout, tmp_path):
    assert made_by(load("lm: {name: ngram, data: few}\n"), layout, tmp_path)["sentences"] == 2


def test_of_a_text_file(load, layout, tmp_path):
    (tmp_path / "lm.txt").write_text("one sentence\n\nanother\n", encoding="utf-8")
    facts = made_by(load("lm: {name: ngram, text: lm.txt}\n"), layout, tmp_path)
    assert (facts["sentences"], facts["words"]) == (2, 3)
    (tmp_path / "lm.txt").write_bytes(b"\xff\n")
    with pytest.raises(KdrecipeError, match="not UTF-8"):
        made_by(load("lm: {name: ngram, text: lm.txt}\n"), layout, tmp_path)


def test_without_a_dev_split(load, layout, tmp_path):
    (layout.manifests / "dev_supervisions.jsonl.gz").unlink()
    assert made_by(load(), layout, tmp_path)["dev_perplexity"] is None


def test_the_model_is_loaded_for_the_recipe_s_tokens_only(load, layout):
    pytest.importorskip("kenlm")
    stage.run(load(), layout, layout.lm)
    tokenizer = Tokenizer.load(layout.tokens)
    lm = load_lm(layout.lm, tokenizer, tokenizer.pieces)
    assert lm.score(lm.start(), tokenizer.pieces.index("▁"))[0] > -0.5
    with pytest.raises(KdrecipeError, match="the bundle has others"):
        load_lm(layout.lm, Letters(), tokenizer.pieces)


def test_the_job_and_its_inputs(load, tmp_path, monkeypatch):
    monkeypatch.setattr(needed, "find_spec", lambda name: name)
    (tmp_path / "lm.txt").write_text("one\n", encoding="utf-8")
    plan = partial(build_plan, layout=Layout(tmp_path / "exp"))
    job = plan(load("lm: {name: ngram, text: lm.txt}\n")).jobs["lm"]
    assert (job.stage, set(job.needs)) == (2, {"prepare", "features", "tokens"})
    (tmp_path / "lm.txt").write_text("two\n", encoding="utf-8")
    assert plan(load("lm: {name: ngram, text: lm.txt}\n")).jobs["lm"].inputs != job.inputs
    assert "lm" in plan(load()).jobs["decode/only/seed1"].needs
    jobs = plan(load("", RECIPE.replace("0.3", "0.0"))).jobs
    assert "lm" not in jobs
    assert "lm" not in jobs["decode/only/seed1"].needs


# ---------------------------------------------------------------- mistakes, found before any work


@pytest.mark.parametrize(
    ("lm", "what"),
    [
        (
            "",
            "recipe.yaml:7: decode.decoders.beam.lm_weight: is 0.3, the recipe has no language model | add ",
        ),
        (
            "lm: {name: ngram, data: fw}\n",
            "recipe.yaml:8: lm.data: unknown subset 'fw' | did you mean 'few'?",
        ),
        ("lm: {name: ngram, data: few, text: a.txt}\n", "lm: data and text exclude each other"),
        ("lm: {name: ngram, text: a.txt}\n", "recipe.yaml:8: lm.text: there is no file "),
        ("lm: {name: ngram, order: 7}\n", "recipe.yaml:8: lm.order: is 7"),
        ("lm: {name: ngram, word_order: 1}\n", "lm.word_order: is 1"),
        ("lm: {name: lstm}\n", "lm.name: is 'lstm'"),
        ("lm: {name: ngram, ordr: 3}\n", "lm.ordr: unknown key | did you mean 'order'?"),
        ("lm: 3\n", "lm: is 3, it must be a mapping"),
    ],
)
def test_mistakes_have_their_line(load, tmp_path, monkeypatch, lm, what):
    monkeypatch.chdir(tmp_path)
    [found] = problems(load, lm)
    assert what in found.replace(f"{tmp_path}/", "")


def test_a_variable_that_is_not_set_stops_the_run_not_the_check(load, tmp_path, monkeypatch):
    monkeypatch.delenv("KDRECIPE_TEST_TEXT", raising=False)
    recipe = load('lm: {name: ngram, text: "${KDRECIPE_TEST_TEXT}"}\n')
    with pytest.raises(RecipeError, match="KDRECIPE_TEST_TEXT"):
        build_plan(recipe, Layout(tmp_path / "exp"))


def test_kenlm_is_asked_for_before_any_work(load, tmp_path, monkeypatch):
    monkeypatch.setattr(needed, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"recipe.yaml:7.*kenlm.*\n.*pip install kenlm"):
        build_plan(load(), Layout(tmp_path / "exp"))
    build_plan(load(recipe=RECIPE.replace("0.3", "0.0")), Layout(tmp_path / "exp"))
