"""Recognisers with a CTC head by transformers: wav2vec 2.0, HuBERT, WavLM and their kin.

B utterances, T frames, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.data.tokens import SPECIALS, vocab_id
from kdrecipe.frames import MIN_LOG_PROB, ctc_greedy, keep_top
from kdrecipe.interfaces import (
    BLANK_ID,
    SOS_EOS_ID,
    UNK_ID,
    Batch,
    Hypothesis,
    Located,
    Options,
    Posteriors,
    TargetItem,
    Targets,
    TargetSpec,
)
from kdrecipe.text import WORD_START, clean

from .pretrained import Pretrained
from .speech_encoder import SpeechEncoder

HEAD = "ctc"


class HfCtcOptions(Options):
    """Options of ``name: hf_ctc``.

    Args:
        path: a directory as ``save_pretrained`` writes it, or a name on Hugging Face's hub
            (``facebook/wav2vec2-base-960h``).
    """

    path: Annotated[str, Located]


class HfCtc:
    """Frame posteriors of a CTC head, hidden states, hypotheses by greedy search.

    Its tokens are put in a recipe's order: blank, sentence marks, unknown, then the others as they were, with
    the mark between words as recipes write it. A student with these pieces has its vocabulary.

    Args:
        config: its options.

    Raises:
        RecipeError: the model is not there, incomplete or of another kind.
        MissingExtra: transformers is not installed.
    """

    Config: ClassVar[type[Options]] = HfCtcOptions
    input: ClassVar[Literal["features", "audio"]] = "audio"

    def __init__(self, config: HfCtcOptions) -> None:
        self._encoder = SpeechEncoder(config.path, "teacher 'hf_ctc'", ctc=True)
        self.files: Sequence[Path] = self._encoder.found.files
        self.pieces, self._classes = recipe_order(self._encoder.found)

    @property
    def num_params(self) -> int | None:
        """Parameters, once loaded."""
        return self._encoder.num_params

    def provides(self) -> list[TargetSpec]:
        """Frame posteriors and hidden states."""
        shift_s = self._encoder.frame_shift_s
        posteriors = TargetSpec("frame_logits", HEAD, len(self.pieces), shift_s, vocab_id(self.pieces))
        return [posteriors, *self._encoder.hidden_specs()]

    def load(self, device: torch.device) -> None:
        """Read the weights."""
        self._encoder.load(device)

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """Frame posteriors and hidden states; see :class:`kdrecipe.interfaces.Teacher`."""
        taps = [need.tap for need in needs if need.kind == "hidden"]
        logits_BTV, hidden, lens_B = self._encoder.run(batch, taps)
        items: dict[str, TargetItem] = {need.key: hidden[need.tap] for need in needs if need.kind == "hidden"}
        for need in (need for need in needs if need.kind == "frame_logits"):
            items[need.key] = keep_top(Posteriors(self._log_probs(logits_BTV), lens_B), need.top_k)
        return Targets(items)

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """Greedy: the likeliest class of each frame.

        The mean log-probability is over the frames at which tokens begin, the score that of the whole path.
        """
        logits_BTV, _, lens_B = self._encoder.run(batch, ())
        log_probs_BTV = self._log_probs(logits_BTV)
        said = zip(*ctc_greedy(log_probs_BTV, lens_B), log_probs_BTV.amax(-1), lens_B.tolist(), strict=True)
        return [
            Hypothesis(
                self._text(tokens),
                tokens,
                [round(self._encoder.frame_shift_s * start, 9) for start in starts],
                float(best_T[:length].sum()),
                float(best_T[starts].mean()) if starts else None,
            )
            for tokens, starts, best_T, length in said
        ]

    def _log_probs(self, logits_BTV: Tensor | None) -> Tensor:
        """Log-posteriors with the classes in the recipe's order."""
        assert logits_BTV is not None
        own_BTV = logits_BTV.log_softmax(-1)
        columns = [
            own_BTV[..., classes].logsumexp(-1) if classes else torch.full_like(own_BTV[..., 0], MIN_LOG_PROB)
            for classes in self._classes
        ]
        return torch.stack(columns, dim=-1).clamp(min=MIN_LOG_PROB)

    def _text(self, tokens: Sequence[int]) -> str:
        names = (SPECIALS[UNK_ID] if i == UNK_ID else self.pieces[i] for i in tokens if i != SOS_EOS_ID)
        return clean("".join(names).replace(WORD_START, " "))


def recipe_order(model: Pretrained) -> tuple[list[str], list[list[int]]]:
    """The model's pieces in a recipe's order, and which of its classes make up each.

    Raises:
        RecipeError: no list of tokens.
    """
    described = {**model.read("special_tokens_map.json"), **model.read("tokenizer_config.json")}
    own = model.pieces(int(model.config.get("vocab_size", 32)))
    blank = model.config.get("pad_token_id", 0)
    unknown = _name(described.get("unk_token", "<unk>"))
    marks = {_name(described.get("bos_token", "<s>")), _name(described.get("eos_token", "</s>"))}
    between = _name(described.get("word_delimiter_token", "|"))
    special: list[list[int]] = [[], [], []]
    pieces, classes = list(SPECIALS), special
    for i, piece in enumerate(own):
        if i == blank:
            special[BLANK_ID].append(i)
        elif piece in marks:
            special[SOS_EOS_ID].append(i)
        elif piece == unknown:
            special[UNK_ID].append(i)
        else:
            pieces.append(WORD_START if piece == between else piece)
            classes.append([i])
    return pieces, classes


def _name(token: Any) -> Any:
    """A token as a text, however its settings are written."""
    return token.get("content") if isinstance(token, dict) else token


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("hf_ctc", HfCtc)
