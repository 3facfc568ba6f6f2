"""The report's sections as blocks of text and tables, which become Markdown here and HTML elsewhere.

Text in blocks may hold ``**bold**`` and `` `code` ``.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdrecipe.report.reading import (
    NONE,
    System,
    count,
    duration,
    few_seeds,
    figure,
    p_value,
    percent,
    points,
    rtf,
    seeds_won,
    span,
    spread,
)
from kdrecipe.score.claims import claimed_text, measured_text
from kdrecipe.score.intervals import MIN_SEEDS

NUM_WORDS = 5  # columns of the table of systems that hold words
MAY_BREAK = frozenset({2, 4})  # of these: parents, and what a row runs in
NUM_RATES = 3  # columns after those that depend on the split
SEARCHES_ARE = (
    "Each search on the bundles in torch, before any export: compare these rows with each other. "
    "The table of systems has what ships, with its own time."
)
PARITY_IS = (
    "Exports compared with their bundles, by greedy search, on a sample of dev over all speakers (of train, "
    "if the corpus has no dev):"
)
MAX_REASONS = 20  # for leaving utterances out: at most so many are listed
_BRIEF = ("WER", "95 %", "MB", "RTF")  # how the names of the columns begin that a run prints at its end
_PARITY = {
    "max_log_prob_diff": "largest log-prob difference",
    "token_error": "tokens differing %",
    "runtime_token_error": "in the runtime %",
    "wer": "WER %",
    "deletions": "del %",
}


@dataclass(frozen=True)
class Table:
    """Rows of text; columns in ``numeric`` are aligned right, cells of columns in ``prose`` may break."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    prose: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Code:
    """Lines for a terminal."""

    text: str


Block = str | list[str] | Table | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: paragraphs, lists, tables, code."""

    title: str
    blocks: list[Block] = field(default_factory=list)


# ---------------------------------------------------------------- tables


def _parents(system: System) -> str:
    parent = system["parent"]
    return NONE if not parent else parent if isinstance(parent, str) else ", ".join(parent)


def split_names(results: Mapping[str, Any]) -> list[str]:
    """Splits that were scored, in order; the first is the main one."""
    return list(dict.fromkeys(split for system in results["systems"] for split in system["splits"]))


def main_table(results: Mapping[str, Any], split: str) -> Table:
    """One row per system: its search, its error rates, its size, time and memory."""
    headers = ["system", "kind", "from", "search", "runs in", "WER %", "95 % interval", "CER %"]
    headers += ["params", "MB", "RTF", "RSS MB"]
    rows = []
    for system in results["systems"]:
        scores = system["splits"].get(split, {})
        wer = scores.get("wer") or {}
        rates = [spread(wer), span(wer.get("ci95")), spread(scores.get("cer"))]
        costs = [figure(cost) for cost in (system["size_mb"], rtf(system), system["peak_rss_mb"])]
        origin = [system["name"], system["kind"], _parents(system), *_search(system)]
        rows.append([*origin, *rates, count(system["params"]), *costs])
    return Table(headers, rows, frozenset(range(NUM_WORDS, len(headers))), MAY_BREAK)


def _search(system: System) -> list[str]:
    """Label of the row's search, and where it runs: both the WER and the time are those of this search."""
    found = system.get("search")
    if not found:
        return [NONE, NONE]
    if found["runs_in"] == "torch":
        return [found["label"], "torch"]
    return [found["label"], f"{found['runs_in']} {found['name']}, {found['variant']}"]


def brief(results: Mapping[str, Any]) -> str:
    """The table of the main split for a terminal: error rate, size and speed of each system."""
    table = main_table(results, next(iter(split_names(results)), ""))
    kept = [i for i, name in enumerate(table.headers) if name == "system" or name.startswith(_BRIEF)]
    rows = [[row[i] for i in kept] for row in table.rows]
    numeric = frozenset(new for new, old in enumerate(kept) if old in table.numeric)
    return _markdown_table(Table([table.headers[i] for i in kept], rows, numeric))


