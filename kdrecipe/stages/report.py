"""Stage 10: everything measured -> ``results.json``, ``RESULTS.md``, ``report.html``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrecipe.artifacts import PROVENANCE, read_json
from kdrecipe.errors import PluginError
from kdrecipe.jobs.plan import Plan
from kdrecipe.jobs.stamps import Job, seconds_of
from kdrecipe.plugin.returned import returned
from kdrecipe.plugin.source_code import core_hash
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.recipe.sections import Learnt, Tokens, beyond_labels
from kdrecipe.recipe.suitable import measured_exporter, search_of_row
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.score import hypotheses, search_facts
from kdrecipe.stages.teachers import facts_of

if TYPE_CHECKING:
    import numpy as np

SECTIONS_PRINTED = 2  # title and reading, and claims if any; the table comes at the run's end


def add_jobs(plan: Plan, recipe: Recipe, layout: Layout) -> None:
    """The stage's one job."""
    each = [f"{name}/seed{seed}" for name in recipe.build_order() for seed in recipe.systems[name].seeds]
    imported = {f"{s.name}/seed{seed}" for s in recipe.systems.values() if s.is_imported for seed in s.seeds}
    measured = [f"export/{e}" for e in each if e not in imported] + [f"decode/{e}" for e in each]
    guards = (f"guard/{name}" for name in recipe.first_teachers())
    needs = ("prepare", "features", "tokens", "texts", "score", *each, *guards, *measured)
    claims = [claim.model_dump(mode="json") for claim in recipe.claims]
    inputs = {
        "systems": list(recipe.systems),
        "profile": recipe.profile,
        "claims": claims,
        "command": recipe.command,
        "learnt_from": [recipe.tokens.data, recipe.lm.data if recipe.lm else None, *recipe.writers],
        "sections": recipe.plugins.fingerprints("report_sections"),
    }
    before = tuple(plan.jobs.values())
    plan.add(Job(10, "report", layout.report, inputs, lambda out: run(recipe, layout, out, before), needs))


def run(recipe: Recipe, layout: Layout, out: Path, before: Sequence[Job]) -> None:
    """Write the report.

    ``before``: all other jobs, which the results say the seconds of.
    """
    from kdrecipe.report.write import write_report

    scores = read_json(layout.scores / "scores.json")
    data = {
        "recipe": _facts(recipe, layout),
        "corpus_summary": _corpus_summary(recipe, layout),
        "systems": [_row(system, recipe, layout, scores) for system in recipe.systems.values()],
        "scores": scores,
        "guard": _verdicts(recipe, layout),
        "searches": _searches(scores["searches"], search_facts(recipe, layout)),
        "claims": [claim.model_dump(mode="json") for claim in recipe.claims],
        "seconds": {job.name: seconds_of(job) for job in before},
    }
    found = recipe.plugins.pm.hook.report_sections(recipe=recipe, results=data)
    data["sections"] = list(_more_sections(found))
    write_report(data, hypotheses(recipe, layout), _logs(recipe, layout), out, audio=_audio(layout))
    shown = (out / "RESULTS.md").read_text(encoding="utf-8").split("\n## ")
    shown = shown[: SECTIONS_PRINTED + bool(recipe.claims)]
    print("\n## ".join(shown).rstrip(), flush=True)


def _more_sections(found: Iterable[Any]) -> Iterator[dict[str, str]]:
    """What plugins add by the hook ``report_sections``."""
    for part in found:
        for section in returned(part or (), Iterable, "a plugin", "report_sections"):  # type: ignore[type-abstract]
            pair = tuple(section) if isinstance(section, tuple | list) else ()
            if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise PluginError(f"report_sections: {section!r} is no pair of texts (title, Markdown)")
            yield {"title": pair[0], "markdown": pair[1]}


def publish(recipe: Recipe, layout: Layout) -> None:
    """Renew the tables beside the recipe, if the report is of the recipe as it stands."""
    for name in ("RESULTS.md", "results.json") if recipe.as_it_stands else ():
        shutil.copyfile(layout.report / name, recipe.dir / name)


def closing(recipe: Recipe, layout: Layout) -> str:
    """What a run ends with: the table in short, where the report is, and how to use the best student."""
    from kdrecipe.report.text import brief

    results = read_json(layout.report / "results.json")
    model = _to_try(recipe, layout, results)
    carries = (model / "bundle.json").is_file() and read_json(model / "bundle.json")["plugin_files"]
    consent = "--trust-plugins " if carries else ""
    command = "kdrecipe" if shutil.which("kdrecipe") else f"{_shown(Path(sys.executable))} -m kdrecipe.cli"
    return (
        f"{brief(results)}\n\nreport: {_shown(layout.report / 'report.html')}"
        f"\nrecognise a recording of your own: {command} transcribe {consent}{_shown(model)} your.wav"
    )


