"""What every decoder and every metric must hold to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import BLANK_ID, SOS_EOS_ID, Hypothesis, ModelOutput
from kdrecipe.model.heads.attention import AttentionHead, AttentionHeadOptions
from kdrecipe.model.heads.rnnt import RnntHead, RnntHeadOptions
from kdrecipe.testing.checks import CheckSkipped, by_id, check_config_strict, require
from kdrecipe.testing.models import (
    FRAME_SHIFT_S,
    VOCAB_SIZE,
    WIDTH,
    TinyModel,
    random_output,
    tiny_model,
)

LENS = (12, 7, 9)
SEARCHED_HEADS: Mapping[str, Any] = {"attention": AttentionHead, "rnnt": RnntHead}
"""Heads of which decoders read no logits, but ask the head step by step."""
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


class SpitefulModel:
    """A language model of which ``hated`` is all but impossible; it notes the texts that it saw end."""

    def __init__(self, hated: int) -> None:
        self.hated = hated
        self.ended: set[tuple[int, ...]] = set()

    def start(self) -> tuple[int, ...]:
        """States are texts."""
        return ()

    def score(self, state: tuple[int, ...], token: int) -> tuple[float, tuple[int, ...]]:
        """1000 nats against the one, 1 against any other."""
        return (-1000.0 if token == self.hated else -1.0), (*state, token)

    def end(self, state: tuple[int, ...]) -> float:
        """1 nat."""
        self.ended.add(state)
        return -1.0


@dataclass(frozen=True)
class DecoderCase:
    """A decoder class under test, with its options."""

    cls: Any
    config: Any

    def decode(self, out: ModelOutput, model: nn.Module | None = None, **lm: Any) -> list[Hypothesis]:
        """What it makes of a model's output; ``lm``, if given, has weight 1."""
        config = self.config.model_copy(update={"lm_weight": 1.0}) if lm else self.config
        more = (lm.get("lm"),) if "lm_weight" in self.cls.Config.model_fields else ()
        decoder = self.cls(config, LetterTokens(), FRAME_SHIFT_S, *more)
        found: list[Hypothesis] = decoder.decode(model or tiny_recogniser(self.cls.head), out)
        return found

    def output(self) -> ModelOutput:
        """Random hidden states and frame logits of three utterances."""
        out = random_output(LENS, num_padding=4)
        logits_BTV = 3 * out.logits["ctc"]
        return replace(out, logits={"ctc": logits_BTV} | self.own_logits(logits_BTV))

    def own_logits(self, logits_BTV: Tensor) -> dict[str, Tensor]:
        """Frame logits under the name of the decoder's head, unless that one is searched itself."""
        return {} if self.cls.head in SEARCHED_HEADS else {self.cls.head: logits_BTV}


def tiny_recogniser(head: str) -> TinyModel:
    """A model with ``head`` ahead of ``ctc``, sure enough of itself to say something."""
    if head not in SEARCHED_HEADS:
        return tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        searched = SEARCHED_HEADS[head](SEARCHED_HEADS[head].Config(), WIDTH, VOCAB_SIZE)
        for weight in searched.parameters():
            weight.data *= 3
        return TinyModel(heads={head: searched}).eval()


class SureAttention(AttentionHead):
    """Says one text whatever it hears."""

    text = (3, 4, 4, 5)

    def step(self, tokens_N: Tensor, state: Any, memory: Any) -> tuple[Tensor, Any]:
        """All but certain of the next token, or the end."""
        log_probs_NV, state = super().step(tokens_N, state, memory)
        position = state.keys[0].shape[2] - 1
        sure_NV = torch.full_like(log_probs_NV, -20.0)
        sure_NV[:, self.text[position] if position < len(self.text) else SOS_EOS_ID] = 20.0
        return sure_NV.log_softmax(-1), state


