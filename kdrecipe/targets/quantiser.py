"""Codebooks: a teacher's hidden states in a few bytes per frame.

Multi-codebook vector quantisation (Guo 2022, arXiv 2211.00508), after the authors' program
``multi_quantization``: a vector is near the sum of one entry of each codebook. A linear classifier proposes
the entries, which are then chosen anew, one codebook after the other, as long as that comes nearer (theirs
searches over pairs of codebooks at a time). Entries and classifier are trained by gradients, first as twice
as many codebooks of 16 entries, then as products of each two of these, 256 entries.

M frames, D width, N codebooks, K entries of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrecipe.errors import PluginError
from kdrecipe.interfaces import (
    CODEBOOK_SIZE,
    Batch,
    Codes,
    Hidden,
    Hypothesis,
    Targets,
    TargetSpec,
    Teacher,
)

REFINEMENTS = 5
"""Times that all codebooks are gone through, once the entries are trained."""


class Quantiser(nn.Module):
    """Codebooks for vectors of one kind.

    Args:
        dim: D.
        num_codebooks: N.
        size: K.
    """

    mean_D: Tensor
    scale: Tensor

    def __init__(self, dim: int, num_codebooks: int, size: int = CODEBOOK_SIZE) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.classifier = nn.Linear(dim, num_codebooks * size)
        self.entries_NKD = nn.Parameter(
            torch.randn(num_codebooks, size, dim) / math.sqrt(num_codebooks * dim)
        )

    def normalised(self, x_MD: Tensor) -> Tensor:
        """With mean 0, and a mean square norm of 1."""
        return (x_MD - self.mean_D) / self.scale

    def encode(self, x_MD: Tensor, refinements: int = REFINEMENTS) -> Tensor:
        """(M, N) int64: the entries whose sum is near each vector."""
        with torch.no_grad():
            return self._codes(self.normalised(x_MD.float()), refinements)

    def decode(self, codes_MN: Tensor) -> Tensor:
        """(M, D): what indices stand for."""
        return self._sum(codes_MN) * self.scale + self.mean_D

    def _sum(self, codes_MN: Tensor) -> Tensor:
        books_N = torch.arange(codes_MN.shape[1], device=codes_MN.device)
        return self.entries_NKD[books_N, codes_MN].sum(1)

    def _logits(self, x_MD: Tensor) -> Tensor:
        logits_MNK: Tensor = self.classifier(x_MD).unflatten(-1, self.entries_NKD.shape[:2])
        return logits_MNK

    @torch.no_grad()
    def _codes(self, x_MD: Tensor, refinements: int) -> Tensor:
        codes_MN = self._logits(x_MD).argmax(-1)
        rest_MD = x_MD - self._sum(codes_MN)
        norms_NK = self.entries_NKD.square().sum(-1)
        for _ in range(refinements):
            for n, entries_KD in enumerate(self.entries_NKD):
                without_MD = rest_MD + entries_KD[codes_MN[:, n]]
                codes_MN[:, n] = (norms_NK[n] - 2 * without_MD @ entries_KD.t()).argmin(-1)
                rest_MD = without_MD - entries_KD[codes_MN[:, n]]
        return codes_MN

    def losses(self, x_MD: Tensor, refinements: int) -> tuple[Tensor, Tensor]:
        """Of normalised vectors: the error as a share of their variance, and the classifier's in nats."""
        codes_MN = self._codes(x_MD, refinements)
        error = (self._sum(codes_MN) - x_MD).square().sum() / x_MD.square().sum().clamp(min=1e-20)
        return error, F.cross_entropy(self._logits(x_MD).flatten(0, 1), codes_MN.flatten())

    @torch.no_grad()
    def of_pairs(self) -> Quantiser:
        """With half the codebooks, whose K * K entries are the sums of those of two."""
        num, size, dim = self.entries_NKD.shape

        def paired(x_NKX: Tensor) -> Tensor:
            return (x_NKX[::2, :, None] + x_NKX[1::2, None]).flatten(1, 2)

        result = Quantiser(dim, num // 2, size * size)
        result.mean_D.copy_(self.mean_D)
        result.scale.copy_(self.scale)
        result.entries_NKD.copy_(paired(self.entries_NKD))
        result.classifier.weight.copy_(paired(self.classifier.weight.view(num, size, dim)).flatten(0, 1))
        result.classifier.bias.copy_(paired(self.classifier.bias.view(num, size, 1)).flatten())
        return result


def train_quantiser(
    frames_MD: Tensor,
    num_codebooks: int,
    *,
    steps: int,
    batch_size: int = 512,
    lr: float = 0.005,
    seed: int = 0,
) -> tuple[Quantiser, float]:
    """Codebooks for what frames are like.

    Args:
        frames_MD: hidden states, float32; some ten thousand.
        num_codebooks: N.
        steps: of the optimiser, in each of the two phases.
        batch_size: frames per step.
        lr: of Adam; falls to 0 in each phase.
        seed: of initialisation and order.

    Returns:
        The quantiser, and its error on these frames as a share of their variance.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantiser = Quantiser(frames_MD.shape[1], 2 * num_codebooks, math.isqrt(CODEBOOK_SIZE))
    quantiser.mean_D.copy_(frames_MD.mean(0))
    centred = frames_MD - quantiser.mean_D
    quantiser.scale.copy_(centred.square().sum(1).mean().sqrt().clamp(min=1e-8))
    rng = torch.Generator().manual_seed(seed)
    x_MD = quantiser.normalised(frames_MD)
    for phase in (1, 2):
        quantiser = quantiser.of_pairs() if phase == 2 else quantiser
        optimizer = torch.optim.Adam(quantiser.parameters(), lr=lr, betas=(0.9, 0.9))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps) * (1.0 if phase == 1 else 0.2)
            rows = torch.randint(len(x_MD), (min(batch_size, len(x_MD)),), generator=rng)
            error, classifier_loss = quantiser.losses(x_MD[rows], 1 + step % 2)
            optimizer.zero_grad()
            (error + classifier_loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    quantiser.requires_grad_(False)
    with torch.no_grad():
        error, _ = quantiser.losses(x_MD[: 20 * batch_size], REFINEMENTS)
    return quantiser, float(error)


class CodedTeacher:
    """A teacher that also gives codebook indices of its hidden states.

    Args:
        teacher: loaded or not.
        quantisers: by key of the target, ``codebooks:encoder.5x8``.
    """

    def __init__(self, teacher: Teacher, quantisers: Mapping[str, Quantiser]) -> None:
        self._teacher = teacher
        self._quantisers = dict(quantisers)
        self.Config = teacher.Config
        self.input = teacher.input
        self.files = teacher.files

    @property
    def num_params(self) -> int | None:
        """Of the teacher."""
        return self._teacher.num_params

    def provides(self) -> list[TargetSpec]:
        """What the teacher gives, without codebooks: any hidden state can have them."""
        return self._teacher.provides()

    def load(self, device: torch.device) -> None:
        """Make both ready."""
        self._teacher.load(device)
        for quantiser in self._quantisers.values():
            quantiser.to(device)

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """What the teacher says, hidden states as indices where that is the need."""
        asked = {need.source.key: need.source for need in needs}
        found = self._teacher.targets(batch, list(asked.values()))
        items = dict(found.items)
        for need in needs:
            if need.kind == "codebooks":
                hidden = found.items.get(need.source.key)
                if not isinstance(hidden, Hidden):
                    raise PluginError(f"the teacher gave no {need.source.key}, of which there are codebooks")
                flat_MD = hidden.values_BTD.flatten(0, 1)
                codes_MN = self._quantisers[need.key].encode(flat_MD)
                items[need.key] = Codes(codes_MN.unflatten(0, hidden.values_BTD.shape[:2]), hidden.lens_B)
        return replace(found, items=items)

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """The teacher's."""
        return self._teacher.hypotheses(batch)


def state_of(quantiser: Quantiser) -> dict[str, Any]:
    """Its tensors."""
    return dict(quantiser.state_dict())


def from_state(state: Mapping[str, Tensor]) -> Quantiser:
    """A quantiser of saved tensors."""
    num, size, dim = state["entries_NKD"].shape
    quantiser = Quantiser(dim, num, size)
    quantiser.load_state_dict(dict(state))
    return quantiser.requires_grad_(False)
