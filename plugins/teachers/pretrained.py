"""Models as Hugging Face's library writes them: found, and looked at, without importing that library."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrecipe.errors import MissingExtra, RecipeError

INSTALL = "pip install 'kdrecipe[transformers]'"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights that transformers loads, the preferred first; large ones are sharded under an index."""

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w.-]+")
_DOWNLOADED = ("*.json", "*.txt", "model.safetensors", "model-*-of-*.safetensors")
_DOWNLOADED_OTHERWISE = ("pytorch_model*.bin", "model.bin")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Pretrained:
    """A directory with a model in it.

    Args:
        dir: the directory.
        config: its ``config.json``.
        weights: its files of weights; empty if it has none that transformers loads.
    """

    dir: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """The weights, and what says how to use them."""
        described = [p for pattern in ("*.json", "*.txt") for p in self.dir.glob(pattern)]
        return sorted({*self.weights, *described})

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory; empty if there is none."""
        return _read_json(self.dir / name)

    def extractor(self) -> dict[str, Any]:
        """How it wants its audio: ``preprocessor_config.json``, or what newer versions write instead."""
        found: dict[str, Any] = self.read("preprocessor_config.json")
        return found or self.read("processor_config.json").get("feature_extractor") or {}

    def pieces(self, size: int) -> list[str]:
        """The tokens by id, ``size`` of them; ids without a token are called ``<unused:ID>``.

        Raises:
            RecipeError: no list of tokens, or one per language.
        """
        by_id: dict[int, str] = {}
        listed = self.read("tokenizer.json")
        vocabulary = (listed.get("model") or {}).get("vocab") or self.read("vocab.json")
        if isinstance(vocabulary, list):  # a unigram model's pairs of piece and score
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in listed.get("added_tokens") or ()}
        for piece, i in {**vocabulary, **self.read("added_tokens.json"), **added}.items():
            if not isinstance(i, int):
                raise RecipeError(
                    "the model has a list of tokens per language, which is not supported",
                    where=str(self.dir / "vocab.json"),
                    remedy="save the model of one language: tokens and adapter chosen, save_pretrained",
                )
            by_id[i] = piece
        if not by_id:
            raise RecipeError(
                "no list of tokens: neither tokenizer.json nor vocab.json",
                where=str(self.dir),
                remedy="copy the tokeniser's files beside the weights",
            )
        return [by_id.get(i, f"<unused:{i}>") for i in range(size)]

    def require_weights(self) -> None:
        """RecipeError if there are no weights that transformers loads."""
        if not self.weights:
            raise RecipeError(
                "the directory has no weights",
                where=str(self.dir),
                remedy=f"put {' or '.join(WEIGHTS)} there, as save_pretrained writes it",
            )


def find_pretrained(path: str) -> Pretrained:
    """The model in a directory, or of a name on Hugging Face's hub.

    A name on the hub is looked for in its cache, then downloaded there.

    Raises:
        RecipeError: nothing is there, it is damaged or incomplete, or the hub can't be reached.
        MissingExtra: it is a name on the hub, and its library is not installed.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return _look(directory)
    if directory.exists() or not _HUB_NAME.fullmatch(path):
        raise RecipeError(
            f"there is no directory {path}",
            remedy="give a directory that save_pretrained wrote, or a name on Hugging Face's hub: owner/name",
        )
    return _from_hub(path)


def need_transformers(who: str) -> None:
    """MissingExtra unless transformers is installed; ``who`` needs it."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("transformers", who, _install())


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its advice to programmers."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def did_load(missing: Sequence[str], model: Pretrained) -> None:
    """RecipeError if weights lack tensors of the model, which would be random numbers.

    Args:
        missing: names of the tensors, as transformers tells them.
        model: what was loaded.
    """
    lacking = sorted(name for name in missing if "masked_spec_embed" not in name)  # of training only
    if lacking:
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise RecipeError(
            f"the weights lack {len(lacking)} tensors of the model: {shown}",
            where=str(model.dir),
            remedy="use weights that were saved from this kind of model",
        )


def _install() -> str:
    return INSTALL if sys.version_info >= (3, 11) else f"{INSTALL}, with Python 3.11 or newer"


def _look(directory: Path) -> Pretrained:
    if not (directory / "config.json").is_file():
        raise RecipeError(
            "the directory has no config.json",
            where=str(directory),
            remedy="give the directory that save_pretrained wrote, with config.json, weights and tokeniser",
        )
    return Pretrained(directory, _read_json(directory / "config.json"), tuple(_weights(directory)))


def _weights(directory: Path) -> list[Path]:
    for name in WEIGHTS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
        elif (directory / name).is_file():
            shards = [name]
        else:
            continue
        for path in (directory / shard for shard in shards):
            _check_weights(path)
        return [directory / shard for shard in shards]
    return []


def _check_weights(path: Path) -> None:
    """RecipeError if a file of weights is missing or only stands for one."""
    if not path.is_file():
        raise RecipeError("weights are missing", where=str(path), remedy="copy all that the index names")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise RecipeError(
                "this is Git LFS's note of a file, not the weights",
                where=str(path),
                remedy="run git lfs pull in the directory",
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(
            f"not JSON: {error}", where=str(path), remedy="copy the file again from where it came"
        ) from None
    return found if isinstance(found, dict) else {}


def _from_hub(name: str) -> Pretrained:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtra(
            "huggingface_hub", f"there is no directory {name}, and the hub's model of that name", _install()
        )
    snapshot_download: Any = importlib.import_module("huggingface_hub").snapshot_download

    reason = ""
    for cached in (True, False):
        for more in ((), _DOWNLOADED_OTHERWISE):
            patterns = [*_DOWNLOADED, *more]
            try:
                found = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
                if _weights(found) or (found / "model.bin").is_file():
                    return _look(found)
            except (OSError, ValueError) as error:  # all of the hub's errors are one of these
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                break
            reason = "it has no weights"
    raise RecipeError(
        f"there is no directory {name}, and Hugging Face's hub gives no model of that name: {reason}",
        remedy="without network, copy the model's files from elsewhere and give the path of that directory",
    )
