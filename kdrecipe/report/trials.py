"""``TRIALS.md``: which options of each loss do best on dev."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrecipe.report.reading import count, percent
from kdrecipe.report.text import Block, Code, Table, ended, rendered

Row = Mapping[str, Any]


def best(options: Sequence[Row]) -> Row:
    """The options with the lowest error rate; of equal ones, by token errors, then those stated."""
    return min(options, key=lambda row: (row["rate"], row["dev_ter"] is None, row["dev_ter"] or 0.0))


def written(changed: Mapping[str, Any]) -> str:
    """Options as a recipe writes them; none: those that it states."""
    return ", ".join(f"`{key}: {value}`" for key, value in changed.items()) or "as stated"


def to_change(systems: Sequence[Row], metric: str) -> list[str]:
    """A sentence for each system that has better options than those that it states."""
    lines = []
    for system in systems:
        stated, found = system["options"][0], best(system["options"])
        if found is not stated:
            rates = f"{percent(stated['rate'])} → {percent(found['rate'])} % {metric.upper()}"
            lines.append(
                f"**{system['name']}: not the best on dev**: {rates} with {written(found['changed'])}."
            )
    return lines


def markdown(data: Mapping[str, Any]) -> str:
    """The page; ``data``: the content of ``trials.json``."""
    metric, systems = data["metric"], data["systems"]
    head = ["system", "options", f"{metric.upper()} %", "token errors %", "best", "steps", "why it ended"]
    rows = []
    for system in systems:
        chosen = best(system["options"])
        for option in system["options"]:
            found = [percent(option["rate"]), percent(option["dev_ter"]), "yes" if option is chosen else ""]
            made = [count(option["steps"]), ended({"by_seed": [option]})]
            rows.append([system["name"], written(option["changed"]), *found, *made])
    changes = to_change(systems, metric) or ["All systems state the options that are the best on dev."]
    blocks: list[Block] = [
        f"# Trials of {data['recipe']}",
        f"Options of each system, compared on dev: one model each, seed {data['seed']}. The lowest "
        f"{metric.upper()} is marked, for the recipe to state; where rates are close, another seed may "
        "choose otherwise. No other split was looked at.",
        [*changes, *data["notes"]],
        Table(head, rows, frozenset({2, 3, 5})),
        Code(data["command"]),
    ]
    return "\n\n".join(map(rendered, blocks)) + "\n"
