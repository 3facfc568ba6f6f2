"""What teachers say, and what losses ask of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kdrecipe.interfaces.tensors import map_tensors

if TYPE_CHECKING:
    from torch import Tensor

TargetKind = Literal[
    "frame_logits", "token_logits", "rnnt_lattice", "hidden", "token_hidden", "codebooks", "hypotheses"
]
FRAME_KINDS: tuple[TargetKind, ...] = ("frame_logits", "rnnt_lattice", "hidden", "codebooks")
"""Kinds whose targets go by frames, which must fall together with the student's."""
TAP_KINDS: tuple[TargetKind, ...] = ("hidden", "token_hidden", "codebooks")
"""Kinds that are the tensors at declared taps, or made of them; the others are of heads."""
FORCED_KINDS: tuple[TargetKind, ...] = ("token_logits", "rnnt_lattice", "token_hidden")
"""Kinds that a teacher can only give along a text."""
TEXT_KINDS: tuple[TargetKind, ...] = (*FORCED_KINDS, "hypotheses")
"""Kinds that are about the text of one utterance, so that utterances that are joined have none."""
VOCABULARY_KINDS: tuple[TargetKind, ...] = ("frame_logits", "token_logits", "rnnt_lattice", "hypotheses")
"""Kinds that are about tokens, which must be the student's."""

Align = Literal["mean", "stride", "interpolate"]
"""How frames of one rate become frames of another, see :mod:`kdrecipe.targets.align`."""
ALIGNABLE_KINDS: tuple[TargetKind, ...] = ("frame_logits", "hidden", "codebooks")
"""Kinds whose frames may be averaged or left out (``codebooks``: left out)."""

CODEBOOK_SIZE = 256
"""Entries of a codebook: an index is a byte."""


@dataclass(frozen=True)
class TargetSpec:
    """What a loss needs of a teacher, or what a teacher gives.

    Args:
        kind: what it is.
        tap: the head (``ctc``) for logits, the declared tap (``encoder.3``) for hidden states.
        dim: size of the last axis: V for logits, D for hidden, the number of codebooks; None in a need
            means any.
        frame_shift_s: seconds from one target frame to the next; None in a need means
            the student's own.
        vocab_id: hash of the token list that the last axis counts in; None: not a vocabulary.
        dtype: how it is stored (``float16`` or ``float32``).
        top_k: classes kept per frame, the rest as one tail mass; None means all. Of ``hypotheses``: how many
            texts per utterance; None means one.
        align: of a need: how the teacher's frames become the student's where their shifts differ; None:
            they must not.
    """

    kind: TargetKind
    tap: str = "ctc"
    dim: int | None = None
    frame_shift_s: float | None = None
    vocab_id: str | None = None
    dtype: str = "float16"
    top_k: int | None = None
    align: Align | None = None

    @property
    def key(self) -> str:
        """Name within :class:`Targets`: kind and tap, and how many codebooks."""
        return f"{self.kind}:{self.tap}" + (f"x{self.dim}" if self.kind == "codebooks" else "")

    @property
    def source(self) -> TargetSpec:
        """What a teacher must give for this: itself, or the hidden states that codebooks are trained on."""
        if self.kind != "codebooks":
            return self
        return replace(self, kind="hidden", dim=None, dtype="float32")

    def among(self, offered: Mapping[str, TargetSpec]) -> TargetSpec | None:
        """What meets this need of a teacher's offers by key; None: nothing does."""
        found = offered.get(self.source.key)
        if found is None or self.kind != "codebooks":
            return found
        return replace(found, kind="codebooks", dim=self.dim)

    def mismatch(self, offered: TargetSpec) -> str | None:
        """Why ``offered`` (a teacher's) can't meet this need, or None if it does."""
        if self.key != offered.key:
            return f"needs {self.key}, the teacher offers {offered.key}"
        for name in ("dim", "vocab_id"):
            need, has = getattr(self, name), getattr(offered, name)
            if need is not None and has is not None and need != has:
                return f"{self.key}: needs {name} {need}, the teacher's is {has}"
        return self._other_rate(offered.frame_shift_s)

    def _other_rate(self, its: float | None) -> str | None:
        """Why frames of ``its`` seconds can't serve, or None if they do."""
        mine = self.frame_shift_s
        if mine is None or its is None or mine == its:
            return None
        if self.align is None:
            return f"{self.key}: needs frame_shift_s {mine}, the teacher's is {its}"
        if self.kind not in ALIGNABLE_KINDS:
            return f"{self.key}: frame_shift_s {mine} and {its}, and {self.kind} can't be aligned"
        if self.align != "interpolate" and whole_factor(mine / its) is None:
            times = f"{mine:g} s is {mine / its:.3g} times {its:g} s"
            return (
                f"{self.key}: align: {self.align} needs a whole number of the teacher's frames, and {times}"
            )
        return None


