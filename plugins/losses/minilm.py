"""Relations within attention: what attends to what, and which values are alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.frames import check_aligned, frame_mask, full_precision
from kdrecipe.interfaces import (
    Align,
    Batch,
    LossOutput,
    LossSetup,
    ModelInfo,
    ModelOutput,
    Options,
    TargetKind,
    Targets,
    TargetSpec,
)
from kdrecipe.layers import attention_bias

Relation = Literal["qk", "qq", "kk", "vv"]


class MiniLm:
    """``sum over layer pairs, relations and frames of mean over heads of KL(R_teacher || R_student)``.

    A relation of a frame is a distribution over all frames, ``R = softmax(A B^T / sqrt(d))``, A and B being
    the queries, keys or values of a head of width d. ``qk`` is the attention map itself. MiniLM (Wang 2020,
    arXiv 2002.10957) transfers ``qk`` and ``vv`` of the last layer. For models with other numbers of heads,
    MiniLMv2 (Wang 2020, arXiv 2012.15828) joins the vectors of all heads and divides them anew into
    *relation heads*, as many in both models; so it is done here, and widths may differ. With ``heads`` the
    number that both have, ``qk`` are their own maps. MiniLMv2 transfers ``qq``, ``kk`` and ``vv``.

    With ``part: decoder`` frames are the tokens of the text and its end, each related to those before it.
    Relations need memory by the square of the length, and queries, keys and values on disk as much as three
    hidden states: ``targets: {mode: live}`` may be the better choice.

    Count: valid frames (or tokens) times layer pairs.

    Raises:
        RecipeError: a layer has no such taps, a width can't be divided by ``heads``, or the student's taps
            have other frames than its output.
        DataError: frame counts of student and teacher differ.
    """

    contract_options: ClassVar[Mapping[str, Any]] = {"layers": {"encoder.1": "encoder.5"}, "heads": 2}
    tiny_options: ClassVar[Mapping[str, Any]] = {"layers": {"encoder.0": "encoder.0"}, "heads": 2}

    class Config(Options):
        """Options of ``minilm``.

        Args:
            layers: student's layer -> teacher's layer, at least one pair: ``{encoder.3: encoder.11}``, of a
                decoder ``{attention.1: attention.5}``.
            relations: which are transferred: ``qk``, ``qq``, ``kk``, ``vv``.
            heads: relation heads; divides the width of both models.
            part: ``encoder`` or ``decoder``, that the layers are of.
            align: of encoders: how the teacher's frames become the student's; None: they must be.
        """

        layers: dict[str, str] = Field(min_length=1)
        relations: tuple[Relation, ...] = Field(("qk", "vv"), min_length=1)
        heads: int = Field(4, ge=1)
        part: Literal["encoder", "decoder"] = "encoder"
        align: Align | None = None

        @model_validator(mode="after")
        def _fits(self) -> MiniLm.Config:
            if len(set(self.relations)) < len(self.relations):
                raise ValueError(f"the same relation twice: {list(self.relations)}")
            if self.part == "decoder" and self.align is not None:
                raise ValueError("align is for part: encoder; a decoder goes by tokens")
            named = [layer for pair in self.layers.items() for layer in pair if layer.startswith("encoder.")]
            if self.part == "decoder" and named:
                raise ValueError(f"part: decoder takes layers of decoders, not {named[0]!r}")
            return self

        @property
        def vectors(self) -> list[str]:
            """Which of q, k and v the relations are made of."""
            return sorted({x for relation in self.relations for x in relation})

    def __init__(self, config: Config, setup: LossSetup) -> None:
        self.config = config
        self.taps = tuple(f"{layer}.{x}" for layer in config.layers for x in config.vectors)
        for tap in self.taps:
            self._check(setup.student, tap, "student")
            own_s, out_s = setup.student.tap_shift_s(tap), setup.student.frame_shift_s
            if config.part == "encoder" and own_s != out_s:
                raise RecipeError(
                    f"minilm: the student's tap {tap!r} has a frame every {own_s} s, its output {out_s} s",
                    remedy="choose a layer with the frames of the output",
                )
        for layer in config.layers.values() if setup.teacher else ():
            for x in config.vectors:
                self._check(setup.teacher, f"{layer}.{x}", "teacher")

    def _check(self, info: ModelInfo | None, tap: str, role: str) -> None:
        assert info is not None
        taps = info.taps if self.config.part == "encoder" else info.token_taps
        if tap not in taps:
            known = {name.removesuffix(tap[-2:]) for name in taps if name.endswith(tap[-2:])}
            raise RecipeError(
                f"minilm: the {role} declares no tap {tap!r} in its {self.config.part}",
                remedy=did_you_mean(tap[:-2], known),
            )
        if taps[tap] % self.config.heads:
            raise RecipeError(
                f"minilm: {self.config.heads} relation heads can't share the {role}'s width {taps[tap]}",
                remedy="set heads to a number that divides the widths of both",
            )

    @staticmethod
    def requires(config: Config) -> list[TargetSpec]:
        """The teacher's queries, keys and values, as far as the relations need them."""
        kind: TargetKind = "hidden" if config.part == "encoder" else "token_hidden"
        layers = dict.fromkeys(config.layers.values())
        return [
            TargetSpec(kind, f"{layer}.{x}", align=config.align) for layer in layers for x in config.vectors
        ]

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Sum over layer pairs, relations and valid frames; see the class."""
        config, causal = self.config, self.config.part == "decoder"
        lens_B = batch.token_lens_B + 1 if causal else out.lens_B
        kind: TargetKind = "token_hidden" if causal else "hidden"
        terms = []
        for student_layer, teacher_layer in config.layers.items():
            mine, its = {}, {}
            for x in config.vectors:
                target = targets.hidden(f"{teacher_layer}.{x}", kind)
                check_aligned(lens_B, target.lens_B)
                mine[x] = full_precision(out.taps[f"{student_layer}.{x}"])
                its[x] = target.values_BTD.detach().to(mine[x].dtype)
            for a, b in config.relations:
                log_q = log_relations(mine[a], mine[b], lens_B, config.heads, causal)
                log_p = log_relations(its[a], its[b], lens_B, config.heads, causal)
                terms.append(F.kl_div(log_q, log_p, reduction="sum", log_target=True) / config.heads)
        return LossOutput(sum(terms[1:], terms[0]), lens_B.sum() * len(config.layers))


def log_relations(a_BTD: Tensor, b_BTD: Tensor, lens_B: Tensor, heads: int, causal: bool) -> Tensor:
    """(N, H, T) log of how each of the N valid frames of a batch relates to its utterance's frames.

    Args:
        a_BTD: vectors of the frames that relate.
        b_BTD: of those that they relate to.
        lens_B: valid frames; T is the longest.
        heads: H, divides D.
        causal: whether frames relate to none after them.
    """
    length = int(lens_B.max()) if len(lens_B) else 0
    a_BHTd, b_BHTd = (x[:, :length].unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a_BTD, b_BTD))
    with torch.autocast(a_BTD.device.type, enabled=False):  # it would take products in 8 bits of mantissa
        scores_BHTT = a_BHTd @ b_BHTd.transpose(2, 3) / math.sqrt(a_BHTd.shape[-1])
    mask_BT = frame_mask(lens_B, length)
    mask_B1TT = mask_BT[:, None, None, :].expand(-1, -1, length, -1)
    if causal:
        mask_B1TT = mask_B1TT & torch.ones(length, length, dtype=torch.bool, device=mask_BT.device).tril()
    log_BHTT = (scores_BHTT + attention_bias(mask_B1TT, scores_BHTT.dtype)).log_softmax(-1)
    log_NHT: Tensor = log_BHTT.transpose(1, 2)[mask_BT]
    return log_NHT


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Make ``minilm`` known."""
    register("minilm", MiniLm)
