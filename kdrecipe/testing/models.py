"""A tiny recogniser and random batches, for tests of plugins.

B utterances, T frames, F feature bins, D width, V vocabulary, U tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdrecipe.frames import frame_mask, keep_top
from kdrecipe.interfaces import (
    CODEBOOK_SIZE,
    FORCED_KINDS,
    UNK_ID,
    Batch,
    Codes,
    Hidden,
    Lattice,
    LossSetup,
    ModelInfo,
    ModelOutput,
    Options,
    Part,
    Posteriors,
    TargetItem,
    TargetKind,
    Targets,
    TargetSpec,
    UnitGroup,
    taps_of,
)
from kdrecipe.lattice import full_lattice_posteriors
from kdrecipe.model.heads.ctc import CtcHead, CtcHeadOptions
from kdrecipe.model.taps import capture
from kdrecipe.targets.kinds.hypotheses import n_best

VOCAB_SIZE = 6
INPUT_DIM = 8
WIDTH = 4
FRAME_SHIFT_S = 0.04
SUBSAMPLING = 4
HEADS: Mapping[str, tuple[TargetKind, ...]] = {
    "ctc": ("frame_logits",),
    "attention": ("token_logits",),
    "rnnt": ("rnnt_lattice",),
}


class TinyEncoder(nn.Module):
    """Four frames stacked, then two layers per frame: the smallest complete architecture.

    Args:
        config: its options.
        input_dim: F.
    """

    class Config(Options):
        """Options of the tiny encoder: ``dim``, its width."""

        dim: int = WIDTH

    subsampling: ClassVar[int] = SUBSAMPLING

    def __init__(self, config: Config, input_dim: int) -> None:
        super().__init__()
        self.output_dim = config.dim
        self.front = nn.Linear(SUBSAMPLING * input_dim, config.dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(config.dim, config.dim), nn.Tanh()) for _ in range(2)
        )

    def taps(self) -> dict[str, tuple[nn.Module, int]]:
        """Outputs of the layers."""
        return {f"encoder.{i}": (layer, self.output_dim) for i, layer in enumerate(self.layers)}

    def unit_groups(self) -> list[UnitGroup]:
        """Its width."""
        layers = [f"layers.{i}.0" for i in range(len(self.layers))]
        parts = [Part(layer, side) for layer in layers for side in ("in", "out")]  # type: ignore[arg-type]
        return [UnitGroup("stream", "width", self.output_dim, (Part("front", "out"), *parts), output=(1,))]

    def output_len(self, num_frames: int) -> int:
        """A quarter, rounded up."""
        return -(-num_frames // SUBSAMPLING)

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F) to (B, ceil(T / 4), D)."""
        mask_BT = frame_mask(lens_B, features_BTF.shape[1])
        x = features_BTF.masked_fill(~mask_BT[..., None], 0.0)
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % SUBSAMPLING))
        x = self.front(x.reshape(x.shape[0], -1, SUBSAMPLING * x.shape[2]))
        for layer in self.layers:
            x = x + layer(x)
        return x, (lens_B + SUBSAMPLING - 1) // SUBSAMPLING


class TinyModel(nn.Module):
    """An encoder under a CTC head, called like :class:`kdrecipe.model.asr.AsrModel`.

    Args:
        encoder: None: a :class:`TinyEncoder`.
        vocab_size: V.
        heads: further heads by name, ahead of ``ctc``.
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        *,
        vocab_size: int = VOCAB_SIZE,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.encoder: nn.Module = encoder or TinyEncoder(TinyEncoder.Config(), INPUT_DIM)
        width = int(self.encoder.output_dim)  # type: ignore[arg-type]
        self.heads = nn.ModuleDict({**(heads or {}), "ctc": CtcHead(CtcHeadOptions(), width, vocab_size)})

    def forward(
        self,
        features_BTF: Tensor,
        lens_B: Tensor,
        *,
        taps: Sequence[str] = (),
        batch: Batch | None = None,
    ) -> ModelOutput:
        """All that the model computes for a batch."""
        with self.tapped(taps) as kept:
            out = self.with_heads(self.encode(features_BTF, lens_B), batch)
        return replace(out, taps=kept)

    def tapped(self, taps: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Within, what runs leaves its tensors at ``taps`` in the dict."""
        return capture(taps_of(self.encoder, dict(self.heads.items())), taps)  # type: ignore[arg-type]

    def encode(self, features_BTF: Tensor, lens_B: Tensor) -> ModelOutput:
        """The encoder's part of it."""
        return ModelOutput(*self.encoder(features_BTF, lens_B))

    def with_heads(self, out: ModelOutput, batch: Batch | None) -> ModelOutput:
        """The heads' part of it."""
        found = {name: head(out.hidden_BTD, out.lens_B, batch) for name, head in self.heads.items()}
        logits = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        lattices = {name: x for name, x in found.items() if isinstance(x, Lattice)}
        return replace(out, logits=logits, lattices=lattices)

    def greedy(self, out: ModelOutput, head: str | None = None) -> list[list[int]]:
        """Tokens by greedy search of ``head``; None: of the first."""
        chosen: Any = self.heads[head or next(iter(self.heads))]
        tokens: list[list[int]] = chosen.greedy(out.hidden_BTD, out.lens_B)
        return tokens


