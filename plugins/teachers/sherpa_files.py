"""sherpa-onnx's kinds of models, and their files in a folder, by the names that published models have."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kdrecipe.errors import Problem, RecipeError, did_you_mean

OURS = frozenset({"num_threads", "provider", "debug"})
"""Arguments of sherpa-onnx's factories that are not for a recipe to choose."""

_STEMS = {
    "encoder": "encode", "decoder": "decode", "preprocessor": "preprocess", "paraformer": "model",
    "uncached_decoder": "uncached_decode", "cached_decoder": "cached_decode",
}  # fmt: skip
_PRECISIONS = {False: ("", "fp16", "int8"), True: ("int8", "", "fp16")}
_TOKENISERS = ("tokenizer.json", "vocab.json")


@cache
def kinds() -> Mapping[str, Mapping[str, inspect.Parameter]]:
    """By the kind of model, the arguments of its factory; those without a default are its files."""
    import sherpa_onnx

    factories = vars(sherpa_onnx.OfflineRecognizer)
    return {
        name.removeprefix("from_"): inspect.signature(getattr(sherpa_onnx.OfflineRecognizer, name)).parameters
        for name in sorted(factories)
        if name.startswith("from_")
    }


def check_kind(kind: str, options: Mapping[str, Any]) -> list[str]:
    """The files that a kind of model consists of.

    Raises:
        RecipeError: there is no such kind, or its factory has no such option.
    """
    if kind not in kinds():
        raise RecipeError(
            f"model: sherpa-onnx has no kind {kind!r}",
            remedy=did_you_mean(kind, kinds()),
        )
    arguments = kinds()[kind]
    parts = [name for name, argument in arguments.items() if argument.default is argument.empty]
    free = set(arguments) - set(parts) - OURS
    for option in options:
        if option not in free:
            raise RecipeError(
                f"options: from_{kind} has no option {option!r}", remedy=did_you_mean(option, free)
            )
    return parts


def find_files(
    folder: Path, parts: Iterable[str], named: Mapping[str, str], *, int8: bool
) -> dict[str, Path]:
    """The file of each part.

    Args:
        folder: of the model.
        parts: arguments of the factory that are files; ``tokenizer`` is a folder.
        named: those that are called otherwise: part -> name in the folder.
        int8: take files of int8 where there are any; else those of float32, and others only without these.

    Raises:
        RecipeError: no such folder, or of a part no file or several; all of them.
    """
    if not folder.is_dir():
        raise RecipeError("there is no such folder", where=str(folder))
    parts = list(parts)
    for part in named:
        if part not in parts:
            raise RecipeError(f"files: this kind of model has no {part!r}", remedy=did_you_mean(part, parts))
    found: dict[str, Path] = {}
    problems = []
    for part in parts:
        candidates = [folder / named[part]] if part in named else _candidates(folder, part, int8=int8)
        candidates = [path for path in candidates if path.exists()]
        if len(candidates) == 1:
            found[part] = candidates[0]
        else:
            problems.append(_problem(folder, part, named.get(part), [path.name for path in candidates]))
    if problems:
        raise RecipeError(problems)
    return found


def _candidates(folder: Path, part: str, *, int8: bool) -> list[Path]:
    there = sorted(folder.iterdir())
    if part == "tokens":
        return _surest([p for p in there if p.name.endswith("tokens.txt")], "tokens.txt")
    if part == "tokenizer":
        return [p for p in there if any((p / name).is_file() for name in _TOKENISERS)]
    stem = _STEMS.get(part, part)
    models = [p for p in there if p.suffix in (".onnx", ".ort")]
    called = [p for p in models if re.search(rf"(?:^|[-_.]){stem}", p.name)]
    if stem == "model" and not called:
        called = models
    for precision in _PRECISIONS[int8]:
        if of_it := [p for p in called if _precision(p) == precision]:
            return _surest(of_it, *(f"{stem}{end}{p.suffix}" for p in of_it for end in ("", "r", ".int8")))
    return []


def _surest(paths: list[Path], *names: str) -> list[Path]:
    """The one that is called exactly so, else all."""
    return [p for p in paths if p.name in names][:1] or paths


def _precision(path: Path) -> str:
    return next((precision for precision in ("int8", "fp16") if precision in path.name), "")


def _problem(folder: Path, part: str, named: str | None, found: list[str]) -> Problem:
    remedy = f"name it: files: {{{part}: NAME}}"
    if found:
        return Problem(f"several files may be its {part}: {', '.join(found)}", str(folder), remedy)
    if named is not None:
        return Problem(f"there is no {named!r}, which files names as its {part}", str(folder))
    looks = {
        "tokens": "tokens.txt",
        "tokenizer": f"a folder with {' or '.join(_TOKENISERS)}",
    }.get(part, f"{_STEMS.get(part, part)}*.onnx")
    return Problem(
        f"its {part} is missing ({looks})", str(folder), f"is it another kind of model? Else {remedy}"
    )
