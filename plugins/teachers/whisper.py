"""Whisper (Radford et al. 2022, arXiv 2212.04356) by transformers; hypotheses also by faster-whisper.

B utterances, W windows, S samples, T frames, U tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.corpus.segments import joined
from kdrecipe.data.tokens import vocab_id
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.frames import MIN_LOG_PROB, keep_top
from kdrecipe.interfaces import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    Batch,
    Hidden,
    Hypothesis,
    Located,
    Options,
    Posteriors,
    Spelling,
    TargetItem,
    Targets,
    TargetSpec,
)

from .whisper_engines import FasterWhisper, Said, TransformersWhisper
from .whisper_files import SUBSAMPLING, WhisperFiles, find_whisper
from .whisper_weights import description, pieces, state_dict
from .windows import Window, in_rows, split_text, windows_of

HEAD = "attention"
OUT = "encoder.out"
FRAME_SHIFT_S = SUBSAMPLING * FRAME_SAMPLES / SAMPLE_RATE

Item = TypeVar("Item")


class WhisperOptions(Options):
    """Options of ``name: whisper``.

    Args:
        path: a directory as ``save_pretrained`` writes it, with ``ct2/`` beside the weights or not; one as
            CTranslate2's converter writes it; or a name on Hugging Face's hub (``openai/whisper-base``).
        language: a code such as ``en``; None: found out for every 30 s. English-only models have none.
        beam: hypotheses kept in the search; 1 is greedy.
        engine: what makes the hypotheses; ``auto``: faster-whisper where it is installed and the model is
            there in CTranslate2's form, else transformers. Targets are always made by transformers.
        batch_size: stretches of 30 s at a time.
    """

    path: Annotated[str, Located]
    language: str | None = None
    beam: int = Field(default=1, ge=1)
    engine: Literal["auto", "transformers", "faster_whisper"] = "auto"
    batch_size: int = Field(default=8, ge=1)


class Whisper:
    """Whisper: encoder states, token posteriors along a text, hypotheses.

    Taps: ``encoder.N``, what block N adds up to, ``encoder.N.q``, ``.k`` and ``.v`` of its attention, and
    ``encoder.out``, the normed output of the last, every 0.02 s: an utterance's own frames, without those of
    Whisper's padding to 30 s. Longer audio is heard in windows that end where it is quiet, and their frames
    and words follow one another.

    Token posteriors (``attention``) are over Whisper's own tokens, the end's last. They go along the text
    of a labelled utterance, which begins with a space as Whisper writes it, or its own hypothesis.

    Args:
        config: its options.

    Raises:
        RecipeError: the model is not there, incomplete, or lacks the language.
        MissingExtra: a package is not installed.
    """

    Config: ClassVar[type[Options]] = WhisperOptions
    input: ClassVar[Literal["features", "audio"]] = "audio"

    def __init__(self, config: WhisperOptions) -> None:
        self.config = config
        self._found: WhisperFiles = find_whisper(config.path, config.language, config.engine)
        self.files: Sequence[Path] = self._found.files
        self.num_params: int | None = None
        self.spelling: Spelling | None = None
        self._model: TransformersWhisper | None = None
        self._fast: FasterWhisper | None = None

    @property
    def runtime(self) -> str:
        """What makes its hypotheses where that is not torch; see :class:`kdrecipe.interfaces.Teacher`."""
        return "" if self._found.ct2 is None else f"faster-whisper {version('faster-whisper')}"

    def as_model(self) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
        """The same model as kdrecipe's own, for students that start from its weights.

        Raises:
            RecipeError: there is no form of it with weights of transformers.
        """
        if self._found.model is None:
            raise RecipeError("a model in CTranslate2's form alone can't lend its weights")
        place = self._found.model.dir
        return description(place), state_dict(place), pieces(place)

    @property
    def tokenizer_file(self) -> Path | None:
        """Where its tokens are; see :class:`kdrecipe.interfaces.TokenTeacher`."""
        path = self._found.home.dir / "tokenizer.json"
        return path if path.is_file() else None

    @property
    def pieces(self) -> list[str]:
        """Its tokens by id."""
        return self._found.pieces

    def provides(self) -> list[TargetSpec]:
        """Encoder states and token posteriors; nothing where there is CTranslate2's form alone."""
        if self._found.model is None:
            return []
        config = self._found.model.config
        parts = ("", ".q", ".k", ".v")
        taps = [*(f"encoder.{i}{x}" for i in range(config["encoder_layers"]) for x in parts), OUT]
        hidden = [TargetSpec("hidden", tap, config["d_model"], FRAME_SHIFT_S) for tap in taps]
        pieces = self._found.pieces
        return [*hidden, TargetSpec("token_logits", HEAD, len(pieces), vocab_id=vocab_id(pieces))]

    def load(self, device: torch.device) -> None:
        """Read the weights: transformers' where they are, and CTranslate2's if its engine searches."""
        if self._found.model is not None:
            self._model = TransformersWhisper(self._found, device)
            self.num_params = self._model.num_params
        if self._found.ct2 is not None:
            self._fast = FasterWhisper(self._found, device)

    @torch.no_grad()
    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """Hidden states and token posteriors; see :class:`kdrecipe.interfaces.Teacher`.

        Raises:
            DataError: a text is longer than Whisper's positions.
        """
        assert self._model is not None, "load() comes first, and gives targets only where provides() does"
        windows = windows_of(batch, self._found.window_s)
        taps = {need.tap for need in needs if need.kind == "hidden"}
        forced = [need for need in needs if need.kind == "token_logits"]
        kept: dict[str, list[Tensor]] = {tap: [] for tap in taps}
        encoded: list[Tensor] = []
        for some in self._batched(windows):
            hidden_WTD, tapped = self._model.encode([w.samples_S for w in some], sorted(taps))
            encoded += list(hidden_WTD) if forced else []
            for tap, values_WTD in tapped.items():
                kept[tap] += [x_TD[: _num_frames(w)] for x_TD, w in zip(values_WTD, some, strict=True)]
        rows = [window.row for window in windows]
        items: dict[str, TargetItem] = {
            need.key: Hidden(*in_rows(kept[need.tap], rows, len(batch)))
            for need in needs
            if need.kind == "hidden"
        }
        said = self._along_texts(batch, windows, encoded) if forced else Targets()
        for need in forced:
            items[need.key] = keep_top(said.posteriors(HEAD, "token_logits"), need.top_k)
        return replace(said, items=items).map(lambda x: x.to(batch.lens_B.device))

    @torch.no_grad()
    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """By its own search, without times. The mean log-probability counts the end of a text, too."""
        windows = windows_of(batch, self._found.window_s)
        audible = [window for window in windows if window.audible]
        said = [s for some in self._batched(audible) for s in self._search(some)]
        by_row: list[list[Said]] = [[] for _ in range(len(batch))]
        for window, s in zip(audible, said, strict=True):
            by_row[window.row].append(s)
        return [_hypothesis(row) for row in by_row]

    def _batched(self, windows: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """As many windows (or their numbers) as are heard at a time."""
        for i in range(0, len(windows), self.config.batch_size):
            yield windows[i : i + self.config.batch_size]

    def _search(self, windows: Sequence[Window], hidden_WTD: Tensor | None = None) -> list[Said]:
        """What is recognised in windows, whose encoder states may be there already."""
        samples = [window.samples_S for window in windows]
        if self._fast is not None:
            return self._fast.search(samples, self.config.beam)
        assert self._model is not None, "load() comes first"
        hidden_WTD = self._model.encode(samples, ())[0] if hidden_WTD is None else hidden_WTD
        return self._model.search(hidden_WTD, self.config.beam)

    def _along_texts(self, batch: Batch, windows: Sequence[Window], encoded: Sequence[Tensor]) -> Targets:
        """Token posteriors along the texts of the windows, which follow one another in their rows."""
        assert self._model is not None
        texts = self._texts(batch, windows, encoded)
        along: list[Tensor] = []
        for some in self._batched(range(len(windows))):
            hidden_WTD = torch.stack([encoded[i] for i in some])
            along += self._model.log_probs(hidden_WTD, [texts[i] for i in some])
        rows = [window.row for window in windows]
        last = [i + 1 == len(rows) or rows[i + 1] != row for i, row in enumerate(rows)]
        # only the end of the last window is the end of the text
        along = [x_UV if ends else x_UV[:-1] for x_UV, ends in zip(along, last, strict=True)]
        log_probs_BUV, lens_B = in_rows(along, rows, len(batch))
        tokens = [torch.tensor(text, dtype=torch.int64)[:, None] for text in texts]
        tokens_BU1, token_lens_B = in_rows(tokens, rows, len(batch))
        posteriors = Posteriors(log_probs_BUV.clamp(min=MIN_LOG_PROB), lens_B)
        return Targets({f"token_logits:{HEAD}": posteriors}, tokens_BU1[..., 0], token_lens_B)

    def _texts(self, batch: Batch, windows: Sequence[Window], encoded: Sequence[Tensor]) -> list[list[int]]:
        """The tokens of each window: its part of the transcript, or what is recognised there."""
        assert self._model is not None
        counts = Counter(window.row for window in windows)
        said: list[Said] = [Said()] * len(windows)
        unclear = [i for i, w in enumerate(windows) if counts[w.row] > 1 or not batch.labelled_B[w.row]]
        for some in self._batched([i for i in unclear if windows[i].audible]):
            found = self._search([windows[i] for i in some], torch.stack([encoded[i] for i in some]))
            for i, one in zip(some, found, strict=True):
                said[i] = one
        texts: list[list[int]] = []
        for row in range(len(batch)):
            of_row = [s for s, window in zip(said, windows, strict=True) if window.row == row]
            if bool(batch.labelled_B[row]):
                parts = split_text(batch.texts[row], [s.text for s in of_row])
                encode = self.spelling.encode if self.spelling else self._model.encode_text
                texts += [encode(part) for part in parts]
            else:
                texts += [self._own_tokens(s) for s in of_row]
            if (longest := max(map(len, texts[-len(of_row) :]))) > self._found.longest_text:
                raise DataError(
                    f"the text has {longest} of Whisper's tokens in {self._found.window_s:g} s of audio, "
                    f"which has positions for {self._found.longest_text}",
                    where=batch.ids[row],
                    remedy="look at the transcript: nobody speaks that fast",
                )
        return texts

    def _own_tokens(self, said: Said) -> list[int]:
        """What was recognised, as far as there are positions for it."""
        if self.spelling is None:
            return list(said.tokens)
        return self.spelling.encode(self.spelling.as_transcript(said.text))[: self._found.longest_text]


def _num_frames(window: Window) -> int:
    """Encoder frames of a window: half of its feature frames, rounded up."""
    num_features = (len(window.samples_S) + FRAME_SAMPLES // 2) // FRAME_SAMPLES
    return -(-num_features // SUBSAMPLING)


def _hypothesis(said: Sequence[Said]) -> Hypothesis:
    """What was said in the windows of an utterance, as one; nothing of one that is too short to be heard."""
    if not said:
        return Hypothesis("")
    text, tokens, _ = joined((0.0, s.text, s.tokens, ()) for s in said)
    score = sum(s.log_prob for s in said)
    mean = score / max(1, sum(s.num_scored for s in said))
    return Hypothesis(text, tokens, [], score, mean, max(s.no_speech_prob for s in said))


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("whisper", Whisper)