def _to_try(recipe: Recipe, layout: Layout, results: Mapping[str, Any]) -> Path:
    """The export of the best student; of the best other system if no student has one; or else a bundle.

    The command knows installed exporters only, not those of the recipe's own files.
    """
    registry = recipe.plugins.registry

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        scores: Mapping[str, Any] = next(iter(row["splits"].values()), {})
        wer = (scores.get("wer") or {}).get("mean")
        is_student = row["kind"] in ("distilled", "compressed")
        return not is_student, wer is None, wer or 0.0

    rows = sorted(results["systems"], key=rank)
    for row in rows:
        exports = layout.export(row["name"], row["seeds"][0])
        heads = recipe.heads_of(row["name"])
        search = search_of_row(heads, recipe.decode.decoders, registry) if heads else None
        named = measured_exporter(heads, recipe.export, registry, search) if heads else None
        installed = named is not None and registry.source("exporters", named.name).package
        if named is not None and installed and (exports / named.name).is_dir():
            return exports / named.name
    return layout.system(rows[0]["name"], rows[0]["seeds"][0])


def _shown(path: Path) -> str:
    """``path`` as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _searches(
    scored: list[dict[str, Any]], facts: dict[str, dict[int, dict[str, dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """What stage 9 found of each search, with what stage 8 noted; time averaged over seeds."""
    rows = []
    for row in scored:
        seeds = [labels[row["search"]] for labels in facts[row["system"]].values()]
        rows.append({**row, **seeds[0], "rtf": _mean(found["rtf"] for found in seeds)})
    return rows


def _verdicts(recipe: Recipe, layout: Layout) -> list[dict[str, Any]]:
    """What stage 3 found of the teachers, a verdict for each and its seed."""
    found = (read_json(layout.guard(name) / "guard.json") for name in recipe.first_teachers())
    return [row for guard in found for row in guard["verdicts"]]


def _corpus_summary(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """What stage 0 wrote, and what stage 2 left out and noted besides."""
    from kdrecipe.corpus.problems import KINDS

    summary: dict[str, Any] = read_json(layout.manifests / "summary.json")
    reason = KINDS["too_short"].singular
    notes = [*summary["notes"], *_learnt_from(recipe, layout)]
    notes += read_json(layout.texts / "texts.json")["notes"]
    too_short = [
        {"id": cut, "where": "", "reason": reason} for cut in read_json(layout.tokens / "left_out.json")
    ]
    return {**summary, "left_out": summary["left_out"] + too_short, "notes": notes}


def _learnt_from(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Whose transcripts tokens and language model come from, and whose labels that exceeds."""
    subsets = {name: set(ids) for name, ids in read_json(layout.features / "subsets.json").items()}
    sources: dict[str, Learnt] = {"the tokens": recipe.tokens}
    if recipe.lm is not None and recipe.lm.text is None:
        sources["the language model"] = recipe.lm
    for what, learnt in sources.items():
        note = f"{what} are" if what.endswith("s") else f"{what} is"
        if isinstance(learnt, Tokens) and learnt.teacher is not None:
            note += f" those of {learnt.teacher} that are used in"
        else:
            note += " learnt from"
        if learnt.labels is not None:
            yield f"{note} hypotheses of {learnt.labels}"
            continue
        of = f"the transcripts of the subset {learnt.data}" if learnt.data else "all training transcripts"
        note += f" {of}"
        if more := beyond_labels(recipe.systems, learnt.data, subsets):
            note += f", more than the labels of {', '.join(more)}"
        yield note


