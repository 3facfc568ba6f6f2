"""Recurrent neural network transducer (Graves 2012): head, loss and greedy search.

A *predictor* reads the tokens so far, a *joiner* puts its output and the encoder's together and says
which token comes next, or the blank: on to the next frame. The shape is icefall's: a predictor
without state that sees the last few tokens (Ghodsi 2020), a joiner of a sum under tanh. Every matrix
product is an ``nn.Linear``.

B utterances, N hypotheses, T frames, U tokens, P = U + 1 positions, V vocabulary, D width of the encoder,
E of the predictor, J of the joiner, C tokens that the predictor sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.interfaces import (
    BLANK_ID,
    UNK_ID,
    Batch,
    Lattice,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Part,
    TargetKind,
    Targets,
    TargetSpec,
    UnitGroup,
)
from kdrecipe.lattice import (
    AM_SCALE,
    LM_SCALE,
    MIN_RANGE,
    cells_log_likelihood,
    joined_cells,
    simple_pass,
)
from kdrecipe.layers import Dropout


class RnntHeadOptions(Options):
    """Options of ``heads: {rnnt: {...}}``.

    Args:
        predictor: ``stateless`` sees the last ``context_size`` tokens, ``lstm`` all of them. Only the
            first fits sherpa-onnx's transducers.
        context_size: tokens that the stateless predictor sees.
        predictor_dim: width E of its embedding and its output.
        joiner_dim: width J in which the two sides are added.
        dropout: share dropped of the encoder's output and of the embedding.
    """

    predictor: Literal["stateless", "lstm"] = "stateless"
    context_size: int = Field(default=2, ge=1)
    predictor_dim: int = Field(default=256, ge=1)
    joiner_dim: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)


@dataclass
class PredictorState:
    """What a predictor remembers of N hypotheses: tensors (N, ...).

    ``stateless``: the last C tokens, int64; ``lstm``: output and cell, (N, E) each.
    """

    parts: tuple[Tensor, ...]

    def select(self, rows_N: Tensor) -> PredictorState:
        """The rows with these numbers, in their order, repeated as often as they occur."""
        return PredictorState(tuple(x[rows_N] for x in self.parts))

    def replace(self, rows_N: Tensor, other: PredictorState) -> PredictorState:
        """The rows where ``rows_N`` (bool) is True taken from ``other``, which has as many rows."""
        pairs = zip(self.parts, other.parts, strict=True)
        return PredictorState(tuple(y.where(rows_N[:, None], x) for x, y in pairs))


class StatelessPredictor(nn.Module):
    """Embeddings of the last C tokens under one linear map, which is a convolution over tokens.

    The blank's embedding is 0: it stands before the first token. Below 0 (as sherpa-onnx begins) is
    the blank too.
    """

    def __init__(self, vocab_size: int, dim: int, context_size: int, dropout: float) -> None:
        super().__init__()
        self.context_size = context_size
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=BLANK_ID)
        self.dropout = Dropout(dropout)
        self.conv = nn.Linear(context_size * dim, dim)

    def forward(self, tokens_BU: Tensor) -> Tensor:
        """(B, U) tokens to (B, P, E), before each token and after the last."""
        padded = F.pad(tokens_BU, (self.context_size, 0), value=BLANK_ID)
        x_BPE: Tensor = self.embed(padded)
        num_positions = tokens_BU.shape[1] + 1
        shifted = [x_BPE[:, i : i + num_positions] for i in range(self.context_size)]
        return F.relu(self.conv(torch.cat(shifted, dim=-1)))

    def unit_groups(self, path: str, read: tuple[Part, ...]) -> list[UnitGroup]:
        """What may be cut out of it; it stands at ``path``, and ``read`` reads its output."""
        context = Part(f"{path}.conv", "in", (1,) * self.context_size)
        parts = (Part(f"{path}.embedding", "out"), context)
        embedding = UnitGroup(f"{path}.embedding", "units", self.embedding.embedding_dim, parts)
        written = (Part(f"{path}.conv", "out"), *read)
        return [embedding, UnitGroup(path, "units", self.conv.out_features, written)]

    def embed(self, tokens: Tensor) -> Tensor:
        """(...) to (..., E)."""
        x: Tensor = self.dropout(self.embedding(tokens.clamp(min=0)))
        return x

    def start(self, num_rows: int) -> PredictorState:
        """Blanks before the first token."""
        shape = (num_rows, self.context_size)
        return PredictorState((torch.full(shape, BLANK_ID, device=self.embedding.weight.device),))

    def output(self, state: PredictorState) -> Tensor:
        """(N, E) after the state's tokens."""
        return F.relu(self.conv(self.embed(state.parts[0]).flatten(1)))

    def advance(self, state: PredictorState, tokens_N: Tensor) -> PredictorState:
        """One token further."""
        return PredictorState((torch.cat([state.parts[0][:, 1:], tokens_N[:, None]], dim=1),))


