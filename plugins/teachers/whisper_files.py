"""A Whisper model on disk: what is there, and whether it fits together. Loads no weights."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdrecipe.errors import MissingExtra, RecipeError, did_you_mean
from kdrecipe.interfaces import FRAME_SAMPLES, SAMPLE_RATE
from kdrecipe.text import read_lines

from .pretrained import Pretrained, find_pretrained, need_transformers

WHO = "teacher 'whisper'"
INSTALL_FAST = "pip install 'kdrecipe[whisper]'"
SUBSAMPLING = 2
CT2_WEIGHTS = "model.bin"
MULTILINGUAL_SIZE = 51865
"""Tokens from which a Whisper knows several languages, where nothing else says so: OpenAI's own rule."""

_WINDOW_S = 30.0
_MEL_BINS = 80
_MAX_POSITIONS = 448
_LANGUAGE = re.compile(r"<\|[a-z]{2,3}\|>")


@dataclass(frozen=True)
class WhisperFiles:
    """What there is of a model.

    Args:
        home: the directory that the recipe names.
        model: as transformers loads it; None where there is CTranslate2's form alone.
        ct2: directory of CTranslate2's form, if its engine is to search.
        language: a code, or None.
    """

    home: Pretrained
    model: Pretrained | None
    ct2: Path | None
    language: str | None

    @property
    def files(self) -> list[Path]:
        """All files that the answers depend on."""
        beside = sorted(path for path in self.ct2.iterdir() if path.is_file()) if self.ct2 else []
        return sorted({*(self.model.files if self.model else []), *beside})

    @cached_property
    def pieces(self) -> list[str]:
        """Tokens by id, as many as the model's outputs."""
        if self.model is not None:
            return self.model.pieces(self.model.config["vocab_size"])
        assert self.ct2 is not None
        as_list = self.ct2 / "vocabulary.json"
        if as_list.is_file():
            return list(json.loads(as_list.read_text(encoding="utf-8")))
        return read_lines(self.ct2 / "vocabulary.txt")

    @property
    def window_s(self) -> float:
        """What it hears at a time."""
        if self.model is None:
            return _WINDOW_S
        return float(self.model.config["max_source_positions"] * SUBSAMPLING * FRAME_SAMPLES / SAMPLE_RATE)

    @property
    def longest_text(self) -> int:
        """Tokens that there is room for after the prompt."""
        positions = self.model.config["max_target_positions"] if self.model else _MAX_POSITIONS
        return int(positions) - len(self.prompt(self.languages[0] if self.multilingual else None))

    @property
    def generation(self) -> dict[str, Any]:
        """Its ``generation_config.json``."""
        return self.home.read("generation_config.json")

    @property
    def multilingual(self) -> bool:
        """Whether it knows more than English."""
        return bool(self.generation.get("is_multilingual", len(self.pieces) >= MULTILINGUAL_SIZE))

    @property
    def languages(self) -> list[str]:
        """Codes of the languages that it knows by name; none of an English-only model."""
        if not self.multilingual:
            return []
        tokens = self.generation.get("lang_to_id") or filter(_LANGUAGE.fullmatch, self.pieces)
        return [token.strip("<|>") for token in tokens]

    def prompt(self, language: str | None) -> list[int]:
        """What comes before a text: the start, the language and the task if it knows several, no times."""
        middle = [f"<|{language}|>", "<|transcribe|>"] if self.multilingual else []
        names = ["<|startoftranscript|>", *middle, "<|notimestamps|>"]
        return [self.pieces.index(name) for name in names]


def find_whisper(path: str, language: str | None, engine: str) -> WhisperFiles:
    """The model in a directory or of a name on the hub, ready for ``engine``.

    Raises:
        RecipeError: it is not there, incomplete, no Whisper, contradicts itself or lacks the language.
        MissingExtra: a package is not installed.
    """
    home = find_pretrained(path)
    only_ct2 = not home.weights and (home.dir / CT2_WEIGHTS).is_file()
    ct2 = home.dir if only_ct2 else home.dir / "ct2"
    fast = engine == "faster_whisper" or only_ct2
    if fast:
        _check_fast(home, ct2, engine)
    elif engine == "auto" and (ct2 / CT2_WEIGHTS).is_file():
        fast = importlib.util.find_spec("faster_whisper") is not None
    if not only_ct2:
        _check_model(home)
        need_transformers(WHO)
    files = WhisperFiles(home, None if only_ct2 else home, ct2 if fast else None, language)
    _check_tokens(files)
    return files


def _check_fast(home: Pretrained, ct2: Path, engine: str) -> None:
    """That CTranslate2's form is there, and what runs it."""
    if engine == "transformers":
        raise RecipeError(
            f"{CT2_WEIGHTS} alone is CTranslate2's form of a model, which transformers does not load",
            where=str(home.dir),
            remedy="set engine: faster_whisper, or give the directory with model.safetensors",
        )
    if not (ct2 / CT2_WEIGHTS).is_file():
        raise RecipeError(
            f"there is no {CT2_WEIGHTS} for faster-whisper",
            where=str(ct2),
            remedy=f"ct2-transformers-converter --model {home.dir} --output_dir {ct2} "
            "--copy_files tokenizer.json, or set engine: transformers",
        )
    if importlib.util.find_spec("faster_whisper") is None:
        raise MissingExtra("faster-whisper", f"{WHO} with CTranslate2's weights", INSTALL_FAST)


def _check_model(home: Pretrained) -> None:
    """That transformers finds a whole Whisper."""
    config, where = home.config, str(home.dir)
    if config.get("model_type") != "whisper":
        raise RecipeError(
            f"not a Whisper: its model_type is {config.get('model_type')!r}",
            where=where,
            remedy="use the teacher hf_ctc or hf_encoder for wav2vec 2.0, HuBERT and WavLM",
        )
    home.require_weights()
    seconds = config["max_source_positions"] * SUBSAMPLING * FRAME_SAMPLES / SAMPLE_RATE
    wanted = {"feature_size": config.get("num_mel_bins", _MEL_BINS), "chunk_length": seconds}
    extractor = home.extractor()
    for name, unit in (("feature_size", "mel bins"), ("chunk_length", "s of audio")):
        says = extractor.get(name, wanted[name])
        if says != wanted[name]:
            raise RecipeError(
                f"the model takes {wanted[name]:g} {unit}, its feature extractor gives {says:g}",
                where=where,
                remedy="config.json and preprocessor_config.json are of different models: copy both from one",
            )


def _check_tokens(files: WhisperFiles) -> None:
    """That the tokens of a prompt exist, the language's too."""
    where, language = str(files.home.dir), files.language
    if language is not None and not files.multilingual:
        raise RecipeError(
            f"language: {language}, but the model knows English only and is told none",
            where=where,
            remedy="leave language out" if language == "en" else "use a multilingual model (without .en)",
        )
    if language is not None and language not in files.languages:
        raise RecipeError(
            f"the model does not know the language {language!r}",
            where=where,
            remedy=f"by code, {did_you_mean(language, files.languages)}",
        )
    try:
        files.prompt(language or (files.languages[0] if files.multilingual else None))
    except (ValueError, IndexError):
        raise RecipeError(
            "the tokeniser lacks the tokens that begin a text (<|startoftranscript|>, ...)",
            where=where,
            remedy="copy tokenizer.json from the model that the weights are of",
        ) from None
