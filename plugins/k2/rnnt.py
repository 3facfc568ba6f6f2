"""The loss ``rnnt`` in k2's kernels: the same options, the same numbers.

B utterances, T frames, U tokens, P = U + 1 positions, R positions kept per frame, V vocabulary, J width
of the joiner.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdrecipe.frames import full_precision
from kdrecipe.interfaces import (
    BLANK_ID,
    Batch,
    Lattice,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Targets,
    TargetSpec,
)
from kdrecipe.lattice import AM_SCALE, LM_SCALE, MIN_RANGE

from .package import import_k2

INSTEAD_OF_RNNT = "{name: rnnt}"


class K2RnntOptions(Options):
    """Options of ``{name: k2_rnnt}``: those of ``{name: rnnt}``.

    Args:
        range: lattice positions per frame at which the joiner is computed, at least 2.
        simple_scale: weight of the simple joiner's loss, which finds these positions.
        lm_scale: share of the predictor's own posteriors in the simple joiner's.
        am_scale: share of the encoder's own. Above 0 k2 differs from ``rnnt``: it smooths by the mean
            of the batch, padding included, so that an utterance's loss depends on its neighbours.
        full: compute the joiner at all positions.
    """

    range: int = Field(default=5, ge=MIN_RANGE)
    simple_scale: float = Field(default=0.5, ge=0.0)
    lm_scale: float = Field(default=LM_SCALE, ge=0.0, lt=1.0)
    am_scale: float = Field(default=AM_SCALE, ge=0.0, lt=1.0)
    full: bool = False


class K2Rnnt:
    """Negative log-likelihood of the transcripts, pruned, and ``simple_scale`` times the simple joiner's.

    Kuang 2022 (arXiv 2206.13236), with tokens that take no frame (k2's ``regular`` topology). Summed
    over utterances, counted in label tokens. Unlabelled and empty utterances are left out, and such
    without frames. Metrics: ``simple`` and ``pruned``, the two parts.

    Args:
        config: its options.
        setup: the models it works between; the student must have the head ``rnnt``.

    Raises:
        MissingExtra: k2 is not installed.
        RecipeError: the student has no head ``rnnt``.
    """

    Config: ClassVar[type[Options]] = K2RnntOptions
    supervised: ClassVar[bool] = True

    def __init__(self, config: K2RnntOptions, setup: LossSetup | None = None) -> None:
        self.config = config
        if setup is not None:
            setup.require_head("rnnt", "k2_rnnt")
        self.k2 = import_k2("k2_rnnt", INSTEAD_OF_RNNT)

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Nothing from a teacher."""
        return []

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Total in nats, count in tokens."""
        lattice = out.lattices["rnnt"]
        used_B = batch.labelled_B & (batch.token_lens_B > 0) & (lattice.lens_B > 0)
        if not bool(used_B.any()):
            return LossOutput(full_precision(lattice.encoder_BTJ[:0]).sum(), 0)
        # sums of exponentials need more than half precision; the joiner has the model's
        with torch.autocast(lattice.am_BTV.device.type, enabled=False):
            simple_B, ranges_BTR = self._simple(lattice)
        logits_BTRV = _join(self.k2, lattice, ranges_BTR)
        with torch.autocast(lattice.am_BTV.device.type, enabled=False):
            pruned_B = self.k2.rnnt_loss_pruned(
                logits=full_precision(logits_BTRV),
                symbols=lattice.tokens_BU,
                ranges=ranges_BTR,
                termination_symbol=BLANK_ID,
                boundary=_boundary(lattice),
                reduction="none",
            )
        # not a product with the mask: what is left out must not bring NaN along
        simple, pruned = (x_B.where(used_B, 0.0).sum() for x_B in (simple_B, pruned_B))
        count = batch.token_lens_B.where(used_B, 0).sum()
        metrics = {"pruned": pruned.detach(), "simple": simple.detach()}
        return LossOutput(pruned + self.config.simple_scale * simple, count, metrics)

    def _simple(self, lattice: Lattice) -> tuple[Tensor, Tensor]:
        """The simple joiner's loss of each utterance, and the positions that it chooses, (B, T, R)."""
        simple_B, (next_BUT, blank_BPT) = self.k2.rnnt_loss_smoothed(
            lm=full_precision(lattice.lm_BPV),
            am=full_precision(lattice.am_BTV),
            symbols=lattice.tokens_BU,
            termination_symbol=BLANK_ID,
            lm_only_scale=self.config.lm_scale,
            am_only_scale=self.config.am_scale,
            boundary=_boundary(lattice),
            reduction="none",
            return_grad=True,
        )
        num_positions, num_frames = blank_BPT.shape[1:]
        needed_B = (lattice.token_lens_B - 1).div(lattice.lens_B.clamp(min=1), rounding_mode="floor") + 2
        size = max(self.config.range, int(needed_B.max()))
        if self.config.full or size >= num_positions:
            all_P = torch.arange(num_positions, device=blank_BPT.device)
            return simple_B, all_P.expand(len(simple_B), num_frames, num_positions).contiguous()
        return simple_B, self.k2.get_rnnt_prune_ranges(next_BUT, blank_BPT, _boundary(lattice), size)


def _join(k2: Any, lattice: Lattice, ranges_BTR: Tensor) -> Tensor:
    """(B, T, R, V) logits of the joiner at ``ranges_BTR``."""
    return lattice.join(*k2.do_rnnt_pruning(lattice.encoder_BTJ, lattice.predictor_BPJ, ranges_BTR))


def _boundary(lattice: Lattice) -> Tensor:
    """(B, 4) first token and frame, number of tokens and of frames; at least one frame, as k2 demands."""
    zeros_B = torch.zeros_like(lattice.lens_B)
    return torch.stack([zeros_B, zeros_B, lattice.token_lens_B, lattice.lens_B.clamp(min=1)], dim=1)
