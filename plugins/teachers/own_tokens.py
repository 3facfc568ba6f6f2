"""The tokens that a CTC model of elsewhere counts in, as the core counts: the blank first.

T frames, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdrecipe.data.tokens import SPECIALS, read_pieces, vocab_id
from kdrecipe.errors import KdrecipeError, RecipeError
from kdrecipe.frames import MIN_LOG_PROB, ctc_greedy
from kdrecipe.interfaces import BLANK_ID, Hypothesis, Speller
from kdrecipe.text import WORD_START, clean

BLANKS = ("<blk>", "<blank>", "<eps>", "<pad>", "[PAD]")
"""What the blank is called, the surest name first."""

MakeSpeller = Callable[[Sequence[str]], Speller]

_UNSAID = frozenset({"<s>", "</s>", "<sos/eos>"})


class CtcTokens:
    """Tokens of a model, with the blank moved to ``BLANK_ID`` and called as the core calls it.

    Args:
        path: of a ``tokens.txt``, a token and its id per line; disambiguation symbols (``#0``) at its end
            are no tokens.
        blank: the blank's id in it; None: found by its name, see :data:`BLANKS`.
        speller: of pieces, how ids become text; None: pieces with SentencePiece's mark at the start of
            words, or characters with ``|`` between words.

    Attributes:
        pieces: by id as the core counts.
        vocab_id: equal to that of a :class:`kdrecipe.data.tokens.Tokenizer` with the same list.

    Raises:
        RecipeError: there is no such file, it is no list of tokens, or which is the blank is not known.
    """

    def __init__(self, path: Path, blank: int | None = None, speller: MakeSpeller | None = None) -> None:
        self.path = path
        listed = read_tokens(path)
        if blank is None:
            blank = next((listed.index(name) for name in BLANKS if name in listed), None)
        if blank is None or not 0 <= blank < len(listed):
            unnamed = f"no token is called as a blank is ({', '.join(BLANKS)})"
            what = unnamed if blank is None else f"no token has id {blank}"
            raise RecipeError(what, where=str(path), remedy="set blank: to the id of the blank")
        self._order = [blank, *(i for i in range(len(listed)) if i != blank)]
        self.pieces = [SPECIALS[BLANK_ID], *(_core_name(listed[i]) for i in self._order[1:])]
        self.vocab_id = vocab_id(self.pieces)
        self._spell = (speller or _speller)(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def log_probs(self, values_TV: Tensor) -> Tensor:
        """Log-posteriors (T, V) float32, the blank first, of logits, log-posteriors or posteriors."""
        values_TV = values_TV.float()
        if _is_distribution(values_TV):
            values_TV = values_TV.log()
        ordered_TV = values_TV if self._order[0] == BLANK_ID else values_TV[:, self._order]
        return ordered_TV.log_softmax(-1).clamp(min=MIN_LOG_PROB)

    def hypothesis(self, log_probs_TV: Tensor, frame_shift_s: float) -> Hypothesis:
        """The best path; its ``avg_log_prob`` is over the frames at which tokens begin."""
        (tokens,), (frames,) = ctc_greedy(log_probs_TV[None], torch.tensor([len(log_probs_TV)]))
        best_T = log_probs_TV.max(-1).values
        return Hypothesis(
            self._spell(tokens).strip(),
            tokens,
            [round(frame * frame_shift_s, 9) for frame in frames],
            float(best_T.sum()),
            float(best_T[frames].mean()) if frames else None,
        )


def read_tokens(path: Path) -> list[str]:
    """The tokens by id of a ``tokens.txt``, without disambiguation symbols at its end.

    Raises:
        RecipeError: there is no such file, or it is no such list.
    """
    if not path.is_file():
        raise RecipeError("there is no such file of tokens", where=str(path))
    try:
        pieces = read_pieces(path)
    except (KdrecipeError, UnicodeDecodeError):
        raise RecipeError(
            "no list of tokens: it must have a token, a space and its id on each line, all ids from 0",
            where=str(path),
        ) from None
    while len(pieces) > 1 and re.fullmatch(r"#\d+", pieces[-1]):
        pieces.pop()
    return pieces


def _core_name(piece: str) -> str:
    """The mark of a sentence's ends without what exports add to it for sherpa-onnx."""
    return piece.removesuffix("…") if piece.startswith("<sos/eos>") else piece


def _is_distribution(values_TV: Tensor) -> bool:
    """Whether every frame is a distribution: some exports end in softmax, and logits never look so."""
    return bool((values_TV >= 0).all()) and bool(((values_TV.sum(-1) - 1).abs() < 1e-3).all())


def _speller(pieces: Sequence[str]) -> Speller:
    space = WORD_START if any(WORD_START in piece for piece in pieces) else "|"
    said = ["" if i == BLANK_ID or piece in _UNSAID else piece for i, piece in enumerate(pieces)]
    return lambda ids: clean("".join(said[i] for i in ids).replace(space, " "))
