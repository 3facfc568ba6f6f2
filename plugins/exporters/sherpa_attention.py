"""ONNX of an attention encoder-decoder for sherpa-onnx, in the slot that it calls ``moonshine``.

::

    preprocessor.onnx  encoder.onnx  uncached_decoder.onnx  cached_decoder.onnx  tokens.txt
                       encoder.int8.onnx                    cached_decoder.int8.onnx

    sherpa_onnx.OfflineRecognizer.from_moonshine(
        preprocessor="preprocessor.onnx", encoder="encoder.int8.onnx",
        uncached_decoder="uncached_decoder.onnx", cached_decoder="cached_decoder.int8.onnx",
        tokens="tokens.txt",
    )

The slot gives raw audio to the first file and leaves to the files what passes between them, so that it
holds any such model. What it fixes, and how the files meet it:

* A sentence ends at token 2. Ours ends at 1: here, also in ``tokens.txt``, ``<sos/eos>`` and ``<unk>`` have
  changed places.
* The first token comes from a file of its own, which would hold the decoder a second time. That file
  always says V, which is no token and has no text, and which the decoder reads as the sentence's start.
* It stops after 0.144 tokens per frame of the encoder's output, the one that begins a sentence included. The
  output has seven times as many frames, and one more: a token per frame, as in greedy search elsewhere.

Preprocessor: ``audio`` (1, S) float32 at 16 kHz to ``features`` (1, T, F). Encoder: these, and
``features_len`` (1,) int32, to ``memory`` (1, 7 (T' + 1), M H d / 7): cross-attention's keys and values by
layer, (M, H, T' + 1, d), M = 7, 14, ..., the last of them and the last frame zeros. Decoders: ``token`` (1,
1) and ``seq_len`` (1,) int32, ``memory`` and ``past``, the keys and values (2, L, 1, H, P, d) of the tokens
before, to ``log_probs`` (1, 1, V + 1) and ``past`` with the new token's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.artifacts import write_atomic
from kdrecipe.corpus.audio import resample
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.data.tokens import ids_by_name, read_pieces
from kdrecipe.interfaces import (
    BLANK_ID,
    SAMPLE_RATE,
    SOS_EOS_ID,
    UNK_ID,
    BundleLike,
    Hypothesis,
    Runner,
    Runtime,
    RuntimeSearch,
)

from . import onnx_files, sherpa
from .fbank_graph import FbankGraph
from .onnx_files import Part
from .shared import Encode, check_head, existing

PARTS = ("preprocessor", "encoder", "uncached_decoder", "cached_decoder")
SPREAD = 7  # 0.144 of as many frames is a token per frame
BELOW = 1024.0  # how far the blank, which no sentence has, is kept below all others


class SherpaAttention:
    """Exporter ``sherpa_attention``: encoder and ``attention`` head; greedy search only."""

    head = "attention"
    runtime = Runtime(
        "sherpa-onnx",
        "kdrecipe_plugins.exporters.runtimes:sherpa_attention",
        {"attention_greedy": RuntimeSearch("greedy_search")},
    )
    variants = onnx_files.VARIANTS
    ships = staticmethod(onnx_files.ships)
    files = onnx_files.file_names(*PARTS, float_parts=("preprocessor", "uncached_decoder"))
    Config = onnx_files.OnnxOptions
    speller = staticmethod(sherpa.plain_speller)

    def __init__(self, config: onnx_files.OnnxOptions) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write the variants; that of a quantised bundle has exactly its integers and scales.

        Raises:
            KdrecipeError: the model has no head ``attention``.
        """
        check_head(bundle, self.head, "sherpa_attention")
        written = onnx_files.write(partial(_parts, bundle), bundle, self.config, directory)
        sherpa.write_tokens(directory)
        _swap_tokens(directory / onnx_files.TOKENS)
        return written

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant.

        Raises:
            KdrecipeError: a file is missing.
        """
        return SherpaAttentionRunner(Path(directory), variant, num_threads=num_threads)


class SherpaAttentionRunner:
    """An export with the ``tokens.txt`` beside it.

    Log-posteriors come from onnxruntime, texts from sherpa-onnx: what a device runs.

    Args:
        directory: where it is.
        variant: ``fp32``, ``int8``, ...
        num_threads: of the runtimes.
    """

    def __init__(self, directory: Path, variant: str, *, num_threads: int = 1) -> None:
        names = SherpaAttention.files[variant]
        self.files = {part: existing(directory / name) for part, name in names.items()}
        self.tokens = existing(directory / onnx_files.TOKENS)
        self.num_threads = num_threads

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (U + 1, V) log-posteriors of its tokens and of the end; one after the other."""
        rows = zip(features_BTF, lens_B, paths, strict=True)
        return [self._walk(row_TF[:length], list(path))[1] for row_TF, length, path in rows]

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """The best token at each step."""
        return self._walk(features_TF, None)[0]

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length; sherpa-onnx resamples if it must. Tokens have no times."""
        return sherpa.recognise(
            self._recogniser, self._ids, samples_S, sample_rate, longest_s, likely=self._likely
        )

    def _likely(self, samples_S: np.ndarray, sample_rate: int) -> list[int]:
        """Tokens of the same files in onnxruntime."""
        audio = resample(np.asarray(samples_S, np.float32), sample_rate)[None]
        (features,) = onnx_files.run(self._sessions["preprocessor"], {"audio": audio})
        return self.greedy(features[0])

    def _walk(self, features_TF: np.ndarray, path: list[int] | None) -> tuple[list[int], np.ndarray]:
        """Tokens, and log-posteriors at each step, along ``path``; None: along the best tokens."""
        encoded = {"features": features_TF[None].astype(np.float32)}
        (memory,) = self._run("encoder", features_len=np.array([len(features_TF)], np.int32), **encoded)
        said, past = self._run("uncached_decoder", memory=memory)
        tokens: list[int] = []
        rows: list[np.ndarray] = []
        limit = memory.shape[1] // SPREAD - 1 if path is None else len(path) + 1
        while len(rows) < limit:
            token = np.array([[said.argmax() if not tokens else swapped(tokens[-1])]], np.int32)
            log_probs, past = self._run("cached_decoder", token=token, memory=memory, past=past)
            rows.append(log_probs[0, 0, [swapped(i) for i in range(log_probs.shape[2] - 1)]])
            best = int(rows[-1].argmax()) if path is None else [*path, SOS_EOS_ID][len(tokens)]
            rows[-1][BLANK_ID] += BELOW
            if best == SOS_EOS_ID:
                break
            tokens.append(best)
        return tokens, np.stack(rows) if rows else np.zeros((0, 0))

    def _run(self, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        unread = {"token": np.array([[1]], np.int32), "seq_len": np.array([1], np.int32)}
        session = self._sessions[part]
        names = [value.name for value in session.get_inputs()]
        return onnx_files.run(session, {name: (unread | inputs)[name] for name in names})

    @cached_property
    def _sessions(self) -> dict[str, onnxruntime.InferenceSession]:
        return {part: onnx_files.session(path, self.num_threads) for part, path in self.files.items()}

    @cached_property
    def _recogniser(self) -> Any:
        import sherpa_onnx

        assert self._sessions, "sherpa-onnx ends the process when a file is damaged; onnxruntime says so"
        files: dict[str, Any] = {part: str(path) for part, path in self.files.items()}
        return sherpa_onnx.OfflineRecognizer.from_moonshine(
            **files, tokens=str(self.tokens), num_threads=self.num_threads
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: swapped(i) for name, i in ids_by_name(read_pieces(self.tokens)).items()}


def swapped(token: int) -> int:
    """The slot's id of one of our tokens, and ours of one of the slot's."""
    return {SOS_EOS_ID: UNK_ID, UNK_ID: SOS_EOS_ID}.get(token, token)


class Encoder(nn.Module):
    """Features of one utterance to what the decoder reads, as many frames as its tokens are to be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encode = Encode(model)
        self.attention: Any = model.get_submodule("heads.attention")

    def forward(self, features: Tensor, features_len: Tensor) -> tuple[Tensor]:
        hidden_NTD, lens_N = self.encode(features, features_len.long())
        memory = self.attention.memory(hidden_NTD, lens_N)
        pairs = [x[0] for pair in zip(memory.keys, memory.values, strict=True) for x in pair]
        missing = -len(pairs) % SPREAD
        memory_MHTd = torch.stack([*pairs, *([torch.zeros_like(pairs[0])] * missing)])
        memory_MHTd = torch.nn.functional.pad(memory_MHTd, (0, 0, 0, 1))
        layer = self.attention.layers[0]
        width = len(memory_MHTd) // SPREAD * layer.num_cross_heads * layer.head_dim
        return (memory_MHTd.reshape(1, SPREAD * (hidden_NTD.shape[1] + 1), width),)


