"""What a teacher says about utterances, computed once and kept on disk.

A cache is a directory::

    key.json                 what the targets were computed from; written last
    index.jsonl, 00000.bin   the arrays of each cut, see :mod:`kdrecipe.targets.shards`

A cache of other targets than those asked for is refused, and so is one whose frames do not fit the
batch. Nothing is ever cropped. (Lhotse's ``perturb_speed`` keeps a cut's arrays as they were, so they are
not kept with the cuts.)

Targets that depend on a text are stored for each text that some student hears: the transcript, a hypothesis
that is its label, the teacher's own words where it has neither. Texts are told apart by their tokens.

B utterances, T frames, U tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from kdrecipe.artifacts import read_json, sha256_bytes, write_json
from kdrecipe.data.features import FRAME_SHIFT_S
from kdrecipe.data.memory import Kept, MemoryBudget
from kdrecipe.data.stored_cuts import Cuts, HeldCuts, StoredCuts
from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import FORCED_KINDS, Batch, Piece, Targets, TargetSpec, Teacher
from kdrecipe.targets.identity import audio_changed, identify, perturbed
from kdrecipe.targets.kinds import Arrays, kind_of
from kdrecipe.targets.live import LiveTargets, padded_tokens
from kdrecipe.targets.rows import in_row
from kdrecipe.targets.shards import Shards, ShardWriter

if TYPE_CHECKING:
    from lhotse.cut import Cut

FORMAT = 3
DEFAULT_FRAME_SHIFT_S = 0.04
RECOMPUTE = "compute the targets again (stage 4)"

OWN = "own"
Along = str
"""The text that a target depends on: :func:`text_key` of a label, :data:`OWN`; '' where none is needed."""
Labels = Mapping[str, tuple[str, Sequence[int]]]
"""Cut -> a text that is its label, and the tokens of that."""


def text_key(tokens: Sequence[int]) -> str:
    """Identifies a text by its tokens."""
    return sha256_bytes(np.asarray(tokens, np.int32).tobytes())[:12]


class Batches(Protocol):
    """Batches of cuts: :class:`kdrecipe.data.batches.CutBatches`."""

    def epoch(self, number: int) -> Sequence[list[str]]:
        """Ids of the cuts in each batch."""

    def load(self, ids: Sequence[str]) -> Batch:
        """One of them, on the CPU."""


class TargetCache:
    """A teacher's targets on disk for a set of cuts, kept in memory after the first use.

    Args:
        directory: what :func:`write_targets` wrote, see :meth:`open`.
        specs: what there is of each cut.
        max_memory_bytes: kept in memory at most, the rest is read again each time; None: as much as
            this process's budget allows, see :mod:`kdrecipe.data.memory`.
    """

    hears_audio = False

    def __init__(
        self, directory: Path, specs: Sequence[TargetSpec], *, max_memory_bytes: int | None = None
    ) -> None:
        self.directory = directory
        self.specs = tuple(specs)
        self._shards = Shards(directory)
        budget = None if max_memory_bytes is None else MemoryBudget(max_memory_bytes)
        self._kept: Kept[dict[str, np.ndarray]] = Kept(budget)
        self._num_features: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._shards)

    @classmethod
    def open(
        cls,
        directory: Path,
        expected_key_parts: Mapping[str, Any],
        *,
        specs: Sequence[TargetSpec] = (),
        cuts: Iterable[Cut] | None = None,
        max_memory_bytes: int | None = None,
    ) -> TargetCache:
        """Open a cache, if it is the right one.

        Args:
            directory: what :func:`write_targets` wrote.
            expected_key_parts: those of its ``key_parts`` that must be the same as then.
            specs: what will be asked of it.
            cuts: the cuts to train on, see :meth:`check_cuts`.
            max_memory_bytes: see the class.

        Raises:
            DataError: naming every part that differs, every missing target, every changed cut.
        """
        key = read_json(directory / "key.json")
        if key["format"] != FORMAT:
            raise DataError(f"format {key['format']}, not {FORMAT}", where=str(directory), remedy=RECOMPUTE)
        cached = [TargetSpec(**spec) for spec in key["specs"]]
        problems = _stale(key["parts"], expected_key_parts, directory)
        problems += [p for need in specs if (p := _uncovered(need, cached, directory))]
        _refuse(problems)
        cache = cls(directory, cached, max_memory_bytes=max_memory_bytes)
        if cuts is not None:
            cache.check_cuts(cuts)
        return cache

    def check_cuts(self, cuts: Iterable[Cut]) -> None:
        """Refuse cuts that are not those the targets were computed from.

        Audio files are read again only if their size or time of change differ.

        Raises:
            DataError: listing all cuts that are missing, perturbed, or whose audio has changed.
        """
        problems = []
        for cut in cuts:
            if cut.id not in self._shards:
                problems.append(Problem("there are no cached targets for this cut", cut.id, RECOMPUTE))
                continue
            record = self._shards.item(cut.id)["cut"]
            if problem := perturbed(cut, record):
                problems.append(problem)
            elif audio_changed(cut, record):
                what = "the audio has changed since its targets were computed"
                problems.append(Problem(what, cut.id, RECOMPUTE))
        _refuse(problems)

    def targets(self, batch: Batch) -> Targets:
        """All targets for ``batch``: those of its cuts, put where each of them is in its row.

        What lies between and around them counts as silence, see :func:`kdrecipe.targets.rows.in_row`.

        Raises:
            DataError: a cut is missing, has another number of feature frames or another transcript,
                or its targets follow another text than the batch needs, or can't be joined; a file is
                damaged.
        """
        rows = [batch.pieces_of(row) for row in range(len(batch))]
        for piece in itertools.chain.from_iterable(rows):
            self._check_piece(piece)
        labelled = batch.labelled_B.tolist()
        sides = [key if known else OWN for key, known in zip(_text_keys(batch), labelled, strict=True)]
        lens = batch.lens_B.tolist()
        items = {spec.key: self._collate(rows, lens, sides, spec) for spec in self.specs}
        found = Targets(items)
        if any(spec.kind in FORCED_KINDS for spec in self.specs):
            tokens_BU, token_lens_B = padded_tokens(self._texts(batch, sides))
            found = replace(found, tokens_BU=tokens_BU, token_lens_B=token_lens_B)
        device = batch.features_BTF.device
        return found.map(lambda x: x.to(device))

    def _check_piece(self, piece: Piece) -> None:
        if piece.id not in self._shards:
            raise DataError("there are no cached targets for this cut", where=piece.id, remedy=RECOMPUTE)
        if piece.id not in self._num_features:
            self._num_features[piece.id] = self._shards.item(piece.id)["num_features"]
        expected = self._num_features[piece.id]
        if piece.num_frames != expected:
            raise DataError(
                f"{piece.num_frames} feature frames, its cached targets were computed from {expected}",
                where=piece.id,
                remedy=f"{RECOMPUTE}; perturb speed before, as separate cuts",
            )

    def _texts(self, batch: Batch, sides: Sequence[Along]) -> list[list[int]]:
        """The texts that the targets follow."""
        pieces = [batch.pieces_of(row)[0] for row in range(len(batch))]  # along a text, none are joined
        arrays = [self._arrays(p.id, _prefix("tokens", a)) for p, a in zip(pieces, sides, strict=True)]
        return [[int(token) for token in found["tokens"]] for found in arrays]

    def _arrays(self, cut_id: str, prefix: str) -> Arrays:
        """Arrays of one cut whose names begin so, by part: log_probs, indices, log_tail; or values."""
        kept = self._kept.get((cut_id, prefix))
        if kept is not None:
            return kept
        arrays = self._shards.arrays(cut_id, prefix)
        if not arrays:
            what = "its cached targets follow another text than its label: that, or the tokens, have changed"
            if f"@{OWN}/" in prefix:
                what = "its cached targets do not follow the teacher's own hypothesis"
            raise DataError(what, where=cut_id, remedy=RECOMPUTE)
        self._kept.offer((cut_id, prefix), arrays, sum(a.nbytes for a in arrays.values()))
        return arrays

    def _collate(
        self,
        rows: Sequence[Sequence[Piece]],
        lens: Sequence[int],
        sides: Sequence[Along],
        spec: TargetSpec,
    ) -> Any:
        stride = round((spec.frame_shift_s or DEFAULT_FRAME_SHIFT_S) / FRAME_SHIFT_S)
        arrays = []
        for pieces, num_features, along in zip(rows, lens, sides, strict=True):
            said = [self._arrays(piece.id, _prefix(spec.key, _along(spec, along))) for piece in pieces]
            arrays.append(in_row(said, pieces, num_features, spec, stride))
        return kind_of(spec).collated(arrays)


def write_targets(
    cuts: Iterable[Cut],
    batches: Batches,
    teacher: Teacher,
    specs: Sequence[TargetSpec],
    out_dir: Path,
    *,
    key_parts: Mapping[str, Any],
    own_ids: Collection[str] = (),
    labels: Sequence[Labels] = (),
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> TargetCache:
    """Compute and store a teacher's targets; resumes after the last batch that was stored whole.

    Args:
        cuts: with recordings; each must occur in ``batches``.
        batches: the same cuts; those of epoch 0 are loaded and moved to ``device``.
        teacher: loaded onto ``device``.
        specs: what to store.
        out_dir: a directory; ``key.json`` is written last.
        key_parts: what determines the targets besides the audio, JSON-like: hash of the teacher's
            files, of the tokens, the feature configuration.
        own_ids: cuts whose targets along a text are stored along the teacher's own hypothesis, too,
            since some student may not have their transcripts. Those with no text at all always are.
        labels: texts in place of transcripts, each a student's, along which they are stored, too.
        device: where batches are sent.
        progress: called with the number of cuts done since the last call.

    Raises:
        DataError: a cut is missing from the batches, or a value does not fit the type to store.
    """
    live = LiveTargets(teacher, specs)
    table: Cuts = cuts if isinstance(cuts, StoredCuts) else HeldCuts(cuts)
    planned = batches.epoch(0)
    _check_plan(table, planned)
    with ShardWriter(out_dir) as writer:
        for ids in planned:
            if not writer.written.issuperset(ids):
                batch = batches.load(ids)
                found = _said(live, batch.map(lambda x: x.to(device)), own_ids, labels)
                lens = dict(zip(batch.ids, batch.lens_B.tolist(), strict=True))
                writer.add(
                    [
                        ({"id": i, "num_features": lens[i], "cut": identify(table[table.number(i)])}, arrays)
                        for i, arrays in found.items()
                    ]
                )
            if progress is not None:
                progress(len(ids))
    key = {"format": FORMAT, "parts": dict(key_parts), "specs": [asdict(spec) for spec in specs]}
    write_json(out_dir / "key.json", key)
    return TargetCache(out_dir, specs)


def _check_plan(cuts: Cuts, planned: Sequence[list[str]]) -> None:
    """DataError where the batches are of other cuts, or not of all."""
    held = np.zeros(len(cuts), bool)
    for cut_id in itertools.chain.from_iterable(planned):
        try:
            held[cuts.number(cut_id)] = True
        except KeyError:
            raise DataError("a batch holds a cut that is not among the cuts", where=cut_id) from None
    _refuse([Problem("no batch holds this cut", cuts.id(i)) for i in np.flatnonzero(~held).tolist()])


def _said(
    live: LiveTargets, batch: Batch, own_ids: Collection[str], labels: Sequence[Labels]
) -> dict[str, dict[str, np.ndarray]]:
    """Cut id -> its arrays by name, in the order of the batch."""
    arrays: dict[str, dict[str, np.ndarray]] = {cut_id: {} for cut_id in batch.ids}
    forced = any(spec.kind in FORCED_KINDS for spec in live.specs)
    plain = [(batch, [""] * len(batch))]
    for part, sides in _sides(batch, own_ids, labels) if forced else plain:
        found = live.targets(part).map(lambda x: x.cpu())
        for row, (cut_id, along) in enumerate(zip(part.ids, sides, strict=True)):
            for name, values in _stored(found, row, live.specs, along, cut_id).items():
                arrays[cut_id].setdefault(name, values)  # frames do not depend on the text
    return arrays


def _sides(
    batch: Batch, own_ids: Collection[str], labels: Sequence[Labels]
) -> list[tuple[Batch, list[Along]]]:
    """The utterances that follow transcripts, labels, and the teacher's own words; the text of each."""
    parts = [batch.select(batch.labelled_B)] if bool(batch.labelled_B.any()) else []
    parts += [_relabelled(batch, texts) for texts in labels if not texts.keys().isdisjoint(batch.ids)]
    sides = [(part, _text_keys(part)) for part in parts]
    known = {cut_id for part in parts for cut_id in part.ids}
    own = [cut_id in own_ids or cut_id not in known for cut_id in batch.ids]
    if any(own):
        unlabelled = replace(batch, labelled_B=torch.zeros_like(batch.labelled_B))
        part = unlabelled.select(torch.tensor(own, device=batch.labelled_B.device))
        sides.append((part, [OWN] * len(part)))
    return sides


