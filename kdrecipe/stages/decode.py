"""Stage 8: the text that each system recognises, and the time and memory that it needs.

A system's row of the table shows what ships: the exported model in its runtime, on one thread, in a
process that has loaded nothing else. Each utterance is recognised once, which gives both the text that is
scored and the time in the same row. If the runtime does not have the search, the row is the bundle's and
has no time. All decoders that fit the system also run on the bundle in torch, to be compared with each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import write_json
from kdrecipe.corpus.segments import LONGEST_S, SHORTEST_S
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Decoder, LanguageModel
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job
from kdrecipe.plugin.returned import returned
from kdrecipe.recipe.load import Named, Recipe, System
from kdrecipe.recipe.sections import uses_lm
from kdrecipe.recipe.suitable import (
    head_of,
    measured_exporter,
    search_of_row,
    searches,
)
from kdrecipe.score.hypotheses import bundle_hyps_file, hyps_file
from kdrecipe.stages.inputs import model_plugins
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.rows import hyps_line, rewritten, row_of, under_conditions, write_rows
from kdrecipe.text import clean

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

    from kdrecipe.corpus.audio import Utterance
    from kdrecipe.model.bundle import Bundle

BATCH_DURATION_S = 60.0


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """One job per system and seed, each run alone, since it measures time."""
    registry = recipe.plugins.registry
    for name in recipe.build_order():
        system, found = recipe.systems[name], recipe.searches_of(name)
        lm = ("lm",) if any(uses_lm(d.options) for d in found.values()) else ()
        for seed in system.seeds:
            if system.is_imported:
                plan.add(_imported_job(recipe, layout, system, seed))
                continue
            inputs = {
                "splits": recipe.decode.splits,
                "measure_max": recipe.decode.measure_max,
                "robustness": recipe.decode.robustness,
                "longest_s": recipe.decode.longest_s,
                "searches": [{"label": label, "name": d.name, **d.options} for label, d in found.items()],
                "plugins": {d.name: registry.fingerprint("decoders", d.name) for d in found.values()},
                "exporter": _exporter_input(recipe, name),
                "model": model_plugins(recipe, name),
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


def _imported_job(recipe: Recipe, layout: Layout, system: System, seed: int) -> Job:
    from kdrecipe.stages import teacher_rows

    keys = ("splits", "measure_max", "robustness")
    name = f"{system.name}/seed{seed}"
    return Job(
        8,
        f"decode/{name}",
        layout.hyps(system.name, seed),
        {key: getattr(recipe.decode, key) for key in keys},
        partial(teacher_rows.run, recipe, layout, system, seed),
        (name, "features", "tokens"),
    )


def _exporter_input(recipe: Recipe, system: str) -> dict[str, str] | None:
    """The exporter whose files the row shows, and a hash of its code; None if the heads are not known yet."""
    registry, heads = recipe.plugins.registry, recipe.heads_of(system)
    search = search_of_row(heads, recipe.decode.decoders, registry) if heads else None
    wanted = measured_exporter(heads, recipe.export, registry, search) if heads else None
    if wanted is None:
        return None
    return {"name": wanted.name, "plugin": registry.fingerprint("exporters", wanted.name)}


def run(recipe: Recipe, layout: Layout, system: System, seed: int, out: Path) -> None:
    """Recognise every split of the recipe: with the export by its search, with the bundle by all searches.

    Raises:
        KdrecipeError: a bundle that did not exist when the recipe was checked has a head that
            nothing in the recipe searches or exports.
    """
    from kdrecipe.data.features import load_cuts
    from kdrecipe.model.bundle import Bundle
    from kdrecipe.model.decoders import build_decoder

    bundle = Bundle.load(layout.system(system.name, seed), recipe.plugins.registry)
    found = _searches(recipe, bundle)
    lm = _language_model(found, layout, bundle)
    decoders = {label: build_decoder(bundle, named, lm) for label, named in found.items()}
    cuts = {split: list(load_cuts(layout.features, split)) for split in recipe.decode.splits}
    longest_s = recipe.decode.longest_s
    said = {split: decode_cuts(bundle, decoders, cuts[split], longest_s) for split in cuts}
    for split, by_label in said.items():
        for label, rows in by_label.items():
            write_rows(bundle_hyps_file(out, label, split), rows)
    main = next(iter(found))
    of_bundle = {split: by_label[main] for split, by_label in said.items()}
    in_torch = partial(_recognise, bundle, decoders[main], longest_s)
    exports = layout.export(system.name, seed)
    row = row_of(recipe, bundle, exports, (main, found[main]), cuts, of_bundle, in_torch)
    for split, rows in row.hypotheses.items():
        write_rows(hyps_file(out, split), rows)
    first = recipe.decode.splits[0]
    same, changed = None, {}
    if row.hypotheses is not of_bundle:
        same = _same_texts(row.hypotheses[first], of_bundle[first])
        changed = rewritten(recipe, bundle, found[main], row.hypotheses, of_bundle)
    if recipe.decode.robustness:
        under_conditions(row, cuts[first], recipe.decode.robustness, out)
    facts = _search_facts(recipe, bundle, decoders, found, cuts[first])
    decoded = {"params": bundle.meta["params"], **row.costs, "search": row.search}
    decoded |= {"same_text_as_bundle": same, "rewritten": changed, "searches": facts}
    write_json(out / "decode.json", decoded)


def _search_facts(
    recipe: Recipe,
    bundle: Bundle,
    decoders: Mapping[str, Decoder],
    found: Mapping[str, Named],
    cuts: Sequence[MonoCut],
) -> dict[str, dict[str, Any]]:
    """Each search on the bundle: its description, and its time in torch on a sample over all speakers."""
    from kdrecipe.corpus.audio import utterances_from_cuts
    from kdrecipe.corpus.subsets import drawn_over_speakers
    from kdrecipe.measure.search import search_rtf

    sample = list(utterances_from_cuts(drawn_over_speakers(cuts, recipe.decode.measure_max)))
    model = bundle.model.to("cpu")
    return {
        label: {
            "rtf": search_rtf(
                model, decoders[label], bundle.meta["features"], sample, recipe.decode.longest_s
            ),
            "decoder": d.name,
            "options": d.options,
            "head": head_of(recipe.plugins.registry, "decoders", d.name),
            "lm": bool(uses_lm(d.options)),
        }
        for label, d in found.items()
    }


def main_search(recipe: Recipe, layout: Layout, bundle: Bundle) -> tuple[str, Decoder]:
    """Label and decoder of the search that makes a system's row."""
    from kdrecipe.model.decoders import build_decoder

    label, named = next(iter(_searches(recipe, bundle).items()))
    return label, build_decoder(bundle, named, _language_model({label: named}, layout, bundle))


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
    """The recipe's language model over the bundle's tokens, if any search uses it."""
    if not any(uses_lm(d.options) for d in found.values()):
        return None
    from kdrecipe.data.ngram import load_lm

    return load_lm(layout.lm, bundle.tokens, bundle.tokens.pieces)