class UncachedDecoder(nn.Module):
    """The sentence's start, and no token before it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.attention: Any = model.get_submodule("heads.attention")

    def forward(self, token: Tensor, memory: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        # made of the input, since a constant would be stored
        one = (token * 0 + 1).float()[None]
        start = torch.nn.functional.pad(one, (self.attention.vocab_size, 0))
        return start, _stacked(self.attention.start(1))


class CachedDecoder(nn.Module):
    """One step of the search."""

    ours: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        head: Any = model.get_submodule("heads.attention")
        self.attention = head
        # our id of each of the slot's
        self.register_buffer("ours", torch.tensor([*map(swapped, range(head.vocab_size)), SOS_EOS_ID]))

    def forward(self, token: Tensor, memory: Tensor, seq_len: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        layer, used = self.attention.layers[0], 2 * len(self.attention.layers)
        pairs = -(-used // SPREAD) * SPREAD
        memory_MNHTd = memory.reshape(pairs, 1, layer.num_cross_heads, -1, layer.head_dim)
        keys, values = memory_MNHTd[0:used:2], memory_MNHTd[1:used:2]
        none_T = torch.zeros_like(memory_MNHTd[0, 0, 0, :-1, 0])
        bias_T = torch.nn.functional.pad(none_T, (0, 1), value=-torch.inf)
        cross = SimpleNamespace(
            keys=keys.unbind(0), values=values.unbind(0), bias_N11T=bias_T[None, None, None]
        )
        state = SimpleNamespace(keys=past[0].unbind(0), values=past[1].unbind(0))
        log_probs_NV, state = self.attention.step(self.ours[token[0].long()], state, cross)
        blank_N1, end_N1, unknown_N1, others = log_probs_NV.split([1, 1, 1, log_probs_NV.shape[1] - 3], dim=1)
        start_N1 = torch.full_like(blank_N1, -torch.inf)
        log_probs = torch.cat([blank_N1 - BELOW, unknown_N1, end_N1, others, start_N1], dim=1)
        return log_probs[None], _stacked(state)


def _stacked(state: Any) -> Tensor:
    return torch.stack([torch.stack(list(state.keys)), torch.stack(list(state.values))])


def _parts(bundle: BundleLike, model: nn.Module) -> list[Part]:
    num_bins = int(bundle.meta["features"]["num_mel_bins"])
    head: Any = model.get_submodule("heads.attention")
    features, lens = onnx_files.example_batch(num_bins)
    example = features[:1, : lens[0]], lens[:1].int()
    with torch.no_grad():
        (memory,) = Encoder(model).eval()(*example)
    about = onnx_files.metadata(bundle, "kdrecipe_attention")
    past = _stacked(head.start(1))
    past = past.new_zeros(*past.shape[:4], 5, past.shape[5])
    said = torch.tensor([[3]], dtype=torch.int32), memory, torch.tensor([5], dtype=torch.int32)
    said_axes = {"token": ("", ""), "memory": ("", "T_memory", ""), "seq_len": ("",)}
    return [
        Part(
            "preprocessor",
            FbankGraph(num_bins),
            (torch.zeros(1, SAMPLE_RATE),),
            {"audio": ("", "S")},
            {"features": ("", "T", "")},
            about,
            quantised=False,
        ),
        Part(
            "encoder",
            Encoder(model),
            example,
            {"features": ("", "T", ""), "features_len": ("",)},
            {"memory": ("", "T_memory", "")},
            about,
        ),
        Part(
            "uncached_decoder",
            UncachedDecoder(model),
            said,
            said_axes,
            {"log_probs": ("", "", ""), "past": ("",) * 6},
            about,
            quantised=False,
        ),
        Part(
            "cached_decoder",
            CachedDecoder(model),
            (*said, past),
            {**said_axes, "past": ("", "", "", "", "P", "")},
            {"log_probs": ("", "", ""), "new_past": ("", "", "", "", "P_new", "")},
            about,
        ),
    ]


def _swap_tokens(path: Path) -> None:
    """Give every token of a list the slot's id."""
    pieces = read_pieces(path)
    lines = [f"{pieces[swapped(i)]} {i}\n" for i in range(len(pieces))]
    write_atomic(path, "".join(lines))


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("sherpa_attention", SherpaAttention)