def tiny_model(seed: int = 0) -> TinyModel:
    """A :class:`TinyModel` with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyModel()


def random_batch(
    lens: Sequence[int] = (29, 21, 13),
    *,
    input_dim: int = INPUT_DIM,
    vocab_size: int = VOCAB_SIZE,
    num_tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> Batch:
    """A labelled batch of noise.

    Args:
        lens: feature frames of each utterance.
        input_dim: F.
        vocab_size: V; labels are drawn from UNK_ID to V - 1.
        num_tokens: labels of each utterance; None: one for every 16 feature frames.
        seed: of the noise.
    """
    rng = torch.Generator().manual_seed(seed)
    counts = list(num_tokens) if num_tokens is not None else [n // 16 for n in lens]
    tokens_BU = torch.randint(UNK_ID, vocab_size, (len(lens), max([*counts, 1])), generator=rng)
    token_lens_B = torch.tensor(counts)
    return Batch(
        ids=[f"utterance-{i}" for i in range(len(lens))],
        features_BTF=torch.randn(len(lens), max(lens), input_dim, generator=rng),
        lens_B=torch.tensor(list(lens)),
        tokens_BU=tokens_BU.masked_fill(~frame_mask(token_lens_B, tokens_BU.shape[1]), 0),
        token_lens_B=token_lens_B,
        labelled_B=torch.ones(len(lens), dtype=torch.bool),
        texts=["noise"] * len(lens),
    )


def model_info(*, vocab_size: int = VOCAB_SIZE, width: int = WIDTH, num_layers: int = 24) -> ModelInfo:
    """A description of a model with every head and the taps ``front``, ``encoder.0``, ``encoder.0.q``, ...
    and, by tokens, ``attention.0``, ``attention.0.q``, ..."""
    parts = ("", ".q", ".k", ".v")
    taps = {"front": width, **{f"encoder.{i}{x}": width for i in range(num_layers) for x in parts}}
    by_tokens = {f"attention.{i}{x}": width for i in range(num_layers) for x in parts}
    return ModelInfo("tiny", vocab_size, FRAME_SHIFT_S, HEADS, taps, token_taps=by_tokens, dim=WIDTH)


def loss_setup() -> LossSetup:
    """Student and teacher of the same size."""
    return LossSetup(model_info(), model_info())


def random_output(
    lens: Sequence[int],
    *,
    taps: Sequence[str] = (),
    num_padding: int = 2,
    num_views: int = 1,
    info: ModelInfo | None = None,
    batch: Batch | None = None,
    seed: int = 0,
) -> ModelOutput:
    """What a student might say: random logits (spread over some nats) and the same noise at all taps.

    Args:
        lens: encoder frames of each utterance.
        taps: names to fill; those by tokens with ``batch`` only.
        num_padding: frames behind the longest utterance.
        num_views: different copies of the batch, one after the other.
        info: gives vocabulary and widths; None: :func:`model_info`.
        batch: one view; with it, heads that need a text give outputs, too.
        seed: of the noise.
    """
    info = info or model_info()
    rng = torch.Generator().manual_seed(seed)
    rows, num_frames = num_views * len(lens), max(lens) + num_padding
    logits_BTV = 2 * torch.randn(rows, num_frames, info.vocab_size, generator=rng)
    hidden = {
        d: torch.randn(rows, num_frames, d, generator=rng) for d in sorted({*info.taps.values(), WIDTH})
    }
    lens_B = torch.tensor(list(lens) * num_views)
    tapped = {name: hidden[info.taps[name]].clone() for name in taps if name in info.taps}
    out = ModelOutput(hidden[WIDTH].clone(), lens_B, {"ctc": logits_BTV}, tapped, num_views)
    if batch is not None:
        batch = batch.repeat(num_views)
        num_positions = batch.tokens_BU.shape[1] + 1
        out.logits["attention"] = 2 * torch.randn(rows, num_positions, info.vocab_size, generator=rng)
        out.lattices["rnnt"] = _random_lattice(num_frames, lens_B, batch, info.vocab_size, rng)
        by_tokens = {
            d: torch.randn(rows, num_positions, d, generator=rng) for d in {*info.token_taps.values()}
        }
        out.taps |= {
            name: by_tokens[info.token_taps[name]].clone() for name in taps if name in info.token_taps
        }
    return out


def _random_lattice(
    num_frames: int, lens_B: Tensor, batch: Batch, vocab_size: int, rng: torch.Generator
) -> Lattice:
    rows, num_positions = len(lens_B), batch.tokens_BU.shape[1] + 1
    weight_JV = torch.randn(WIDTH, vocab_size, generator=rng)

    def noise(length: int, width: int) -> Tensor:
        return torch.randn(rows, length, width, generator=rng)

    return Lattice(
        am_BTV=noise(num_frames, vocab_size),
        lm_BPV=noise(num_positions, vocab_size),
        encoder_BTJ=noise(num_frames, WIDTH),
        predictor_BPJ=noise(num_positions, WIDTH),
        tokens_BU=batch.tokens_BU,
        lens_B=lens_B,
        token_lens_B=batch.token_lens_B,
        join=lambda a, b: torch.tanh(a + b) @ weight_JV.to(a),
    )


def targets_like(
    out: ModelOutput,
    specs: Sequence[TargetSpec],
    *,
    noise: float = 1.0,
    teacher: ModelInfo | None = None,
    seed: int = 1,
) -> Targets:
    """What a teacher might say that differs from ``out`` by random noise.

    Args:
        out: the student's output; its taps all hold the same.
        specs: the targets; all kinds but ``codebooks``.
        noise: standard deviation of the difference; 0: the teacher says what the student does.
        teacher: gives the width of its taps; None: :func:`model_info`.
        seed: of the noise.

    Raises:
        ValueError: a kind that has no random stand-in here.
    """
    teacher = teacher or model_info()
    rng = torch.Generator().manual_seed(seed)
    items: dict[str, TargetItem] = {}
    texts: tuple[Tensor, ...] = ()
    for spec in specs:
        if spec.kind in ("frame_logits", "token_logits"):
            logits_BTV = out.logits[spec.tap].detach()
            logits_BTV = logits_BTV + noise * torch.randn(logits_BTV.shape, generator=rng)
            lens_B = out.lens_B if spec.kind == "frame_logits" else out.lattices["rnnt"].token_lens_B + 1
            items[spec.key] = keep_top(Posteriors(logits_BTV.log_softmax(-1), lens_B), spec.top_k)
        elif spec.kind == "rnnt_lattice":
            other = out.lattices[spec.tap].map(Tensor.detach)
            moved = noise * torch.randn(other.encoder_BTJ.shape, generator=rng)
            other.encoder_BTJ = other.encoder_BTJ + moved  # not in place: the student has it, too
            items[spec.key] = full_lattice_posteriors(other)
        elif spec.kind == "hypotheses":
            logits_BTV = out.logits[spec.tap].detach()
            moved_BTV = logits_BTV + noise * torch.randn(logits_BTV.shape, generator=rng)
            items[spec.key] = n_best(moved_BTV, out.lens_B, spec.top_k or 1)
        elif spec.kind == "hidden":
            dim = teacher.taps.get(spec.tap, WIDTH)
            same = [x.detach() for x in (*out.taps.values(), out.hidden_BTD) if x.shape[-1] == dim]
            base_BTD = same[0] if same else torch.zeros(*out.hidden_BTD.shape[:2], dim)
            spread = noise if same else 1.0
            values_BTD = base_BTD + spread * torch.randn(base_BTD.shape, generator=rng)
            items[spec.key] = Hidden(values_BTD, out.lens_B)
        elif spec.kind == "codebooks":
            shape = (*out.hidden_BTD.shape[:2], int(spec.dim or 1))
            items[spec.key] = Codes(torch.randint(CODEBOOK_SIZE, shape, generator=rng), out.lens_B)
        elif spec.kind == "token_hidden":
            dim, lattice = teacher.token_taps.get(spec.tap, WIDTH), out.lattices["rnnt"]
            shape = (*lattice.lm_BPV.shape[:2], dim)
            same = [x.detach() for x in out.taps.values() if x.shape == shape]
            base_BPD = same[0] if same else torch.zeros(shape)
            values_BPD = base_BPD + (noise if same else 1.0) * torch.randn(base_BPD.shape, generator=rng)
            items[spec.key] = Hidden(values_BPD, lattice.token_lens_B + 1)
        else:
            raise ValueError(f"there are no random targets of kind {spec.kind!r}")
    if any(spec.kind in FORCED_KINDS for spec in specs):
        texts = out.lattices["rnnt"].tokens_BU, out.lattices["rnnt"].token_lens_B
    return Targets(items, *texts)