def _facts(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """Where the figures come from."""
    made_here = [system for system in recipe.systems.values() if not system.is_imported]
    first = next(iter(made_here or recipe.systems.values()))
    provenance = _provenance(layout.system(first.name, first.seeds[0]))
    return {
        "name": recipe.name,
        "path": f"recipes/{recipe.name}",
        "corpus": recipe.corpus.name,
        "command": recipe.command,
        "seeds": list(recipe.seeds),
        "profile": recipe.profile,
        "git": provenance.get("git"),
        "core": core_hash(),
        "date": provenance.get("date"),
        "machine": provenance.get("machine"),
        "versions": provenance.get("versions"),
    }


def _row(system: System, recipe: Recipe, layout: Layout, scores: Mapping[str, Any]) -> dict[str, Any]:
    """One system's row: figures that vary with the seed are averaged over seeds."""
    bundles = [facts_of(layout, system.name, seed) for seed in system.seeds]
    decoded = [read_json(layout.hyps(system.name, seed) / "decode.json") for seed in system.seeds]
    exports = layout.export(system.name, system.seeds[0])
    parity = {} if system.is_imported else read_json(exports / "parity.json")
    first = bundles[0]
    return {
        "name": system.name,
        "kind": system.kind,
        "parent": _parents(system),
        "seeds": list(system.seeds),
        "params": first["params"],
        "size_mb": decoded[0]["size_mb"],
        "rtf": _rtf([d["rtf"] for d in decoded]),
        "peak_rss_mb": max((d["peak_rss_mb"] for d in decoded if d["peak_rss_mb"]), default=None),
        "runtime": decoded[0]["runtime"],
        "search": decoded[0]["search"],
        "bundle": scores["bundles"][system.name],
        "same_text_as_bundle": _mean_or_none(d["same_text_as_bundle"] for d in decoded),
        "core": _cores(system, layout),
        "parity": {name: found["parity"] for name, found in parity.items()},
        "compression": first["compression"],
        **({"budget": [bundle["budget"] for bundle in bundles]} if first.get("budget") else {}),
        "train": _effort(system, layout, bundles) if first.get("training") else None,
        "losses": [{"name": t.name, "weight": t.weight} for t in system.terms],
        "data": system.data,
        "unlabelled": system.unlabelled,
        "labels": first.get("labels"),
    }


def _parents(system: System) -> list[str] | str | None:
    """What it was made of, and whom it learnt from with losses of its own."""
    if system.parent is None:
        return list(system.teachers) or system.init_from
    others = [name for name in system.teachers if name != system.parent]
    return [system.parent, *others] if others else system.parent


def _cores(system: System, layout: Layout) -> list[str]:
    """Hashes of the core's code by which a row's bundles, exports and hypotheses were made."""
    found = set()
    for seed in system.seeds:
        found.add(_core_of(layout, system, seed))
        exports = () if system.is_imported else (layout.export(system.name, seed),)
        for place in (*exports, layout.hyps(system.name, seed)):
            found.add(read_json(place / "stamp.json").get("core"))
    return sorted(core or "not recorded" for core in found)


def _core_of(layout: Layout, system: System, seed: int) -> str | None:
    place = layout.system(system.name, seed)
    core: str | None = (read_json(place / "stamp.json") if system.is_imported else _provenance(place)).get(
        "core"
    )
    return core


def _rtf(found: list[dict[str, float] | None]) -> dict[str, float] | None:
    """Averaged over seeds; None where nothing was measured."""
    known = [one for one in found if one is not None]
    return {key: _mean(one[key] for one in known) for key in ("median", "p95", "total")} if known else None


def _provenance(bundle: Path) -> dict[str, Any]:
    """Where a system comes from; empty for an imported one that does not say."""
    path = bundle / PROVENANCE
    return read_json(path) if path.exists() else {}


def _effort(system: System, layout: Layout, bundles: list[dict[str, Any]]) -> dict[str, Any]:
    """What training took, averaged over seeds, and each seed's own figures."""
    times_s = [_provenance(layout.system(system.name, seed)).get("seconds", 0.0) for seed in system.seeds]
    runs = [{**b["training"], "seconds": time_s} for b, time_s in zip(bundles, times_s, strict=True)]
    return {
        "epochs": _mean(run["epochs"] for run in runs),
        "steps": _mean(run["steps"] for run in runs),
        "seconds": _mean(run["seconds"] for run in runs),
        "audio_s_per_s": sum(run["audio_s"] for run in runs) / max(sum(run["seconds"] for run in runs), 1e-9),
        "by_seed": runs,
    }


def _mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))


def _mean_or_none(values: Any) -> float | None:
    """The mean, None where some are not known."""
    listed = list(values)
    return None if None in listed else _mean(listed)


def _logs(recipe: Recipe, layout: Layout) -> dict[str, dict[int, Path]]:
    """Training logs of the systems that were trained."""
    return {
        name: {seed: layout.system(name, seed) / "train" / "log.jsonl" for seed in system.seeds}
        for name, system in recipe.systems.items()
        if system.kind in ("trained", "distilled")
    }


def _audio(layout: Layout) -> Callable[[str, str], tuple[np.ndarray, int] | None]:
    """Audio of an utterance, for the page to play."""
    from kdrecipe.data.features import load_cuts

    cuts = cache(partial(load_cuts, layout.features))

    def load(split: str, utterance: str) -> tuple[np.ndarray, int] | None:
        try:
            cut = cuts(split)[cuts(split).number(utterance)]
        except KeyError:
            return None
        audio = cut.load_audio()
        return None if audio is None else (audio[0], cut.sampling_rate)

    return load
