"""Encoders, heads, and what losses may know of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from kdrecipe.interfaces.common import Options
from kdrecipe.interfaces.targets import FRAME_KINDS, TAP_KINDS, VOCABULARY_KINDS, TargetKind, TargetSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


class Tap(NamedTuple):
    """A declared intermediate tensor. ``(module, D)`` alone stands for one with the frames of the output.

    Args:
        module: whose output it is, or the first of its outputs: (B, T, D), or (B, H, T, D / H), heads apart.
        dim: D.
        subsampling: feature frames per frame; None: as the encoder's output.
        by: ``frames``; or ``tokens``: there are U + 1 of them, the end of the sentence being one.
    """

    module: nn.Module
    dim: int
    subsampling: int | None = None
    by: Literal["frames", "tokens"] = "frames"


@runtime_checkable
class Architecture(Protocol):
    """An encoder; an ``nn.Module`` built as ``cls(config, input_dim)``.

    ``forward(features_BTF, lens_B) -> (hidden_BTD, lens_B)``. Output on valid frames must not
    depend on padding. ``output_len`` gives the output length for a number of feature frames.

    For starting from another model (``init_from``), optional: class attributes ``layer_list``, the name of
    the ``nn.ModuleList`` of its ``num_layers`` equal layers, of which some may be chosen, and
    ``free_options``, options on which no weight depends; a method ``fit_input(utterances) -> float``, which
    fits the weights ``input_map.*`` to what an imported model hears, from normalised features (T, F) and
    audio (S,) of each utterance, and gives the error as a share.

    For being pruned, optional: a method ``unit_groups() -> list[UnitGroup]``, what may be cut out of it as it
    is now, paths counted from the encoder. Then what it computes must follow from the sizes of its layers,
    not from its options; ``output_dim`` is set by who cuts the output.
    """

    Config: ClassVar[type[Options]]
    output_dim: int
    subsampling: int

    def taps(self) -> Mapping[str, Tap | tuple[nn.Module, int]]:
        """Declared intermediate tensors by name.

        A layer with attention declares its queries, keys and values beside its output: ``encoder.3``,
        ``encoder.3.q``, ``encoder.3.k``, ``encoder.3.v``. Maps of attention are what losses make of them.
        """

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""


class Head(Protocol):
    """A head on an encoder; an ``nn.Module`` built as ``cls(config, input_dim, vocab_size)``.

    ``forward(hidden_BTD, lens_B, batch) -> logits``, a :class:`Lattice`, or None; ``batch`` is None
    where no text is known, and then heads that need one give None. The attribute ``vocab_size``
    is V. A class attribute ``subsampling``, optional, is the number of the encoder's frames per frame of
    the head's output (1 without it). A method ``taps()``, optional, is as in :class:`Architecture`; the
    head's name goes before theirs. ``layer_list`` and ``free_options`` are as there, too; ``token_rows``,
    optional, names the weights that have a row per token. ``unit_groups``, optional, is as there, too, paths
    counted from the head; ``reads() -> list[str]``, optional, gives the paths of the linear layers that read
    the encoder's output: without it the encoder's width can't be pruned.
    """

    Config: ClassVar[type[Options]]
    target_kinds: ClassVar[tuple[TargetKind, ...]]

    def greedy(self, hidden_BTD: Tensor, lens_B: Tensor) -> list[list[int]]:
        """Tokens of each utterance, the best one at each step."""


@dataclass(frozen=True)
class ModelInfo:
    """What losses may know of a model before it runs.

    Args:
        vocab_id: hash of its token list.
        vocab_size: V.
        frame_shift_s: seconds per output frame.
        heads: name of each head -> the kinds of targets that it can give; the first head is the
            one by which the model is judged.
        taps: name -> D of each declared tap that goes by frames.
        head_shifts_s: name -> seconds per frame of each head; those not named: ``frame_shift_s``.
        tap_shifts_s: name -> seconds per frame of each tap; those not named: ``frame_shift_s``.
        token_taps: name -> D of each declared tap that goes by tokens.
        dim: width of the encoder's output; 0 where that is not known (of an imported model).
    """

    vocab_id: str
    vocab_size: int
    frame_shift_s: float
    heads: Mapping[str, tuple[TargetKind, ...]]
    taps: Mapping[str, int]
    head_shifts_s: Mapping[str, float] = field(default_factory=dict)
    tap_shifts_s: Mapping[str, float] = field(default_factory=dict)
    token_taps: Mapping[str, int] = field(default_factory=dict)
    dim: int = 0

    @classmethod
    def of_model(
        cls,
        vocab_id: str,
        vocab_size: int,
        encoder: Architecture,
        heads: Mapping[str, Any],
        feature_frame_shift_s: float = 0.01,
    ) -> ModelInfo:
        """Of a model's parts, which need not have weights."""

        def shift_s(subsampling: int) -> float:
            return round(feature_frame_shift_s * subsampling, 9)

        own = encoder.subsampling
        taps = taps_of(encoder, heads)
        by_frames = {name: tap for name, tap in taps.items() if tap.by == "frames"}
        return cls(
            vocab_id=vocab_id,
            vocab_size=vocab_size,
            frame_shift_s=shift_s(own),
            heads={name: tuple(head.target_kinds) for name, head in heads.items()},
            taps={name: tap.dim for name, tap in by_frames.items()},
            head_shifts_s={n: shift_s(own * getattr(head, "subsampling", 1)) for n, head in heads.items()},
            tap_shifts_s={name: shift_s(tap.subsampling or own) for name, tap in by_frames.items()},
            token_taps={name: tap.dim for name, tap in taps.items() if tap.by == "tokens"},
            dim=encoder.output_dim,
        )

    @classmethod
    def of_specs(cls, specs: Sequence[TargetSpec]) -> ModelInfo:
        """Of an imported model, by what it provides."""
        heads: dict[str, tuple[TargetKind, ...]] = {}
        for spec in specs:
            if spec.kind not in TAP_KINDS:
                heads[spec.tap] = (*heads.get(spec.tap, ()), spec.kind)
        hidden = [spec for spec in specs if spec.kind == "hidden"]
        counted = next((spec for spec in specs if spec.vocab_id is not None), None)
        shifts = {spec.key: spec.frame_shift_s for spec in specs if spec.frame_shift_s is not None}
        return cls(
            vocab_id=str(counted.vocab_id) if counted else "",
            vocab_size=int(counted.dim or 0) if counted else 0,
            frame_shift_s=next(iter(shifts.values()), 0.0),
            heads=heads,
            taps={spec.tap: int(spec.dim or 0) for spec in hidden},
            head_shifts_s={
                s.tap: shifts[s.key] for s in specs if s.kind not in TAP_KINDS and s.key in shifts
            },
            tap_shifts_s={s.tap: shifts[s.key] for s in hidden if s.key in shifts},
            token_taps={spec.tap: int(spec.dim or 0) for spec in specs if spec.kind == "token_hidden"},
        )

    def head_shift_s(self, head: str) -> float:
        """Seconds from one frame of a head's output to the next."""
        return self.head_shifts_s.get(head, self.frame_shift_s)

    def tap_shift_s(self, tap: str) -> float:
        """Seconds from one frame at a tap to the next."""
        return self.tap_shifts_s.get(tap, self.frame_shift_s)

    def provides(self) -> list[TargetSpec]:
        """The targets that a model like this can give as a teacher."""
        specs = [
            TargetSpec(
                kind,
                head,
                self.vocab_size,
                self.head_shift_s(head) if kind in FRAME_KINDS else None,
                self.vocab_id,
            )
            for head, kinds in self.heads.items()
            for kind in kinds
        ]
        specs += [TargetSpec("hidden", tap, dim, self.tap_shift_s(tap)) for tap, dim in self.taps.items()]
        specs += [TargetSpec("token_hidden", tap, dim) for tap, dim in self.token_taps.items()]
        return specs

    def pinned(self, need: TargetSpec) -> TargetSpec:
        """What a loss needs of a teacher, with what follows from this student filled in.

        Frames must fall together: with those of the student's head of that name for logits, with
        those of its encoder's output for hidden states and codebooks. Logits must count in the same
        vocabulary.
        """
        if need.kind in FRAME_KINDS and need.frame_shift_s is None:
            shift_s = self.frame_shift_s if need.kind in TAP_KINDS else self.head_shift_s(need.tap)
            need = replace(need, frame_shift_s=shift_s)
        if need.kind in VOCABULARY_KINDS:
            need = replace(need, dim=self.vocab_size, vocab_id=self.vocab_id)
        return need


def taps_of(encoder: Architecture, heads: Mapping[str, Any]) -> dict[str, Tap]:
    """All declared taps of a model: the encoder's, and those of heads after the head's name."""
    found = {name: Tap(*given) for name, given in encoder.taps().items()}
    for head_name, head in heads.items():
        of_head = head.taps() if hasattr(head, "taps") else {}
        found |= {f"{head_name}.{name}": Tap(*given) for name, given in of_head.items()}
    return found
