"""Attention encoder-decoder: Transformer decoder (Vaswani 2017), its loss and greedy search.

Given the encoder's output and the tokens so far, it says which token comes next; ``<sos/eos>``
begins and ends every sentence.

B utterances, N hypotheses, T frames, U tokens, V vocabulary, D width, H attention heads, d width of
a head, L layers, P positions of a hypothesis so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.frames import frame_mask, full_precision
from kdrecipe.interfaces import (
    BLANK_ID,
    SOS_EOS_ID,
    Batch,
    LossOutput,
    LossSetup,
    ModelOutput,
    Options,
    Part,
    Tap,
    TargetKind,
    Targets,
    TargetSpec,
    UnitGroup,
)
from kdrecipe.layers import Dropout, FeedForward, attend, attention_bias


class AttentionHeadOptions(Options):
    """Options of ``heads: {attention: {...}}``.

    Args:
        num_layers: Transformer blocks.
        dim: width D, a multiple of ``num_heads``; by default the encoder's.
        num_heads: attention heads.
        ff_dim: width within the feed-forward modules; by default 4 * ``dim``.
        activation: within the feed-forward modules.
        positions: sines, which have no end, on embeddings scaled by the root of ``dim``; or a learned vector
            for each, on embeddings as they are.
        max_positions: that are learned; tokens beyond share the last.
        tied: the output has the embedding's weights, and no bias.
        dropout: share dropped after the embedding and in every module.
    """

    num_layers: int = Field(default=6, ge=1)
    dim: int | None = Field(default=None, ge=2)
    num_heads: int = Field(default=4, ge=1)
    ff_dim: int | None = Field(default=None, ge=1)
    activation: Literal["silu", "gelu"] = "silu"
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_positions: int = Field(default=448, ge=1)
    tied: bool = False
    dropout: float = Field(default=0.1, ge=0.0, lt=0.99)


@dataclass
class Memory:
    """What every step of a search reads of the encoder's output.

    Args:
        keys: per layer, (N, H, T, d).
        values: per layer, (N, H, T, d).
        bias_N11T: added to the scores, so that padding is not looked at.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias_N11T: Tensor

    def expand(self, num_rows: int) -> Memory:
        """The only row, ``num_rows`` times: of one utterance for all its hypotheses, not copied."""

        def view(x: Tensor) -> Tensor:
            return x.expand(num_rows, *x.shape[1:])

        return Memory([view(k) for k in self.keys], [view(v) for v in self.values], view(self.bias_N11T))


@dataclass
class State:
    """The tokens so far of N hypotheses, as the layers' keys and values.

    Args:
        keys: per layer, (N, H, P, d).
        values: per layer, (N, H, P, d).
    """

    keys: list[Tensor]
    values: list[Tensor]

    def select(self, rows_N: Tensor) -> State:
        """The rows with these numbers, in their order, repeated as often as they occur."""
        return State([k[rows_N] for k in self.keys], [v[rows_N] for v in self.values])


