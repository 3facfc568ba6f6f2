"""A recogniser: feature normalisation, an encoder, and heads on it.

B utterances, T frames, F feature bins, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdrecipe.errors import Problem, RecipeError
from kdrecipe.interfaces import Batch, Lattice, ModelInfo, ModelOutput, TargetSpec, taps_of
from kdrecipe.model.taps import capture

if TYPE_CHECKING:
    from kdrecipe.plugin.registry import Registry

MIN_STD = 1e-3  # of log-mel values; a bin that never varies (band-limited audio) must not divide by 0


class FeatureNorm(nn.Module):
    """Per-bin normalisation by the training set's mean and deviation, kept with the weights.

    Args:
        num_bins: F; mean 0 and deviation 1 until :meth:`set_stats` or a state dict fills them.
    """

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(num_bins))
        self.register_buffer("std_F", torch.ones(num_bins))

    @classmethod
    def from_stats(cls, mean: Any, std: Any) -> FeatureNorm:
        """From (F,) arrays or tensors."""
        norm = cls(len(mean))
        norm.set_stats(mean, std)
        return norm

    def set_stats(self, mean: Any, std: Any) -> None:
        """Take over (F,) arrays or tensors; deviations below 1e-3 count as 1e-3."""
        self.mean_F.copy_(torch.as_tensor(mean))
        self.std_F.copy_(torch.as_tensor(std).clamp(min=MIN_STD))

    def forward(self, features_BTF: Tensor) -> Tensor:
        """(B, T, F) log-mel values to normalised ones; padding is normalised along."""
        return (features_BTF - self.mean_F) / self.std_F


class AsrModel(nn.Module):
    """Norm, encoder and heads.

    Args:
        encoder: an :class:`~kdrecipe.interfaces.Architecture`.
        heads: name -> :class:`~kdrecipe.interfaces.Head`.
        norm: applied to the features first; SpecAugment fills with ``norm.mean_F``.
    """

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module], norm: FeatureNorm) -> None:
        super().__init__()
        self.norm = norm
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)

    def forward(
        self,
        features_BTF: Tensor,
        lens_B: Tensor,
        *,
        taps: Sequence[str] = (),
        batch: Batch | None = None,
    ) -> ModelOutput:
        """Everything the model computes for a batch.

        Args:
            features_BTF: log-mel features, not normalised, padding arbitrary.
            lens_B: int64, valid frames.
            taps: names of intermediate tensors to keep as well.
            batch: for heads that need the labels (teacher forcing); None outside training.
        """
        with self.tapped(taps) as kept:
            out = self.with_heads(self.encode(features_BTF, lens_B), batch)
        return replace(out, taps=kept)

    def tapped(self, taps: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Within, what runs of the model leaves its tensors at ``taps`` in the dict; RecipeError for unknown
        names."""
        if not taps:
            return nullcontext({})
        return capture(taps_of(self.encoder, dict(self.heads.items())), taps)  # type: ignore[arg-type]

    def encode(self, features_BTF: Tensor, lens_B: Tensor) -> ModelOutput:
        """The encoder's part of :meth:`forward`."""
        return ModelOutput(*self.encoder(self.norm(features_BTF), lens_B))

    def with_heads(self, out: ModelOutput, batch: Batch | None) -> ModelOutput:
        """What :meth:`encode` gave with all heads' outputs added; those that need a text, if there is one."""
        found = {name: head(out.hidden_BTD, out.lens_B, batch) for name, head in self.heads.items()}
        return replace(
            out,
            logits={name: x for name, x in found.items() if isinstance(x, Tensor)},
            lattices={name: x for name, x in found.items() if isinstance(x, Lattice)},
        )

    def greedy(self, out: ModelOutput, head: str | None = None) -> list[list[int]]:
        """Tokens by greedy search of ``head``; None: of the first, by which the model is judged."""
        chosen: Any = self.heads[head or next(iter(self.heads))]
        tokens: list[list[int]] = chosen.greedy(out.hidden_BTD, out.lens_B)
        return tokens

    def frames_of(self, need: TargetSpec, batch: Batch) -> Tensor:
        """int64 (B,): the frames that this model has of a batch, where a target goes by frames."""
        count: Any = self.encoder.output_len
        return torch.tensor([count(length) for length in batch.lens_B.tolist()])

    @property
    def num_params(self) -> int:
        """Trainable and frozen parameters; buffers (the norm) don't count."""
        return sum(p.numel() for p in self.parameters())


def build_model(
    config: Mapping[str, Any], *, input_dim: int, vocab_size: int, registry: Registry
) -> AsrModel:
    """An untrained model from its description.

    Args:
        config: ``{name: conformer, <options>, heads: {ctc: {<options>}}}``.
        input_dim: feature bins.
        vocab_size: V.
        registry: where architectures and heads are looked up.

    Raises:
        RecipeError: an option is unknown or out of range; all of them at once.
        PluginError: no such architecture or head.
    """
    options = {k: v for k, v in config.items() if k not in ("name", "heads")}
    architecture = registry.get("architectures", config["name"])
    problems: list[Problem] = []
    encoder_config = _options(architecture, options, f"model {config['name']}", problems)
    heads = {}
    for name, head_options in config.get("heads", {"ctc": {}}).items():
        head = registry.get("heads", name)
        heads[name] = head, _options(head, head_options or {}, f"head {name}", problems)
    if problems:
        raise RecipeError(problems)
    encoder = architecture(encoder_config, input_dim)
    built = {name: head(cfg, encoder.output_dim, vocab_size) for name, (head, cfg) in heads.items()}
    return AsrModel(encoder, built, FeatureNorm(input_dim))


def _options(cls: Any, given: Mapping[str, Any], where: str, problems: list[Problem]) -> Any:
    try:
        return cls.Config(**given)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            problems.append(Problem(f"{key}: {item['msg']}" if key else item["msg"], where))


def model_info(model: AsrModel, vocab_id: str, feature_frame_shift_s: float = 0.01) -> ModelInfo:
    """What losses may know of ``model`` before it runs."""
    encoder: Any = model.encoder
    sizes = [head.vocab_size for head in model.heads.values()]
    vocab_size = int(sizes[0]) if sizes else 0  # type: ignore[arg-type]
    return ModelInfo.of_model(vocab_id, vocab_size, encoder, dict(model.heads.items()), feature_frame_shift_s)
