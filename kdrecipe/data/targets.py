"""What teachers say about utterances: computed on the fly, or once and cached on disk.

:class:`LiveTargets` and :class:`TargetCache` give a loss the same object: posteriors cut to the
top k, hidden states, both rounded to the type in which they are stored. Given the same batches they
agree bit for bit; a batch put together differently can move a value by one step of that type, since
matrix products depend on the shapes.

A cache is a directory::

    key.json      what the targets were computed from
    cuts.jsonl.gz Lhotse cuts; the arrays of a cut are its custom TemporalArray fields
    arrays/       numpy files

A cache of other targets than those asked for is refused, and so is one whose frames do not fit the
batch. Nothing is ever cropped. (Lhotse's ``perturb_speed`` keeps a cut's arrays as they were.)

B utterances, T frames, K kept classes, V vocabulary, D width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lhotse.array import TemporalArray
from lhotse.cut import Cut, CutSet
from lhotse.features.io import NumpyFilesWriter
from lhotse.utils import fastcopy
from torch import Tensor, nn

from kdrecipe.artifacts import fingerprint, read_json, write_json
from kdrecipe.data.frames import keep_top
from kdrecipe.data.identity import audio_changed, identify, perturbed
from kdrecipe.errors import DataError, Problem
from kdrecipe.interfaces import Batch, Hidden, ModelOutput, Posteriors, Targets, TargetSpec

FORMAT = 1
KINDS = ("frame_logits", "hidden")  # those that can be computed and cached so far
DEFAULT_FRAME_SHIFT_S = 0.04
DEFAULT_MEMORY_BYTES = 2 << 30
RECOMPUTE = "compute the targets anew (stage 4)"


class Batches(Protocol):
    """Batches of cuts: :class:`kdrecipe.data.batches.CutBatches`."""

    def epoch(self, number: int) -> list[list[str]]:
        """Ids of the cuts in each batch."""

    def load(self, ids: Sequence[str]) -> Batch:
        """One of them, on the CPU."""


# ---------------------------------------------------------------- on the fly


class LiveTargets:
    """A teacher at work: evaluation mode, float32, no gradient.

    Args:
        model: the teacher, on the device of the batches; it is frozen here.
        specs: what it is asked for.

    Raises:
        DataError: a kind of target that can't be computed.
    """

    def __init__(self, model: nn.Module, specs: Sequence[TargetSpec]) -> None:
        for spec in specs:
            if spec.kind not in KINDS:
                raise DataError(
                    f"targets of kind {spec.kind!r} can't be computed", remedy=f"use {' or '.join(KINDS)}"
                )
        self.model = model.eval().requires_grad_(False)
        self.specs = tuple(specs)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """All targets for ``batch``, whose features must not be augmented."""
        self.model.eval()  # whoever shares the module may have set it back
        taps = [spec.tap for spec in self.specs if spec.kind == "hidden"]
        with torch.autocast(batch.features_BTF.device.type, enabled=False):
            out = self.model(batch.features_BTF.float(), batch.lens_B, taps=taps)
        return Targets({spec.key: _target(out, spec) for spec in self.specs})


def _target(out: ModelOutput, spec: TargetSpec) -> Posteriors | Hidden:
    num_frames = int(out.lens_B.max()) if len(out.lens_B) else 0
    padding_BT1 = (torch.arange(num_frames, device=out.lens_B.device) >= out.lens_B[:, None])[..., None]

    def stored(values_BTX: Tensor) -> Tensor:
        """Rounded as on disk, padding 0."""
        rounded = values_BTX[:, :num_frames].to(getattr(torch, spec.dtype)).float()
        return rounded.masked_fill(padding_BT1, 0.0)

    if spec.kind == "hidden":
        return Hidden(stored(out.taps[spec.tap]), out.lens_B)
    all_BTV = out.logits[spec.tap].float().log_softmax(-1)
    top = keep_top(Posteriors(all_BTV, out.lens_B), spec.top_k)
    if top.indices_BTK is None or top.log_tail_BT is None:
        return Posteriors(stored(all_BTV), out.lens_B)
    return Posteriors(
        stored(top.log_probs_BTK),
        out.lens_B,
        top.indices_BTK[:, :num_frames].masked_fill(padding_BT1, 0),
        stored(top.log_tail_BT[..., None])[..., 0],
    )


# ---------------------------------------------------------------- cached


class TargetCache:
    """A teacher's targets on disk for a set of cuts, kept in memory after the first use.

    Args:
        directory: where they lie.
        specs: what there is of each cut.
        cuts: the cuts with their arrays; each must be as it was when they were computed.
        max_memory_bytes: kept in memory at most; the rest is read anew each time.

    Raises:
        DataError: cuts were perturbed after their targets had been computed.
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TargetSpec],
        cuts: CutSet,
        *,
        max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self.directory = directory
        self.specs = tuple(specs)
        self._cuts = {cut.id: cut for cut in _listed(cuts)}
        self._kept: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self._room = max_memory_bytes
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
        max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> TargetCache:
        """Open a cache, if it is the right one.

        Args:
            directory: what :func:`write_targets` wrote.
            expected_key_parts: those of its ``key_parts`` that must be the same as then.
            specs: what will be asked of it.
            cuts: the cuts to train on, see :meth:`check_cuts`.
            max_memory_bytes: kept in memory at most.

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
        """All targets for ``batch``, whose features must be those of the cached cuts.

        Raises:
            DataError: a cut is missing, or has another number of feature frames.
        """
        for cut_id, num_frames in zip(batch.ids, batch.lens_B.tolist(), strict=True):
            if cut_id not in self._cuts:
                raise DataError("there are no cached targets for this cut", where=cut_id, remedy=RECOMPUTE)
            expected = _record(self._cuts[cut_id])["num_features"]
            if num_frames != expected:
                raise DataError(
                    f"{num_frames} feature frames, its cached targets were computed from {expected}",
                    where=cut_id,
                    remedy=f"{RECOMPUTE}; perturb speed before, as cuts of their own",
                )
        items = {spec.key: self._collate(batch.ids, spec) for spec in self.specs}
        device = batch.features_BTF.device
        return Targets(items).map(lambda x: x.to(device))

    def _arrays(self, cut_id: str, spec: TargetSpec) -> dict[str, np.ndarray]:
        """Arrays (T, ...) of one cut by part: log_probs, indices, log_tail; or values."""
        kept = self._kept.get((cut_id, spec.key))
        if kept is not None:
            return kept
        prefix = _field(spec, "")
        manifests = {
            n[len(prefix) :]: a for n, a in self._cuts[cut_id].custom.items() if n.startswith(prefix)
        }
        # Lhotse's cut.load_custom() would crop to the cut's duration; this reads what was written.
        arrays = {part: a.with_path_prefix(self.directory).load() for part, a in manifests.items()}
        size = sum(a.nbytes for a in arrays.values())
        if size <= self._room:
            self._room -= size
            self._kept[cut_id, spec.key] = arrays
        return arrays

    def _collate(self, ids: Sequence[str], spec: TargetSpec) -> Posteriors | Hidden:
        arrays = [self._arrays(cut_id, spec) for cut_id in ids]
        parts = {name: _pad([a[name] for a in arrays]) for name in arrays[0]}
        lens_B = torch.tensor([len(next(iter(a.values()))) for a in arrays])
        if spec.kind == "hidden":
            return Hidden(parts["values"], lens_B)
        return Posteriors(parts["log_probs"], lens_B, parts.get("indices"), parts.get("log_tail"))


def write_targets(
    cuts: CutSet,
    batches: Batches,
    model: nn.Module,
    specs: Sequence[TargetSpec],
    out_dir: Path,
    *,
    key_parts: Mapping[str, Any],
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
        progress: called with the number of cuts done since the last call.

    Raises:
        DataError: a cut is missing from the batches, or a value does not fit the type to store.
    """
    live = LiveTargets(model, specs)
    device = next(model.parameters()).device
    by_id = {cut.id: cut for cut in _listed(cuts)}
    done: dict[str, Cut] = {}
    (out_dir / "arrays").mkdir(parents=True, exist_ok=True)
    writer = NumpyFilesWriter(out_dir / "arrays")
    for ids in batches.epoch(0):
        batch = batches.load(ids).map(lambda x: x.to(device))
        items = live.targets(batch).map(lambda x: x.cpu()).items
        for row, cut_id in enumerate(batch.ids):
            if cut_id not in by_id:
                raise DataError("a batch holds a cut that is not among the cuts", where=cut_id)
            record = {**identify(by_id[cut_id]), "num_features": int(batch.lens_B[row])}
            custom: dict[str, Any] = {"targets": record}
            for spec in specs:
                for part, values in _parts(items[spec.key], row, spec).items():
                    _check_finite(values, spec, cut_id)
                    custom[_field(spec, part)] = _store(writer, cut_id, spec, part, values)
            done[cut_id] = fastcopy(by_id[cut_id], custom=custom)
        if progress is not None:
            progress(len(batch))
    _refuse([Problem("no batch holds this cut", cut_id) for cut_id in by_id if cut_id not in done])
    stored = CutSet.from_cuts([done[cut_id] for cut_id in by_id])
    stored.to_file(out_dir / "cuts.jsonl.gz")
    key = {"format": FORMAT, "parts": dict(key_parts), "specs": [asdict(spec) for spec in specs]}
    write_json(out_dir / "key.json", key)
    return TargetCache(out_dir, specs, stored)