def whole_factor(ratio: float) -> int | None:
    """The whole number, 1 or more, that ``ratio`` is but for rounding; None if it is not one."""
    factor = round(ratio)
    return factor if factor >= 1 and abs(ratio - factor) < 1e-6 else None


@dataclass
class Posteriors:
    """A teacher's posteriors at temperature 1: the kept classes and the mass of the rest.

    Classes that the teacher rules out have :data:`kdrecipe.frames.MIN_LOG_PROB`, not -inf, in what
    live and cached teachers give; so has an empty rest.

    Args:
        log_probs_BTK: float32, log-posteriors of the kept classes.
        lens_B: int64, valid frames (or tokens) of each utterance.
        indices_BTK: int64, the kept classes' ids; None: all V classes in order (K = V).
        log_tail_BT: float32, log of the mass of all other classes; None where none is left out.
    """

    log_probs_BTK: Tensor
    lens_B: Tensor
    indices_BTK: Tensor | None = None
    log_tail_BT: Tensor | None = None


@dataclass
class Hidden:
    """A teacher's hidden states: values_BTD float32, lens_B int64 valid frames (or tokens)."""

    values_BTD: Tensor
    lens_B: Tensor


@dataclass
class Codes:
    """A teacher's hidden states as indices of entries, one in each of N codebooks, whose sum they are near.

    Args:
        indices_BTN: int64, 0 to :data:`CODEBOOK_SIZE` - 1.
        lens_B: int64, valid frames.
    """

    indices_BTN: Tensor
    lens_B: Tensor


@dataclass
class LatticePosteriors:
    """A teacher's transducer posteriors at temperature 1, at every frame and position of the lattice.

    Three classes: the next token of the text, the blank, and all other tokens together, whose
    mass is what the two leave (Panchapagesan 2020, arXiv 2011.06110).

    Args:
        log_probs_BTP2: float32, log-posteriors of the next token and of the blank; after the last
            token there is no next one, and its position has no meaning.
        lens_B: int64, valid frames.
        token_lens_B: int64, U of each utterance; its positions are 0 to U.
    """

    log_probs_BTP2: Tensor
    lens_B: Tensor
    token_lens_B: Tensor


@dataclass
class NBest:
    """A teacher's best texts of each utterance, best first, N of them or as many as it found.

    Args:
        tokens_BNU: int64, padded with BLANK_ID.
        token_lens_BN: int64.
        log_probs_BN: float32, log P(text | audio), summed over all alignments; of texts that are not
            there :data:`kdrecipe.frames.MIN_LOG_PROB`, and they are empty.
    """

    tokens_BNU: Tensor
    token_lens_BN: Tensor
    log_probs_BN: Tensor

    @property
    def lens_B(self) -> Tensor:
        """int64: texts of each utterance, as other targets have frames or tokens."""
        return self.token_lens_BN.new_full(self.token_lens_BN.shape[:1], self.token_lens_BN.shape[1])


TargetItem = Posteriors | Hidden | LatticePosteriors | NBest | Codes
"""A target of one kind, of a batch."""


@dataclass
class Targets:
    """All that one teacher says about a batch, by :attr:`TargetSpec.key`.

    Args:
        items: the targets.
        tokens_BU: int64, the texts along which targets of :data:`FORCED_KINDS` were
            computed: the transcript of a labelled utterance, the teacher's own hypothesis of any
            other; None if there are no such targets.
        token_lens_B: int64, their lengths.
    """

    items: dict[str, TargetItem] = field(default_factory=dict)
    tokens_BU: Tensor | None = None
    token_lens_B: Tensor | None = None

    def posteriors(self, head: str = "ctc", kind: TargetKind = "frame_logits") -> Posteriors:
        """Frame (or token) posteriors of the teacher's ``head``."""
        item = self.items[f"{kind}:{head}"]
        assert isinstance(item, Posteriors)
        return item

    def hidden(self, tap: str, kind: TargetKind = "hidden") -> Hidden:
        """Hidden states at the teacher's ``tap``."""
        item = self.items[f"{kind}:{tap}"]
        assert isinstance(item, Hidden)
        return item

    def codes(self, tap: str, num_codebooks: int) -> Codes:
        """Codebook indices of the teacher's ``tap``."""
        item = self.items[f"codebooks:{tap}x{num_codebooks}"]
        assert isinstance(item, Codes)
        return item

    def lattice(self, head: str = "rnnt") -> LatticePosteriors:
        """Transducer posteriors of the teacher's ``head``."""
        item = self.items[f"rnnt_lattice:{head}"]
        assert isinstance(item, LatticePosteriors)
        return item

    def hypotheses(self, head: str = "ctc") -> NBest:
        """The best texts of the teacher's ``head``."""
        item = self.items[f"hypotheses:{head}"]
        assert isinstance(item, NBest)
        return item

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """A copy with every tensor changed (moved, repeated, selected by row)."""
        result: Targets = map_tensors(self, change)
        return result
