"""Training utterances that are longer than a batch should be: told with the memory that they will take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdrecipe.artifacts import read_json
from kdrecipe.recipe.load import Recipe, System
from kdrecipe.stages.inputs import utterances_of

if TYPE_CHECKING:
    from lhotse.cut import MonoCut

NAMED = 5
VOCAB_SIZE = 100  # of a model whose tokens are not counted yet


def tell_long_utterances(recipe: Recipe, features: Path) -> None:
    """Print a warning if an utterance is longer than ``batch_duration_s`` of a system that learns from it.

    Args:
        recipe: the recipe.
        features: what stage 1 has written.
    """
    from kdrecipe.data.features import load_cuts

    if not (features / "train.jsonl.gz").exists():
        return
    cuts = load_cuts(features, "train")
    longest = np.argsort(-cuts.durations_s, kind="stable")
    subsets = read_json(features / "subsets.json")
    concerned: dict[tuple[float, tuple[int, ...]], list[System]] = {}
    for system in recipe.systems.values():
        if system.model is not None:
            limit_s = system.training.batch_duration_s
            labelled, unlabelled = utterances_of(system, cuts, subsets, ())
            heard = (labelled | unlabelled).of(cuts)
            long = tuple(longest[heard[longest] & (cuts.durations_s[longest] > limit_s)].tolist())
            concerned.setdefault((limit_s, long), []).append(system)
    for (limit_s, long), systems in concerned.items():
        if long:
            print(_warning(recipe, limit_s, systems, [cuts[i] for i in long]))


def _warning(recipe: Recipe, limit_s: float, systems: Sequence[System], long: Sequence[MonoCut]) -> str:
    from kdrecipe.train.memory import free_bytes

    longest_s = long[0].duration
    needed = {system.name: _gigabytes(recipe, system, longest_s) for system in systems}
    free = free_bytes() / 1e9
    takes = ", ".join(f"{name} about {gb:.2f} GB" for name, gb in needed.items())
    names = ", ".join(f"{cut.id} ({cut.duration:.0f} s)" for cut in long[:NAMED])
    more = f" and {len(long) - NAMED} more" if len(long) > NAMED else ""
    count = f"{len(long)} utterances of train are" if len(long) > 1 else "1 utterance of train is"
    fits = f"{free:.1f} GB are free" + (": not enough" if max(needed.values()) > free else "")
    return (
        f"  warning: {count} longer than training.batch_duration_s ({limit_s:g} s): {names}{more}\n"
        f"    the longest is a batch by itself, for which training takes: {takes}; {fits}\n"
        "    cut it at pauses into utterances with texts of their own, or leave it out"
    )


def _gigabytes(recipe: Recipe, system: System, duration_s: float) -> float:
    """What an utterance takes while ``system`` trains on it, with weights, gradients and optimiser."""
    from kdrecipe.data.features import FRAME_SHIFT_S
    from kdrecipe.model.asr import build_model
    from kdrecipe.train.distribution import local_device
    from kdrecipe.train.memory import batch_bytes

    registry = recipe.plugins.registry
    model = build_model(
        system.model or {},
        input_dim=recipe.features.num_mel_bins,
        vocab_size=recipe.tokens.vocab_size or VOCAB_SIZE,
        registry=registry,
    )
    views = [int(getattr(registry.get("losses", term.name), "num_views", 1)) for term in system.terms]
    frames = round(duration_s / FRAME_SHIFT_S)
    activations = batch_bytes(
        model.to(local_device()).train(),
        frames,
        precision=system.training.precision,
        num_views=max(views, default=1),
    )
    return (activations + 16 * model.num_params) / 1e9