def _listed(cuts: Any) -> list[Any]:
    """The cuts as a list; Lhotse's annotations do not let a CutSet be iterated."""
    return list(cuts)


def _record(cut: Any) -> dict[str, Any]:
    """What is known of the audio that a cut's targets were computed from."""
    record: dict[str, Any] = (cut.custom or {}).get("targets") or {}
    if not record:
        raise DataError("the cut holds no cached targets", where=cut.id, remedy=RECOMPUTE)
    return record


def _field(spec: TargetSpec, part: str) -> str:
    """Name of a cut's custom field."""
    return re.sub(r"\W", "_", f"target_{spec.kind}_{spec.tap}__{part}")


def _store(
    writer: NumpyFilesWriter, cut_id: str, spec: TargetSpec, part: str, values: np.ndarray
) -> TemporalArray:
    # Cut ids may hold what file names may not; the directory may be moved.
    name = f"{fingerprint(cut_id)[:16]}-{_field(spec, part)}"
    shift_s = spec.frame_shift_s or DEFAULT_FRAME_SHIFT_S
    stored: Any = writer.store_array(name, values, frame_shift=shift_s, temporal_dim=0, start=0)
    moved: TemporalArray = fastcopy(stored, array=fastcopy(stored.array, storage_path="arrays"))
    return moved


def _parts(target: Posteriors | Hidden, row: int, spec: TargetSpec) -> dict[str, np.ndarray]:
    """The arrays of one utterance as they are stored."""
    length = int(target.lens_B[row])

    def values(tensor: Tensor, dtype: str) -> np.ndarray:
        return np.ascontiguousarray(tensor[row, :length].numpy().astype(dtype))

    if isinstance(target, Hidden):
        return {"values": values(target.values_BTD, spec.dtype)}
    parts = {"log_probs": values(target.log_probs_BTK, spec.dtype)}
    if target.indices_BTK is not None and target.log_tail_BT is not None:
        small = int(target.indices_BTK.max()) <= np.iinfo(np.int16).max
        parts["indices"] = values(target.indices_BTK, "int16" if small else "int32")
        parts["log_tail"] = values(target.log_tail_BT, spec.dtype)
    return parts


def _pad(arrays: Sequence[np.ndarray]) -> Tensor:
    """(T, ...) arrays to one (B, T, ...) tensor, 0 behind each; float32, or int64 for integers."""
    longest = max(len(a) for a in arrays)
    dtype = np.float32 if np.issubdtype(arrays[0].dtype, np.floating) else np.int64
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
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