def search_table(results: Mapping[str, Any], split: str, *, timed: bool) -> Table:
    """One row per search of the systems with several, on their bundles in torch; ``timed``: with the
    real-time factor."""
    headers = [
        "bundle of",
        "search in torch",
        "WER %",
        "95 % interval",
        "CER %",
        "points to the first",
        "p (Holm)",
    ]
    headers += ["RTF (torch, 1 thread)"] if timed else []
    rows: list[list[str]] = []
    main: dict[str, str] = {}
    for row in results["searches"]:
        scores, system = row["splits"].get(split, {}), row["system"]
        first = main.setdefault(system, row["search"])
        wer = scores.get("wer") or {}
        rates = [spread(wer), span(wer.get("ci95")), spread(scores.get("cer"))]
        against = [c for c in row["comparisons"] if c["split"] == split and c["b"] == first]
        change = [f"{100 * c['difference']:+.2f}".replace("-", "−") for c in against] or [NONE]
        p = [p_value(c["p_adjusted"]) for c in against] or [NONE]
        time = [figure(row["rtf"])] if timed else []
        rows.append([system, row["search"], *rates, *change, *p, *time])
    return Table(headers, rows, frozenset(range(2, 8)))


def _search_section(results: Mapping[str, Any], split: str, first: bool) -> Section:
    """The searches on a split; ``first``: with a description of each."""
    section = Section(f"Searches on {split}, bundles in torch", [search_table(results, split, timed=first)])
    if first:
        section.blocks.insert(0, SEARCHES_ARE)
        described = {row["search"]: _flat(row.get("options") or {}) for row in results["searches"]}
        names = {row["search"]: row["decoder"] for row in results["searches"]}
        section.blocks.append([", ".join([f"{x}: {names[x]}", *options]) for x, options in described.items()])
    return section


def _errors_table(results: Mapping[str, Any], split: str) -> Table:
    """Kinds of errors, gap recovered, similarity to the teacher."""
    headers = [
        "system",
        "sub %",
        "ins %",
        "del %",
        "gap recovered %",
        "differs from teacher %",
        "same text %",
    ]
    rows = []
    for system in results["systems"]:
        if not (scores := system["splits"].get(split)):
            continue
        gap, like = scores.get("gap_recovered"), scores.get("fidelity") or {}
        recovered = NONE if not gap else f"{100 * gap['mean']:.0f}"
        if gap and gap.get("ci95"):
            recovered += " ({:.0f} to {:.0f})".format(*(100 * end for end in gap["ci95"]))
        kinds = [percent(scores.get(kind)) for kind in ("sub", "ins", "del")]
        alike = [percent(like.get("wer")), percent(like.get("agreement"))]
        rows.append([system["name"], *kinds, recovered, *alike])
    return Table(headers, rows, frozenset(range(1, 7)))


def _comparison_table(results: Mapping[str, Any]) -> Table:
    headers = [
        "system",
        "against",
        "split",
        "WER %",
        "points",
        "95 % interval",
        "p",
        "p (Holm)",
        "seeds won",
    ]
    rows = []
    for c in results["comparisons"]:
        change = f"{percent(c['b_mean'])} → {percent(c['a_mean'])}"
        difference = f"{100 * c['difference']:+.2f}".replace("-", "−")
        ends = points(c["ci95"]) if c.get("ci95") else NONE
        p_values = [p_value(c["p"]), p_value(c.get("p_adjusted"))]
        rows.append([c["a"], c["b"], c["split"], change, difference, ends, *p_values, _seeds_won(c)])
    return Table(headers, rows, frozenset(range(3, 9)))


def _seeds_won(c: Mapping[str, Any]) -> str:
    """``2 of 3`` for paired seeds, ``7 of 9 pairs`` for crossed ones; nothing for a single seed."""
    won, _, number = seeds_won(c)
    return f"{won} of {number}{' pairs' if c.get('seed_pairs') else ''}" if number > 1 else NONE


def _what_varies(facts: Mapping[str, Any], systems: Sequence[System]) -> str:
    """The variance that the intervals and p-values of a split include."""
    units = f"{facts['utterances']} utterances"
    if facts.get("units") == "speakers":
        units = f"{facts['speakers']} speakers with their {units}"
    numbers = sorted({len(s["seeds"]) for s in systems if len(s["seeds"]) >= MIN_SEEDS})
    seeds = f", and over {' or '.join(map(str, numbers))} seeds" if numbers else ""
    if any(few_seeds(s) for s in systems):
        seeds += "; seeds of systems with fewer than three are left out"
    return f"Intervals and p-values: variance over {units}{seeds}."


