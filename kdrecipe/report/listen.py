"""The part of the page where one looks at, and listens to, what teacher and student say.

Chooses the utterances on which a student differs most from its teacher (or a compressed system
from the one it was made from), aligns what each system said with the reference, and packs audio.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile

from kdrecipe.report.reading import first_parent
from kdrecipe.score.hypotheses import read_hypotheses

Audio = Callable[[str, str], "tuple[np.ndarray, int] | None"]
"""(split, utterance id) -> (samples in [-1, 1], mono (S,) or (S, channels), sampling rate) or None."""

Texts = Mapping[str, Mapping[str, Mapping[str, tuple[str, str]]]]
"""split -> system -> utterance id -> (reference, hypothesis), one seed per system."""

_ENCODINGS = (("MP3", "MPEG_LAYER_III", "audio/mpeg"), ("FLAC", "PCM_16", "audio/flac"))


@dataclass(frozen=True)
class Listening:
    """How much to embed.

    Args:
        per_pair: utterances for each pair of systems, the most different ones.
        max_audio_mb: audio in the page, in 10^6 bytes after base64; utterances beyond it are
            shown without sound.
    """

    per_pair: int = 25
    max_audio_mb: float = 8.0


@dataclass
class Card:
    """One utterance: ``differences`` maps the number of a pair to (differing words, outcome)."""

    split: str
    id: str
    differences: dict[int, tuple[int, str]] = field(default_factory=dict)
    audio: str = ""  # a data: address; empty: none


@dataclass(frozen=True)
class Selection:
    """What the page shows: ``pairs`` of (teacher or parent, student), cards, texts."""

    pairs: list[tuple[str, str]]
    cards: list[Card]
    texts: Texts


def select(
    systems: Sequence[Mapping[str, Any]],
    hyps: Mapping[str, Mapping[int, Mapping[str, Path]]],
    audio: Audio | None,
    listening: Listening,
) -> Selection:
    """Choose the utterances and pack their audio, most different first until the budget is used.

    The first seed of each system speaks for it.
    """
    texts: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
    for system in systems:
        for splits in list(hyps.get(system["name"], {}).values())[:1]:
            for split, path in splits.items():
                texts.setdefault(split, {})[system["name"]] = read_hypotheses(path)
    spoken = {name for by_system in texts.values() for name in by_system}
    pairs = [
        (str(first_parent(s)), s["name"])
        for s in systems
        if s["kind"] in ("distilled", "compressed") and first_parent(s) in spoken and s["name"] in spoken
    ]
    cards: dict[tuple[str, str], Card] = {}
    by_rank: list[tuple[int, Card]] = []
    for number, pair in enumerate(pairs):
        for rank, (split, utterance, found) in enumerate(_most_different(texts, pair, listening.per_pair)):
            card = cards.setdefault((split, utterance), Card(split, utterance))
            card.differences[number] = found
            by_rank.append((rank, card))
    by_rank.sort(key=lambda item: item[0])  # stable: the pairs take turns
    if audio:
        _pack(
            dict.fromkeys(id(card) for _, card in by_rank), {id(c): c for _, c in by_rank}, audio, listening
        )
    ordered = sorted(
        cards.values(), key=lambda c: (-max(d for d, _ in c.differences.values()), c.split, c.id)
    )
    return Selection(pairs, ordered, texts)


def _most_different(
    texts: Texts, pair: tuple[str, str], number: int
) -> list[tuple[str, str, tuple[int, str]]]:
    """(split, id, (differing words, outcome)) of the utterances a pair differs most on."""
    found = []
    for split, said in texts.items():
        one, other = (said.get(name, {}) for name in pair)
        for utterance in one.keys() & other.keys():
            if differing := _distance(one[utterance][1], other[utterance][1]):
                by_one, by_other = _distance(*one[utterance]), _distance(*other[utterance])
                outcome = "worse" if by_other > by_one else "better" if by_other < by_one else "even"
                found.append((split, utterance, (differing, outcome)))
    return sorted(found, key=lambda item: (-item[2][0], item[0], item[1]))[:number]


def _distance(reference: str, hypothesis: str) -> int:
    edits = jiwer.process_words(reference, hypothesis)
    return int(edits.substitutions + edits.insertions + edits.deletions)


def _pack(order: Mapping[int, None], cards: Mapping[int, Card], audio: Audio, listening: Listening) -> None:
    left = listening.max_audio_mb * 1e6
    for key in order:
        card = cards[key]
        if found := audio(card.split, card.id):
            packed = encode(*found)
            if len(packed) <= left:
                card.audio = packed
                left -= len(packed)


def encode(samples: np.ndarray, sampling_rate: int) -> str:
    """Samples as a small ``data:`` address: MP3, which every browser plays, else FLAC."""
    mono = np.asarray(samples, dtype=np.float32)
    mono = mono.mean(axis=1) if mono.ndim == 2 else mono
    for container, coding, kind in _ENCODINGS:
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, mono, sampling_rate, format=container, subtype=coding)
        except (soundfile.SoundFileError, ValueError):  # an old libsndfile has no MP3; nor has MP3 every rate
            continue
        return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return ""


# ---------------------------------------------------------------- HTML


def aligned(reference: str, hypothesis: str) -> tuple[str, int]:
    """The hypothesis as HTML, its edits against the reference marked; and their number."""
    words = jiwer.process_words(reference, hypothesis)
    ref, hyp = words.references[0], words.hypotheses[0]
    pieces = []
    for chunk in words.alignments[0]:
        was = ref[chunk.ref_start_idx : chunk.ref_end_idx]
        now = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "equal":
            pieces += [escape(word) for word in now]
        elif chunk.type == "insert":
            pieces += [f"<ins>{escape(word)}</ins>" for word in now]
        elif chunk.type == "delete":
            pieces += [f"<del>{escape(word)}</del>" for word in was]
        else:
            pieces += [
                f'<span class="sub" title="instead of {escape(w)}">{escape(n)}'
                f'<span class="unseen"> (instead of {escape(w)})</span></span>'
                for w, n in zip(was, now, strict=True)
            ]
    return " ".join(pieces), int(words.substitutions + words.insertions + words.deletions)


def section(selection: Selection) -> str:
    """The explorer: controls, then one card per utterance."""
    if not selection.cards:
        why = (
            "No utterance on which they differ."
            if selection.pairs
            else "No system here was made from another."
        )
        return f"<p>{why}</p>"
    pairs = "".join(
        f'<option value="{i}" data-teacher="{escape(teacher)}" data-student="{escape(student)}">'
        f"{escape(student)} and {escape(teacher)}</option>"
        for i, (teacher, student) in enumerate(selection.pairs)
    )
    splits = "".join(f"<option>{escape(split)}</option>" for split in selection.texts)
    silent = sum(not card.audio for card in selection.cards)
    sound = f" {silent} of them have no audio in this page." if silent else ""
    return f"""