def _relabelled(batch: Batch, texts: Labels) -> Batch:
    """The utterances that have a label, with it in place of the transcript."""
    device = batch.labelled_B.device
    part = batch.select(torch.tensor([cut_id in texts for cut_id in batch.ids], device=device))
    tokens_BU, token_lens_B = padded_tokens([texts[cut_id][1] for cut_id in part.ids])
    return replace(
        part,
        tokens_BU=tokens_BU.to(device),
        token_lens_B=token_lens_B.to(device),
        labelled_B=torch.ones_like(part.labelled_B),
        texts=[texts[cut_id][0] for cut_id in part.ids],
    )


def _text_keys(batch: Batch) -> list[Along]:
    rows = zip(batch.tokens_BU.tolist(), batch.token_lens_B.tolist(), strict=True)
    return [text_key(tokens[:length]) for tokens, length in rows]


def _along(spec: TargetSpec, along: Along) -> Along:
    return along if spec.kind in FORCED_KINDS else ""


def _prefix(key: str, along: Along) -> str:
    """What the names of a target's arrays begin with; the part follows."""
    return f"{key}@{along}/" if along else f"{key}/"


def _stored(
    targets: Targets, row: int, specs: Sequence[TargetSpec], along: Along, cut_id: str
) -> dict[str, np.ndarray]:
    """All arrays of one utterance by name."""
    arrays: dict[str, np.ndarray] = {}
    for spec in specs:
        for part, values in kind_of(spec).parts(targets.items[spec.key], row, spec).items():
            _check_finite(values, spec, cut_id)
            arrays[_prefix(spec.key, _along(spec, along)) + part] = values
    if along and targets.tokens_BU is not None and targets.token_lens_B is not None:
        tokens = targets.tokens_BU[row, : int(targets.token_lens_B[row])]
        arrays[_prefix("tokens", along) + "tokens"] = tokens.numpy().astype(np.int32)
    return arrays


