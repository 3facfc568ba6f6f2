"""The running average of a model's weights, by which it is judged and with which it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Mean of all weights so far, the newer ones weighing more: step s of t with ``s^gamma``.

    The power profile of Karras et al. 2024 (arXiv 2312.02696, section 3.1): its window grows with the
    run, about ``1 / (gamma + 1)`` of the steps so far, so that nothing has to be known about the run's
    length. At a constant learning rate it takes out the noise of the last steps, most of what the
    decay of the rate would bring. Buffers (masks, statistics) are not averaged: a mean of masks is no
    mask.

    Args:
        model: whose parameters are averaged.
        gamma: 0 or more; 7 averages over about the last eighth.
    """

    def __init__(self, model: nn.Module, gamma: float = 7.0) -> None:
        self.gamma = gamma
        self._live = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        self._mean = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (from 1)."""
        share = 1 - (1 - 1 / step) ** (self.gamma + 1)
        live = [p.detach() for p in self._live.values()]
        torch._foreach_lerp_(list(self._mean.values()), live, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights within, its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged weights for good."""
        for name, p in self._live.items():
            p.copy_(self._mean[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._live.items():
            kept = p.detach().clone()
            p.copy_(self._mean[name])
            self._mean[name] = kept

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self._mean

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume from :meth:`state_dict`."""
        for name, value in self._mean.items():
            value.copy_(state[name])