<p>The {len(selection.cards)} utterances on which a system and the one it was made from differ in most words,
spoken for by the first seed of each.{sound} Against the reference: <span class="sub">substituted</span>,
<ins>inserted</ins>, <del>deleted</del>.</p>
<form id="filters" role="search" aria-label="Utterances">
<label>Pair <select id="pair"><option value="">every pair, all systems</option>{pairs}</select></label>
<label>Outcome <select id="outcome"><option value="">any</option><option value="worse">student worse</option>
<option value="better">student better</option><option value="even">as many errors</option></select></label>
<label>Split <select id="split"><option value="">all</option>{splits}</select></label>
<label class="grow">Search <input id="find" type="search" placeholder="a word or an id"></label>
<output id="shown" aria-live="polite">{len(selection.cards)} utterances</output>
</form>
<div id="cards">{"".join(_card(card, selection) for card in selection.cards)}</div>"""


def _card(card: Card, selection: Selection) -> str:
    said = selection.texts[card.split]
    reference = next(by_id[card.id][0] for by_id in said.values() if card.id in by_id)
    rows = []
    for system, by_id in said.items():
        if card.id in by_id:
            html, errors = aligned(reference, by_id[card.id][1])
            mark = "correct" if not errors else f"{errors} error{'s' if errors > 1 else ''}"
            rows.append(
                f'<tr data-system="{escape(system)}"><th scope="row">{escape(system)}</th>'
                f'<td>{html or "<i>nothing</i>"}</td><td class="count">{mark}</td></tr>'
            )
    pairs = " ".join(
        f"{i}:{differing}:{outcome}" for i, (differing, outcome) in sorted(card.differences.items())
    )
    sound = f'<audio controls preload="none" src="{card.audio}"></audio>' if card.audio else ""
    words = " ".join(
        [card.id, reference, *(by_id[card.id][1] for by_id in said.values() if card.id in by_id)]
    )
    return f"""<article class="card" data-split="{escape(card.split)}" data-pairs="{pairs}"
data-words="{escape(words.lower())}">
<header><h3>{escape(card.id)}</h3><span>{escape(card.split)}</span>{sound}</header>
<table><tr class="ref"><th scope="row">reference</th><td>{escape(reference)}</td><td></td></tr>
{"".join(rows)}</table></article>
"""