class SureRnnt(RnntHead):
    """Takes hidden states for joined logits."""

    def encode(self, hidden_BTD: Tensor) -> Tensor:
        """As they are."""
        return hidden_BTD

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Whatever was said before."""
        return encoder + 0 * predictor[..., :1]


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
    """Hypotheses do not depend on the content of the padding."""
    out = case.output()
    padding_BT1 = ~frame_mask(out.lens_B, out.hidden_BTD.shape[1])[..., None]

    def loud(x: Tensor) -> Tensor:
        return torch.where(padding_BT1, x.flip(-1) * 5, x) if x.dim() == 3 else x

    want, got = case.decode(out), case.decode(out.map(loud))
    same = all(a.tokens == b.tokens for a, b in zip(want, got, strict=True))
    require(same, "hypotheses change when only the padding does")


def check_batch_invariance(case: DecoderCase) -> None:
    """An utterance's hypothesis does not depend on the others in its batch."""
    out = case.output()
    for row, together in enumerate(case.decode(out)):
        alone = case.decode(out.map(lambda x, row=row: x[row : row + 1]))[0]  # type: ignore[misc]
        require(alone.tokens == together.tokens, f"utterance {row} is decoded otherwise when it is alone")


def check_no_frames(case: DecoderCase) -> None:
    """An utterance without frames is an empty hypothesis."""
    out = case.output()
    found = case.decode(replace(out, lens_B=torch.zeros_like(out.lens_B)))
    require(len(found) == len(LENS), f"{len(found)} hypotheses for {len(LENS)} utterances")
    require(not any(h.tokens or h.times_s or h.text for h in found), f"from no frames: {found}")


def check_certain_output(case: DecoderCase) -> None:
    """Where the model is certain, the hypothesis is what it says, for CTC with repeats and blanks dropped."""
    wanted = [*SureAttention.text]
    path = [0, 3, 0, 0, 4, 0, 4, 5, 0] if case.cls.head == "rnnt" else [0, 3, 3, 0, 4, 0, 4, 5, 5]
    logits_BTV = torch.full((1, len(path), VOCAB_SIZE), -20.0)
    logits_BTV[0, torch.arange(len(path)), torch.tensor(path)] = 20.0
    hidden_BTD = logits_BTV if case.cls.head == "rnnt" else torch.zeros(1, len(path), WIDTH)
    logits = {"ctc": logits_BTV} | case.own_logits(logits_BTV)
    if case.cls.head == "attention":
        model = TinyModel(heads={"attention": SureAttention(AttentionHeadOptions(), WIDTH, VOCAB_SIZE)})
    elif case.cls.head == "rnnt":
        model = TinyModel(heads={"rnnt": SureRnnt(RnntHeadOptions(), VOCAB_SIZE, VOCAB_SIZE)})
    else:
        model = tiny_model()
    out = ModelOutput(hidden_BTD, torch.tensor([len(path)]), logits)
    tokens = case.decode(out, model.eval())[0].tokens
    require(tokens == wanted, f"tokens {tokens} where {wanted} are certain")


def check_language_model(case: DecoderCase) -> None:
    """With ``lm_weight`` the language model weighs in, at every token and at the end of the text."""
    if "lm_weight" not in case.cls.Config.model_fields:
        raise CheckSkipped("it has no option lm_weight")
    if getattr(case.cls, "needs_lm", False):
        raise CheckSkipped("it needs its own kind of language model")
    out = case.output()
    said = Counter(token for h in case.decode(out) for token in h.tokens)
    lm = SpitefulModel(hated=said.most_common(1)[0][0])
    for hypothesis in case.decode(out, lm=lm):
        tokens = hypothesis.tokens
        require(lm.hated not in tokens, f"the language model all but forbids {lm.hated}, and yet: {tokens}")
        require(tuple(tokens) in lm.ended, f"the language model was never asked how probably {tokens} ends")


DECODER_CHECKS = by_id(
    check_well_formed,
    check_padding_invariance,
    check_batch_invariance,
    check_no_frames,
    check_certain_output,
    check_language_model,
    check_config_strict,
)
"""Contract of a decoder, by check id."""


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