def _flat(value: Any, name: str = "") -> list[str]:
    """A nested value as ``name value`` pieces."""
    if isinstance(value, Mapping):
        return [piece for key, item in value.items() for piece in _flat(item, f"{name} {key}".strip())]
    if isinstance(value, list):
        text = ", ".join(piece for item in value for piece in _flat(item))
    else:
        text = figure(value) if isinstance(value, float) else str(value)
    return [f"{name} {text}".strip()]


def _made_section(results: Mapping[str, Any]) -> Section:
    """Command, seeds, versions, machine."""
    recipe = results["recipe"]
    keys = ("path", "profile", "git", "date", "seeds", "machine", "versions")
    lines = [f"{key}: {', '.join(_flat(recipe[key]))}" for key in keys if recipe.get(key)]
    known = [seconds for seconds in results["seconds"].values() if seconds is not None]
    if known:
        lines.append(f"time: {duration(sum(known))}, the sum of all jobs")
    runtimes: dict[str, list[str]] = {}
    for system in results["systems"]:
        if system["runtime"]:
            runtimes.setdefault(str(system["runtime"]), []).append(system["name"])
    lines += [
        f"{', '.join(names)}: {runtime if runtime.startswith('not measured') else f'measured in {runtime}'}"
        for runtime, names in runtimes.items()
    ]
    if method := results.get("method"):
        lines.append(f"intervals: {method['interval']}")
        lines.append(f"test: {method['test']}; p (Holm) allows for the number of comparisons")
    section = Section("How this was made", [lines])
    if command := recipe.get("command"):
        section.blocks.insert(0, Code(shlex.join(command) if isinstance(command, list) else str(command)))
    return section


def _corpus_section(results: Mapping[str, Any]) -> Section:
    """Splits, what was left out, overlaps."""
    summary = results["corpus_summary"]
    section = Section("The corpus")
    if splits := summary.get("splits"):
        columns = ("utterances", "speakers", "hours")
        rows = [[name, *(figure(facts.get(key)) for key in columns)] for name, facts in splits.items()]
        section.blocks.append(Table(["split", *columns], rows, frozenset({1, 2, 3})))
    left_out = summary.get("left_out") or []
    if left_out:
        reasons = Counter(str(item["reason"] if isinstance(item, Mapping) else item) for item in left_out)
        often = sorted(reasons.items(), key=lambda found: (-found[1], found[0]))
        section.blocks.append(f"Left out: {len(left_out)} utterances.")
        section.blocks.append([f"{number} × {reason}" for reason, number in often[:MAX_REASONS]])
        if len(often) > MAX_REASONS:
            section.blocks.append(f"... and {len(often) - MAX_REASONS} more reasons, all in `results.json`.")
    elif splits:
        section.blocks.append("Nothing was left out.")
    if notes := summary.get("notes"):
        section.blocks.extend(("Notes on this corpus:", [str(note) for note in notes]))
    return section


def _making_section(results: Mapping[str, Any]) -> Section:
    """Training effort, compression, parity of exports."""
    section = Section("Training, compression, export")
    rows = []
    for system in results["systems"]:
        if train := system["train"]:
            numbers = [count(train.get("epochs")), count(train.get("steps")), duration(train.get("seconds"))]
            speed = figure(train.get("audio_s_per_s"))
            rows.append([system["name"], *numbers, speed, percent(_dev(train)), ended(train)])
    if rows:
        headers = ["system", "epochs", "steps", "time per seed", "audio seconds per second"]
        headers += ["dev token errors %", "why it ended"]
        section.blocks.append(Table(headers, rows, frozenset(range(1, 6))))
    steps = []
    for system in results["systems"]:
        for step in system["compression"] or []:
            facts = _flat(step.get("options") or {}) + _flat(step.get("report") or {})
            steps.append(f"{system['name']}, {step['name']}: {', '.join(facts)}")
        steps += [_budget(system["name"], found) for found in (system.get("budget") or [])[:1]]
    if steps:
        section.blocks.append(steps)
    if labelled := [_labels_row(system) for system in results["systems"] if system.get("labels")]:
        section.blocks.append("Labels that are a teacher's hypotheses:")
        headers = ["system", "teacher", "kept", "of", "hours", "of", "dropped, by first reason"]
        section.blocks.append(Table(headers, labelled, frozenset(range(2, 6))))
    checked = [row for system in results["systems"] for row in _parity_rows(system["name"], system["parity"])]
    if checked:
        section.blocks.append(PARITY_IS)
        headers = ["system", "export", *_PARITY.values(), "bundle's WER %"]
        section.blocks.append(Table(headers, checked, frozenset(range(2, len(headers)))))
    if shipped := [row for split in split_names(results) for row in _shipped_rows(results, split)]:
        section.blocks.append("The rows of the tables of systems, and their bundles by the same search:")
        headers = ["system", "split", "search", "runs in", "WER %", "bundle's WER %", "same text %"]
        section.blocks.append(Table(headers, shipped, frozenset(range(4, len(headers)))))
    return section


