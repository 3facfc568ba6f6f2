"""N-gram models: probabilities that are ones, a textbook's figures, and what KenLM makes of the file."""

import itertools
from collections import Counter
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.data import ngram
from kdrecipe.data.ngram import NgramModel, estimate
from kdrecipe.errors import DataError, KdrecipeError, MissingExtra

BOS, EOS, UNK = ngram.BOS, ngram.EOS, ngram.UNK

sentences = st.lists(st.lists(st.sampled_from("abcd"), max_size=7), min_size=1, max_size=12)


def random_text(num_sentences=300, seed=0):
    """Sentences in which what follows depends on what came before, with rare and common symbols."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_sentences):
        line = ["a"]
        while rng.random() > 0.15:
            step = int(rng.geometric(0.35))
            line.append("abcdefghij"[("abcdefghij".index(line[-1]) + step) % 10])
        lines.append(line)
    return lines


def read_arpa(path):
    """n-gram (a tuple) -> (log10 probability, log10 backoff), by the letter of the format."""
    table = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            table[tuple(fields[1].split(" "))] = (
                float(fields[0]),
                float(fields[2]) if len(fields) > 2 else 0.0,
            )
    return table


def arpa_log10(table, context, symbol):
    """The backoff rule of ARPA files."""
    if (*context, symbol) in table:
        return table[(*context, symbol)][0]
    backoff = table.get(context, (0.0, 0.0))[1]
    return backoff + arpa_log10(table, context[1:], symbol)


def textbook(lines, order, vocabulary):
    """Interpolated modified Kneser-Ney, written down from the equations: ``p(symbol, context)``."""
    padded = [(BOS, *line, EOS) for line in lines]
    raw = [
        Counter(line[i : i + n] for line in padded for i in range(len(line) - n + 1))
        for n in range(1, order + 2)
    ]

    def count(gram):
        if len(gram) == order or gram[0] == BOS:
            return raw[len(gram) - 1][gram] * (gram != (BOS,))
        return sum(1 for longer in raw[len(gram)] if longer[1:] == gram)

    counts = {gram: count(gram) for grams in raw[:order] for gram in grams}

    def discounts(n):
        of_counts = Counter(c for gram, c in counts.items() if len(gram) == n)
        t = [of_counts[k] for k in range(5)]
        if n == 1:
            return [0, 0.5, 1.0, 1.5]  # lmplz's fallback: ten letters have no counts of counts
        y = t[1] / (t[1] + 2 * t[2])
        return [0.0] + [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]

    all_discounts = [discounts(n) for n in range(1, order + 1)]

    def prob(symbol, context):
        after = {g[-1]: c for g, c in counts.items() if len(g) == len(context) + 1 and g[:-1] == context}
        lower = prob(symbol, context[1:]) if context else 1 / len(vocabulary)
        total = sum(after.values())
        if not total:
            return lower
        taken = {s: all_discounts[len(context)][min(c, 3)] for s, c in after.items()}
        return (after.get(symbol, 0) - taken.get(symbol, 0)) / total + sum(taken.values()) / total * lower

    return prob


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_textbook(order, tmp_path):
    lines = random_text()
    letters = [*"abcdefghij", UNK, EOS]
    prob = textbook(lines, order, letters)
    model = estimate(lines, order)
    model.write_arpa(tmp_path / "a.arpa")
    table = read_arpa(tmp_path / "a.arpa")
    contexts = [(), (BOS,), ("a",), ("c", "d"), (BOS, "a"), ("a", "b", "d"), ("j", "j", "j"), (BOS, "a", "b")]
    for context in (c for c in contexts if len(c) < order):
        for symbol in letters:
            assert 10 ** arpa_log10(table, context, symbol) == pytest.approx(prob(symbol, context), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(sentences, st.integers(1, 4))
def test_probabilities_after_every_context_sum_to_one(tmp_path_factory, lines, order):
    path = tmp_path_factory.mktemp("lm") / "a.arpa"
    estimate(lines, order, vocabulary="abcde").write_arpa(path)
    table = read_arpa(path)
    for length in range(order):
        for context in itertools.product([BOS, *"abe"], repeat=length):
            total = sum(10 ** arpa_log10(table, context, s) for s in [*"abcde", UNK, EOS])
            assert total == pytest.approx(1.0, abs=1e-5), context


def test_what_the_text_lacks_gets_probability():
    model = estimate([["a", "b"]], 3, vocabulary=["a", "b", "c"])
    seen, unseen, unknown = (exp(model.log_probs([[s]])[0]) for s in ("a", "c", "z"))
    assert seen > unseen > 0
    assert unseen == pytest.approx(unknown)


def test_the_order_is_lowered_to_the_longest_sentence():
    assert len(estimate([["a"], ["b"]], 6).levels) == 3  # <s> a </s>
    with pytest.raises(DataError, match="no text"):
        estimate([], 3)


@settings(max_examples=30, deadline=None)
@given(sentences, sentences, st.integers(1, 4))
def test_own_scores_follow_the_backoff_rule(tmp_path_factory, lines, others, order):
    path = tmp_path_factory.mktemp("lm") / "a.arpa"
    model = estimate(lines, order)
    model.write_arpa(path)
    table = read_arpa(path)
    expected = []
    for line in others:
        line = [s if (s,) in table else UNK for s in line]
        for i, symbol in enumerate([*line, EOS]):
            context = (BOS, *line)[: i + 1][-(order - 1) :] if order > 1 else ()
            expected.append(arpa_log10(table, context, symbol) * log(10))
    assert model.log_probs(others) == pytest.approx(expected, abs=1e-5)
    assert model.perplexity(others) == pytest.approx(exp(-np.mean(expected)), rel=1e-4)


def test_a_model_of_its_own_text_beats_chance_and_higher_orders_beat_lower_ones():
    lines, others = random_text(seed=0), random_text(seed=1)
    found = [estimate(lines, n).perplexity(others) for n in (1, 2, 3)]
    assert found[1] < found[0] < 11
    assert found[2] < 1.1 * found[1]


# ---------------------------------------------------------------- KenLM

ODD = [
    "<blk>",
    "<sos/eos>",
    "<unk>",
    "\u2581",
    "a",
    "",
    " ",
    "\u00a0",
    "\\",
    "<s>",
    "</s>",
    "<UNK>",
    "#",
    "é",
]


@pytest.mark.parametrize("order", [2, 3, 6])
def test_kenlm_scores_as_we_do(tmp_path, order):
    pytest.importorskip("kenlm")
    rng = np.random.default_rng(0)
    lines = [[ODD[i] for i in rng.integers(2, len(ODD) - 1, size=rng.integers(0, 9))] for _ in range(60)]
    own = estimate(lines, order, vocabulary=ODD[3:])
    own.write_arpa(tmp_path / "a.arpa")
    model = NgramModel(tmp_path / "a.arpa", ODD)
    for _ in range(30):
        ids = rng.integers(0, len(ODD), size=rng.integers(0, 9)).tolist()
        state, scores = model.start(), []
        for token in ids:
            score, state = model.score(state, token)
            scores.append(score)
        scores.append(model.end(state))
        expected = own.log_probs([[ODD[i] if i > 1 else UNK for i in ids]])
        assert scores == pytest.approx(expected.tolist(), abs=1e-4)


def test_states_are_values(tmp_path):
    pytest.importorskip("kenlm")
    estimate(random_text(), 3).write_arpa(tmp_path / "a.arpa")
    model = NgramModel(tmp_path / "a.arpa", "abcdefghij")
    _, state = model.score(model.start(), 0)
    before = model.score(state, 1)[0]
    model.score(model.score(state, 5)[1], 2)
    model.end(state)
    assert model.score(state, 1)[0] == before


def test_faults_of_files_have_a_place_and_a_remedy(tmp_path):
    pytest.importorskip("kenlm")
    with pytest.raises(KdrecipeError, match="missing file"):
        NgramModel(tmp_path / "none.arpa", ["a"])
    (tmp_path / "bad.arpa").write_text("no model\n")
    with pytest.raises(KdrecipeError, match="KenLM can't read it") as error:
        NgramModel(tmp_path / "bad.arpa", ["a"]).start()
    assert error.value.problems[0].remedy


def test_without_kenlm_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)
    (tmp_path / "a.arpa").touch()
    with pytest.raises(MissingExtra, match=r"pip install kenlm"):
        NgramModel(tmp_path / "a.arpa", ["a"]).start()


def test_escaping_keeps_symbols_apart():
    symbols = [*ODD, "\\e", "\\u0020", "\\<s>", "\\\\", "x y", "x\\u0020y", "\u2028", "\n"]
    escaped = [ngram.escape(s) for s in symbols]
    assert len(set(escaped)) == len(symbols)
    assert all(e.split() == [e] for e in escaped)
    assert ngram.escape("\u2581THE") == "\u2581THE"
