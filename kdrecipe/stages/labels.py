"""Stage 4, hypotheses: what teachers recognise of audio whose transcripts are not used, as labels.

``hypotheses.jsonl`` has a line per utterance: ``id``, ``text`` as the teacher wrote it, ``transcript`` as the
recipe's transcripts are written, ``duration_s``, ``avg_log_prob``, ``no_speech_prob``, and ``reference``, the
transcript that there is, which only ``keep.max_wer`` and ``keep.max_cer`` look at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import read_json, write_atomic, write_json
from kdrecipe.jobs.executors import job_label
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.stages.layout import Layout
from kdrecipe.text import read_lines

if TYPE_CHECKING:
    from kdrecipe.score.keep import Kept, Said
    from kdrecipe.text_form import TextForm

BATCH_DURATION_S = 120.0
EXAMPLES = 3


def students_of(recipe: Recipe, teacher: str) -> list[System]:
    """The systems whose labels are hypotheses of ``teacher``."""
    return [system for system in recipe.systems.values() if system.labels == teacher]


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per teacher and seed whose hypotheses are labels."""
    for teacher, system in recipe.systems.items():
        students = students_of(recipe, teacher)
        for seed in system.seeds if students else ():
            inputs = {
                "subsets": sorted({(s.data or "", s.unlabelled or "") for s in students}),
                "text": system.text.model_dump(mode="json"),
                "transcripts": recipe.tokens.data,
            }
            plan.add(
                Job(
                    4,
                    f"hypotheses/{teacher}/seed{seed}",
                    layout.said(teacher, seed),
                    inputs,
                    partial(run, recipe, layout, teacher, seed),
                    ("features", "tokens", f"{teacher}/seed{seed}"),
                    resumable=True,
                    alone=False,
                )
            )


def run(recipe: Recipe, layout: Layout, teacher: str, seed: int, out: Path) -> None:
    """Recognise what the students hear without labels, at its own speed; resumes between batches."""
    from kdrecipe.data.batches import transcript_of
    from kdrecipe.data.features import is_copy
    from kdrecipe.data.tokens import Tokenizer
    from kdrecipe.stages.session import training_data
    from kdrecipe.stages.teachers import hypotheses, open_teacher
    from kdrecipe.text_form import TextChanges
    from kdrecipe.train.distribution import local_device
    from kdrecipe.train.log import Progress

    system, device = recipe.systems[teacher], local_device()
    form = form_of(recipe, layout, system)
    cuts, _, unlabelled = training_data(layout, students_of(recipe, teacher))
    listed: Any = cuts
    wanted = {cut.id: cut for cut in listed if cut.id in unlabelled and not is_copy(cut)}
    path = out / "heard.jsonl"
    done = {row["id"]: row for row in _rows(path)}
    left = [cut for cut in wanted.values() if cut.id not in done]
    progress = Progress(job_label(f"hypotheses/{teacher}"), len(left), unit="utterance")
    if left:
        opened = open_teacher(recipe, layout, teacher, seed)
        opened.load(device)
        with open(path, "a", encoding="utf-8") as file:
            tokens = Tokenizer.load(layout.tokens)
            for cut_id, said in hypotheses(opened.teacher, tokens, left, device, BATCH_DURATION_S):
                row = {
                    "id": cut_id,
                    "text": said.text,
                    "transcript": form.apply(said.text),
                    "duration_s": wanted[cut_id].duration,
                    "avg_log_prob": said.avg_log_prob,
                    "no_speech_prob": said.no_speech_prob,
                    "reference": transcript_of(wanted[cut_id]),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                done[cut_id] = row
                progress.advance(1)
    progress.close()
    rows = [done[cut_id] for cut_id in wanted]
    for student in students_of(recipe, teacher):  # now, not when other students have been trained
        _kept(student, rows, training_data(layout, [student])[2])
    write_atomic(
        out / "hypotheses.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    path.unlink(missing_ok=True)
    changes: TextChanges = form.changes(row["text"] for row in rows)
    write_json(out / "form.json", form.model_dump(mode="json"))
    for line in changes.lines():
        print(f"  {line}", flush=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an interrupted run; what is after them is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def form_of(recipe: Recipe, layout: Layout, system: System) -> TextForm:
    """How a teacher's hypotheses are written as transcripts, by those that the tokens are learnt from.

    Where nobody transcribed what students hear, those of dev show how transcripts are written.
    """
    from kdrecipe.corpus.manifests import transcripts

    subset = recipe.tokens.data
    ids = read_json(layout.features / "subsets.json")[subset] if subset else None
    texts = transcripts(layout.manifests, "train", ids) or transcripts(layout.manifests, "dev")
    return system.text.fitted(texts)


def kept_of(layout: Layout, system: System, seed: int, ids: set[str]) -> tuple[Kept, dict[str, str]]:
    """Which hypotheses are labels of a student, and id -> transcript of those.

    Args:
        layout: where stage 4 wrote them.
        system: the student.
        seed: of its teacher.
        ids: what it hears without labels, copies at other speeds included.

    Raises:
        DataError: nothing is kept.
    """
    assert system.labels is not None
    place = layout.said(system.labels, seed) / "hypotheses.jsonl"
    rows = [json.loads(line) for line in read_lines(place)]
    kept = _kept(system, rows, ids)
    transcripts = {row["id"]: row["transcript"] for row in rows}
    return kept, {utterance: transcripts[utterance] for utterance in kept.kept}


def _kept(system: System, rows: Iterable[Mapping[str, Any]], ids: set[str]) -> Kept:
    """Which of the hypotheses of ``ids`` are labels of a student; DataError if none is."""
    from kdrecipe.score.keep import Said

    assert system.keep is not None

    def said(row: Mapping[str, Any]) -> Said:
        return Said(
            row["id"],
            row["transcript"],
            row["duration_s"],
            row["avg_log_prob"],
            row["no_speech_prob"],
            row["reference"] or None,
        )

    return system.keep.sort(said(row) for row in rows if row["id"] in ids)
