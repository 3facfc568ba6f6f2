"""What tokens and language models are learnt from: text that all systems of a recipe may see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from kdrecipe.errors import KdrecipeError, Problem, did_you_mean
from kdrecipe.recipe.imported import build_teacher, teacher_options, tokenizer_file
from kdrecipe.recipe.parsing import Parser
from kdrecipe.recipe.sections import (
    ALL,
    Corpus,
    Decode,
    Learnt,
    Lm,
    System,
    Tokens,
    shared_labels,
    uses_lm,
    without_transcripts,
)
from kdrecipe.recipe.yaml import KeyPath

LearntT = TypeVar("LearntT", Tokens, Lm)


def check_lm(parser: Parser, lm: Lm | None, decode: Decode) -> None:
    """What the language model is made of is there, and so is the model where a search weights one."""
    if lm is None:
        written = parser.document.data.get("lm")
        for label, decoder in decode.decoders.items() if written is None else ():
            if uses_lm(decoder.options):
                what = f"is {decoder.options['lm_weight']}, the recipe has no language model"
                parser.problem(("decode", "decoders", label, "lm_weight"), what, "add lm: {name: ngram}")
        return
    if lm.text is not None and (lm.data is not None or lm.labels is not None):
        other = "data" if lm.data is not None else "labels"
        parser.problem(("lm",), f"{other} and text exclude each other", "remove one of them")
    elif lm.text is not None:
        try:
            path = lm.text.path()
        except KdrecipeError:
            return  # an environment variable: looked up when there is work
        if not path.is_file():
            what, remedy = f"there is no file {path}", "a text file with a sentence per line"
            parser.problem(("lm", "text"), what, remedy)


def with_text(
    parser: Parser, key: str, learnt: LearntT, systems: Mapping[str, System], corpus: Corpus | None
) -> LearntT:
    """Tokens or a language model, with the transcripts or hypotheses that they are learnt from filled in.

    All systems share both, so without a word from the recipe it is what all of them have labels
    of: transcripts, or, where no system has any, what their one teacher recognises. Where systems have
    labels of several subsets or teachers, the recipe must say which.

    Args:
        parser: notes problems.
        key: ``tokens`` or ``lm``.
        learnt: as the recipe has it.
        systems: those that could be read.
        corpus: with its subsets.
    """
    labels = learnt.labels
    if labels is None and learnt.data is None and (silent := without_transcripts(systems)):
        labels = _common_teacher(parser, key, learnt, silent)
    elif labels is None:
        return learnt.model_copy(update={"data": _learnt_from(parser, key, learnt.data, systems, corpus)})
    if labels is not None and (problem := _not_imported(labels, systems, parser)):
        path: KeyPath = (key, "labels") if learnt.labels else (key,)
        parser.problem(path, f"{labels!r} {problem.what}", problem.remedy)
    return learnt.model_copy(update={"labels": labels})


def _common_teacher(parser: Parser, key: str, learnt: Learnt, systems: Sequence[System]) -> str | None:
    """The teacher whose hypotheses are all the text that ``systems`` have."""
    found = list(dict.fromkeys(s.labels for s in systems if s.labels is not None))
    if not found and isinstance(learnt, Tokens) and learnt.teacher is not None:
        found = [learnt.teacher]
    if len(found) == 1:
        return found[0]
    what = f"no system has transcripts to learn the {key} from"
    if found:
        what += f", and they have labels of different teachers ({', '.join(found)})"
    remedy = f"say whose hypotheses are taken: {key}: {{..., labels: <teacher>}}; or data: {ALL}"
    parser.problem((key,), what, remedy)
    return None


def check_own_tokens(parser: Parser, tokens: Tokens, systems: Mapping[str, System]) -> None:
    """The teacher whose tokens are taken is there, is imported, and has some."""
    name, path = tokens.teacher, ("tokens", "teacher")
    if name is None:
        return
    if problem := _not_imported(name, systems, parser):
        parser.problem(path, f"{name!r} {problem.what}", problem.remedy)
        return
    if name not in systems:
        return  # it could not be read
    try:
        teacher_options(parser.registry, systems[name])
        teacher = build_teacher(parser.registry, systems[name])
    except KdrecipeError:
        return  # an environment variable, which is looked up when there is work; or reported with the system
    if tokenizer_file(teacher) is None:
        what = f"{name!r} has no tokens that can be taken: it has no tokeniser by byte-level BPE"
        parser.problem(path, what, "take them from a whisper with tokenizer.json, or name bpe or char")


def _not_imported(name: str, systems: Mapping[str, System], parser: Parser) -> Problem | None:
    """Why a system has no tokens, and writes no texts, before the recipe has tokens."""
    written = parser.document.data.get("systems")
    known = set(written) if isinstance(written, dict) else set()
    if name not in known:
        return Problem("is no system", "", did_you_mean(name, known))
    if name in systems and not systems[name].is_imported:
        remedy = "name one that a plugin imports: pretrained: {name: whisper, path: ...}"
        return Problem("is no imported teacher: it counts in the recipe's tokens itself", "", remedy)
    return None


def _learnt_from(
    parser: Parser, key: str, data: str | None, systems: Mapping[str, System], corpus: Corpus | None
) -> str | None:
    """The subset whose transcripts are learnt from; None: the whole split."""
    subsets = corpus.subsets if corpus is not None else {}
    if data is None:
        found = [name for name in shared_labels(systems) if name in subsets]  # others are already reported
        if len(found) > 1:
            what = f"systems have labels of different subsets ({', '.join(found)}), and all share the {key}"
            remedy = (
                f"say whose transcripts they are learnt from: {key}: {{..., data: <subset>}}, or data: {ALL}"
            )
            parser.problem((key,), what, remedy)
        return found[0] if found else None
    if data == ALL:
        return None
    if data not in subsets and corpus is not None:
        remedy = did_you_mean(data, {*subsets, ALL}) + " (corpus.subsets)"
        parser.problem((key, "data"), f"unknown subset {data!r}", remedy)
    return data
