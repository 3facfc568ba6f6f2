"""The plugin k2 without k2: its errors, and the parts that do not need it."""

import itertools
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrecipe.data.ngram import UNK, escape, estimate
from kdrecipe.errors import DataError, KdrecipeError, MissingExtra, RecipeError
from kdrecipe.model.heads.rnnt import RnntLoss
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.testing.contracts import test_plugin as check_plugin
from kdrecipe.testing.decode_checks import LetterTokens
from kdrecipe.testing.models import loss_setup
from kdrecipe_plugins.k2.arpa import grammar_arcs, read_arpa, unescape, vocabulary
from kdrecipe_plugins.k2.hlg import K2Hlg
from kdrecipe_plugins.k2.lexicon import disambiguate, lexicon_arcs, spell
from kdrecipe_plugins.k2.rnnt import K2Rnnt

RECIPE = """\
corpus: {name: an4, root: "${KDRECIPE_TEST_ROOT}"}
tokens: {name: bpe, vocab_size: 64}
systems:
  plain: {train: {model: &model {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}, rnnt: {}}}}}
  fast:
    train:
      model: *model
      losses: [{name: LOSS, range: 3}]
decode:
  decoders:
    greedy: {name: ctc_greedy}
    graph: {name: DECODER}
"""


@pytest.fixture
def absent(monkeypatch):
    """As if k2 were not installed."""
    monkeypatch.setitem(sys.modules, "k2", None)


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A k2 that can't be imported."""
    (tmp_path / "k2").mkdir()
    (tmp_path / "k2" / "__init__.py").write_text('raise OSError("undefined symbol:\\n _ZN3c10")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "k2", raising=False)


def build(name):
    return K2Rnnt(K2Rnnt.Config(), loss_setup()) if name == "k2_rnnt" else K2Hlg(K2Hlg.Config(), None, 0.04)


# ---------------------------------------------------------------- k2 is not there


def test_the_plugin_loads_without_k2(absent):
    plugins = load_plugins(env={"KDRECIPE_PLUGINS": "k2"})
    assert plugins.broken == {}
    assert plugins.registry.names("decoders") == ["k2_hlg"]
    assert "k2_rnnt" in plugins.registry.names("losses")


@pytest.mark.parametrize(("name", "instead"), [("k2_rnnt", "rnnt"), ("k2_hlg", "ctc_prefix_beam")])
def test_what_needs_k2_says_so(absent, name, instead):
    with pytest.raises(MissingExtra) as caught:
        build(name)
    (problem,) = caught.value.problems
    assert problem.what == f"{name} needs the package 'k2', which is not installed"
    assert "https://k2-fsa.github.io/k2" in problem.remedy
    assert problem.remedy.endswith(f"or use {{name: {instead}}}")


@pytest.mark.parametrize("name", ["k2_rnnt", "k2_hlg"])
def test_a_k2_for_another_torch_says_what_is_wrong_with_it(broken, name):
    with pytest.raises(
        KdrecipeError, match=rf"{name} .* can't be imported: OSError: undefined symbol: _ZN3c10\n"
    ):
        build(name)


@pytest.mark.parametrize(
    ("loss", "decoder", "line", "what"),
    [
        ("k2_rnnt", "ctc_prefix_beam", 8, "k2_rnnt needs the package 'k2'"),
        ("rnnt", "k2_hlg, lm_weight: 0.0", 12, "k2_hlg needs the package 'k2'"),
    ],
)
def test_a_recipe_that_needs_it_is_refused_with_its_line(absent, tmp_path, loss, decoder, line, what):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("LOSS", loss).replace("DECODER", decoder))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert problem.where.endswith(f"recipe.yaml:{line}")
    assert what in problem.what
    assert "https://k2-fsa.github.io/k2" in problem.remedy


