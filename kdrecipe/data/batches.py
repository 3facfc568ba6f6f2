"""Batches: a plan for every epoch that depends on (seed, epoch) alone, and features kept in memory.

B utterances, T feature frames, F bins, U tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdrecipe.corpus.audio import padded
from kdrecipe.corpus.gather import reason
from kdrecipe.data.memory import Kept, MemoryBudget
from kdrecipe.errors import DataError
from kdrecipe.interfaces import BLANK_ID, SAMPLE_RATE, Batch, Piece, TokenTable

if TYPE_CHECKING:  # Lhotse is slow to import, and only its cuts' attributes are used here
    from lhotse.cut import Cut

    from kdrecipe.data.augment import Augmenter

_FULL_SCALE = 32767.0

# Durations are multiplied by a random factor of up to this much before sorting: batches then hold
# utterances of about equal length (little padding), yet other ones in every epoch.
_JITTER = 0.1


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
        cuts: Iterable[Cut],
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
        listed = list(cuts)
        self._cuts = {cut.id: cut for cut in listed}
        _check(listed, self._cuts)
        self.ids = list(self._cuts)
        self.tokenizer = tokenizer
        self.batch_duration_s = batch_duration_s
        self.seed = seed
        self.shuffle = shuffle
        self._durations_s = np.array([cut.duration for cut in listed])
        self._labelled = {
            cut.id
            for cut in listed
            if (labelled_ids is None or cut.id in labelled_ids) and transcript_of(cut)
        }
        if tokenizer is None:
            self._labelled.clear()
        self._labels: dict[str, list[int]] = {}
        budget = None if cache is None else MemoryBudget(cache)
        self._features: Kept[Tensor] = Kept(budget)
        self._audio: Kept[np.ndarray] = Kept(budget)
        self._augmenter, self._extract = augmenter, extract
        self._with_audio = with_audio

    # ------------------------------------------------------------ plans

    def epoch(self, number: int) -> list[list[str]]:
        """The batches of epoch ``number`` (from 0), as lists of cut ids; the same whenever asked."""
        rng = np.random.default_rng([self.seed, number])
        blocks = self._blocks(rng)
        if self.shuffle:
            blocks = [blocks[i] for i in rng.permutation(len(blocks))]
        return [[self.ids[i] for i in block] for block in blocks]

    def num_batches(self, number: int) -> int:
        """``len(self.epoch(number))``, without making the lists."""
        rng = np.random.default_rng([self.seed, number])
        return len(_fill(self._durations_s[self._order(rng)], self.batch_duration_s))

    def longest(self) -> list[str]:
        """The batch that needs the most memory: the longest utterances of all, as many as fit."""
        order = np.argsort(-self._durations_s, kind="stable")
        end = _fill(self._durations_s[order], self.batch_duration_s)[0]
        return [self.ids[i] for i in order[:end]]

    def duration_s(self, ids: Iterable[str]) -> float:
        """Seconds of audio in these cuts, padding not counted."""
        return float(sum(self._cuts[i].duration for i in ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_labelled(self) -> int:
        """Utterances whose text may be used."""
        return len(self._labelled)

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Cut numbers from the longest to the shortest, roughly so when shuffling."""
        spread = rng.uniform(1 - _JITTER, 1 + _JITTER, len(self.ids)) if self.shuffle else 1.0
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
            alike = [i for i in ids if (i in self._labelled) == known]
            durations_s = [self._cuts[i].duration for i in alike]
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
        labelled = [row[0] in self._labelled for row in rows]
        texts = [
            " ".join(transcript_of(self._cuts[i]) for i in row) if known else ""
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
        if row not in self._cuts:  # joined anew each time
            return self.tokenizer.encode(text)
        if row not in self._labels:
            self._labels[row] = self.tokenizer.encode(text)
        return self._labels[row]

    def _load_features(self, cut_id: str) -> Tensor:
        cached = self._features.get(cut_id)
        if cached is not None:
            return cached
        with _reading("features", cut_id, "rerun the features stage with --force"):
            # Not cut.load_features, which finds no frame in a cut of less than 0.005 s.
            array = self._cuts[cut_id].features.load()  # type: ignore[attr-defined]
        features = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        self._features.offer(cut_id, features, features.numel() * features.element_size())
        return features

    def _load_audio(self, cut_id: str) -> np.ndarray:
        """(S,) float32; in memory as 16 bits, as most files have them."""
        kept = self._audio.get(cut_id)
        if kept is None:
            with _reading("audio", cut_id, "rerun the recipe from --stage 0"):
                [samples_S] = padded(np.asarray(self._cuts[cut_id].load_audio()), SAMPLE_RATE)
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


def _check(cuts: Sequence[Cut], by_id: dict[str, Cut]) -> None:
    if not cuts:
        raise DataError(
            "no utterances to make batches of",
            remedy="look at the subset's rule and at manifests/summary.json",
        )
    if len(by_id) != len(cuts):
        raise DataError("the same cut id occurs more than once", remedy="run the prepare stage again")
    if missing := next((cut.id for cut in cuts if not cut.has_features), None):
        raise DataError("the cut has no features", where=missing, remedy="run the features stage")


def transcript_of(cut: Cut) -> str:
    """What is said in a cut; empty where it is not known."""
    return " ".join(s.text for s in cut.supervisions if s.text)


def _fill(durations_s: np.ndarray, limit_s: float) -> list[int]:
    """Ends of consecutive batches in which count times longest stays within ``limit_s``."""
    ends: list[int] = []
    start, longest = 0, 0.0
    for number, duration in enumerate(durations_s.tolist()):
        longest = max(longest, duration)
        if number > start and (number + 1 - start) * longest > limit_s * (1 + 1e-9):
            ends.append(number)
            start, longest = number, duration
    return [*ends, len(durations_s)]


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
