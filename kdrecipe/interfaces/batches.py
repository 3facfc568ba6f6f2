"""What models are given, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kdrecipe.interfaces.tensors import map_tensors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A cut within a row of a batch.

    Args:
        id: of the cut.
        start: feature frame at which it begins.
        num_frames: its feature frames.
    """

    id: str
    start: int
    num_frames: int


@dataclass
class Batch:
    """Utterances as a model sees them, padded at the end.

    Args:
        ids: cut ids, B of them; of cuts that were joined, with ``+`` between them.
        features_BTF: float32 log-mel features, padding arbitrary.
        lens_B: int64, valid feature frames.
        tokens_BU: int64 labels, padded with BLANK_ID; unlabelled utterances have length 0.
        token_lens_B: int64.
        labelled_B: bool, False where the text must not be used (or is not known).
        texts: transcripts ('' where unlabelled).
        pieces: the cuts that each row consists of, with silence around them; empty: a row is its cut.
        samples_BS: float32 audio at 16 kHz in [-1, 1], padded with zeros, of which the features are; None
            where nothing asked for it.
        sample_lens_B: int64, valid samples; None without them.
    """

    ids: list[str]
    features_BTF: Tensor
    lens_B: Tensor
    tokens_BU: Tensor
    token_lens_B: Tensor
    labelled_B: Tensor
    texts: list[str] = field(default_factory=list)
    pieces: list[tuple[Piece, ...]] = field(default_factory=list)
    samples_BS: Tensor | None = None
    sample_lens_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def pieces_of(self, row: int) -> tuple[Piece, ...]:
        """The cuts that a row consists of, in order."""
        return self.pieces[row] if self.pieces else (Piece(self.ids[row], 0, int(self.lens_B[row])),)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed; ids and texts stay."""
        result: Batch = map_tensors(self, change)
        return result

    def select(self, rows_B: Tensor) -> Batch:
        """The utterances where ``rows_B`` (bool) is True."""
        keep = rows_B.nonzero().flatten().tolist()
        picked = self.map(lambda x: x[rows_B])
        texts = [self.texts[i] for i in keep] if self.texts else []
        pieces = [self.pieces[i] for i in keep] if self.pieces else []
        return replace(picked, ids=[self.ids[i] for i in keep], texts=texts, pieces=pieces)

    def repeat(self, num_views: int) -> Batch:
        """The batch ``num_views`` times over, whole copies one after the other."""
        if num_views == 1:
            return self
        copies = self.map(lambda x: x.repeat(num_views, *[1] * (x.dim() - 1)))
        return replace(
            copies,
            ids=self.ids * num_views,
            texts=self.texts * num_views,
            pieces=self.pieces * num_views,
        )


@dataclass
class Lattice:
    """The two sides of a transducer for a batch and its tokens, not yet joined.

    The joined logits (B, T, P, V) would fill the memory: :mod:`kdrecipe.lattice` finds, by
    the *simple* joiner, which is a sum of the two sides, the few positions per frame that matter,
    and joins there only (Kuang 2022, arXiv 2206.13236).

    Args:
        am_BTV: the encoder's side of the simple joiner, not normalised.
        lm_BPV: the predictor's side of the simple joiner.
        encoder_BTJ: the encoder's side of the joiner.
        predictor_BPJ: the predictor's side of the joiner.
        tokens_BU: int64, the text, padded with BLANK_ID.
        lens_B: int64, valid frames.
        token_lens_B: int64, U of each utterance.
        join: ``(encoder (..., J), predictor (..., J)) -> logits (..., V)``, broadcasting.
    """

    am_BTV: Tensor
    lm_BPV: Tensor
    encoder_BTJ: Tensor
    predictor_BPJ: Tensor
    tokens_BU: Tensor
    lens_B: Tensor
    token_lens_B: Tensor
    join: Callable[[Tensor, Tensor], Tensor]
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Results that several losses need, by whatever computed them; a changed copy starts without."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Lattice:
        """A copy with every tensor changed."""
        result: Lattice = map_tensors(self, change)
        return result


@dataclass
class ModelOutput:
    """What a model computed.

    Args:
        hidden_BTD: the encoder's output.
        lens_B: int64, its valid frames.
        logits: by head name, not normalised; ``ctc``: (B, T, V); ``attention``: (B, U + 1, V), the
            tokens of the batch and the end of the sentence, each given those before it.
        taps: by declared name, those that were asked for: (B, T, D), or (B, U + 1, D) of taps by tokens.
        num_views: how many differently augmented copies of the batch follow one another
            along B (1: none; see :meth:`views`).
        lattices: by head name, of heads that are transducers.
    """

    hidden_BTD: Tensor
    lens_B: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    num_views: int = 1
    lattices: dict[str, Lattice] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelOutput:
        """A copy with every tensor changed."""
        result: ModelOutput = map_tensors(self, change)
        return result

    def select(self, rows_B: Tensor) -> ModelOutput:
        """The utterances where ``rows_B`` (bool) is True."""
        return self.map(lambda x: x[rows_B])

    def views(self) -> list[ModelOutput]:
        """The views one by one, each with B / num_views utterances in the same order."""
        size = self.lens_B.shape[0] // self.num_views
        parts = [self.map(lambda x, i=i: x[i * size : (i + 1) * size]) for i in range(self.num_views)]  # type: ignore[misc]
        return [replace(p, num_views=1) for p in parts]
