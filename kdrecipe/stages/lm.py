"""Stage 2, second job: n-gram language models over tokens and over words, for searches.

``tokens.arpa`` is over the pieces of the recipe's tokens, ``words.arpa`` over words, both as
:func:`kdrecipe.data.ngram.escape` writes symbols; ``lm.json`` says what they are made of and how
well they predict the development split's text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import sha256_file, write_json
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Lm, Recipe
from kdrecipe.stages.labels import hypotheses_jobs, labels_inputs, training_texts
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.needed import missing_kenlm
from kdrecipe.text import clean, read_lines

if TYPE_CHECKING:
    from kdrecipe.data.tokens import Tokenizer


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """Add the job, if the recipe has a language model.

    Raises:
        KdrecipeError: what the job or a search needs is not on this machine.
    """
    lm = recipe.lm
    if lm is None:
        return
    if missing := missing_kenlm(recipe):
        raise missing
    inputs = {
        "order": lm.order,
        "word_order": lm.word_order,
        "data": lm.data,
        "text": sha256_file(_text_file(lm)) if lm.text else None,
        **({"labels": labels_inputs(recipe, lm)} if lm.labels else {}),
    }
    needs = ("prepare", "features", "tokens", *hypotheses_jobs(recipe, lm))
    plan.add(Job(2, "lm", layout.lm, inputs, lambda out: run(recipe, layout, out), needs))


def run(recipe: Recipe, layout: Layout, out: Path) -> None:
    """Estimate both models and write them.

    Raises:
        DataError: there is no text.
    """
    from kdrecipe.corpus.manifests import transcripts
    from kdrecipe.data.ngram import estimate
    from kdrecipe.data.tokens import Tokenizer

    assert recipe.lm is not None
    tokenizer = Tokenizer.load(layout.tokens)
    texts = sentences(recipe, layout)
    dev_texts = transcripts(layout.manifests, "dev")
    pieces = [_pieces(text, tokenizer) for text in texts]
    tokens = estimate(pieces, recipe.lm.order, vocabulary=tokenizer.pieces[3:])
    tokens.write_arpa(out / "tokens.arpa")
    perplexity = tokens.perplexity(_pieces(t, tokenizer) for t in dev_texts) if dev_texts else None
    words = [text.split() for text in texts]
    estimate(words, recipe.lm.word_order).write_arpa(out / "words.arpa")
    known = {word for line in words for word in line}
    dev_words = [word for text in dev_texts for word in text.split()]
    facts: dict[str, Any] = {
        "sentences": len(texts),
        "tokens": sum(map(len, pieces)),
        "words": sum(map(len, words)),
        "order": recipe.lm.order,
        "word_order": recipe.lm.word_order,
        "vocab_id": tokenizer.vocab_id,
        "dev_perplexity": perplexity,
        "dev_words": len(dev_words),
        "dev_words_out_of_vocabulary": sum(word not in known for word in dev_words),
    }
    write_json(out / "lm.json", facts)
    print(f"  {_summary(facts)}", flush=True)


def _summary(facts: dict[str, Any]) -> str:
    made = f"{facts['order']}-gram over tokens, from {facts['sentences']} sentences"
    if facts["dev_perplexity"] is None:
        return f"{made}; no dev split to try it on"
    share = facts["dev_words_out_of_vocabulary"] / max(1, facts["dev_words"])
    return f"{made}: perplexity {facts['dev_perplexity']:.2f} per token of dev, {share:.1%} of its words new"


def sentences(recipe: Recipe, layout: Layout) -> list[str]:
    """Those of ``lm.text``, or transcripts of the training split or of a subset of it, or hypotheses.

    Raises:
        DataError: the file is not UTF-8, or there is no text.
    """
    lm = recipe.lm
    assert lm is not None
    if lm.text is not None:
        path = _text_file(lm)
        try:
            lines = read_lines(path)
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 ({error.reason})", where=str(path), remedy="convert it") from None
        texts, where = [text for text in map(clean, lines) if text], str(path)
    else:
        texts, where = training_texts(recipe, layout, lm), "the train split's transcripts"
    if not texts:
        raise DataError("no text to estimate a language model from", where=where)
    return texts


def _pieces(text: str, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.pieces[i] for i in tokenizer.encode(text)]


def _text_file(lm: Lm) -> Path:
    assert lm.text is not None
    path = lm.text.path()
    if not path.is_file():
        remedy = "a text file with a sentence per line"
        raise RecipeError(f"lm.text: there is no file {path}", where=lm.text.where, remedy=remedy)
    return path