class LstmPredictor(nn.Module):
    """One LSTM layer over embeddings (Hochreiter 1997); the blank stands before the first token."""

    def __init__(self, vocab_size: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=BLANK_ID)
        self.dropout = Dropout(dropout)
        self.input = nn.Linear(dim, 4 * dim)
        self.recurrent = nn.Linear(dim, 4 * dim, bias=False)
        with torch.no_grad():
            self.input.bias[dim : 2 * dim] = 1.0  # the forget gate: remember at first

    def forward(self, tokens_BU: Tensor) -> Tensor:
        """(B, U) tokens to (B, P, E), before each token and after the last."""
        gates_BPG = self.input(self.dropout(self.embedding(F.pad(tokens_BU, (1, 0), value=BLANK_ID))))
        zeros = gates_BPG.new_zeros(len(tokens_BU), self.dim)
        state = PredictorState((zeros, zeros))
        outputs = []
        for gates_BG in gates_BPG.unbind(1):
            state = self.cell(gates_BG, state)
            outputs.append(state.parts[0])
        return torch.stack(outputs, dim=1)

    @property
    def dim(self) -> int:
        """E."""
        return int(self.recurrent.in_features)

    def unit_groups(self, path: str, read: tuple[Part, ...]) -> list[UnitGroup]:
        """What may be cut out of it; it stands at ``path``, and ``read`` reads its output."""
        parts = (Part(f"{path}.embedding", "out"), Part(f"{path}.input", "in"))
        embedding = UnitGroup(f"{path}.embedding", "units", self.embedding.embedding_dim, parts)
        gates = (Part(f"{path}.input", "out", (1,) * 4), Part(f"{path}.recurrent", "out", (1,) * 4))
        inner = (*gates, Part(f"{path}.recurrent", "in"), *read)
        return [embedding, UnitGroup(path, "units", self.dim, inner)]

    def cell(self, gates_NG: Tensor, state: PredictorState) -> PredictorState:
        """One step, given the input's part of the gates (N, 4 E)."""
        hidden_NE, cell_NE = state.parts
        i, f, g, o = (gates_NG + self.recurrent(hidden_NE)).chunk(4, dim=-1)
        cell_NE = f.sigmoid() * cell_NE + i.sigmoid() * g.tanh()
        return PredictorState((o.sigmoid() * cell_NE.tanh(), cell_NE))

    def start(self, num_rows: int) -> PredictorState:
        """The blank has been read."""
        weight = self.embedding.weight
        zeros = weight.new_zeros(num_rows, self.dim)
        blanks = torch.full((num_rows,), BLANK_ID, device=weight.device)
        return self.advance(PredictorState((zeros, zeros)), blanks)

    def output(self, state: PredictorState) -> Tensor:
        """(N, E) after the state's tokens."""
        return state.parts[0]

    def advance(self, state: PredictorState, tokens_N: Tensor) -> PredictorState:
        """One token further."""
        return self.cell(self.input(self.dropout(self.embedding(tokens_N))), state)


