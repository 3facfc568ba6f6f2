"""Stage 8: what each system says, and how fast and in how much memory it says it.

The hypotheses are the bundle's, by every decoder of the recipe that serves the system. Speed and
memory are those of what ships: the exported model in its runtime, one thread, in a process that
has loaded nothing else. How long the searches take, one against the other, is measured in torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import write_atomic, write_json
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Decoder, Hypothesis, LanguageModel, TokenTable
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.load import Named, Recipe, System
from kdrecipe.recipe.sections import uses_lm
from kdrecipe.recipe.suitable import head_of, measured_exporter, searches, unfit
from kdrecipe.score.hypotheses import hyps_file
from kdrecipe.stages.layout import Layout

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from kdrecipe.corpus.audio import Utterance
    from kdrecipe.measure.runtime import Measurement
    from kdrecipe.model.bundle import Bundle

BATCH_DURATION_S = 60.0


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per system and seed; alone, since it measures time."""
    registry = recipe.plugins.registry
    for name in recipe.build_order():
        system, found = recipe.systems[name], recipe.searches_of(name)
        lm = ("lm",) if any(uses_lm(d.options) for d in found.values()) else ()
        for seed in system.seeds:
            inputs = {
                "splits": recipe.decode.splits,
                "measure_max": recipe.decode.measure_max,
                "searches": [{"label": label, "name": d.name, **d.options} for label, d in found.items()],
                "plugins": {d.name: registry.fingerprint("decoders", d.name) for d in found.values()},
            }
            plan.add(
                Job(
                    8,
                    f"decode/{name}/seed{seed}",
                    layout.hyps(name, seed),
                    inputs,
                    partial(run, recipe, layout, system, seed),
                    (f"{name}/seed{seed}", f"export/{name}/seed{seed}", "features", *lm),
                )
            )


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Decode every split that the recipe names by every search, then measure on the first split.

    Raises:
        KdrecipeError: a bundle that was not there when the recipe was checked has a head that
            nothing in the recipe searches or measures.
    """
    from kdrecipe.corpus.audio import utterances_from_cuts
    from kdrecipe.data.features import load_cuts
    from kdrecipe.measure.search import search_rtf
    from kdrecipe.model.bundle import Bundle

    registry = recipe.plugins.registry
    bundle = Bundle.load(layout.system(system.name, seed), registry)
    found = _searches(recipe, bundle)
    lm = _language_model(found, layout, bundle)
    shift_s = bundle.meta["frame_shift_s"]
    decoders = {x: build_decoder(registry, d, bundle.tokens, shift_s, lm) for x, d in found.items()}
    cuts = {split: list(load_cuts(layout.features, split)) for split in recipe.decode.splits}
    first, main = recipe.decode.splits[0], next(iter(found))
    said: dict[str, dict[str, str]] = {}
    for split in recipe.decode.splits:
        for label, rows in decode_cuts(bundle, decoders, cuts[split]).items():
            if split == first:
                said[label] = {row["id"]: row["hyp"] for row in rows}
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_atomic(hyps_file(out, label, main, split), "".join(lines))
    sample = utterances_from_cuts(cuts[first], recipe.decode.measure_max)
    measured = _measure(recipe, bundle, layout.export(system.name, seed), sample)
    model = bundle.model.to("cpu")
    facts = {
        label: {
            "rtf": search_rtf(model, decoders[label], bundle.meta["features"], sample),
            "decoder": d.name,
            "options": d.options,
            "head": head_of(registry, "decoders", d.name),
            "lm": bool(uses_lm(d.options)),
        }
        for label, d in found.items()
    }
    if isinstance(measured, str):
        costs = {"size_mb": None, "rtf": None, "peak_rss_mb": None, "runtime": measured}
        same = None
    else:
        costs, same = measured.summary(), _same_texts(measured.texts, said, facts)
    write_json(
        out / "decode.json",
        {"params": bundle.meta["params"], **costs, "same_text_as_bundle": same, "searches": facts},
    )


def _searches(recipe: Recipe, bundle: Bundle) -> dict[str, Named]:
    heads = list(bundle.meta["model"]["heads"])
    found = searches(heads, recipe.decode.decoders, recipe.plugins.registry)
    if not found:
        raise KdrecipeError(
            f"no decoder in decode.decoders searches the head {heads[0]!r} of {bundle.name!r}",
            where=recipe.document.where(("decode", "decoders")),
            remedy="kdrecipe plugins list",
        )
    return found


def _language_model(found: Mapping[str, Named], layout: Layout, bundle: Bundle) -> LanguageModel | None:
    """The recipe's language model over the bundle's tokens, if some search uses it."""
    if not any(uses_lm(d.options) for d in found.values()):
        return None
    from kdrecipe.data.ngram import load_lm

    return load_lm(layout.lm, bundle.tokens, bundle.tokens.pieces)


def build_decoder(
    registry: Registry,
    named: Named,
    tokens: TokenTable,
    frame_shift_s: float,
    lm: LanguageModel | None = None,
) -> Decoder:
    """The decoder that ``named`` describes; ``lm`` is for those whose ``lm_weight`` is above 0."""
    cls = registry.get("decoders", named.name)
    config = cls.Config.model_validate(named.options)
    more = (lm if uses_lm(named.options) else None,) if "lm_weight" in cls.Config.model_fields else ()
    decoder: Decoder = cls(config, tokens, frame_shift_s, *more)
    return decoder


def decode_cuts(
    bundle: Bundle, decoders: Mapping[str, Decoder], cuts: Sequence[Cut]
) -> dict[str, list[dict[str, Any]]]:
    """Every cut with its best hypothesis by each decoder: label -> rows of the hypotheses file."""
    import torch

    from kdrecipe.data.batches import CutBatches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = bundle.model.to(device)
    by_id = {cut.id: cut for cut in cuts}
    batches = CutBatches(
        cuts, bundle.tokens, batch_duration_s=BATCH_DURATION_S, seed=0, labelled_ids=None, shuffle=False
    )
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in decoders}
    for ids in batches.epoch(0):
        batch = batches.load(ids).map(lambda x: x.to(device))
        with torch.no_grad():
            out = model(batch.features_BTF, batch.lens_B)
            for label, decoder in decoders.items():
                found = zip(batch.ids, decoder.decode(model, out), strict=True)
                rows[label] += [_row(by_id[cut_id], hypothesis) for cut_id, hypothesis in found]
    return rows


def _measure(recipe: Recipe, bundle: Bundle, exports: Path, sample: Sequence[Utterance]) -> Measurement | str:
    """Run the export of the bundle's first head in its runtime; or why that can't be done."""
    from kdrecipe.measure.runtime import measure_export

    heads, registry = list(bundle.meta["model"]["heads"]), recipe.plugins.registry
    wanted = measured_exporter(heads, recipe.export, registry)
    if wanted is None:
        raise KdrecipeError(
            f"nothing in export is of the head {heads[0]!r} of {bundle.name!r} and can be measured",
            where=recipe.document.where(("export",)),
            remedy="kdrecipe plugins list",
        )
    if why := unfit(registry, wanted.name, bundle.meta["model"]):
        return f"not measured: {why}"
    exporter = registry.get("exporters", wanted.name)
    return measure_export(exporter, exports / wanted.name, "int8" if bundle.is_int8 else "fp32", sample)


def _same_texts(
    texts: Mapping[str, str], said: Mapping[str, Mapping[str, str]], facts: Mapping[str, Mapping[str, Any]]
) -> float | None:
    """Share of texts that the runtime, which searches greedily, has in common with the bundle.

    None if the bundle was not searched greedily by its first head.
    """
    head = next(iter(facts.values()))["head"]
    greedy = [x for x, f in facts.items() if f["head"] == head and str(f["decoder"]).endswith("_greedy")]
    if not greedy:
        return None
    return sum(texts[u] == said[greedy[0]][u] for u in texts) / len(texts)


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
