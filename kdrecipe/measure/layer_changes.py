"""One layer at a time in other numbers: what int8, int4 and pruning would make of it.

Rounding is simulated in float. Shapes: O outputs of a layer, I inputs, N rows (frames) that it sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CHANGES = ("int8", "int4", "prune")
OUTLIER = 10.0  # a channel is one whose largest value is so many times the median of the channels'
GROUP = 32  # inputs that share a scale in int4
_CONVS = (nn.Conv1d, nn.Conv2d)
_RECURRENT = (nn.LSTM, nn.GRU)
_MIN_SCALE = 1e-12


@dataclass
class Heard:
    """What a layer is given, over all utterances.

    Args:
        max_I: largest magnitude in each input channel.
        squares_I: sum of squares.
        num_rows: N.
    """

    max_I: Tensor
    squares_I: Tensor
    num_rows: int = 0

    @property
    def outliers(self) -> dict[int, float]:
        """Channels that stand out -> how many times the median of those that are ever used, largest first."""
        used_I = self.max_I[self.max_I > 0]
        ratio_I = self.max_I / (used_I.median() if len(used_I) else torch.ones(1))
        found = {int(i): float(ratio_I[i]) for i in torch.nonzero(ratio_I > OUTLIER).flatten()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass
class Layers:
    """The layers of a model that can be changed, by name, and what they hear while :meth:`listening`."""

    modules: Mapping[str, nn.Module]
    heard: dict[str, Heard] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Layers:
        """Linear layers, convolutions and recurrent layers, in the order of the model."""
        kinds = (nn.Linear, *_CONVS, *_RECURRENT)
        return cls({name: m for name, m in model.named_modules() if isinstance(m, kinds)})

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, what passes through the layers is noted."""
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                hooks.callback(module.register_forward_pre_hook(self._note(name)).remove)
            yield

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows_NI = _rows(module, args[0].detach())
            heard = self.heard.setdefault(name, Heard(torch.zeros(rows_NI.shape[1]), torch.zeros(1)))
            heard.max_I = torch.maximum(heard.max_I, rows_NI.abs().amax(0))
            heard.squares_I = heard.squares_I + rows_NI.square().sum(0)
            heard.num_rows += len(rows_NI)

        return note

    def num_bytes(self, name: str, change: str | None = None) -> int:
        """Of the weights, with their scales; of ``prune``, what is left if half of it is taken out."""
        found = 0
        for weight in _weights(self.modules[name]).values():
            size, rows = weight.numel(), weight.shape[0]
            if change == "int8":
                found += size + 4 * rows
            elif change == "int4":
                found += (size + 1) // 2 + 4 * rows * -(-(size // rows) // GROUP)
            else:
                found += 2 * size if change == "prune" else 4 * size
        return found

    def can(self, name: str, change: str) -> bool:
        """Whether a layer can be changed so: of recurrent layers, parts are not simply taken out."""
        return change != "prune" or not isinstance(self.modules[name], _RECURRENT)

    @contextmanager
    def changed(self, name: str, change: str) -> Iterator[None]:
        """Within, one layer computes with other numbers.

        ``int8``: weights with a scale per output; of linear layers, inputs with a scale per frame. ``int4``:
        weights with a scale per 32 inputs. ``prune``: without the half of the inputs that matter least, by
        weight times input (Sun et al. 2023, arXiv 2306.11695); of layers with one input per output, without
        that half of the outputs.
        """
        module = self.modules[name]
        before = {key: weight.data for key, weight in _weights(module).items()}
        with ExitStack() as undo:
            for key, weight in _weights(module).items():
                undo.callback(setattr, weight, "data", before[key])
                weight.data = self._other(name, change, before[key])
            if change == "int8" and isinstance(module, nn.Linear):
                undo.callback(module.register_forward_pre_hook(_rounded_input).remove)
            yield

    def _other(self, name: str, change: str, weight: Tensor) -> Tensor:
        if change == "prune":
            heard = self.heard[name]
            return without_half(weight, (heard.squares_I / max(1, heard.num_rows)).sqrt())
        flat_OI = weight.flatten(1)
        found = rounded(flat_OI, 127) if change == "int8" else grouped(flat_OI)
        return found.view_as(weight)


def rounded(values_NI: Tensor, steps: int) -> Tensor:
    """Each row rounded to whole multiples of its largest magnitude / ``steps``."""
    scale_N1 = (values_NI.abs().amax(-1, keepdim=True) / steps).clamp_min(_MIN_SCALE)
    return (values_NI / scale_N1).round() * scale_N1


def grouped(weight_OI: Tensor) -> Tensor:
    """Rounded to -7 to 7, with a scale per output and :data:`GROUP` inputs."""
    return torch.cat([rounded(part, 7) for part in weight_OI.split(GROUP, dim=1)], dim=1)


def without_half(weight: Tensor, input_I: Tensor) -> Tensor:
    """(O, I, ...) with zeros for the half of the inputs that matter least; see :meth:`Layers.changed`."""
    axis = 1 if weight.shape[1] > 1 else 0
    others = [i for i in range(weight.dim()) if i != axis]
    norms = weight.square().sum(others).sqrt()
    if len(input_I) == len(norms):  # grouped convolutions share their inputs' places
        norms = norms * input_I
    keep = torch.ones_like(norms)
    keep[norms.argsort(stable=True)[: len(norms) // 2]] = 0
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * keep.view(shape)


def _rounded_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return rounded(args[0], 127), *args[1:]


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """(N, I): the inputs of a layer, its channels last."""
    if isinstance(module, _CONVS):
        x = x.movedim(1 if x.dim() > (2 if isinstance(module, nn.Conv1d) else 3) else 0, -1)
    return x.reshape(-1, x.shape[-1])


def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices and kernels of a layer, no biases."""
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() > 1}
