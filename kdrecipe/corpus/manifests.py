"""Manifests of a corpus: validated and written; nothing is left out silently.

A corpus plugin makes Lhotse recordings and supervisions, on its own or with
:func:`kdrecipe.corpus.gather.gather`; :func:`validate_corpus` then looks at every recording and
transcript, and :func:`finish` writes ``<split>_recordings.jsonl.gz``,
``<split>_supervisions.jsonl.gz`` and ``summary.json``. Once there are tokens,
:func:`check_lengths` finds utterances that are too short for their text.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdrecipe.artifacts import fingerprint, sha256_file, write_jsonl_gz
from kdrecipe.corpus.audio_checks import audio_path, check_overlaps, check_recording
from kdrecipe.corpus.problems import NAMES_SHOWN, DataProblem, OnError, as_left_out, notes_of, settle
from kdrecipe.interfaces import SAMPLE_RATE, Prepared, TokenTable
from kdrecipe.text import clean, control_characters, lower, odd_characters, shown, upper

if TYPE_CHECKING:
    from lhotse.audio import RecordingSet
    from lhotse.cut import MonoCut
    from lhotse.supervision import SupervisionSet

SAMPLE_SPEAKERS = 6
RECORDINGS = "_recordings.jsonl.gz"
_BEYOND_S = 0.01  # a transcript may end this much after its audio: rounding in hand-made manifests


@dataclass
class Summary:
    """What :func:`finish` wrote, also as ``summary.json``.

    Args:
        splits: name -> ``{"utterances", "speakers", "hours"}``.
        left_out: ``{"id", "where", "reason"}`` of everything left out.
        notes: facts that the report must state.
    """

    splits: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sample(prepared: Prepared, max_utterances: int) -> Prepared:
    """A corpus cut down to try a recipe out: the same utterances each time.

    Args:
        prepared: a corpus plugin's result; not changed.
        max_utterances: of each split, dealt out evenly among at most :data:`SAMPLE_SPEAKERS` speakers.
    """
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet

    splits: dict[str, tuple[RecordingSet, SupervisionSet]] = {}
    for split, (recordings, supervisions) in prepared.splits.items():
        by_speaker: dict[str, list[Any]] = {}
        for sup in sorted(_items(supervisions), key=lambda sup: str(sup.id)):
            by_speaker.setdefault(str(sup.speaker), []).append(sup)
        speakers = sorted(by_speaker)
        chosen = random.Random(0).sample(speakers, min(SAMPLE_SPEAKERS, len(speakers)))
        dealt = itertools.zip_longest(*(by_speaker[speaker] for speaker in chosen))
        sups = [sup for turn in dealt for sup in turn if sup is not None][:max_utterances]
        wanted = {sup.recording_id for sup in sups}
        recs = [recording for recording in _items(recordings) if recording.id in wanted]
        splits[split] = (RecordingSet.from_recordings(recs), SupervisionSet.from_segments(sups))
    note = f"a sample: at most {max_utterances} utterances of each split"
    return replace(prepared, splits=splits, notes=[*prepared.notes, note])


def in_case(prepared: Prepared, case: Literal["lower", "upper"]) -> Prepared:
    """A corpus with all transcripts in small letters or in capitals, as each one's language has them."""
    from lhotse.supervision import SupervisionSet

    change = {"lower": lower, "upper": upper}[case]

    def changed(sup: Any) -> Any:
        return replace(sup, text=change(sup.text, sup.language)) if sup.text else sup

    splits = {
        split: (recordings, SupervisionSet.from_segments(map(changed, _items(supervisions))))
        for split, (recordings, supervisions) in prepared.splits.items()
    }
    return replace(prepared, splits=splits, notes=[*prepared.notes, f"all transcripts in {case} case"])


