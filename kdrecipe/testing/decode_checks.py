"""What every decoder and every metric must hold to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdrecipe.data.frames import frame_mask
from kdrecipe.interfaces import BLANK_ID, Hypothesis, ModelOutput
from kdrecipe.testing.checks import by_id, check_config_strict, require
from kdrecipe.testing.models import FRAME_SHIFT_S, VOCAB_SIZE, random_output, tiny_model

LENS = (12, 7, 9)
SENTENCES = ("one two three", "a", "two two words more")


class LetterTokens:
    """A token table of single letters, for tests: ``<blk>``, ``<sos/eos>``, ``<unk>``, a, b, c, ..."""

    vocab_id = "letters"

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        self.pieces = ["<blk>", "<sos/eos>", "<unk>", *map(chr, range(97, 97 + vocab_size - 3))]

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """One id per letter."""
        return [self.pieces.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The letters in a row; special tokens are silent."""
        return "".join(self.pieces[i] for i in ids if i > 2)


@dataclass(frozen=True)
class DecoderCase:
    """A decoder class under test, with its options."""

    cls: Any
    config: Any

    def decode(self, out: ModelOutput) -> list[Hypothesis]:
        """What it makes of a model's output."""
        found: list[Hypothesis] = self.cls(self.config, LetterTokens(), FRAME_SHIFT_S).decode(
            tiny_model(), out
        )
        return found

    def output(self) -> ModelOutput:
        """Random logits of three utterances."""
        out = random_output(LENS, num_padding=4)
        return replace(out, logits={self.cls.head: 3 * out.logits["ctc"]})


def check_well_formed(case: DecoderCase) -> None:
    """One hypothesis per utterance: tokens without blanks, their text, a time each, in order and in range."""
    out = case.output()
    found = case.decode(out)
    require(len(found) == len(LENS), f"{len(found)} hypotheses for {len(LENS)} utterances")
    require(any(h.tokens for h in found), "every hypothesis is empty")
    for hypothesis, length in zip(found, LENS, strict=True):
        tokens, times_s = hypothesis.tokens, hypothesis.times_s
        require(all(BLANK_ID < i < VOCAB_SIZE for i in tokens), f"tokens {tokens}")
        text = LetterTokens().decode(tokens)
        require(hypothesis.text == text, f"the text is {hypothesis.text!r}, its tokens spell {text!r}")
        require(len(times_s) in (0, len(tokens)), f"{len(times_s)} times for {len(tokens)} tokens")
        require(times_s == sorted(times_s), f"times run backwards: {times_s}")
        end_s = length * FRAME_SHIFT_S
        require(all(0 <= t < end_s for t in times_s), f"times {times_s} of an utterance of {end_s:g} s")


def check_padding_invariance(case: DecoderCase) -> None:
    """Hypotheses do not depend on what lies in the padding."""
    out = case.output()
    logits_BTV = out.logits[case.cls.head]
    padding_BT = ~frame_mask(out.lens_B, logits_BTV.shape[1])
    loud_BTV = torch.where(padding_BT[..., None], logits_BTV.flip(-1) * 5, logits_BTV)
    want, got = case.decode(out), case.decode(replace(out, logits={case.cls.head: loud_BTV}))
    same = all(a.tokens == b.tokens for a, b in zip(want, got, strict=True))
    require(same, "hypotheses change when only the padding does")


def check_batch_invariance(case: DecoderCase) -> None:
    """An utterance's hypothesis does not depend on the others in its batch."""
    out = case.output()
    for row, together in enumerate(case.decode(out)):
        alone = case.decode(out.map(lambda x, row=row: x[row : row + 1]))[0]  # type: ignore[misc]
        require(alone.tokens == together.tokens, f"utterance {row} is decoded otherwise when it is alone")


def check_certain_output(case: DecoderCase) -> None:
    """Where the model is certain, the hypothesis is what it says, repeats merged and blanks dropped."""
    path = [0, 3, 3, 0, 4, 0, 4, 5, 5]
    logits_TV = torch.full((len(path), VOCAB_SIZE), -20.0)
    logits_TV[torch.arange(len(path)), torch.tensor(path)] = 20.0
    lens_B = torch.tensor([len(path)])
    out = ModelOutput(torch.zeros(1, len(path), 1), lens_B, {case.cls.head: logits_TV[None]})
    tokens = case.decode(out)[0].tokens
    require(tokens == [3, 4, 4, 5], f"tokens {tokens} from the certain path {path}")


DECODER_CHECKS = by_id(
    check_well_formed,
    check_padding_invariance,
    check_batch_invariance,
    check_certain_output,
    check_config_strict,
)
"""Contract of a CTC decoder, by check id."""


@dataclass(frozen=True)
class MetricCase:
    """A metric class under test, with its options."""

    cls: Any
    config: Any

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """Errors and length."""
        pair: tuple[int, int] = self.cls(self.config).errors(reference, hypothesis)
        return pair


def check_perfect_is_zero(case: MetricCase) -> None:
    """The reference itself has no errors, and a length above 0."""
    for text in SENTENCES:
        errors, length = case.errors(text, text)
        require(errors == 0, f"{errors} errors in a perfect hypothesis")
        require(length > 0, f"{text!r} has length {length}")


def check_empty_texts(case: MetricCase) -> None:
    """An empty hypothesis has as many errors as the reference is long; an empty reference has length 0."""
    for text in SENTENCES:
        errors, length = case.errors(text, "")
        require(errors == length, f"{errors} errors of {length} in an empty hypothesis")
        errors, length = case.errors("", text)
        require(length == 0 and errors > 0, f"{errors} errors of {length} where the reference is empty")


def check_counts(case: MetricCase) -> None:
    """Errors are whole numbers, never negative; the length is the reference's alone."""
    for reference in SENTENCES:
        lengths = set()
        for hypothesis in (*SENTENCES, ""):
            errors, length = case.errors(reference, hypothesis)
            require(isinstance(errors, int) and errors >= 0, f"{errors!r} errors")
            lengths.add(length)
        require(
            len(lengths) == 1, f"the length of {reference!r} depends on the hypothesis: {sorted(lengths)}"
        )


METRIC_CHECKS = by_id(check_perfect_is_zero, check_empty_texts, check_counts, check_config_strict)
"""Contract of a metric, by check id."""
