"""Stage 8 for teachers that plugins import: recognised by their own search, where they run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import write_json
from kdrecipe.interfaces import SAMPLE_RATE, Batch, Teacher
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.recipe.sections import Features
from kdrecipe.score.hypotheses import bundle_hyps_file, hyps_file
from kdrecipe.stages.labels import form_of
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.rows import Row, hyps_line, under_conditions, write_rows
from kdrecipe.stages.teachers import Opened, facts_of, hypotheses, open_teacher

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

    from kdrecipe.corpus.audio import Utterance

BATCH_DURATION_S = 60.0
OWN = "own"
"""The label of its search."""
IN_TORCH = "an imported teacher runs in torch, as it teaches"


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Recognise every split of the recipe."""
    from kdrecipe.data.features import load_cuts
    from kdrecipe.train.distribution import local_device

    opened, device = open_teacher(recipe, layout, system.name, seed), local_device()
    opened.load(device)
    form = form_of(recipe, layout, system)
    rows: dict[str, list[dict[str, Any]]] = {}
    cuts = {split: list(load_cuts(layout.features, split)) for split in recipe.decode.splits}
    for split, listed in cuts.items():
        by_id = {cut.id: cut for cut in listed}
        found = hypotheses(opened.teacher, listed, device, BATCH_DURATION_S)
        said = {
            cut_id: hyps_line(by_id[cut_id], form.apply(h.text), h.tokens, h.times_s, h.score)
            | {"raw": h.text}
            for cut_id, h in found
        }
        rows[split] = [said[cut.id] for cut in listed]
        write_rows(hyps_file(out, split), rows[split])
        write_rows(bundle_hyps_file(out, OWN, split), rows[split])
    first = recipe.decode.splits[0]
    facts = facts_of(layout, system.name, seed)
    runtime = getattr(opened.teacher, "runtime", "")
    speed = _speed(recipe, opened, cuts[first])
    costs = {"size_mb": facts["size_mb"], "rtf": None, "peak_rss_mb": None}
    costs |= {"rtf": speed, "runtime": runtime} if runtime else {"runtime": f"not measured: {IN_TORCH}"}
    assert system.plugin is not None
    search = {"label": OWN, "decoder": system.plugin.name, "options": system.plugin.options, "variant": ""}
    search |= {"runs_in": runtime or "torch", "name": OWN}

    def in_torch(utterances: Sequence[Utterance]) -> list[str]:
        return [form.apply(text) for text in _recognise(recipe, opened, utterances)]

    row = Row(search, rows, in_torch, costs)
    if recipe.decode.robustness:
        under_conditions(row, cuts[first], recipe.decode.robustness, out)
    searches = {
        OWN: {"rtf": speed["total"], "decoder": system.plugin.name, "options": {}, "head": None, "lm": False}
    }
    decoded = {"params": facts["params"], **costs, "search": search, "searches": searches}
    write_json(out / "decode.json", {**decoded, "same_text_as_bundle": None, "rewritten": {}})


def _speed(recipe: Recipe, opened: Opened, cuts: Sequence[MonoCut]) -> dict[str, float]:
    """Seconds of work per second of audio, one utterance at a time on one thread: median, 95 %, total."""
    import numpy as np
    import torch

    from kdrecipe.corpus.audio import utterances_from_cuts
    from kdrecipe.corpus.subsets import drawn_over_speakers
    from kdrecipe.measure.runtime import NUM_WARM_UP

    utterances = list(utterances_from_cuts(drawn_over_speakers(cuts, recipe.decode.measure_max)))
    opened.load(torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _recognise(recipe, opened, utterances[:NUM_WARM_UP])
    seconds = []
    for utterance in utterances:
        began = time.perf_counter()
        _recognise(recipe, opened, [utterance])
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    lens_s = [utterance.duration_s for utterance in utterances]
    rtfs = [spent / length for spent, length in zip(seconds, lens_s, strict=True)]
    return {
        "median": float(np.median(rtfs)),
        "p95": float(np.percentile(rtfs, 95)),
        "total": sum(seconds) / sum(lens_s),
    }


def _recognise(recipe: Recipe, opened: Opened, utterances: Sequence[Utterance]) -> list[str]:
    """Texts of any utterances, one at a time, on the CPU."""
    import torch

    opened.load(torch.device("cpu"))
    with torch.no_grad():
        found = [opened.teacher.hypotheses(_alone(opened.teacher, recipe.features, u))[0] for u in utterances]
    return [hypothesis.text for hypothesis in found]


def _alone(teacher: Teacher, features: Features, utterance: Utterance) -> Batch:
    """A batch of one utterance, without labels."""
    import torch

    from kdrecipe.data.features import extract

    samples_S = utterance.samples_S
    if teacher.input == "features":
        features_TF = extract(samples_S, SAMPLE_RATE, features.model_dump())
    else:
        features_TF = torch.zeros(max(1, len(samples_S) // 160), features.num_mel_bins).numpy()
    none = torch.zeros(1, 0, dtype=torch.int64)
    return Batch(
        ids=[utterance.id],
        features_BTF=torch.from_numpy(features_TF)[None],
        lens_B=torch.tensor([len(features_TF)]),
        tokens_BU=none,
        token_lens_B=torch.zeros(1, dtype=torch.int64),
        labelled_B=torch.zeros(1, dtype=torch.bool),
        texts=[""],
        samples_BS=torch.from_numpy(samples_S)[None].float(),
        sample_lens_B=torch.tensor([len(samples_S)]),
    )
