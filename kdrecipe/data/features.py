"""Features: log-mel cuts from manifests, speed-perturbed copies, subsets, normalisation statistics.

Written to the features directory::

    <split>.jsonl.gz   cuts, one per supervision, with features computed (``train`` with its copies)
    <split>.index.npz  see :mod:`kdrecipe.data.stored_cuts`
    storage/<split>/   the arrays: float32 (T, F) log-mel, not normalised
    norm.npz           mean and std (F,) over the unperturbed training cuts
    subsets.json       name -> ids of the training cuts in it, with their perturbed copies
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.audio import Recording
from lhotse.cut import MonoCut
from lhotse.features.io import NumpyFilesWriter
from lhotse.features.kaldi.extractors import Fbank, FbankConfig
from lhotse.supervision import SupervisionSegment
from lhotse.utils import fastcopy

from kdrecipe.artifacts import disk_errors, replacing, write_json, write_jsonl_gz
from kdrecipe.corpus.audio import padded
from kdrecipe.corpus.gather import reason
from kdrecipe.corpus.manifests import RECORDINGS
from kdrecipe.corpus.subsets import choose_subsets
from kdrecipe.data.stored_cuts import StoredCuts
from kdrecipe.errors import DataError, Problem, RecipeError
from kdrecipe.interfaces import SAMPLE_RATE

FRAME_SHIFT_S = 0.01
MINUTE = 6000  # frames
_BLOCK = 50  # cuts

_SUPERVISIONS = "_supervisions.jsonl.gz"


def make_extractor(config: Mapping[str, Any]) -> Fbank:
    """Lhotse's Kaldi-compatible filter bank, which sherpa-onnx computes in the same way on the device.

    Args:
        config: the recipe's ``features`` (``name``, ``num_mel_bins``; ``speed_perturb`` is not used here).

    Raises:
        RecipeError: unknown kind of features.
    """
    if config["name"] != "fbank":
        raise RecipeError(
            f"unknown features {config['name']!r}", where="features.name", remedy="the one kind is fbank"
        )
    return _fbank(int(config["num_mel_bins"]))


class _Fbank(Fbank):
    """Lhotse's, minute by minute: the same numbers, but an hour at once would take 2.6 GB."""

    def extract(self, samples: Any, sampling_rate: int) -> np.ndarray:
        """(1, S) samples to (T, F)."""
        hop = round(FRAME_SHIFT_S * sampling_rate)
        num_frames = (samples.shape[1] + hop // 2) // hop
        parts = []
        for start in range(0, max(1, num_frames), MINUTE):
            # Two frames more on either side, so that no window is mirrored where a part ends.
            first, last = max(0, start - 2), start + MINUTE + 2
            part = samples[:, first * hop : None if last >= num_frames else last * hop]
            parts.append(np.asarray(super().extract(part, sampling_rate))[start - first :][:MINUTE])
        return np.concatenate(parts)


@functools.lru_cache
def _fbank(num_mel_bins: int) -> Fbank:
    return _Fbank(FbankConfig(sampling_rate=SAMPLE_RATE, num_filters=num_mel_bins))


def extract(samples_S: np.ndarray, sample_rate: int, config: Mapping[str, Any]) -> np.ndarray:
    """Log-mel features (T, F) float32 of one utterance of any length, samples in [-1, 1].

    Raises:
        DataError: the sampling rate is not 16 kHz.
    """
    if sample_rate != SAMPLE_RATE:
        raise DataError(
            f"audio at {sample_rate} Hz",
            remedy=f"convert it to {SAMPLE_RATE} Hz first, e.g. with sox or ffmpeg",
        )
    samples = padded(np.asarray(samples_S, dtype=np.float32)[None], sample_rate)
    return np.asarray(make_extractor(config).extract(samples, sample_rate), dtype=np.float32)


def compute_features(
    manifest_dir: Path,
    out_dir: Path,
    config: Mapping[str, Any],
    *,
    subsets: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    num_jobs: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, StoredCuts]:
    """Compute the features of every split in ``manifest_dir``.

    Args:
        manifest_dir: holds ``<split>_recordings.jsonl.gz`` and ``<split>_supervisions.jsonl.gz``.
        out_dir: see the module's text. The cuts name their arrays, and audio within ``manifest_dir``,
            by paths relative to it, so that both can be moved together.
        config: the recipe's ``features``: ``name: fbank``, ``num_mel_bins`` and ``speed_perturb``,
            factors for copies of the training cuts (1.0 is the cut itself and always there).
        subsets: name -> rule, see :func:`kdrecipe.corpus.subsets.choose_subsets`.
        seed: for the choice of subsets.
        num_jobs: processes; one is best for less than some ten hours of audio.
        on_progress: called with (cuts done, cuts in all).

    Raises:
        DataError: no manifests, unreadable audio (every bad file is named), a subset that can't be made.
    """
    splits = {split: SplitCuts(manifest_dir, split) for split in _split_names(manifest_dir)}
    factors = [f for f in config.get("speed_perturb", []) if f != 1.0]
    ids = {split: [cut.id for cut in cuts] for split, cuts in splits.items()}  # and all are sound
    originals = set(ids.get("train", []))
    _refuse_names_of_copies(originals, factors)
    chosen = choose_subsets(list(splits["train"]) if subsets and originals else [], subsets or {}, seed)
    counts = {split: len(ids[split]) * (1 + len(factors) * (split == "train")) for split in splits}
    total, done = sum(counts.values()), 0
    del ids
    problems: list[Problem] = []

    def sound(outcomes: Iterable[MonoCut | Problem]) -> Iterator[MonoCut]:
        nonlocal done
        for outcome in outcomes:
            done += 1
            if on_progress:
                on_progress(done, total)
            if isinstance(outcome, Problem):
                problems.append(outcome)
            else:
                yield _portable(outcome, manifest_dir, out_dir)

    for split, cuts in splits.items():
        storage, jobs = out_dir.absolute() / "storage" / split, num_jobs if counts[split] > _BLOCK else 1
        work = _extract_all(_with_speeds(cuts, factors if split == "train" else ()), storage, config, jobs)
        write_cuts(out_dir / f"{split}.jsonl.gz", sound(work))
    if problems:
        for split in splits:
            (out_dir / f"{split}.jsonl.gz").unlink()
        raise DataError(problems)
    result = {split: load_cuts(out_dir, split) for split in splits}
    if originals:
        train = result["train"]
        _write_norm(out_dir / "norm.npz", *feature_stats(train.select(train.chosen(originals))))
    write_json(out_dir / "subsets.json", _with_copies(chosen, factors))
    return result


def _with_speeds(cuts: SplitCuts, factors: Sequence[float]) -> Iterator[MonoCut]:
    """All cuts, then the copies of each."""
    yield from cuts
    if factors:
        yield from (perturb_speed(cut, factor) for cut in cuts for factor in factors)


def perturb_speed(cut: MonoCut, factor: float) -> MonoCut:
    """A copy of ``cut`` played ``factor`` times as fast, under the id ``<id>_sp<factor>``.

    Raises:
        DataError: the cut carries arrays. They belong to the original's time axis, and Lhotse
            would keep them (or cut their ends off) under the copy's new duration.
    """
    arrays = [name for name, value in (cut.custom or {}).items() if hasattr(value, "storage_path")]
    if cut.has_features or arrays:
        kept = ", ".join(arrays + ["features"] * cut.has_features)
        raise DataError(
            f"can't change the speed of a cut that holds computed arrays ({kept})",
            where=cut.id,
            remedy="perturb first, then compute features and targets of the copy",
        )
    copy: MonoCut = cut.perturb_speed(factor)  # type: ignore[assignment]
    return copy


def _refuse_names_of_copies(ids: Set[str], factors: Sequence[float]) -> None:
    """DataError for utterances that are called as a copy of another at another speed is."""
    ends = tuple(f"_sp{factor}" for factor in factors)
    problems = [
        Problem(
            "this id is also that of a copy at another speed, which ends in _sp<speed>",
            cut_id,
            "rename the utterance, or change features.speed_perturb",
        )
        for cut_id in sorted(ids)
        if any(cut_id.endswith(end) and cut_id.removesuffix(end) in ids for end in ends)
    ]
    if problems:
        raise DataError(problems)


def read_cuts(manifest_dir: Path, split: str) -> list[MonoCut]:
    """One cut per supervision of a split, under the supervision's id; no features yet.

    Raises:
        DataError: a supervision names a recording that is not there, or a rate is not 16 kHz.
    """
    return list(SplitCuts(manifest_dir, split))


class SplitCuts:
    """What :func:`read_cuts` lists, made one at a time and as often as asked.

    Recordings are kept as lines of JSON, which take a quarter of Lhotse's objects.
    """

    def __init__(self, manifest_dir: Path, split: str) -> None:
        self._folder = manifest_dir.absolute()
        self._supervisions = manifest_dir / f"{split}{_SUPERVISIONS}"
        with gzip.open(manifest_dir / f"{split}{RECORDINGS}") as lines:
            self._lines = {json.loads(line)["id"]: line for line in lines}

    def __iter__(self) -> Iterator[MonoCut]:
        problems = []
        with gzip.open(self._supervisions) as lines:
            for line in lines:
                supervision = SupervisionSegment.from_dict(json.loads(line))
                made = self._cut(supervision)
                if isinstance(made, Problem):
                    problems.append(made)
                else:
                    yield made
        if problems:
            raise DataError(problems)

    def _cut(self, supervision: SupervisionSegment) -> MonoCut | Problem:
        line = self._lines.get(supervision.recording_id)
        if line is None:
            return Problem(f"its recording {supervision.recording_id!r} is missing", supervision.id)
        recording = Recording.from_dict(json.loads(line)).with_path_prefix(self._folder)
        if recording.sampling_rate != SAMPLE_RATE:
            what = f"recorded at {recording.sampling_rate} Hz"
            return Problem(what, supervision.id, f"convert the corpus to {SAMPLE_RATE} Hz")
        channel = supervision.channel
        return MonoCut(
            id=supervision.id,
            start=supervision.start,
            # Rounding in the corpus's own times may put the end some samples past the audio's.
            duration=min(supervision.duration, recording.duration - supervision.start),
            channel=channel if isinstance(channel, int) else channel[0],
            supervisions=[supervision.with_offset(-supervision.start)],
            recording=recording,
        )


def load_cuts(features_dir: Path, split: str) -> StoredCuts:
    """The cuts that :func:`compute_features` wrote for ``split``; each is read when it is asked for.

    Raises:
        DataError: there is no such split, or its file is damaged.
    """
    path = features_dir / f"{split}.jsonl.gz"
    if not path.exists():
        names = ", ".join(sorted(p.name.removesuffix(".jsonl.gz") for p in features_dir.glob("*.jsonl.gz")))
        raise DataError(
            f"there is no split {split!r}",
            where=str(features_dir),
            remedy=f"splits with features: {names or 'none'}",
        )
    return StoredCuts(path)


def _portable(cut: MonoCut, manifest_dir: Path, out_dir: Path) -> MonoCut:
    """The cut with paths relative to ``out_dir``, except for audio outside ``manifest_dir``."""
    folder, manifests = out_dir.absolute(), manifest_dir.absolute()
    assert cut.recording is not None
    assert cut.features is not None
    sources = [
        fastcopy(source, source=os.path.relpath(str(source.source), folder))
        if source.type == "file" and Path(str(source.source)).is_relative_to(manifests)
        else source
        for source in cut.recording.sources
    ]
    storage = os.path.relpath(cut.features.storage_path, folder)
    return fastcopy(
        cut,
        recording=fastcopy(cut.recording, sources=sources),
        features=fastcopy(cut.features, storage_path=storage),
    )


def write_cuts(path: Path, cuts: Any) -> None:
    """Write a CutSet as Lhotse does, but for the time, and its index: equal cuts give equal bytes."""
    write_jsonl_gz(path, (cut.to_dict() for cut in cuts))
    StoredCuts(path)  # writes the index


def tuning_cuts(features_dir: Path) -> list[MonoCut]:
    """What exports are compared on: dev, or the unperturbed training cuts of a corpus without dev.

    Never test: what is looked at while a system is made says nothing new about it.
    """
    cuts = load_cuts(features_dir, "dev" if has_dev(features_dir) else "train")
    return list(cuts.select(cuts.all() - cuts.copies()))


def has_dev(features_dir: Path) -> bool:
    """Whether the corpus has a split ``dev``."""
    return (features_dir / "dev.jsonl.gz").exists()


def load_norm(features_dir: Path, ids: Collection[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (F,) float32 of the training features, at their own speed.

    Args:
        features_dir: what :func:`compute_features` wrote.
        ids: only of these utterances; None: of all.

    Raises:
        DataError: there are no such utterances.
    """
    if ids is None:
        with np.load(features_dir / "norm.npz") as stored:
            return stored["mean"], stored["std"]
    cuts = load_cuts(features_dir, "train")
    return feature_stats(cuts.select(cuts.chosen(ids) - cuts.copies()))


def _split_names(manifest_dir: Path) -> list[str]:
    names = sorted(p.name.removesuffix(RECORDINGS) for p in manifest_dir.glob(f"*{RECORDINGS}"))
    if not names:
        raise DataError("no manifests", where=str(manifest_dir), remedy="run the prepare stage")
    return names


# ---------------------------------------------------------------- extraction


def _extract_all(
    cuts: Iterable[MonoCut], storage: Path, config: Mapping[str, Any], num_jobs: int
) -> Iterator[MonoCut | Problem]:
    """The cuts with features, in order, with a problem instead of each that has none."""
    numbered = enumerate(cuts)
    # Blocks bound what is under way between processes, and load the extractor once per block.
    blocks = iter(lambda: list(itertools.islice(numbered, _BLOCK)), [])
    if num_jobs <= 1:
        for block in blocks:
            yield from _extract_block(block, storage, dict(config))
        return
    # A forked copy of a process in which torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_jobs, mp_context=context, initializer=_one_thread) as pool:
        work: deque[Future[list[MonoCut | Problem]]] = deque()
        for block in blocks:
            work.append(pool.submit(_extract_block, block, storage, dict(config)))
            if len(work) > 2 * num_jobs:
                yield from work.popleft().result()
        for future in work:
            yield from future.result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _extract_block(
    numbered: Sequence[tuple[int, MonoCut]], storage: Path, config: dict[str, Any]
) -> list[MonoCut | Problem]:
    extractor = make_extractor(config)
    writer = _NamedFiles(storage)
    done: list[MonoCut | Problem] = []
    for number, cut in numbered:
        try:
            samples = padded(np.asarray(cut.load_audio()), cut.sampling_rate)
        except Exception as error:  # whatever the decoder raises, it is about this file
            what = f"can't read its audio: {type(error).__name__}: {reason(error)}"
            # Stage 0 could read it, or it would have been left out: the file has changed since.
            done.append(Problem(what, cut.id, "restore the file, or run the prepare stage again"))
            continue
        storage.mkdir(parents=True, exist_ok=True)
        with disk_errors(storage):
            # Lhotse groups files by the first three characters of the key. Numbers, not ids, since
            # an id may be no file name.
            writer.file = f"{number // 1000:03d}-{number:07d}"
            features = extractor.extract_from_samples_and_store(
                samples, writer, cut.sampling_rate, offset=cut.start, channel=cut.channel
            )
        assert cut.recording is not None
        features.recording_id = cut.recording.id
        cut.features = features
        done.append(cut)
    return done


class _NamedFiles(NumpyFilesWriter):
    """Stores arrays under :attr:`file` instead of the random names that Lhotse makes up."""

    file = ""

    def write(self, key: str, value: np.ndarray) -> str:
        """Store ``value``; ``key`` is not used."""
        return str(super().write(self.file, value))


# ---------------------------------------------------------------- statistics and subsets


def _write_norm(path: Path, mean: np.ndarray, std: np.ndarray) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, mean=mean, std=std)


def feature_stats(cuts: Iterable[MonoCut]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (F,) float32 over all frames of ``cuts``.

    Raises:
        DataError: there are no frames.
    """
    total: Any = 0.0
    squares: Any = 0.0
    num_frames = 0
    for cut in cuts:
        assert cut.features is not None
        frames = cut.features.load().astype(np.float64)  # all: see CutBatches
        total, squares = total + frames.sum(0), squares + (frames**2).sum(0)
        num_frames += len(frames)
    if num_frames == 0:
        raise DataError("no training audio", where="train", remedy="look at the prepare stage's summary.json")
    mean = total / num_frames
    # A bin that never changes (synthetic or band-limited audio) must not be blown up to noise.
    std = np.sqrt(np.maximum(squares / num_frames - mean**2, 1e-4))
    return mean.astype(np.float32), std.astype(np.float32)


def _with_copies(subsets: Mapping[str, list[str]], factors: Sequence[float]) -> dict[str, list[str]]:
    return {
        name: [copy for cut_id in ids for copy in (cut_id, *(f"{cut_id}_sp{f}" for f in factors))]
        for name, ids in subsets.items()
    }
