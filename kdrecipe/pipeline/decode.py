"""Stage 8: what each system says, and how fast and in how much memory it says it.

The hypotheses are the bundle's, by the recipe's decoder. Speed and memory are those of what ships:
the exported model in its runtime, one thread, in a process that has loaded nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import write_atomic, write_json
from kdrecipe.interfaces import Hypothesis
from kdrecipe.parsing import MEASURED_EXPORT
from kdrecipe.schema import Recipe, System
from kdrecipe.stages import Job, Layout, Plan

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from kdrecipe.bundle import Bundle

BATCH_DURATION_S = 60.0


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per system and seed; alone, since it measures time."""
    registry = recipe.plugins.registry
    for name in recipe.build_order():
        system = recipe.systems[name]
        for seed in system.seeds:
            inputs = {
                "decode": recipe.decode.model_dump(mode="json", exclude={"metrics", "compare"}),
                "plugin": registry.fingerprint("decoders", recipe.decode.decoder.name),
            }
            plan.add(
                Job(
                    8,
                    f"decode/{name}/seed{seed}",
                    layout.hyps(name, seed),
                    inputs,
                    partial(run, recipe, layout, system, seed),
                    (f"{name}/seed{seed}", f"export/{name}/seed{seed}", "features"),
                )
            )


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Decode every split that the recipe names, then measure the shipped file on the first."""
    from kdrecipe.bundle import Bundle
    from kdrecipe.data.audio import utterances_from_cuts
    from kdrecipe.data.features import load_cuts
    from kdrecipe.measure.runtime import measure_export

    bundle = Bundle.load(layout.system(system.name, seed), recipe.plugins.registry)
    cuts = {split: list(load_cuts(layout.features, split)) for split in recipe.decode.splits}
    ours: dict[str, str] = {}
    for split in recipe.decode.splits:
        rows = [_row(cut, hyp) for cut, hyp in decode_cuts(recipe, bundle, cuts[split])]
        ours |= {row["id"]: row["hyp"] for row in rows}
        write_atomic(out / f"{split}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    directory = layout.export(system.name, seed) / MEASURED_EXPORT
    variant = "int8" if bundle.is_int8 else "fp32"
    sample = utterances_from_cuts(cuts[recipe.decode.splits[0]], recipe.decode.measure_max)
    measured = measure_export(directory, variant, sample)
    same = [measured.texts[u] == ours[u] for u in measured.texts]
    write_json(
        out / "decode.json",
        {"params": bundle.meta["params"], **measured.summary(), "same_text_as_bundle": sum(same) / len(same)},
    )


def decode_cuts(recipe: Recipe, bundle: Bundle, cuts: Sequence[Cut]) -> Iterator[tuple[Cut, Hypothesis]]:
    """Every cut with its best hypothesis, by the recipe's decoder."""
    import torch

    from kdrecipe.data.batches import CutBatches

    cls = recipe.plugins.registry.get("decoders", recipe.decode.decoder.name)
    config = cls.Config.model_validate(recipe.decode.decoder.options)
    decoder = cls(config, bundle.tokens, bundle.meta["frame_shift_s"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = bundle.model.to(device)
    by_id = {cut.id: cut for cut in cuts}
    batches = CutBatches(
        cuts, bundle.tokens, batch_duration_s=BATCH_DURATION_S, seed=0, labelled_ids=None, shuffle=False
    )
    for ids in batches.epoch(0):
        batch = batches.load(ids).map(lambda x: x.to(device))
        with torch.no_grad():
            out = model(batch.features_BTF, batch.lens_B).map(lambda x: x.cpu())
        for cut_id, hypothesis in zip(batch.ids, decoder.decode(model, out), strict=True):
            yield by_id[cut_id], hypothesis


def _row(cut: Cut, found: Hypothesis) -> dict[str, Any]:
    return {
        "id": cut.id,
        "speaker": cut.supervisions[0].speaker,
        "ref": " ".join(s.text or "" for s in cut.supervisions),
        "hyp": found.text,
        "duration_s": cut.duration,
        "score": found.score,
        "tokens": found.tokens,
        "times_s": [round(t, 3) for t in found.times_s],
    }
