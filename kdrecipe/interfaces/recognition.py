"""Searches, what they find, and figures over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kdrecipe.interfaces.batches import ModelOutput
from kdrecipe.interfaces.common import Options

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Hypothesis:
    """A recognised utterance.

    Args:
        text: the words.
        tokens: token ids.
        times_s: start of each token in seconds, as many as tokens (or empty).
        score: log-score of the search, higher is better; None where the runtime gives none.
        avg_log_prob: mean natural log-probability of its tokens, 0 at best; None where it is not known.
        no_speech_prob: the model's probability that nobody speaks, 0 to 1; None where it is not known.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    score: float | None = None
    avg_log_prob: float | None = None
    no_speech_prob: float | None = None


class TokenTable(Protocol):
    """Tokens of a bundle; :class:`kdrecipe.data.tokens.Tokenizer` is one."""

    vocab_id: str
    pieces: list[str]
    """The text of each token, as ``tokens.txt`` has it."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class LanguageModel(Protocol):
    """A model of token sequences; :class:`kdrecipe.data.ngram.NgramModel` is one.

    States are values: nothing that is done with one changes it.
    """

    def start(self) -> Any:
        """The state before the first token of a sentence."""

    def score(self, state: Any, token: int) -> tuple[float, Any]:
        """Natural log-probability of ``token`` after ``state``, and the state after it."""

    def end(self, state: Any) -> float:
        """Natural log-probability that the sentence ends after ``state``."""


class Decoder(Protocol):
    """A search on the outputs of one head, built as ``cls(config, tokens, frame_shift_s)``.

    A decoder whose options have ``lm_weight`` is built as ``cls(config, tokens, frame_shift_s, lm)``, ``lm``
    being the recipe's :class:`LanguageModel`, or None where ``lm_weight`` is 0 (the default). A static
    method ``beside(config)``, optional, names further heads that it reads.
    """

    Config: ClassVar[type[Options]]
    head: ClassVar[str]

    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """Hypotheses of a batch, in its order."""


class Metric(Protocol):
    """A figure over a split, built as ``cls(config)``.

    A metric may also have ``details(reference, hypothesis) -> dict[str, int]`` that splits the
    errors into ``sub``, ``ins`` and ``del``; the report shows them for the recipe's first metric. It may
    have ``notes(references, hypotheses) -> list[str]``, what the report must state of it on these texts.
    """

    Config: ClassVar[type[Options]]

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """(errors, reference length) of one utterance; the score is the ratio of sums."""