def validate_corpus(
    prepared: Prepared,
    *,
    sampling_rate: int = SAMPLE_RATE,
    num_workers: int = 1,
    without_text: Collection[str] = (),
) -> list[DataProblem]:
    """Look at all transcripts and decode all audio.

    Args:
        prepared: a corpus plugin's result; not changed.
        sampling_rate: in Hz, what every recording must have.
        num_workers: threads that decode.
        without_text: splits in which a transcript may be missing.

    Returns:
        What is wrong, besides ``prepared.problems``, and notes; several per utterance if need be.
    """
    problems: list[DataProblem] = []
    seen: dict[str, str] = {}
    for split, (recordings, supervisions) in prepared.splits.items():
        by_id = {recording.id: recording for recording in _items(recordings)}
        sups_of: dict[str, list[Any]] = {}
        for sup in _items(supervisions):
            if sup.id in seen:
                what = f"in {seen[sup.id]} and {split}" if seen[sup.id] != split else f"in {split}"
                problems.append(DataProblem(what, sup.id, kind="duplicate_id", id=sup.id))
            seen.setdefault(sup.id, split)
            sups_of.setdefault(sup.recording_id, []).append(sup)
            problems += _check_supervision(sup, by_id.get(sup.recording_id), split not in without_text)
        used = {i: sups for i, sups in sups_of.items() if i in by_id}
        check = partial(check_recording, sampling_rate=sampling_rate)
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            problems += itertools.chain.from_iterable(pool.map(check, map(by_id.get, used), used.values()))
        problems += itertools.chain.from_iterable(map(check_overlaps, sups_of.values()))
    return problems


def _items(manifest: Any) -> list[Any]:
    """The manifest as a list; Lhotse's annotations do not let it be iterated."""
    return list(manifest)


def _check_supervision(sup: Any, recording: Any | None, needs_text: bool) -> list[DataProblem]:
    """Faults of one transcript."""
    where = audio_path(recording) if recording is not None else sup.recording_id
    text, found = sup.text or "", []
    if recording is None:
        found.append(DataProblem(f"no recording for {sup.id}", where, kind="missing_audio", id=sup.id))
    elif sup.duration <= 0 or sup.start < 0 or sup.end > recording.duration + _BEYOND_S:
        what = f"{sup.start:.2f} to {sup.end:.2f} s of {recording.duration:.2f} s"
        if recording.duration > 0:  # an empty recording is reported as such
            found.append(DataProblem(what, where, kind="beyond_audio", id=sup.id))
    if needs_text and not clean(text):
        found.append(DataProblem("", where, kind="empty_text", id=sup.id))
    if controls := control_characters(text):
        what = f"{sup.id}: {shown(dict.fromkeys(controls))}"
        found.append(DataProblem(what, where, kind="control_characters", id=sup.id))
    if "\ufffd" in text:  # what readers write for bytes that they could not decode
        found.append(DataProblem(repr(text[:40]), where, kind="not_utf8", id=sup.id))
    return found


def transcripts(manifest_dir: Path, split: str, ids: Collection[str] | None = None) -> list[str]:
    """Texts of a split's utterances, each once whatever copies at other speeds there are of it.

    Empty if there is no such split; ``ids``: only those of these utterances.
    """
    from lhotse.supervision import SupervisionSet

    path = manifest_dir / f"{split}_supervisions.jsonl.gz"
    if not path.exists():
        return []
    wanted = None if ids is None else set(ids)
    sups = _items(SupervisionSet.from_file(path))
    return [s.text for s in sups if s.text and s.text.strip() and (wanted is None or s.id in wanted)]


def check_texts(cuts: Iterable[MonoCut]) -> list[DataProblem]:
    """A problem per cut that has no transcript, ``id`` being the cut's id."""
    silent = [c for c in cuts if not any(clean(sup.text or "") for sup in c.supervisions)]
    where = {c.id: audio_path(c.recording) if c.has_recording else c.id for c in silent}
    return [DataProblem("", place, kind="empty_text", id=cut_id) for cut_id, place in where.items()]