def decode_cuts(
    bundle: Bundle,
    decoders: Mapping[str, Decoder],
    cuts: Sequence[MonoCut],
    longest_s: float = LONGEST_S,
) -> dict[str, list[dict[str, Any]]]:
    """The best hypothesis of every cut by each decoder: label -> rows of the hypotheses file.

    Cuts of more than ``longest_s``, or next to nothing, are recognised from their audio, as runtimes do.
    """
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in decoders}
    whole = [cut for cut in cuts if SHORTEST_S <= cut.duration <= longest_s]
    if whole:
        _decode_batches(bundle, decoders, whole, rows)
    others = [cut for cut in cuts if not SHORTEST_S <= cut.duration <= longest_s]
    _decode_pieces(bundle, decoders, others, longest_s, rows)
    return rows


def _decode_pieces(
    bundle: Bundle,
    decoders: Mapping[str, Decoder],
    cuts: Sequence[MonoCut],
    longest_s: float,
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    from kdrecipe.corpus.audio import utterances_from_cuts
    from kdrecipe.measure.search import recognise

    model, features = bundle.model.to("cpu"), bundle.meta["features"]
    for cut, utterance in zip(cuts, utterances_from_cuts(cuts), strict=True):
        for label, decoder in decoders.items():
            h = recognise(model, decoder, features, utterance.samples_S, longest_s=longest_s)
            rows[label].append(hyps_line(cut, h.text, h.tokens, h.times_s, h.score))


def _decode_batches(
    bundle: Bundle,
    decoders: Mapping[str, Decoder],
    cuts: Sequence[MonoCut],
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    import torch

    from kdrecipe.data.batches import CutBatches
    from kdrecipe.train.distribution import local_device

    device = local_device()
    model = bundle.model.to(device)
    by_id = {cut.id: cut for cut in cuts}
    batches = CutBatches(
        cuts, bundle.tokens, batch_duration_s=BATCH_DURATION_S, seed=0, labelled_ids=None, shuffle=False
    )
    for ids in batches.epoch(0):
        batch = batches.load(ids).map(lambda x: x.to(device))
        with torch.no_grad():
            out = model(batch.features_BTF, batch.lens_B)
            for label, decoder in decoders.items():
                hypotheses = returned(decoder.decode(model, out), list, f"decoder {label!r}", "decode")
                found = zip(batch.ids, hypotheses, strict=True)
                rows[label] += [
                    hyps_line(by_id[cut_id], h.text, h.tokens, h.times_s, h.score) for cut_id, h in found
                ]


def _recognise(
    bundle: Bundle, decoder: Decoder, longest_s: float, utterances: Sequence[Utterance]
) -> list[str]:
    """Texts by the bundle in torch, one utterance at a time."""
    from kdrecipe.measure.search import recognise

    model, features = bundle.model.to("cpu"), bundle.meta["features"]
    return [recognise(model, decoder, features, u.samples_S, SAMPLE_RATE, longest_s).text for u in utterances]


def _same_texts(rows: Sequence[Mapping[str, Any]], of_bundle: Sequence[Mapping[str, Any]]) -> float:
    """Share of utterances for which runtime and bundle give the same text, by the same search."""
    said = {row["id"]: clean(row["hyp"]) for row in of_bundle}
    same = [bool(clean(row["hyp"]) == said[row["id"]]) for row in rows]
    return sum(same) / len(same)