def _budget(name: str, found: Mapping[str, Any]) -> str:
    """What a budget was and what met it, of the first seed."""
    value, limit, strength = (figure(float(found[key])) for key in ("value", "limit", "strength"))
    return f"{name}, budget: {found['measure']} {limit}, met with {value} at strength {strength}"


def _labels_row(system: System) -> list[str]:
    """How many hypotheses of its teacher a student has as labels, and why not the others."""
    found = system["labels"]
    why = ", ".join(f"{reason} {number}" for reason, number in found["reasons"].items()) or NONE
    hours = [figure(found[key] / 3600) for key in ("kept_s", "all_s")]
    numbers = [count(found["kept"]), count(found["kept"] + found["dropped"]), *hours]
    return [system["name"], found["teacher"], *numbers, why]


_ENDS = {
    "flat": "dev error flat",
    "bound": "**epochs, still improving**",
    "no dev": "epochs (no dev)",
    "schedule": "epochs",
}


def ended(train: Mapping[str, Any]) -> str:
    """Why training ended, over all seeds; the reason with its number of seeds where they differ."""
    found = Counter(_ENDS[str(run["stopped"])] for run in train.get("by_seed", []) if "stopped" in run)
    if len(found) < 2:
        return next(iter(found), NONE)
    return ", ".join(f"{reason} ({number})" for reason, number in found.most_common())


def _dev(train: Mapping[str, Any]) -> float | None:
    """Dev token error rate of the finished models, mean over seeds."""
    rates = [run.get("dev_ter") for run in train.get("by_seed", [])]
    return None if None in rates or not rates else sum(map(float, rates)) / len(rates)


def _parity_rows(system: str, found: Any, export: str = "", bundle: float | None = None) -> list[list[str]]:
    """One row per exported variant, wherever in the nested figures it stands."""
    if not isinstance(found, Mapping):
        return []
    if "max_log_prob_diff" in found:
        percents = {"token_error", "runtime_token_error", "wer", "deletions"}
        figures = [percent(found.get(k)) if k in percents else figure(found.get(k), 2) for k in _PARITY]
        return [[system, export or NONE, *figures, percent(bundle)]]
    if isinstance(found.get("bundle"), Mapping):
        bundle = found["bundle"].get("wer")
    return [
        row
        for key, item in found.items()
        for row in _parity_rows(system, item, f"{export} {key}".strip(), bundle)
    ]


def _shipped_rows(results: Mapping[str, Any], split: str) -> list[list[str]]:
    """Runtime and bundle side by side, for the systems whose row is that of a runtime."""
    rows = []
    first = split == split_names(results)[0]  # where texts were compared
    for system in results["systems"]:
        scores, bundle = system["splits"].get(split), (system.get("bundle") or {}).get(split)
        if scores and bundle and system["search"]["runs_in"] != "torch":
            own = (scores.get("wer") or {}).get("mean")
            same = percent(system.get("same_text_as_bundle")) if first else NONE
            rows.append(
                [system["name"], split, *_search(system), percent(own), percent(bundle.get("wer")), same]
            )
    return rows