def test_a_recipe_that_does_not_name_it_does_not_need_it(absent, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("LOSS", "rnnt").replace("DECODER", "ctc_prefix_beam"))
    assert load_recipe(path).systems["fast"].terms[0].options["range"] == 3


@pytest.mark.parametrize(("kind", "name"), [("losses", "k2_rnnt"), ("decoders", "k2_hlg")])
def test_the_contract_is_skipped_with_the_reason(absent, kind, name):
    results = check_plugin(load_plugins().registry, kind, name)
    assert all(r.ok for r in results)
    assert any(r.status == "skipped" and "'k2', which is not installed" in r.reason for r in results)


def test_its_options_are_those_of_rnnt():
    ours, theirs = K2Rnnt.Config.model_fields, RnntLoss.Config.model_fields
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].annotation == theirs[name].annotation, name
        assert ours[name].default == theirs[name].default, name
        assert ours[name].metadata == theirs[name].metadata, name


# ---------------------------------------------------------------- grammar


def path_score(arcs, labels, backoff_id, *, always=False):
    """The highest score of the paths that spell ``labels`` and end.

    They back off where no arc has the next label; with ``always`` they may do so anywhere, as k2's do.
    """
    leaving = {}
    for arc in arcs:
        leaving.setdefault(arc.source, {})[arc.label] = arc

    def follow(state, left):
        label, rest = (left[0], left[1:]) if left else (-1, ())
        scores = [-math.inf]
        if arc := leaving[state].get(label):
            scores.append(arc.score + (follow(arc.target, rest) if left else 0.0))
        if (always or len(scores) == 1) and (arc := leaving[state].get(backoff_id)):
            scores.append(arc.score + follow(arc.target, left))
        return max(scores)

    return follow(0, tuple(labels))


SENTENCES = st.lists(st.lists(st.sampled_from("abcd"), max_size=5), min_size=1, max_size=12)


@given(SENTENCES, st.integers(1, 4), st.sampled_from([0.5, 1.0]))
def test_sentences_have_the_n_grams_probability_in_the_grammar(tmp_path_factory, sentences, order, weight):
    ngram = estimate(sentences, order, vocabulary="abcd")
    path = tmp_path_factory.mktemp("lm") / "words.arpa"
    ngram.write_arpa(path)
    ngrams = read_arpa(path)
    ids = {word: number for number, word in enumerate(vocabulary(ngrams), start=1)}
    assert list(ids) == list("abcd")
    arcs = grammar_arcs(ngrams, ids, backoff_id=9, weight=weight)
    for text in ("", "a", "dd", "abc", "bdacb"):
        want = weight * ngram.log_probs([text]).sum()
        labels = [ids[c] for c in text]
        assert path_score(arcs, labels, 9) == pytest.approx(want, abs=1e-4)
        assert path_score(arcs, labels, 9, always=True) >= want - 1e-4