class RnntHead(nn.Module):
    """Predictor, joiner, and the simple joiner by which training is pruned.

    Args:
        config: its options.
        input_dim: D.
        vocab_size: V, the blank included.
    """

    Config: ClassVar[type[Options]] = RnntHeadOptions
    tiny_options: ClassVar[dict[str, int]] = {"predictor_dim": 16, "joiner_dim": 16}
    target_kinds: ClassVar[tuple[TargetKind, ...]] = ("rnnt_lattice",)

    def __init__(self, config: RnntHeadOptions, input_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        dim, joiner_dim = config.predictor_dim, config.joiner_dim
        self.predictor: Any
        if config.predictor == "stateless":
            self.predictor = StatelessPredictor(vocab_size, dim, config.context_size, config.dropout)
        else:
            self.predictor = LstmPredictor(vocab_size, dim, config.dropout)
        self.dropout = Dropout(config.dropout)
        self.encoder_proj = nn.Linear(input_dim, joiner_dim)
        self.predictor_proj = nn.Linear(dim, joiner_dim)
        self.output = nn.Linear(joiner_dim, vocab_size)
        self.simple_am = nn.Linear(input_dim, vocab_size)
        self.simple_lm = nn.Linear(dim, vocab_size)

    def forward(self, hidden_BTD: Tensor, lens_B: Tensor, batch: Batch | None = None) -> Lattice | None:
        """Both sides of the lattice of the batch's tokens; None without a batch.

        The lattice joins in the precision that is in force here, also if it is asked outside autocast.
        """
        if batch is None:
            return None
        hidden_BTD = self.dropout(hidden_BTD)
        predicted_BPE = self.predictor(batch.tokens_BU)
        kind = hidden_BTD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Lattice(
            am_BTV=self.simple_am(hidden_BTD),
            lm_BPV=self.simple_lm(predicted_BPE),
            encoder_BTJ=self.encoder_proj(hidden_BTD),
            predictor_BPJ=self.predictor_proj(predicted_BPE),
            tokens_BU=batch.tokens_BU,
            lens_B=lens_B,
            token_lens_B=batch.token_lens_B,
            join=partial(_in_precision, self.join, dtype),
        )

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """(..., J) of both sides, broadcasting, to (..., V) logits."""
        logits: Tensor = self.output(torch.tanh(encoder + predictor))
        return logits

    def unit_groups(self) -> list[UnitGroup]:
        """Units of the joiner, and what the predictor has."""
        size = self.output.in_features
        sides = (Part("encoder_proj", "out"), Part("predictor_proj", "out"))
        joiner = UnitGroup("joiner", "units", size, (*sides, Part("output", "in")))
        read = (Part("predictor_proj", "in"), Part("simple_lm", "in"))
        return [joiner, *self.predictor.unit_groups("predictor", read)]

    def reads(self) -> list[str]:
        """The layers that read the encoder's output."""
        return ["encoder_proj", "simple_am"]

    # ------------------------------------------------------------ search

    def encode(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, J): the encoder's side of the joiner, once for all steps."""
        side: Tensor = self.encoder_proj(hidden_BTD)
        return side

    def start(self, num_rows: int) -> PredictorState:
        """No token yet."""
        state: PredictorState = self.predictor.start(num_rows)
        return state

    def predict(self, state: PredictorState) -> Tensor:
        """(N, J): the predictor's side of the joiner."""
        side: Tensor = self.predictor_proj(self.predictor.output(state))
        return side

    def advance(self, state: PredictorState, tokens_N: Tensor) -> PredictorState:
        """One token further."""
        new: PredictorState = self.predictor.advance(state, tokens_N)
        return new

    def greedy(self, hidden_BTD: Tensor, lens_B: Tensor) -> list[list[int]]:
        """Tokens of each utterance, the best one at each frame."""
        return self.best_path(hidden_BTD, lens_B)[0]

    @torch.no_grad()
    def best_path(
        self, hidden_BTD: Tensor, lens_B: Tensor
    ) -> tuple[list[list[int]], list[list[int]], Tensor]:
        """Greedy search as sherpa-onnx's: at most one token per frame, and ``<unk>`` counts as the blank.

        Returns:
            Tokens of each utterance, the frame of each of them, and (B,) log-posteriors of the path.
        """
        num_rows, num_frames = hidden_BTD.shape[:2]
        encoder_BTJ = self.encode(hidden_BTD)
        state = self.start(num_rows)
        predictor_BJ = self.predict(state)
        scores_B = hidden_BTD.new_zeros(num_rows)
        found: list[Tensor] = []
        for frame in range(num_frames):
            logits_BV = self.join(encoder_BTJ[:, frame], predictor_BJ)
            best_log_probs_B, best_B = logits_BV.log_softmax(-1).max(-1)
            valid_B = frame < lens_B
            scores_B = scores_B + best_log_probs_B.masked_fill(~valid_B, 0.0)
            emits_B = (best_B != BLANK_ID) & (best_B != UNK_ID) & valid_B
            found.append(best_B.where(emits_B, BLANK_ID))
            if bool(emits_B.any()):
                state = state.replace(emits_B, self.advance(state, best_B))
                predictor_BJ = self.predict(state)
        best_BT = torch.stack(found, dim=1) if found else lens_B.new_zeros(num_rows, 0)
        frames = [row.nonzero().flatten().tolist() for row in best_BT]
        return [best_BT[i, at].tolist() for i, at in enumerate(frames)], frames, scores_B


def _in_precision(
    join: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype | None, encoder: Tensor, predictor: Tensor
) -> Tensor:
    """``join`` under autocast to ``dtype``; None: as it is."""
    if dtype is None:
        return join(encoder, predictor)
    with torch.autocast(encoder.device.type, dtype):
        return join(encoder.to(dtype), predictor.to(dtype))


# ---------------------------------------------------------------- loss


class RnntLossOptions(Options):
    """Options of ``{name: rnnt}``.

    Args:
        range: lattice positions per frame at which the joiner is computed, at least 2.
        simple_scale: weight of the simple joiner's loss, which finds these positions.
        lm_scale: share of the predictor's own posteriors in the simple joiner's.
        am_scale: share of the encoder's own.
        full: compute the joiner at all positions: far more memory, for comparisons.
    """

    range: int = Field(default=5, ge=MIN_RANGE)
    simple_scale: float = Field(default=0.5, ge=0.0)
    lm_scale: float = Field(default=LM_SCALE, ge=0.0, lt=1.0)
    am_scale: float = Field(default=AM_SCALE, ge=0.0, lt=1.0)
    full: bool = False


class RnntLoss:
    """Negative log-likelihood of the transcripts, pruned, and ``simple_scale`` times the simple joiner's.

    Kuang 2022 (arXiv 2206.13236). Summed over utterances, counted in label tokens; as in icefall, but
    without its warm-up, where both have other weights for the first steps. Unlabelled and empty utterances
    are left out, and such without frames. Metrics: ``simple`` and ``pruned``, the two parts.

    Args:
        config: its options.
        setup: the models it works between; the student must have the head.

    Raises:
        RecipeError: the student has no head ``rnnt``.
    """

    Config: ClassVar[type[Options]] = RnntLossOptions
    supervised = True

    def __init__(self, config: RnntLossOptions, setup: LossSetup | None = None) -> None:
        self.config = config
        if setup is not None:
            setup.require_head("rnnt", "rnnt")

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Nothing from a teacher."""
        return []

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Total in nats, count in tokens."""
        config, lattice = self.config, out.lattices["rnnt"]
        used_B = batch.labelled_B & (batch.token_lens_B > 0) & (lattice.lens_B > 0)
        scales = (config.lm_scale, config.am_scale)
        cells = joined_cells(lattice, None if config.full else config.range, *scales)
        total = pruned = _sum_where(used_B, -cells_log_likelihood(lattice, cells))
        metrics = {"pruned": pruned.detach()}
        if config.simple_scale:
            simple = _sum_where(used_B, -simple_pass(lattice, *scales).log_likelihood_B)
            total = pruned + config.simple_scale * simple
            metrics["simple"] = simple.detach()
        count = batch.token_lens_B.where(used_B, 0).sum()
        return LossOutput(total, count, metrics)


def _sum_where(used_B: Tensor, values_B: Tensor) -> Tensor:
    """Sum of the values that are used; not a product, so that nothing else brings NaN along."""
    return values_B.where(used_B, torch.zeros_like(values_B)).sum()


@hookimpl
def register_heads(register: Callable[[str, type], None]) -> None:
    """Offer the head ``rnnt``."""
    register("rnnt", RnntHead)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Offer the loss ``rnnt``."""
    register("rnnt", RnntLoss)
