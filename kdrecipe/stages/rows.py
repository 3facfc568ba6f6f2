"""What a system's row of the table shows: one search in one place, an export in its runtime or a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import write_atomic
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Hypothesis
from kdrecipe.recipe.load import Named, Recipe
from kdrecipe.recipe.suitable import RuntimeOptions, measured_exporter, runtime_search, unfit
from kdrecipe.score.hypotheses import condition_hyps_file

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

    from kdrecipe.corpus.audio import Utterance
    from kdrecipe.measure.runtime import Measurement
    from kdrecipe.model.bundle import Bundle


@dataclass(frozen=True)
class Row:
    """What a system's row of the table shows: one search in one place.

    Args:
        search: ``label``, ``decoder`` and ``options`` in the recipe; ``runs_in``: ``sherpa-onnx``, or
            ``torch`` for a bundle; ``name``: its name there; ``variant``: of the exporter.
        hypotheses: split -> rows of the hypotheses file, which are scored.
        recognise: the texts of any other utterances by the same search in the same place.
        costs: of the same recognition: ``size_mb``, ``rtf``, ``peak_rss_mb``, ``runtime`` and more; of a
            bundle only ``size_mb`` of the exported files, and ``runtime`` says why there is no more.
    """

    search: dict[str, Any]
    hypotheses: dict[str, list[dict[str, Any]]]
    recognise: Callable[[Sequence[Utterance]], list[str]]
    costs: dict[str, Any]

    def __post_init__(self) -> None:
        in_torch = self.search["runs_in"] == "torch"
        assert in_torch == (self.costs["rtf"] is None), "a row's time belongs to its own texts"


def row_of(
    recipe: Recipe,
    bundle: Bundle,
    exports: Path,
    search: tuple[str, Named],
    cuts: Mapping[str, Sequence[MonoCut]],
    of_bundle: dict[str, list[dict[str, Any]]],
    in_torch: Callable[[Sequence[Utterance]], list[str]],
) -> Row:
    """The row of the export if its runtime has the search (label, decoder), otherwise that of the bundle."""
    registry, heads = recipe.plugins.registry, list(bundle.meta["model"]["heads"])
    wanted = measured_exporter(heads, recipe.export, registry, search[1])
    if wanted is None:
        raise KdrecipeError(
            f"no exporter in export is for the head {heads[0]!r} of {bundle.name!r} and can be measured",
            where=recipe.document.where(("export",)),
            remedy="kdrecipe plugins list",
        )
    cls, label = registry.get("exporters", wanted.name), search[0]
    variant = cls.ships(bundle.number_formats)
    about = {"label": label, "decoder": search[1].name, "options": search[1].options, "variant": variant}
    why = unfit(registry, wanted.name, bundle.meta["model"])
    if why is None and variant not in cls.files:
        why = f"{wanted.name} writes no {variant} files"
    if why is None:
        files = [exports / wanted.name / name for name in cls.files[variant].values()]
        size_mb = sum(file.stat().st_size for file in files) / 1e6
        found = runtime_search(cls.runtime, search[1], registry)
        if isinstance(found, RuntimeOptions):
            about |= {"runs_in": cls.runtime.name, "name": found.name}
            return _shipped(cls, exports / wanted.name, about, found, cuts, recipe.decode.longest_s)
        why = found
    else:
        size_mb = None
    costs = {"size_mb": size_mb, "rtf": None, "peak_rss_mb": None, "runtime": f"not measured: {why}"}
    about |= {"runs_in": "torch", "name": search[1].name, "why": why}
    return Row(about, of_bundle, in_torch, costs)


def _shipped(
    exporter: Any,
    directory: Path,
    about: dict[str, Any],
    search: RuntimeOptions,
    cuts: Mapping[str, Sequence[MonoCut]],
    longest_s: float,
) -> Row:
    """Every split, recognised once in the runtime; the costs are those of the first split."""
    from kdrecipe.corpus.audio import utterances_from_cuts
    from kdrecipe.measure.runtime import measure_export

    def measure(utterances: Iterable[Utterance]) -> Measurement:
        return measure_export(
            exporter, directory, about["variant"], utterances, search=search, longest_s=longest_s
        )

    def recognise(utterances: Sequence[Utterance]) -> list[str]:
        return [found.text for found in measure(utterances).utterances]

    measured = {split: measure(utterances_from_cuts(listed)) for split, listed in cuts.items()}
    hypotheses = {
        split: [
            hyps_line(cut, found.text, found.tokens, found.times_s)
            for cut, found in zip(listed, measured[split].utterances, strict=True)
        ]
        for split, listed in cuts.items()
    }
    return Row(about, hypotheses, recognise, next(iter(measured.values())).summary())


def rewritten(
    recipe: Recipe,
    bundle: Bundle,
    search: Named,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    of_bundle: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, str]:
    """Split -> what the runtime wrote otherwise than its tokens spell; only splits where it did."""
    from kdrecipe.data.tokens import ids_by_name
    from kdrecipe.measure.spelling import Spelling, speller_of

    registry, heads = recipe.plugins.registry, list(bundle.meta["model"]["heads"])
    wanted = measured_exporter(heads, recipe.export, registry, search)
    assert wanted is not None, "it has a row in its runtime"
    cls = registry.get("exporters", wanted.name)
    ids, notes = ids_by_name(bundle.tokens.pieces), {}
    for split, listed in rows.items():
        spelling = Spelling(bundle.tokens, speller_of(cls, bundle.tokens.pieces), cls.runtime.name)
        likely = {row["id"]: row["tokens"] for row in of_bundle[split]}
        for row in listed:
            if all(name in ids for name in row["tokens"]):  # a runtime may have names of its own
                said = Hypothesis(row["hyp"], [ids[name] for name in row["tokens"]])
                spelling.add(spelling.heard(said, likely[row["id"]]), row["hyp"])
        if spelling.rewritten:
            notes[split] = f"{spelling.summary()} on {split}, {spelling.rate:.2%} of words"
    return notes


def hyps_line(
    cut: MonoCut, text: str, tokens: Sequence[Any], times_s: Sequence[float], score: float | None = None
) -> dict[str, Any]:
    return {
        "id": cut.id,
        "speaker": cut.supervisions[0].speaker,
        "ref": " ".join(s.text or "" for s in cut.supervisions),
        "hyp": text,
        "duration_s": cut.duration,
        "score": score,
        "tokens": list(tokens),
        "times_s": [round(t, 3) for t in times_s],
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A hypotheses file, a JSON object per line."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def under_conditions(row: Row, cuts: Sequence[MonoCut], number: int, out: Path) -> None:
    """What the row says of ``number`` utterances, over all speakers, under each condition."""
    from kdrecipe.corpus.audio import utterances_from_cuts
    from kdrecipe.corpus.subsets import drawn_over_speakers
    from kdrecipe.measure.conditions import CONDITIONS

    drawn = drawn_over_speakers(cuts, number)
    by_speaker = sorted(drawn, key=lambda cut: (str(cut.supervisions[0].speaker), cut.id))
    recorded = list(utterances_from_cuts(by_speaker))
    heard = {name: condition.apply(recorded) for name, condition in CONDITIONS.items()}
    texts = iter(row.recognise([u for utterances in heard.values() for u in utterances]))
    for name, utterances in heard.items():
        rows = [{"id": u.id, "ref": u.text, "hyp": next(texts)} for u in utterances]
        write_rows(condition_hyps_file(out, name), rows)
