"""An imported teacher whose tokens a recipe has taken over, those that its text uses.

Its token posteriors become posteriors over the recipe's tokens, and the mass of all others a tail. They go
along texts as the recipe spells them, which is as the teacher would, but for tokens that the recipe
left out: those are spelled by the parts that they are merged from.

B utterances, U tokens, V the teacher's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from kdrecipe.frames import frame_mask, keep_top, over_tokens
from kdrecipe.interfaces import (
    BLANK_ID,
    SOS_EOS_ID,
    UNK_ID,
    Batch,
    Hypothesis,
    Options,
    Spelling,
    Targets,
    TargetSpec,
    TokenTeacher,
)

if TYPE_CHECKING:
    from kdrecipe.data.tokens import Tokenizer


class TrimmedTeacher:
    """The teacher, counting in the recipe's tokens.

    Args:
        teacher: the one whose tokens they were, or another with the same list.
        tokens: trimmed from its own.
        as_transcript: what it recognised, as transcripts are written.
    """

    Config: ClassVar[type[Options]] = Options

    def __init__(self, teacher: TokenTeacher, tokens: Tokenizer, as_transcript: Callable[[str], str]) -> None:
        assert tokens.origin is not None, "tokens of a teacher"
        self._teacher, self._origin = teacher, tokens.origin
        self._size, self._vocab_id = len(tokens), tokens.vocab_id
        self.input: Literal["features", "audio"] = teacher.input
        self.files: Sequence[Path] = teacher.files

        def encode(text: str) -> list[int]:
            return [old for i in tokens.encode(text) if (old := self._origin[i]) is not None]

        teacher.spelling = Spelling(encode, as_transcript)

    @property
    def num_params(self) -> int | None:
        """Of the teacher."""
        return self._teacher.num_params

    def provides(self) -> list[TargetSpec]:
        """What the teacher gives, token posteriors over the recipe's tokens."""
        return [
            replace(spec, dim=self._size, vocab_id=self._vocab_id) if _of_tokens(spec) else spec
            for spec in self._teacher.provides()
        ]

    def load(self, device: torch.device) -> None:
        """See :class:`kdrecipe.interfaces.Teacher`."""
        self._teacher.load(device)

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """See :class:`kdrecipe.interfaces.Teacher`."""
        found = self._teacher.targets(batch, [replace(n, top_k=None) if _of_tokens(n) else n for n in needs])
        items = dict(found.items)
        for need in filter(_of_tokens, needs):
            whole = found.posteriors(need.tap, need.kind)
            items[need.key] = keep_top(over_tokens(whole, self._origin), need.top_k)
        if found.tokens_BU is None or found.token_lens_B is None:
            return replace(found, items=items)
        tokens_BU = self._renamed(found.tokens_BU, found.token_lens_B)
        return replace(found, items=items, tokens_BU=tokens_BU)

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """The teacher's own texts, in its own tokens."""
        return self._teacher.hypotheses(batch)

    def _renamed(self, tokens_BU: Tensor, lens_B: Tensor) -> Tensor:
        """The teacher's tokens as the recipe's."""
        pairs = [(old, new) for new, old in enumerate(self._origin) if old is not None and new != SOS_EOS_ID]
        old, new = torch.tensor(pairs, device=tokens_BU.device).unbind(1)
        size = 1 + max(int(old.max()), int(tokens_BU.max()) if tokens_BU.numel() else 0)
        new_V = torch.full((size,), UNK_ID, device=tokens_BU.device).index_copy(0, old, new)
        return new_V[tokens_BU].masked_fill(~frame_mask(lens_B, tokens_BU.shape[1]), BLANK_ID)


def _of_tokens(spec: TargetSpec) -> bool:
    return spec.kind == "token_logits"