def check_lengths(
    cuts: Iterable[MonoCut],
    tokenizer: TokenTable,
    subsampling: int | Callable[[int], int],
    frame_shift_s: float = 0.01,
) -> list[DataProblem]:
    """Cuts that CTC can't align: fewer encoder frames than tokens plus repetitions.

    Between two equal tokens CTC needs a blank, hence the repetitions.

    Args:
        cuts: with text, with features or without.
        tokenizer: gives the tokens of a text.
        subsampling: the encoder's own ``output_len``, or feature frames per encoder frame; the last
            of them may be incomplete.
        frame_shift_s: of the features, for cuts that have none yet.

    Returns:
        A problem per such cut, ``id`` being the cut's id.
    """
    problems = []
    for cut in cuts:
        ids = tokenizer.encode(" ".join(sup.text or "" for sup in cut.supervisions))
        needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
        num_frames = cut.features.num_frames if cut.features else round(cut.duration / frame_shift_s)
        frames = subsampling(num_frames) if callable(subsampling) else -(-num_frames // subsampling)
        if frames < needed:
            where = audio_path(cut.recording) if cut.has_recording else cut.id
            what = f"{cut.id}: {cut.duration:.2f} s give {frames} frames, its {len(ids)} tokens need {needed}"
            problems.append(DataProblem(what, where, kind="too_short", id=cut.id))
    return problems


def text_notes(splits: dict[str, tuple[RecordingSet, SupervisionSet]]) -> list[str]:
    """What is odd about the texts as the corpus has them, as sentences for the report."""
    notes = []
    for split, (_, supervisions) in splits.items():
        texts = [sup.text for sup in _items(supervisions) if sup.text]
        odd = Counter(c for text in texts for c in odd_characters(text))
        if odd:
            number = sum(bool(odd_characters(text)) for text in texts)
            counts = ", ".join(f"{shown(c)} ({n})" for c, n in odd.most_common(NAMES_SHOWN))
            notes.append(f"{number} {split} transcripts have invisible characters or rare spaces: {counts}")
        rewritten = sum(unicodedata.normalize("NFC", text) != text for text in texts)
        if rewritten:
            notes.append(f"{rewritten} {split} transcripts were brought to Unicode's normal form C")
        if len(texts) > 1 and len({clean(text) for text in texts}) == 1:
            notes.append(f"all {len(texts)} {split} transcripts are the same: {clean(texts[0])[:40]!r}")
    return notes


def overlap_notes(splits: dict[str, tuple[RecordingSet, SupervisionSet]]) -> list[str]:
    """What ``dev`` and ``test`` share with ``train``, as sentences for the report.

    Sentences are always counted; speakers only if there are any in common.
    """
    notes = []
    train = _items(splits["train"][1]) if "train" in splits else []
    texts, speakers = {sup.text for sup in train} - {""}, {sup.speaker for sup in train} - {None}
    for split, (_, supervisions) in splits.items():
        if split == "train" or not train:
            continue
        others = _items(supervisions)
        shared = sum(sup.text in texts for sup in others)
        if texts:
            notes.append(f"{shared} of {len(others)} {split} sentences occur in train")
        common = sorted({sup.speaker for sup in others} & speakers)
        if common:
            shown = ", ".join(map(str, common[:NAMES_SHOWN]))
            notes.append(f"{len(common)} speakers of {split} are also in train: {shown}")
    return notes


def finish(prepared: Prepared, out_dir: Path, on_error: OnError) -> Summary:
    """Write manifests and ``summary.json``, without whatever ``prepared.problems`` says to leave out.

    Texts are written by :func:`kdrecipe.text.clean`.

    The files do not depend on the time of writing: equal input gives equal bytes. Audio below ``out_dir``
    is named relative to it, so that the directory can be copied; :func:`audio_files` finds it.

    Args:
        prepared: a corpus plugin's result, its problems completed by :func:`validate_corpus`.
        out_dir: created if needed.
        on_error: what to do about problems, see :func:`settle`.

    Raises:
        DataError: see :func:`settle`; and if nothing is left of a split.
    """
    out = settle(prepared.problems, on_error, out_dir / "problems.txt")
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet

    notes = prepared.notes + notes_of(prepared.problems, out)
    summary = Summary(left_out=as_left_out(prepared.problems), notes=notes)
    kept: dict[str, tuple[RecordingSet, SupervisionSet]] = {}
    seen: set[str] = set()
    for split, (recordings, supervisions) in prepared.splits.items():
        sups = []
        for sup in _items(supervisions):
            if sup.id not in seen and sup.id not in out:
                seen.add(sup.id)
                sups.append(replace(sup, text=clean(sup.text or "")))
        wanted = {sup.recording_id for sup in sups}
        recs = list({r.id: r for r in reversed(_items(recordings)) if r.id in wanted}.values())[::-1]
        listed = {sup.recording_id for sup in _items(supervisions)}
        unused = [r.id for r in _items(recordings) if r.id not in listed]
        if unused:
            shown = ", ".join(unused[:NAMES_SHOWN]) + (", ..." if len(unused) > NAMES_SHOWN else "")
            summary.notes.append(f"{len(unused)} recordings of {split} have no transcript, not used: {shown}")
        kept[split] = (RecordingSet.from_recordings(recs), SupervisionSet.from_segments(sups))
        summary.splits[split] = {
            "utterances": len(sups),
            "speakers": len({sup.speaker for sup in sups} - {None}),
            "hours": round(sum(sup.duration for sup in sups) / 3600, 4),
        }
    cause = ""
    if summary.left_out:
        first = summary.left_out[0]
        cause = f"{len(summary.left_out)} left out, such as {first['where']}: {first['reason']}"
    empty = [
        DataProblem(cause, split, kind="empty_split") for split, sets in kept.items() if not len(sets[1])
    ]
    settle(empty, "stop")
    notes = text_notes(prepared.splits) + overlap_notes(kept)
    summary.notes = list(dict.fromkeys(summary.notes + notes))
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, (recording_set, supervision_set) in kept.items():
        folder = out_dir.absolute()
        portable = (_relative_to(recording, folder).to_dict() for recording in _items(recording_set))
        write_jsonl_gz(out_dir / f"{split}{RECORDINGS}", portable)
        spoken = (supervision.to_dict() for supervision in _items(supervision_set))
        write_jsonl_gz(out_dir / f"{split}_supervisions.jsonl.gz", spoken)
    text = json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n"
    (out_dir / "summary.json").write_text(text, encoding="utf-8")
    return summary


def _relative_to(recording: Any, folder: Path) -> Any:
    """The recording with its files' paths relative to ``folder`` where they are in it, else absolute."""

    def moved(source: Any) -> Any:
        path = Path(source.source).absolute()
        return replace(source, source=str(path.relative_to(folder) if path.is_relative_to(folder) else path))

    sources = [moved(source) if source.type == "file" else source for source in recording.sources]
    return replace(recording, sources=sources)


def audio_files(manifest_dir: Path) -> dict[str, list[Path]]:
    """Split -> absolute paths of the audio that its recordings name, in their order."""
    folder = manifest_dir.absolute()
    found = {}
    for file in sorted(manifest_dir.glob(f"*{RECORDINGS}")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            sources = [source for line in lines for source in json.loads(line)["sources"]]
        paths = [folder / source["source"] for source in sources if source["type"] == "file"]
        found[file.name.removesuffix(RECORDINGS)] = paths
    return found


def audio_digests(manifest_dir: Path) -> dict[str, str]:
    """Split -> digest of the content of all its audio files."""
    hashes: dict[Path, str] = {}

    def content(path: Path) -> str:
        if path not in hashes:
            hashes[path] = sha256_file(path)
        return hashes[path]

    found = audio_files(manifest_dir)
    return {split: fingerprint([content(path) for path in paths]) for split, paths in found.items()}