def _check_finite(values: np.ndarray, spec: TargetSpec, cut_id: str) -> None:
    if not np.isfinite(values).all():
        raise DataError(
            f"a value of {spec.key} is not finite as {spec.dtype}",
            where=cut_id,
            remedy="float16 ends at 65504: store hidden states as float32, or take a tap behind a norm",
        )


def _stale(parts: Mapping[str, Any], expected: Mapping[str, Any], directory: Path) -> list[Problem]:
    """A problem for each part of the key that is not as expected."""
    plain = json.loads(json.dumps(dict(expected), default=str))
    return [
        Problem(
            f"the cached targets are stale: {name} was {parts.get(name)} when they were made, is {now} now",
            str(directory),
            RECOMPUTE,
        )
        for name, now in plain.items()
        if name not in parts or parts[name] != now
    ]


def _uncovered(need: TargetSpec, cached: Sequence[TargetSpec], directory: Path) -> Problem | None:
    """The problem of a need that the cache does not meet."""
    found = [spec for spec in cached if spec.key == need.key]
    if not found:
        what = f"the cache holds no {need.key}, only {', '.join(spec.key for spec in cached)}"
        return Problem(what, str(directory), RECOMPUTE)
    has = found[0]
    if has.top_k is not None and (need.top_k is None or need.top_k > has.top_k):
        what = f"the cache holds the best {has.top_k} classes of {need.key}, {need.top_k or 'all'} are needed"
        return Problem(what, str(directory), RECOMPUTE)
    mismatch = need.mismatch(has)
    return Problem(mismatch, str(directory), RECOMPUTE) if mismatch else None


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise DataError(problems)