class DecoderLayer(nn.Module):
    """Attention to the tokens before, attention to the encoder's output, feed-forward.

    Each has its norm before it and a residual around it.

    Args:
        config: the head's options.
        dim: D.
        input_dim: width of the encoder's output.
    """

    def __init__(self, config: AttentionHeadOptions, dim: int, input_dim: int) -> None:
        super().__init__()
        self.head_dim = dim // config.num_heads
        self.norm_self = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_self = nn.Linear(dim, dim)
        self.given = nn.ModuleDict({name: nn.Identity() for name in "qkv"})  # see AttentionHead.taps()
        self.norm_cross = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(input_dim, 2 * dim)
        self.out_cross = nn.Linear(dim, dim)
        activation = nn.GELU() if config.activation == "gelu" else nn.SiLU()
        self.ff = FeedForward(dim, config.ff_dim or 4 * dim, config.dropout, activation)
        self.dropout = Dropout(config.dropout)

    @property
    def num_heads(self) -> int:
        """Of its attention to tokens."""
        return int(self.out_self.in_features) // self.head_dim

    @property
    def num_cross_heads(self) -> int:
        """Of its attention to frames."""
        return int(self.out_cross.in_features) // self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """(N, P, D) to (N, H, P, d)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def memory(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's output, (B, H, T, d)."""
        k, v = self.kv(hidden_BTD).chunk(2, dim=-1)
        return self.split(k), self.split(v)

    def forward(
        self,
        x_NPD: Tensor,
        past: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        memory: tuple[Tensor, Tensor],
        memory_bias_N11T: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N, P, D) to (N, P, D), and the keys and values of all positions, those of ``past`` first.

        Args:
            x_NPD: the new positions.
            past: keys and values of the positions before; None: there are none.
            bias: on the scores of new positions to all positions; None: all may be looked at.
            memory: of :meth:`memory`.
            memory_bias_N11T: on the scores of frames.
        """
        parts = zip("qkv", self.qkv(self.norm_self(x_NPD)).chunk(3, dim=-1), strict=True)
        q, k, v = (self.given[name](self.split(y)) for name, y in parts)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = attend(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x_NPD + self.dropout(self.out_self(y))
        q = self.split(self.q(self.norm_cross(x)))
        y = attend(q, *memory, memory_bias_N11T).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out_cross(y))
        return x + self.dropout(self.ff(x)), (k, v)


class AttentionHead(nn.Module):
    """A Transformer decoder; with learned positions, GELU and a tied output it is Whisper's.

    Where the output is tied, the end of a sentence has a weight of its own (``end_D``): ``<sos/eos>`` is read
    as the start and written as the end, and both in one vector would be neither.

    Args:
        config: its options.
        input_dim: width of the encoder's output.
        vocab_size: V.

    Raises:
        ValueError: the width is not a multiple of the number of attention heads.
    """

    Config: ClassVar[type[Options]] = AttentionHeadOptions
    tiny_options: ClassVar[dict[str, int | None]] = {
        "num_layers": 1,
        "dim": None,
        "num_heads": 2,
        "ff_dim": None,
    }
    target_kinds: ClassVar[tuple[TargetKind, ...]] = ("token_logits",)
    layer_list: ClassVar[str] = "layers"
    free_options: ClassVar[tuple[str, ...]] = ("dropout",)
    token_rows: ClassVar[tuple[str, ...]] = ("embedding.weight", "proj.weight", "proj.bias")

    def __init__(self, config: AttentionHeadOptions, input_dim: int, vocab_size: int) -> None:
        super().__init__()
        dim = config.dim or input_dim
        if dim % config.num_heads:
            raise ValueError(f"attention: dim {dim} is not a multiple of num_heads {config.num_heads}")
        self.config = config
        self.vocab_size = vocab_size
        self.dim = dim
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # scaled up below, as in the paper
        self.positions = nn.Embedding(config.max_positions, dim) if config.positions == "learned" else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=dim**-0.5)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, dim, input_dim) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)
        if config.tied:
            self.end_D = nn.Parameter(torch.empty(dim))
            nn.init.normal_(self.end_D, std=dim**-0.5)
        else:
            self.proj = nn.Linear(dim, vocab_size)

    def forward(self, hidden_BTD: Tensor, lens_B: Tensor, batch: Batch | None = None) -> Tensor | None:
        """(B, U + 1, V) logits of the batch's tokens and the sentence's end; None without a batch."""
        if batch is None:
            return None
        sos_B1 = batch.tokens_BU.new_full((len(hidden_BTD), 1), SOS_EOS_ID)
        x = self.embed(torch.cat([sos_B1, batch.tokens_BU], dim=1), 0)
        num_positions = x.shape[1]
        causal = torch.ones(num_positions, num_positions, dtype=torch.bool, device=x.device).tril()
        memory = self.memory(hidden_BTD, lens_B)
        bias = attention_bias(causal, memory.keys[0].dtype)[None, None]
        for number, layer in enumerate(self.layers):
            x, _ = layer(x, None, bias, (memory.keys[number], memory.values[number]), memory.bias_N11T)
        return self.output(x)

    def embed(self, tokens_NP: Tensor, position: int | Tensor) -> Tensor:
        """(N, P, D) of tokens whose first stands at ``position``."""
        x_NPD = self.embedding(tokens_NP)
        positions_P = torch.arange(tokens_NP.shape[1], device=x_NPD.device) + position
        if self.positions is None:
            x_NPD = x_NPD * math.sqrt(self.dim) + sinusoids(positions_P, self.dim).to(x_NPD.dtype)
        else:
            x_NPD = x_NPD + self.positions(positions_P.clamp(max=self.positions.num_embeddings - 1))
        return self.dropout(x_NPD)  # type: ignore[no-any-return]

    def output(self, x_NPD: Tensor) -> Tensor:
        """(N, P, V) logits of what the layers gave."""
        x_NPD = self.norm(x_NPD)
        if not self.config.tied:
            return self.proj(x_NPD)  # type: ignore[no-any-return]
        logits_NPV = F.linear(x_NPD, self.embedding.weight)
        end_NP1 = F.linear(x_NPD, self.end_D[None])
        before_end, after_end = logits_NPV[..., :SOS_EOS_ID], logits_NPV[..., SOS_EOS_ID + 1 :]
        return torch.cat([before_end, end_NP1, after_end], dim=-1)

    def taps(self) -> dict[str, Tap]:
        """Of each layer its output, ``0``, and ``0.q``, ``0.k``, ``0.v`` of its attention to tokens."""
        found: dict[str, Tap] = {}
        for i, layer in enumerate(self.layers):
            given: Any = layer.given
            found[str(i)] = Tap(layer, self.dim, by="tokens")
            dim: Any = layer.out_self.in_features  # type: ignore[union-attr]
            found |= {f"{i}.{name}": Tap(module, dim, by="tokens") for name, module in given.items()}
        return found

    def unit_groups(self) -> list[UnitGroup]:
        """Inner units of each layer; heads of all layers together, since exports stack the layers' states."""
        layers: Any = self.layers
        dim = layers[0].head_dim
        own, cross = [], []
        for i in range(len(layers)):
            own += [Part(f"layers.{i}.qkv", "out", (dim,) * 3), Part(f"layers.{i}.out_self", "in", (dim,))]
            cross += [Part(f"layers.{i}.q", "out", (dim,)), Part(f"layers.{i}.kv", "out", (dim, dim))]
            cross += [Part(f"layers.{i}.out_cross", "in", (dim,))]
        return [
            UnitGroup("self", "heads", layers[0].num_heads, tuple(own)),
            UnitGroup("cross", "heads", layers[0].num_cross_heads, tuple(cross)),
            *(layer.ff.unit_group(f"layers.{i}.ff") for i, layer in enumerate(layers)),
        ]

    def reads(self) -> list[str]:
        """The layers that read the encoder's output."""
        return [f"layers.{i}.kv" for i in range(len(self.layers))]

    # ------------------------------------------------------------ search

    def memory(self, hidden_BTD: Tensor, lens_B: Tensor) -> Memory:
        """What a search reads of the encoder's output, once for all its steps."""
        pairs = [layer.memory(hidden_BTD) for layer in self.layers]  # type: ignore[operator]
        bias_BT = attention_bias(frame_mask(lens_B, hidden_BTD.shape[1]), pairs[0][0].dtype)
        return Memory([k for k, _ in pairs], [v for _, v in pairs], bias_BT[:, None, None, :])

    def start(self, num_rows: int) -> State:
        """No token yet."""
        layer: Any = self.layers[0]
        empty = self.embedding.weight.new_zeros(num_rows, layer.num_heads, 0, layer.head_dim)
        return State([empty] * len(self.layers), [empty] * len(self.layers))

    def step(self, tokens_N: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """One token further: (N, V) log-posteriors of the next one, and the new state.

        Args:
            tokens_N: int64, the last token of each hypothesis (at first ``<sos/eos>``).
            state: of the tokens before it.
            memory: a row for each hypothesis.
        """
        x = self.embed(tokens_N[:, None], state.keys[0].shape[2])
        keys, values = [], []
        for number, layer in enumerate(self.layers):
            past = (state.keys[number].to(x.dtype), state.values[number].to(x.dtype))
            cross = (memory.keys[number], memory.values[number])
            x, (k, v) = layer(x, past, None, cross, memory.bias_N11T)
            keys.append(k)
            values.append(v)
        log_probs_NV = self.output(x)[:, 0].float().log_softmax(-1)
        return log_probs_NV, State(keys, values)

    def greedy(self, hidden_BTD: Tensor, lens_B: Tensor) -> list[list[int]]:
        """Tokens of each utterance, the best one at each step, at most one per frame."""
        return self.best_path(hidden_BTD, lens_B)[0]

    @torch.no_grad()
    def best_path(self, hidden_BTD: Tensor, lens_B: Tensor) -> tuple[list[list[int]], Tensor]:
        """What :meth:`greedy` gives, and (B,) log-posteriors: of the tokens and, unless cut off, the end."""
        num_rows, max_tokens = len(lens_B), int(lens_B.max()) if len(lens_B) else 0
        memory, state = self.memory(hidden_BTD, lens_B), self.start(num_rows)
        last_B = torch.full((num_rows,), SOS_EOS_ID, device=hidden_BTD.device)
        done_B = lens_B == 0
        scores_B = torch.zeros(num_rows, device=hidden_BTD.device)
        found: list[Tensor] = []
        for _ in range(max_tokens):
            log_probs_BV, state = self.step(last_B, state, memory)
            log_probs_BV[:, BLANK_ID] = -math.inf
            best_B, last_B = log_probs_BV.max(-1)
            done_B = done_B | (lens_B <= len(found))
            scores_B = scores_B + best_B.masked_fill(done_B, 0.0)
            done_B = done_B | (last_B == SOS_EOS_ID)
            if bool(done_B.all()):
                break
            found.append(last_B.masked_fill(done_B, SOS_EOS_ID))
        rows = torch.stack(found, dim=1).tolist() if found else [[] for _ in range(num_rows)]
        return [row[: row.index(SOS_EOS_ID)] if SOS_EOS_ID in row else row for row in rows], scores_B


def sinusoids(positions_P: Tensor, dim: int) -> Tensor:
    """(P, D) positions as sines and cosines of falling frequency (Vaswani 2017, section 3.5)."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=positions_P.device) * (-math.log(10000.0) / half))
    angles = positions_P[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


class AttentionLossOptions(Options):
    """Options of ``{name: attention}``.

    Args:
        label_smoothing: share of the target's mass that is spread over all tokens, in [0, 1).
    """

    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)


class AttentionLoss:
    """Cross entropy of the transcripts' tokens and their ends, summed; counted in these tokens.

    Args:
        config: its options.
        setup: the models it works between; the student must have the head.

    Raises:
        RecipeError: the student has no head ``attention``.
    """

    Config: ClassVar[type[Options]] = AttentionLossOptions
    supervised = True

    def __init__(self, config: AttentionLossOptions, setup: LossSetup | None = None) -> None:
        self.config = config
        if setup is not None:
            setup.require_head("attention", "attention")

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Nothing from a teacher."""
        return []

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """Total in nats, count in tokens; unlabelled and empty utterances are left out."""
        logits_BPV = full_precision(out.logits["attention"])
        used_B = batch.labelled_B & (batch.token_lens_B > 0)
        positions_BP = frame_mask(batch.token_lens_B + 1, logits_BPV.shape[1]) & used_B[:, None]
        logits_NV = logits_BPV[positions_BP]
        wanted_N = with_end(batch.tokens_BU, batch.token_lens_B)[positions_BP]
        smoothing = self.config.label_smoothing
        total = F.cross_entropy(logits_NV, wanted_N, reduction="sum", label_smoothing=smoothing)
        correct = (logits_NV.argmax(-1) == wanted_N).sum()
        return LossOutput(total, len(wanted_N), {"correct": correct})


def with_end(tokens_BU: Tensor, token_lens_B: Tensor) -> Tensor:
    """(B, U + 1) tokens with ``<sos/eos>`` after the last one of each row."""
    positions_BP = F.pad(tokens_BU, (0, 1), value=BLANK_ID)
    return positions_BP.scatter(1, token_lens_B[:, None], SOS_EOS_ID)


@hookimpl
def register_heads(register: Callable[[str, type], None]) -> None:
    """Offer the head ``attention``."""
    register("attention", AttentionHead)


@hookimpl
def register_losses(register: Callable[[str, type], None]) -> None:
    """Offer the loss ``attention``."""
    register("attention", AttentionLoss)
