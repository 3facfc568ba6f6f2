"""The part of the page that shows, and plays, utterances with the texts of teacher and student.

Chooses the utterances on which a student differs most from its teacher (or a compressed system
from the one it was made from), aligns what each system said with the reference, and packs audio.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Word:
    """A word of a hypothesis, ``now``, instead of the reference's, ``was``; empty if there is none."""

    edit: str  # equal, insert, delete or substitute
    was: str
    now: str


@dataclass(frozen=True)
class Said:
    """What a system recognised, compared with the reference."""

    system: str
    text: str
    words: list[Word]
    errors: int


@dataclass
class Card:
    """One utterance: ``differences`` maps the number of a pair to (differing words, outcome)."""

    split: str
    id: str
    differences: dict[int, tuple[int, str]] = field(default_factory=dict)
    audio: str = ""  # a data: address; empty if there is none
    reference: str = ""
    said: list[Said] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The text in which the page's search box looks."""
        return " ".join([self.id, self.reference, *(said.text for said in self.said)]).lower()


@dataclass(frozen=True)
class Selection:
    """What the page shows: ``pairs`` of (teacher or parent, student), cards, splits."""

    pairs: list[tuple[str, str]]
    cards: list[Card]
    splits: list[str]

    @property
    def num_silent(self) -> int:
        """Cards without audio."""
        return sum(not card.audio for card in self.cards)


def select(
    systems: Sequence[Mapping[str, Any]],
    hyps: Mapping[str, Mapping[int, Mapping[str, Path]]],
    audio: Audio | None,
    listening: Listening,
) -> Selection:
    """Choose the utterances and pack their audio, most different first until the budget is used.

    Each system is shown by its first seed.
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
    for card in ordered:
        spoken_here = {name: by_id[card.id] for name, by_id in texts[card.split].items() if card.id in by_id}
        card.reference = next(iter(spoken_here.values()))[0]
        card.said = [_said(name, card.reference, hyp) for name, (_, hyp) in spoken_here.items()]
    return Selection(pairs, ordered, list(texts))


def _most_different(
    texts: Texts, pair: tuple[str, str], number: int
) -> list[tuple[str, str, tuple[int, str]]]:
    """(split, id, (differing words, outcome)) of the utterances on which a pair differs most."""
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


# ---------------------------------------------------------------- against the reference


def aligned(reference: str, hypothesis: str) -> tuple[list[Word], int]:
    """The hypothesis word by word with its edits against the reference, and their number."""
    words = jiwer.process_words(reference, hypothesis)
    ref, hyp = words.references[0], words.hypotheses[0]
    found = []
    for chunk in words.alignments[0]:
        was = ref[chunk.ref_start_idx : chunk.ref_end_idx]
        now = hyp[chunk.hyp_start_idx : chunk.hyp_end_idx]
        found += [Word(chunk.type, *pair) for pair in itertools.zip_longest(was, now, fillvalue="")]
    return found, int(words.substitutions + words.insertions + words.deletions)


def _said(system: str, reference: str, hypothesis: str) -> Said:
    words, errors = aligned(reference, hypothesis)
    return Said(system, hypothesis, words, errors)
