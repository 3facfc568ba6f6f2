"""Stage 4, hypotheses: what teachers recognise of audio whose transcripts are not used, as labels.

Where tokens or the language model are learnt from hypotheses, the job is one of stage 2: the teacher is
imported, and needs no tokens of the recipe to write.

``hypotheses.jsonl`` has a line per utterance: ``id``, ``text`` as the teacher wrote it, ``transcript`` as the
recipe's transcripts are written, ``duration_s``, ``avg_log_prob``, ``no_speech_prob``, and ``reference``, the
transcript that there is, which only ``keep.max_wer`` and ``keep.max_cer`` look at.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import read_json, write_atomic, write_json
from kdrecipe.jobs.executors import job_label
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.recipe.sections import Learnt
from kdrecipe.score.keep import Keep
from kdrecipe.stages.layout import Layout
from kdrecipe.text import read_lines

if TYPE_CHECKING:
    from kdrecipe.score.keep import Kept
    from kdrecipe.text_form import TextForm

BATCH_DURATION_S = 120.0
EXAMPLES = 3


def students_of(recipe: Recipe, teacher: str) -> list[System]:
    """The systems whose labels are hypotheses of ``teacher``; of one whose hypotheses only tokens are learnt
    from, those that hear something without labels."""
    found = [system for system in recipe.systems.values() if system.labels == teacher]
    if not found and teacher in recipe.writers:
        found = [system for system in recipe.systems.values() if system.unlabelled is not None]
    return found


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout, stage: int) -> None:
    """One job per teacher and seed whose hypotheses are labels: of stage 2 what tokens are learnt from, else
    of stage 4."""
    for teacher, system in recipe.systems.items():
        early, students = teacher in recipe.writers, students_of(recipe, teacher)
        for seed in system.seeds if students and early == (stage == 2) else ():
            inputs = {
                "subsets": sorted({(s.data or "", s.unlabelled or "") for s in students}),
                "text": system.text.model_dump(mode="json"),
                "transcripts": "dev" if recipe.tokens.labels else recipe.tokens.data,
            }
            place = f"{teacher}/seed{seed}"
            plan.add(
                Job(
                    stage,
                    f"hypotheses/{place}",
                    layout.said(teacher, seed),
                    inputs,
                    partial(run, recipe, layout, teacher, seed),
                    ("features", place) if early else ("features", "tokens", place),
                    resumable=True,
                    alone=False,
                )
            )


def run(recipe: Recipe, layout: Layout, teacher: str, seed: int, out: Path) -> None:
    """Recognise what the students hear without labels, at its own speed; resumes between batches."""
    from kdrecipe.data.batches import transcript_of
    from kdrecipe.stages.session import training_data
    from kdrecipe.stages.teachers import hypotheses, open_teacher
    from kdrecipe.text_form import TextChanges
    from kdrecipe.train.distribution import local_device
    from kdrecipe.train.log import Progress

    system, device = recipe.systems[teacher], local_device()
    form = form_of(recipe, layout, system)
    cuts, _, unlabelled = training_data(layout, students_of(recipe, teacher))
    wanted = {cut.id: cut for cut in cuts.select(unlabelled - cuts.copies())}
    path = out / "heard.jsonl"
    done = {row["id"]: row for row in _rows(path)}
    left = [cut for cut in wanted.values() if cut.id not in done]
    progress = Progress(job_label(f"hypotheses/{teacher}"), len(left), unit="utterance")
    if left:
        opened = open_teacher(recipe, layout, teacher, seed)
        opened.load(device)
        with open(path, "a", encoding="utf-8") as file:
            for cut_id, said in hypotheses(opened.teacher, left, device, BATCH_DURATION_S):
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
        if student.keep is not None:
            _kept(student.keep, rows, training_data(layout, [student])[2])
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
    """How a teacher's hypotheses are written as transcripts: as those that the tokens are learnt from.

    Where these are learnt from hypotheses, or nobody transcribed what students hear, it is dev's transcripts.
    """
    from kdrecipe.corpus.manifests import transcripts

    if recipe.tokens.labels:
        return system.text.fitted(transcripts(layout.manifests, "dev"))
    subset = recipe.tokens.data
    ids = read_json(layout.features / "subsets.json")[subset] if subset else None
    texts = transcripts(layout.manifests, "train", ids) or transcripts(layout.manifests, "dev")
    return system.text.fitted(texts)


def texts_of(recipe: Recipe, layout: Layout, teacher: str) -> list[str]:
    """What a teacher recognised that is a label of all its students: the text that these may see.

    Raises:
        DataError: nothing is kept.
    """
    subsets = read_json(layout.features / "subsets.json")
    seed, texts = recipe.systems[teacher].seeds[0], []
    for student in students_of(recipe, teacher):
        ids = subsets.get(student.unlabelled)  # None: all of the training split
        texts.append(kept_of(layout, teacher, seed, student.keep or Keep(), ids)[1])
    return [text for cut, text in texts[0].items() if all(cut in other for other in texts)]


def training_texts(recipe: Recipe, layout: Layout, learnt: Learnt) -> list[str]:
    """What tokens or a language model are learnt from: transcripts, or hypotheses of a teacher."""
    from kdrecipe.corpus.manifests import transcripts

    if learnt.labels is not None:
        return texts_of(recipe, layout, learnt.labels)
    ids = read_json(layout.features / "subsets.json")[learnt.data] if learnt.data else None
    return transcripts(layout.manifests, "train", ids)


def hypotheses_jobs(recipe: Recipe, learnt: Learnt) -> tuple[str, ...]:
    """The job that writes what is learnt from, if these are hypotheses."""
    if learnt.labels is None:
        return ()
    return (f"hypotheses/{learnt.labels}/seed{recipe.systems[learnt.labels].seeds[0]}",)


def labels_inputs(recipe: Recipe, learnt: Learnt) -> list[Any]:
    """Which hypotheses are learnt from."""
    students = students_of(recipe, learnt.labels) if learnt.labels else []
    keeps = [(s.unlabelled, s.keep.model_dump(mode="json") if s.keep else None) for s in students]
    return sorted(keeps, key=str)


def kept_of(
    layout: Layout, teacher: str, seed: int, keep: Keep, ids: Collection[str] | None
) -> tuple[Kept, dict[str, str]]:
    """Which hypotheses are labels of a student, and id -> transcript of those.

    Args:
        layout: where they were written.
        teacher: whose they are.
        seed: of the teacher.
        keep: the student's bounds.
        ids: what it hears without labels, copies at other speeds included; None: all.

    Raises:
        DataError: nothing is kept.
    """
    rows = [json.loads(line) for line in read_lines(layout.said(teacher, seed) / "hypotheses.jsonl")]
    kept = _kept(keep, rows, ids)
    transcripts = {row["id"]: row["transcript"] for row in rows}
    return kept, {utterance: transcripts[utterance] for utterance in kept.kept}


def _kept(keep: Keep, rows: Iterable[Mapping[str, Any]], ids: Collection[str] | None) -> Kept:
    """Which of the hypotheses of ``ids`` are labels; DataError if none is."""
    from kdrecipe.score.keep import Said

    wanted = None if ids is None else set(ids)

    def said(row: Mapping[str, Any]) -> Said:
        return Said(
            row["id"],
            row["transcript"],
            row["duration_s"],
            row["avg_log_prob"],
            row["no_speech_prob"],
            row["reference"] or None,
        )

    return keep.sort(said(row) for row in rows if wanted is None or row["id"] in wanted)