def _robustness_section(robustness: Mapping[str, Any]) -> Section:
    """Error rates under conditions, and by how much they exceed those of the utterances as recorded."""
    conditions: Mapping[str, str] = robustness["conditions"]
    clean, *others = conditions
    rows = []
    for system, rates in robustness["systems"].items():
        cells = [f"{percent(rates[x])} ({_times(rates[x], rates[clean])})" for x in others]
        rows.append([system, percent(rates[clean]), *cells])
    headers = ["system", *conditions.values()]
    said = (
        f"{robustness['metric'].upper()} % of {robustness['utterances']} utterances over all speakers, with "
        "the search and the files of the table of systems, averaged over seeds; in brackets, how many times "
        "the first column. What is said is the same in all columns."
    )
    return Section("Robustness", [said, Table(headers, rows, frozenset(range(1, len(headers))))])


def _times(rate: float, clean: float) -> str:
    """``×1.3``; nothing to compare with where the clean utterances have no errors."""
    return f"×{rate / clean:.2f}" if clean else NONE


def _claims_section(claims: Sequence[Mapping[str, Any]]) -> Section:
    """Published figures beside measured ones."""
    rows = [
        [claim["text"], claimed_text(claim) or NONE, measured_text(claim) or NONE, claim["note"]]
        for claim in claims
    ]
    table = Table(["claim", "claimed", "measured", "note"], rows, prose=frozenset(range(4)))
    section = Section("Claims beside what was measured", [table])
    if sources := list(dict.fromkeys(claim["source"] for claim in claims if claim["source"])):
        section.blocks.append(f"Claimed in: {'; '.join(sources)}.")
    return section


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The whole report after its title, without the plugins' sections; the first is the reading."""
    said: list[Block] = [[item["text"] for item in results["reading"]]]
    found = [Section("What the numbers say", said if results["reading"] else ["Nothing was compared."])]
    if results["claims"]:
        found.append(_claims_section(results["claims"]))
    for i, split in enumerate(split_names(results)):
        table = main_table(results, split)
        if i:  # what a system costs does not depend on the split
            end = NUM_WORDS + NUM_RATES
            rows = [row[:end] for row in table.rows]
            table = Table(table.headers[:end], rows, table.numeric & set(range(end)), table.prose)
        facts = results["splits"].get(split, {})
        blocks: list[Block] = [table, _errors_table(results, split)]
        if facts.get("utterances"):
            people = f" by {facts['speakers']} speakers" if facts.get("speakers") else ""
            size = f"{facts['utterances']} utterances{people}, {facts['words']} words."
            blocks.insert(0, f"{size} {_what_varies(facts, results['systems'])}")
        found.append(Section(f"Systems on {split}", blocks))
        if results["searches"]:
            found.append(_search_section(results, split, first=i == 0))
    if not results["systems"] or not split_names(results):
        found.append(Section("Systems", [main_table(results, "")]))
    if results["comparisons"]:
        found.append(Section("Comparisons", [_comparison_table(results)]))
    if robustness := results.get("robustness"):
        found.append(_robustness_section(robustness))
    found += [_making_section(results), _corpus_section(results), _made_section(results)]
    return [section for section in found if section.blocks]


# ---------------------------------------------------------------- Markdown


def markdown(results: Mapping[str, Any]) -> str:
    """The report as Markdown that can also be read on a terminal."""
    parts = [f"# Results of {results['recipe']['name']}", results["subtitle"]]
    body = sections(results)
    extra = [Section(item["title"], [item["markdown"]]) for item in results["sections"]]
    for section in [*body[:-1], *extra, body[-1]]:
        parts += [f"## {section.title}", *map(rendered, section.blocks)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def rendered(block: Block) -> str:
    """A block as Markdown."""
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Code):
        return f"```sh\n{block.text}\n```"
    return "\n".join(f"- {item}" for item in block) if isinstance(block, list) else block


def _markdown_table(table: Table) -> str:
    texts = [
        [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (table.headers, *table.rows)
    ]
    widths = [max(3, *(len(row[i]) for row in texts)) for i in range(len(table.headers))]
    lines = []
    for row in texts:
        cells = [
            cell.rjust(width) if i in table.numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rules = ["-" * (width + 1) + (":" if i in table.numeric else "-") for i, width in enumerate(widths)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])