@given(SENTENCES)
def test_every_state_of_the_grammar_is_left_and_the_last_one_never(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("lm") / "words.arpa"
    estimate(sentences, 3).write_arpa(path)
    arcs = grammar_arcs(read_arpa(path), {"a": 1, "b": 2}, backoff_id=3, weight=1.0)
    final = max(arc.target for arc in arcs)
    assert {arc.source for arc in arcs} == set(range(final))
    assert {arc.label for arc in arcs if arc.target == final} == {-1}
    assert {arc.label for arc in arcs} <= {-1, 1, 2, 3}, "words that are not listed do not occur"


def test_a_pruned_n_gram_backs_off_to_what_there_is(tmp_path):
    path = tmp_path / "words.arpa"
    path.write_text(
        "\\data\\\nngram 1=4\nngram 2=2\nngram 3=1\n\n\\1-grams:\n-99\t<s>\t-0.3\n-1\t</s>\n-0.5\ta\t-0.2\n"
        "-0.7\tb\n\n\\2-grams:\n-0.1\t<s> a\t-0.4\n-0.6\ta b\n\n\\3-grams:\n-0.05\t<s> a b\n\n\\end\\\n"
    )
    ngrams = read_arpa(path)
    arcs = grammar_arcs(ngrams, {"a": 1, "b": 2}, backoff_id=3, weight=1.0)
    for labels, log10 in [
        ((1, 2), -0.1 - 0.05 - 1),
        ((1, 1), -0.1 - 0.4 - 0.2 - 0.5 - 0.2 - 1),
        ((), -0.3 - 1),
    ]:
        assert path_score(arcs, labels, 3) == pytest.approx(log10 * math.log(10))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "no such n-gram"),
        ("words\n", "not an n-gram in ARPA format"),
        ("\\1-grams:\n-1\ta\n", "or one without </s>"),
        ("\\1-grams:\n-1\t</s>\nhigh\ta\n", r"words.arpa:3: not a line of 1-grams: 'high\\ta'"),
        ("\\1-grams:\n-1\t</s>\n\\2-grams:\n-1\ta\n", "words.arpa:4: not a line of 2-grams"),
        (b"\xff\xfe\x00", "not an n-gram in ARPA format"),
    ],
)
def test_other_files_are_refused(tmp_path, text, what):
    path = tmp_path / "words.arpa"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=what):
        read_arpa(path)


@given(
    st.text(min_size=1).filter(
        lambda word: len(word.split()) == 1 == len(f"{word}.".split()) and "\0" not in word
    )
)
def test_words_come_back_from_the_file_as_they_were(word):
    if not any(c.isspace() for c in word) and word != UNK:
        assert unescape(escape(word)) == word


# ---------------------------------------------------------------- lexicon

SPELLINGS = st.dictionaries(
    st.text("xyz", min_size=1, max_size=4),
    st.lists(st.integers(3, 5), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=10,
)


@given(SPELLINGS)
def test_no_spelling_is_the_beginning_of_another(spellings):
    told_apart = disambiguate(spellings, first_id=10)
    for (a, one), (b, other) in itertools.permutations(told_apart.items(), 2):
        assert one != other[: len(one)], (a, b)
    for word, spelling in told_apart.items():
        assert tuple(t for t in spelling if t < 10) == spellings[word]
    assert all(t < 10 for s in told_apart.values() for t in s[:-1]), "symbols stand at the end only"


def test_words_that_need_no_symbol_get_none():
    spellings = {"on": (3, 4), "one": (3, 4, 5), "won": (3, 4), "two": (6,)}
    expected = {"on": (3, 4, 10), "one": (3, 4, 5), "won": (3, 4, 11), "two": (6,)}
    assert disambiguate(spellings, 10) == expected


@given(SPELLINGS, st.data())
def test_the_lexicon_turns_spellings_into_words(spellings, data):
    ids = {word: number for number, word in enumerate(spellings, start=1)}
    told_apart = disambiguate(spellings, first_id=10)
    arcs = lexicon_arcs(told_apart, ids, backoff=(9, 99))
    words = data.draw(st.lists(st.sampled_from(list(ids)), max_size=4))
    states, outputs = {0: [[]]}, []
    for token in [t for word in words for t in (9, *told_apart[word])]:
        after = {}
        for arc in arcs:
            if arc.label == token and arc.source in states:
                said = [[*before, arc.word] if arc.word else before for before in states[arc.source]]
                after.setdefault(arc.target, []).extend(said)
        states = after
    outputs = [said for said in states.get(0, [])]
    assert outputs == [[x for word in words for x in (99, ids[word])]]


def test_words_that_the_tokens_cannot_spell_are_left_out():
    class Tokens(LetterTokens):
        def encode(self, text):
            return [self.pieces.index(c) if c in self.pieces else 2 for c in text]

    assert spell(["ab", "aüb", "cab", "\\\\a"], Tokens()) == {"ab": (3, 4), "cab": (5, 3, 4)}
