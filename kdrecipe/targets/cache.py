"""What a teacher says about utterances, computed once and kept on disk.

A cache is a directory::

    key.json      what the targets were computed from
    cuts.jsonl.gz Lhotse cuts; the arrays of a cut are its custom fields
    arrays/       numpy files

A cache of other targets than those asked for is refused, and so is one whose frames do not fit the
batch. Nothing is ever cropped. (Lhotse's ``perturb_speed`` keeps a cut's arrays as they were.)

Targets that depend on a text are stored for the transcript, for the teacher's own hypothesis, or
both, as the students need: one may have a cut's transcript, another may not.

B utterances, T frames, U tokens, P = U + 1 positions between them, K kept classes, V vocabulary, D width.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lhotse.cut import Cut, CutSet
from lhotse.features.io import NumpyFilesWriter
from lhotse.utils import fastcopy
from torch import Tensor, nn

from kdrecipe.artifacts import fingerprint, read_json, write_json
from kdrecipe.data.features import FRAME_SHIFT_S, write_cuts
from kdrecipe.data.memory import Kept, MemoryBudget
from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import (
    FORCED_KINDS,
    FRAME_KINDS,
    Batch,
    Hidden,
    LatticePosteriors,
    Piece,
    Posteriors,
    Targets,
    TargetSpec,
)
from kdrecipe.targets.identity import audio_changed, identify, perturbed
from kdrecipe.targets.live import LiveTargets, padded_tokens
from kdrecipe.targets.rows import in_row

FORMAT = 2
DEFAULT_FRAME_SHIFT_S = 0.04
RECOMPUTE = "compute the targets again (stage 4)"

Along = Literal["", "transcript", "own"]
"""The text that a target depends on; '' for those that need none."""


class Batches(Protocol):
    """Batches of cuts: :class:`kdrecipe.data.batches.CutBatches`."""

    def epoch(self, number: int) -> list[list[str]]:
        """Ids of the cuts in each batch."""

    def load(self, ids: Sequence[str]) -> Batch:
        """One of them, on the CPU."""


class TargetCache:
    """A teacher's targets on disk for a set of cuts, kept in memory after the first use.

    Args:
        directory: where they are stored.
        specs: what there is of each cut.
        cuts: the cuts with their arrays; each must be as it was when they were computed.
        max_memory_bytes: kept in memory at most, the rest is read again each time; None: as much as
            this process's budget allows, see :mod:`kdrecipe.data.memory`.

    Raises:
        DataError: cuts were perturbed after their targets had been computed.
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TargetSpec],
        cuts: CutSet,
        *,
        max_memory_bytes: int | None = None,
    ) -> None:
        self.directory = directory
        self.specs = tuple(specs)
        self._cuts = {cut.id: cut for cut in _listed(cuts)}
        budget = None if max_memory_bytes is None else MemoryBudget(max_memory_bytes)
        self._kept: Kept[dict[str, np.ndarray]] = Kept(budget)
        _refuse([p for cut in self._cuts.values() if (p := perturbed(cut, _record(cut)))])

    def __len__(self) -> int:
        return len(self._cuts)

    @classmethod
    def open(
        cls,
        directory: Path,
        expected_key_parts: Mapping[str, Any],
        *,
        specs: Sequence[TargetSpec] = (),
        cuts: CutSet | None = None,
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
        cached = [TargetSpec(**spec) for spec in key["specs"]]
        problems = _stale(key["parts"], expected_key_parts, directory)
        if key["format"] != FORMAT:
            problems.append(Problem(f"format {key['format']}, not {FORMAT}", str(directory), RECOMPUTE))
        problems += [p for need in specs if (p := _uncovered(need, cached, directory))]
        _refuse(problems)
        stored = CutSet.from_file(directory / "cuts.jsonl.gz")
        cache = cls(directory, cached, stored, max_memory_bytes=max_memory_bytes)
        if cuts is not None:
            cache.check_cuts(cuts)
        return cache

    def check_cuts(self, cuts: CutSet) -> None:
        """Refuse cuts that are not those the targets were computed from.

        Audio files are read again only if their size or time of change differ.

        Raises:
            DataError: listing all cuts that are missing, perturbed, or whose audio has changed.
        """
        problems = []
        for cut in _listed(cuts):
            if cut.id not in self._cuts:
                problems.append(Problem("there are no cached targets for this cut", cut.id, RECOMPUTE))
                continue
            record = _record(self._cuts[cut.id])
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
                or its targets follow another text than the batch needs, or can't be joined.
        """
        rows = [batch.pieces_of(row) for row in range(len(batch))]
        for piece in itertools.chain.from_iterable(rows):
            self._check_piece(piece)
        labelled = batch.labelled_B.tolist()
        sides: list[Along] = ["transcript" if known else "own" for known in labelled]
        lens = batch.lens_B.tolist()
        items = {spec.key: self._collate(rows, lens, sides, spec) for spec in self.specs}
        found = Targets(items)
        if any(spec.kind in FORCED_KINDS for spec in self.specs):
            tokens_BU, token_lens_B = padded_tokens(self._texts(batch, sides))
            found = replace(found, tokens_BU=tokens_BU, token_lens_B=token_lens_B)
        device = batch.features_BTF.device
        return found.map(lambda x: x.to(device))

    def _check_piece(self, piece: Piece) -> None:
        if piece.id not in self._cuts:
            raise DataError("there are no cached targets for this cut", where=piece.id, remedy=RECOMPUTE)
        expected = _record(self._cuts[piece.id])["num_features"]
        if piece.num_frames != expected:
            raise DataError(
                f"{piece.num_frames} feature frames, its cached targets were computed from {expected}",
                where=piece.id,
                remedy=f"{RECOMPUTE}; perturb speed before, as separate cuts",
            )

    def _texts(self, batch: Batch, sides: Sequence[Along]) -> list[list[int]]:
        """The texts that the targets follow; a transcript must be the batch's own."""
        texts: list[list[int]] = []
        rows = zip(sides, batch.tokens_BU.tolist(), batch.token_lens_B.tolist(), strict=True)
        for row, (along, tokens, length) in enumerate(rows):
            (piece,) = batch.pieces_of(row)  # targets along a text are not joined
            text = [int(t) for t in self._arrays(piece.id, f"tokens__{along}")["tokens"]]
            if along == "transcript" and text != tokens[:length]:
                what = "its transcript has changed since its targets were computed"
                raise DataError(what, where=piece.id, remedy=RECOMPUTE)
            texts.append(text)
        return texts

    def _arrays(self, cut_id: str, name: str) -> dict[str, np.ndarray]:
        """Arrays of one cut under a field's name, by part: log_probs, indices, log_tail; or values."""
        kept = self._kept.get((cut_id, name))
        if kept is not None:
            return kept
        prefix = f"target_{name}_"
        manifests = {
            n[len(prefix) :]: a for n, a in self._cuts[cut_id].custom.items() if n.startswith(prefix)
        }
        if not manifests:
            what = "its cached targets do not follow its transcript"
            if name.endswith("own"):
                what = "its cached targets do not follow the teacher's own hypothesis"
            raise DataError(what, where=cut_id, remedy=RECOMPUTE)
        # Lhotse's cut.load_custom() would crop to the cut's duration; this reads what was written.
        arrays = {part: a.with_path_prefix(self.directory).load() for part, a in manifests.items()}
        self._kept.offer((cut_id, name), arrays, sum(a.nbytes for a in arrays.values()))
        return arrays

    def _collate(
        self,
        rows: Sequence[Sequence[Piece]],
        lens: Sequence[int],
        sides: Sequence[Along],
        spec: TargetSpec,
    ) -> Posteriors | Hidden | LatticePosteriors:
        forced = spec.kind in FORCED_KINDS
        stride = round((spec.frame_shift_s or DEFAULT_FRAME_SHIFT_S) / FRAME_SHIFT_S)
        arrays = []
        for pieces, num_frames, along in zip(rows, lens, sides, strict=True):
            said = [self._arrays(piece.id, _name(spec, along if forced else "")) for piece in pieces]
            arrays.append(in_row(said, pieces, num_frames, spec, stride))
        parts = {name: _pad([a[name] for a in arrays]) for name in arrays[0]}
        lens_B = torch.tensor([len(next(iter(a.values()))) for a in arrays])
        if spec.kind == "hidden":
            return Hidden(parts["values"], lens_B)
        if spec.kind == "rnnt_lattice":
            token_lens_B = torch.tensor([a["log_probs"].shape[1] - 1 for a in arrays])
            return LatticePosteriors(parts["log_probs"], lens_B, token_lens_B)
        return Posteriors(parts["log_probs"], lens_B, parts.get("indices"), parts.get("log_tail"))


def write_targets(
    cuts: CutSet,
    batches: Batches,
    model: nn.Module,
    specs: Sequence[TargetSpec],
    out_dir: Path,
    *,
    key_parts: Mapping[str, Any],
    own_ids: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> TargetCache:
    """Compute and store a teacher's targets.

    Args:
        cuts: with recordings; each must occur in ``batches``.
        batches: the same cuts; those of epoch 0 are loaded and moved to the model's device.
        model: the teacher.
        specs: what to store.
        out_dir: a directory; ``key.json`` is written last.
        key_parts: what determines the targets besides the audio, JSON-like: hash of the teacher's
            bundle, of the tokens, the feature configuration.
        own_ids: cuts whose targets along a text are stored along the teacher's own hypothesis, too,
            since some student may not have their transcripts. Those without one always are.
        progress: called with the number of cuts done since the last call.

    Raises:
        DataError: a cut is missing from the batches, or a value does not fit the type to store.
    """
    live = LiveTargets(model, specs)
    forced = any(spec.kind in FORCED_KINDS for spec in specs)
    device = next(model.parameters()).device
    by_id = {cut.id: cut for cut in _listed(cuts)}
    done: dict[str, Cut] = {}
    (out_dir / "arrays").mkdir(parents=True, exist_ok=True)
    writer = NumpyFilesWriter(out_dir / "arrays")
    for ids in batches.epoch(0):
        batch = batches.load(ids).map(lambda x: x.to(device))
        if unknown := [cut_id for cut_id in batch.ids if cut_id not in by_id]:
            raise DataError("a batch holds a cut that is not among the cuts", where=unknown[0])
        custom: dict[str, dict[str, Any]] = {
            cut_id: {"targets": {**identify(by_id[cut_id]), "num_features": int(num_features)}}
            for cut_id, num_features in zip(batch.ids, batch.lens_B.tolist(), strict=True)
        }
        plain: list[tuple[Batch, Along]] = [(batch, "")]
        for part, along in _sides(batch, own_ids) if forced else plain:
            found = live.targets(part).map(lambda x: x.cpu())
            for row, cut_id in enumerate(part.ids):
                for name, (values, shift_s) in _stored(found, row, specs, along, cut_id).items():
                    if name not in custom[cut_id]:  # frames do not depend on the text
                        custom[cut_id][name] = _store(writer, cut_id, name, values, shift_s)
        # Without features: their place is not the targets', which must be the same bytes wherever they lie.
        done |= {i: fastcopy(by_id[i], features=None, custom=custom[i]) for i in batch.ids}
        if progress is not None:
            progress(len(batch))
    _refuse([Problem("no batch holds this cut", cut_id) for cut_id in by_id if cut_id not in done])
    stored = CutSet.from_cuts([done[cut_id] for cut_id in by_id])
    write_cuts(out_dir / "cuts.jsonl.gz", stored)
    key = {"format": FORMAT, "parts": dict(key_parts), "specs": [asdict(spec) for spec in specs]}
    write_json(out_dir / "key.json", key)
    return TargetCache(out_dir, specs, stored)


def _sides(batch: Batch, own_ids: Collection[str]) -> list[tuple[Batch, Along]]:
    """The utterances that follow their transcripts, and those that follow the teacher's own words."""
    own = torch.tensor([cut_id in own_ids for cut_id in batch.ids]) | ~batch.labelled_B.cpu()
    own_B = own.to(batch.labelled_B.device)
    sides: list[tuple[Batch, Along]] = []
    if bool(batch.labelled_B.any()):
        sides.append((batch.select(batch.labelled_B), "transcript"))
    if bool(own_B.any()):
        unlabelled = replace(batch, labelled_B=torch.zeros_like(batch.labelled_B))
        sides.append((unlabelled.select(own_B), "own"))
    return sides


def _listed(cuts: Any) -> list[Any]:
    """The cuts as a list; Lhotse's annotations do not let a CutSet be iterated."""
    return list(cuts)


def _record(cut: Any) -> dict[str, Any]:
    """What is known of the audio that a cut's targets were computed from."""
    record: dict[str, Any] = (cut.custom or {}).get("targets") or {}
    if not record:
        raise DataError("the cut holds no cached targets", where=cut.id, remedy=RECOMPUTE)
    return record


def _name(spec: TargetSpec, along: Along) -> str:
    """Name of a target within a cut's custom fields, ahead of the part's."""
    return re.sub(r"\W", "_", f"{spec.kind}_{spec.tap}_{along}")


def _stored(
    targets: Targets, row: int, specs: Sequence[TargetSpec], along: Along, cut_id: str
) -> dict[str, tuple[np.ndarray, float | None]]:
    """All arrays of one utterance by field name, with the frame shift of those that go by frames."""
    arrays: dict[str, tuple[np.ndarray, float | None]] = {}
    for spec in specs:
        name = _name(spec, along if spec.kind in FORCED_KINDS else "")
        shift_s = (spec.frame_shift_s or DEFAULT_FRAME_SHIFT_S) if spec.kind in FRAME_KINDS else None
        for part, values in _parts(targets.items[spec.key], row, spec).items():
            _check_finite(values, spec, cut_id)
            arrays[f"target_{name}_{part}"] = values, shift_s
    if along and targets.tokens_BU is not None and targets.token_lens_B is not None:
        tokens = targets.tokens_BU[row, : int(targets.token_lens_B[row])]
        arrays[f"target_tokens__{along}_tokens"] = tokens.numpy().astype(np.int32), None
    return arrays


def _store(
    writer: NumpyFilesWriter, cut_id: str, name: str, values: np.ndarray, shift_s: float | None
) -> Any:
    # Cut ids may contain characters that file names can't; the directory may be moved.
    key = f"{fingerprint(cut_id)[:16]}-{name}"
    if shift_s is None:
        return fastcopy(writer.store_array(key, values), storage_path="arrays")
    stored: Any = writer.store_array(key, values, frame_shift=shift_s, temporal_dim=0, start=0)
    return fastcopy(stored, array=fastcopy(stored.array, storage_path="arrays"))


def _parts(
    target: Posteriors | Hidden | LatticePosteriors, row: int, spec: TargetSpec
) -> dict[str, np.ndarray]:
    """The arrays of one utterance as they are stored."""
    length = int(target.lens_B[row])

    def values(tensor: Tensor, dtype: str) -> np.ndarray:
        return np.ascontiguousarray(tensor[row, :length].numpy().astype(dtype))

    if isinstance(target, Hidden):
        parts = {"values": values(target.values_BTD, spec.dtype)}
    elif isinstance(target, LatticePosteriors):
        positions = int(target.token_lens_B[row]) + 1
        parts = {"log_probs": values(target.log_probs_BTP2[:, :, :positions], spec.dtype)}
    else:
        parts = {"log_probs": values(target.log_probs_BTK, spec.dtype)}
        if target.indices_BTK is not None and target.log_tail_BT is not None:
            small = int(target.indices_BTK.max()) <= np.iinfo(np.int16).max
            parts["indices"] = values(target.indices_BTK, "int16" if small else "int32")
            parts["log_tail"] = values(target.log_tail_BT, spec.dtype)
    return parts


def _pad(arrays: Sequence[np.ndarray]) -> Tensor:
    """Arrays of like rank to one tensor, 0 behind each in every direction; float32, or int64 for integers."""
    shape = np.max([a.shape for a in arrays], axis=0)
    dtype = np.float32 if np.issubdtype(arrays[0].dtype, np.floating) else np.int64
    padded = np.zeros((len(arrays), *shape), dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[tuple(slice(n) for n in array.shape)] = array
    return torch.from_numpy(padded)


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
