"""Batches: a plan for every epoch that depends on (seed, epoch) alone, and features kept in memory.

B utterances, T feature frames, F bins, U tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from kdrecipe.corpus.audio import padded
from kdrecipe.corpus.gather import reason
from kdrecipe.data.memory import Kept, MemoryBudget
from kdrecipe.data.stored_cuts import Cuts, HeldCuts, StoredCuts
from kdrecipe.errors import DataError
from kdrecipe.interfaces import BLANK_ID, SAMPLE_RATE, Batch, Piece, TokenTable

if TYPE_CHECKING:  # Lhotse is slow to import, and only its cuts' attributes are used here
    from lhotse.cut import Cut

    from kdrecipe.data.augment import Augmenter

_FULL_SCALE = 32767.0

# Durations are multiplied by a random factor of up to this much before sorting: batches then hold
# utterances of about equal length (little padding), yet other ones in every epoch.
_JITTER = 0.1

_CUT_BYTES = 2500  # a cut as Lhotse's objects
_ENTRY_BYTES = 200  # what keeping something small takes besides it


class Plan(Sequence[list[str]]):
    """The batches of an epoch: ids are looked up when a batch is asked for."""

    def __init__(self, cuts: Cuts, blocks: Sequence[np.ndarray]) -> None:
        self._cuts, self._blocks = cuts, blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, number: int) -> list[str]: ...
    @overload
    def __getitem__(self, number: slice) -> list[list[str]]: ...
    def __getitem__(self, number: int | slice) -> list[str] | list[list[str]]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return [self._cuts.id(i) for i in self._blocks[number].tolist()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class CutBatches:
    """The utterances of a split or subset, in batches of about equal duration.

    Args:
        cuts: with features computed.
        tokenizer: for the labels; None: there are none.
        batch_duration_s: utterances in a batch times the longest one's duration stays at or
            below this, except for an utterance that is longer on its own.
        seed: of the plans.
        labelled_ids: cuts whose text may be used; None: all that have a text.
        shuffle: False: one plan for all epochs, longest batch first (for dev).
        cache: bytes of features and audio kept in memory; None: as many as this process's budget allows,
            see :mod:`kdrecipe.data.memory`.
        augmenter: makes what :meth:`load_augmented` gives.
        extract: features (T, F) of samples (S,), for that.
        with_audio: whether batches carry their audio, too.

    Raises:
        DataError: no cuts, a cut without features, or the same id twice.
    """

    def __init__(
        self,
        cuts: Iterable[Cut] | StoredCuts,
        tokenizer: TokenTable | None,
        *,
        batch_duration_s: float,
        seed: int,
        labelled_ids: Set[str] | None = None,
        shuffle: bool = True,
        cache: int | None = None,
        augmenter: Augmenter | None = None,
        extract: Callable[[np.ndarray], np.ndarray] | None = None,
        with_audio: bool = False,
    ) -> None:
        self._table: Cuts = cuts if isinstance(cuts, StoredCuts) else HeldCuts(cuts)
        _check(self._table)
        self.tokenizer = tokenizer
        self.batch_duration_s = batch_duration_s
        self.seed = seed
        self.shuffle = shuffle
        self._durations_s = self._table.durations_s
        self._labelled_N = self._table.has_text
        if labelled_ids is not None:
            self._labelled_N = self._labelled_N & self._table.among(labelled_ids)
        if tokenizer is None:
            self._labelled_N = np.zeros(len(self._table), bool)
        budget = None if cache is None else MemoryBudget(cache)
        self._cuts: Kept[Cut] = Kept(budget)
        self._labels: Kept[list[int]] = Kept(budget)
        self._features: Kept[Tensor] = Kept(budget)
        self._audio: Kept[np.ndarray] = Kept(budget)
        self._augmenter, self._extract = augmenter, extract
        self._with_audio = with_audio

    # ------------------------------------------------------------ plans

    @property
    def ids(self) -> list[str]:
        """Of all cuts."""
        return [self._table.id(number) for number in range(len(self))]

    @cached_property
    def digest(self) -> str:
        """Of the ids, in their order."""
        found = hashlib.sha256()
        for number in range(len(self)):
            found.update(self._table.id(number).encode() + b"\n")
        return found.hexdigest()

    def epoch(self, number: int) -> Plan:
        """The batches of epoch ``number`` (from 0), as lists of cut ids; the same whenever asked."""
        rng = np.random.default_rng([self.seed, number])
        blocks = self._blocks(rng)
        if self.shuffle:
            blocks = [blocks[i] for i in rng.permutation(len(blocks))]
        return Plan(self._table, blocks)

    def num_batches(self, number: int) -> int:
        """``len(self.epoch(number))``, without making the lists."""
        rng = np.random.default_rng([self.seed, number])
        return len(_fill(self._durations_s[self._order(rng)], self.batch_duration_s))

    def longest(self) -> list[str]:
        """The batch that needs the most memory: the longest utterances of all, as many as fit."""
        order = np.argsort(-self._durations_s, kind="stable")
        end = _fill(self._durations_s[order], self.batch_duration_s)[0]
        return [self._table.id(i) for i in order[:end].tolist()]

    def duration_s(self, ids: Iterable[str]) -> float:
        """Seconds of audio in these cuts, padding not counted."""
        return float(sum(self._durations_s[self._table.number(i)] for i in ids))

    @property
    def total_s(self) -> float:
        """Seconds of audio in all cuts."""
        return float(self._durations_s.sum())

    def __len__(self) -> int:
        return len(self._durations_s)

    @property
    def num_labelled(self) -> int:
        """Utterances whose text may be used."""
        return int(self._labelled_N.sum())

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Cut numbers from the longest to the shortest, roughly so when shuffling."""
        spread = rng.uniform(1 - _JITTER, 1 + _JITTER, len(self)) if self.shuffle else 1.0
        return np.argsort(-self._durations_s * spread, kind="stable")

    def _blocks(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = self._order(rng)
        durations_s = self._durations_s[order]
        limit_s = self.batch_duration_s
        ends = _fill(durations_s, limit_s)
        if self.shuffle:
            ends = _level(durations_s, limit_s, ends)
        return np.split(order, ends[:-1])

    # ------------------------------------------------------------ loading

    def load(self, ids: Sequence[str]) -> Batch:
        """The batch of these cuts, on the CPU, features padded with zeros.

        Raises:
            DataError: features on disk are missing or damaged.
        """
        batch = self._batch([[i] for i in ids], [self._load_features(i) for i in ids], [])
        return _carrying(batch, [self._load_audio(i) for i in ids]) if self._with_audio else batch

    def load_augmented(self, ids: Sequence[str], seed: Sequence[int]) -> Batch:
        """The batch of these cuts in scenes of the augmenter; rows of several are labelled, or not, alike.

        Args:
            ids: of the cuts.
            seed: the same cuts and seed give the same batch.

        Raises:
            DataError: audio can't be read.
        """
        assert self._augmenter is not None
        assert self._extract is not None
        rng = np.random.default_rng(seed)
        rows: list[list[str]] = []
        for known in (True, False):  # a row with words that must not be used has no label
            alike = [i for i in ids if self._is_labelled(i) == known]
            durations_s = [float(self._durations_s[self._table.number(i)]) for i in alike]
            if alike:
                rows += [[alike[n] for n in row] for row in self._augmenter.rows(durations_s, rng)]
        scenes = self._augmenter.scenes([[self._load_audio(i) for i in row] for row in rows], rng)
        features = [torch.from_numpy(self._extract(scene.samples_S)) for scene in scenes]
        pieces = [
            tuple(Piece(i, *frames) for i, frames in zip(row, scene.frames, strict=True))
            for row, scene in zip(rows, scenes, strict=True)
        ]
        batch = self._batch(rows, features, pieces)
        return _carrying(batch, [scene.samples_S for scene in scenes]) if self._with_audio else batch

    def _batch(
        self, rows: Sequence[Sequence[str]], features: Sequence[Tensor], pieces: list[tuple[Piece, ...]]
    ) -> Batch:
        """Rows of one cut or more, which their features belong to."""
        lens = [len(f) for f in features]
        features_BTF = features[0].new_zeros(len(rows), max(lens), features[0].shape[1])
        for row, item in zip(features_BTF, features, strict=True):
            row[: len(item)] = item
        labelled = [self._is_labelled(row[0]) for row in rows]
        texts = [
            " ".join(transcript_of(self._cut(i)) for i in row) if known else ""
            for row, known in zip(rows, labelled, strict=True)
        ]
        ids = ["+".join(row) for row in rows]
        known_rows = zip(ids, texts, labelled, strict=True)
        labels = [self._encode(i, text) if known else [] for i, text, known in known_rows]
        tokens_BU = torch.full((len(rows), max(map(len, labels))), BLANK_ID, dtype=torch.int64)
        for row, label in zip(tokens_BU, labels, strict=True):
            row[: len(label)] = torch.tensor(label, dtype=torch.int64)
        return Batch(
            ids=ids,
            features_BTF=features_BTF,
            lens_B=torch.tensor(lens),
            tokens_BU=tokens_BU,
            token_lens_B=torch.tensor([len(label) for label in labels]),
            labelled_B=torch.tensor(labelled),
            texts=texts,
            pieces=pieces,
        )

    def _encode(self, row: str, text: str) -> list[int]:
        assert self.tokenizer is not None, "without tokens there are no labels"
        kept = self._labels.get(row)
        if kept is None:
            kept = self.tokenizer.encode(text)
            if self._has(row):  # else joined anew each time
                self._labels.offer(row, kept, 8 * len(kept) + _ENTRY_BYTES)
        return kept

    def _has(self, row: str) -> bool:
        try:
            self._table.number(row)
        except KeyError:
            return False
        return True

    def _is_labelled(self, cut_id: str) -> bool:
        return bool(self._labelled_N[self._table.number(cut_id)])

    def _cut(self, cut_id: str) -> Cut:
        cut = self._cuts.get(cut_id)
        if cut is None:
            cut = self._table[self._table.number(cut_id)]
            if isinstance(self._table, StoredCuts):
                self._cuts.offer(cut_id, cut, _CUT_BYTES)
        return cut

    def _load_features(self, cut_id: str) -> Tensor:
        cached = self._features.get(cut_id)
        if cached is not None:
            return cached
        with _reading("features", cut_id, "rerun the features stage with --force"):
            # Not cut.load_features, which finds no frame in a cut of less than 0.005 s.
            array = self._cut(cut_id).features.load()  # type: ignore[attr-defined]
        features = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        self._features.offer(cut_id, features, features.numel() * features.element_size())
        return features

    def _load_audio(self, cut_id: str) -> np.ndarray:
        """(S,) float32; in memory as 16 bits, as most files have them."""
        kept = self._audio.get(cut_id)
        if kept is None:
            with _reading("audio", cut_id, "rerun the recipe from --stage 0"):
                [samples_S] = padded(np.asarray(self._cut(cut_id).load_audio()), SAMPLE_RATE)
            kept = np.round(samples_S * _FULL_SCALE).clip(-_FULL_SCALE, _FULL_SCALE).astype(np.int16)
            self._audio.offer(cut_id, kept, kept.nbytes)
        return kept.astype(np.float32) / _FULL_SCALE


def _carrying(batch: Batch, audio: Sequence[np.ndarray]) -> Batch:
    """The batch with the audio (S,) of each row."""
    samples_BS = torch.zeros(len(audio), max(map(len, audio)))
    for row, samples_S in zip(samples_BS, audio, strict=True):
        row[: len(samples_S)] = torch.from_numpy(np.asarray(samples_S, np.float32))
    return replace(batch, samples_BS=samples_BS, sample_lens_B=torch.tensor([len(a) for a in audio]))


@contextlib.contextmanager
def _reading(what: str, cut_id: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong with a file (it is missing, cut short, of another kind) is about that file."""
    try:
        yield
    except Exception as error:
        said = f"can't read its {what}: {type(error).__name__}: {reason(error)}"
        raise DataError(said, where=cut_id, remedy=remedy) from error


def _check(cuts: Cuts) -> None:
    if not len(cuts):
        raise DataError(
            "no utterances to make batches of",
            remedy="look at the subset's rule and at manifests/summary.json",
        )
    if fault := cuts.fault():
        raise fault


def transcript_of(cut: Cut) -> str:
    """What is said in a cut; empty where it is not known."""
    return " ".join(s.text for s in cut.supervisions if s.text)


def _fill(durations_s: np.ndarray, limit_s: float) -> list[int]:
    """Ends of consecutive batches in which count times longest stays within ``limit_s``."""
    most = limit_s * (1 + 1e-9)
    ends: list[int] = []
    start = 0
    while start < len(durations_s):
        first = float(durations_s[start])
        # no more fit, since the first is at most the longest
        room = int(min(most / first, len(durations_s))) + 2 if first > 0 else len(durations_s)
        longest = np.maximum.accumulate(durations_s[start : start + room])
        over = longest * np.arange(1, len(longest) + 1) > most
        over[0] = False
        start += int(over.argmax()) if over.any() else len(longest)
        ends.append(start)
    return ends


def _level(durations_s: np.ndarray, limit_s: float, ends: list[int]) -> list[int]:
    """Equally many batches as ``ends``, of about equal size.

    Filling to the limit leaves a remainder, and a last batch of one utterance would weigh as much
    in an optimiser step as a full one. So: the lowest limit that needs no more batches.
    """
    low, high, best = 0.0, limit_s, ends
    for _ in range(6):
        middle = (low + high) / 2
        tried = _fill(durations_s, middle)
        if len(tried) <= len(ends):
            high, best = middle, tried
        else:
            low = middle
    return best if len(best) == len(ends) else ends
