"""ONNX of an attention encoder-decoder, with a program that runs it.

::

    encoder.onnx  decoder.onnx  encoder.int8.onnx  decoder.int8.onnx  tokens.txt  recognise.py

    python recognise.py speech.wav

It has the joint search with CTC, which sherpa-onnx lacks (``sherpa_attention`` is for greedy search there).
``recognise.py`` (``plugins/exporters/attention_runtime.py``) needs onnxruntime, numpy and kaldi-native-fbank.

Encoder: ``x`` (N, T, F) float32 log-mel features, not normalised, and ``x_lens`` (N,) int64, to
``cross_keys`` and ``cross_values`` (L, N, H, T', d), ``cross_lens`` (N,), and, where the model has a head
``ctc``, ``ctc_log_probs`` (N, T', V).

Decoder, one step: ``tokens`` (N,) int64, the last ones; ``self_keys`` and ``self_values`` (L, N, H, P, d),
of the tokens before them; what the encoder gave, for each hypothesis or (N = 1) for all; to
``log_probs`` (N, V) of the next tokens, ``new_self_keys`` and ``new_self_values`` (L, N, H, P + 1, d).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.corpus import segments
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.errors import KdrecipeError
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import BundleLike, Hypothesis, Runner, Runtime, RuntimeSearch
from kdrecipe.layers import attention_bias

from . import attention_runtime, onnx_files
from .shared import Encode, check_head, existing

PROGRAM = "recognise.py"
KEYS = ("", "N", "", "T_out", "")
PAST = ("", "N", "", "P", "")


class OnnxAttention:
    """Exporter ``onnx_attention``: encoder and ``attention`` head, and the ``ctc`` head if there is one."""

    head = "attention"
    runtime = Runtime(
        "onnxruntime",
        "kdrecipe_plugins.exporters.runtimes:attention",
        {
            "attention_greedy": RuntimeSearch("greedy"),
            "attention_beam": RuntimeSearch(
                "joint_beam", ("beam", "ctc_weight", "length_bonus", "max_len_ratio")
            ),
        },
    )
    variants = onnx_files.VARIANTS
    ships = staticmethod(onnx_files.ships)
    files = attention_runtime.FILES
    Config = onnx_files.OnnxOptions

    def __init__(self, config: onnx_files.OnnxOptions) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write the variants; that of a quantised bundle has exactly its integers and scales.

        Raises:
            KdrecipeError: the model has no head ``attention``.
        """
        check_head(bundle, self.head, "onnx_attention")
        batch = onnx_files.example_batch(int(bundle.meta["features"]["num_mel_bins"]))
        about = onnx_files.metadata(bundle, "kdrecipe_attention", frame_shift_s=bundle.meta["frame_shift_s"])

        def parts(model: nn.Module) -> list[onnx_files.Part]:
            return [_encoder(model, batch, about), _decoder(model, about)]

        written = onnx_files.write(parts, bundle, self.config, directory)
        (directory / PROGRAM).write_text(program(), encoding="utf-8")
        return {variant: [*names, PROGRAM] for variant, names in written.items()}

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant.

        Raises:
            KdrecipeError: a file is missing.
        """
        return OnnxAttentionRunner(Path(directory), variant, num_threads=num_threads)


def program() -> str:
    """``recognise.py``: one file, with the code that it imports from kdrecipe put in place of the import."""
    source = Path(attention_runtime.__file__).read_text(encoding="utf-8")
    (line,) = re.findall(r"^from kdrecipe\.corpus\.segments import .*\n", source, flags=re.MULTILINE)
    code = (
        Path(segments.__file__)
        .read_text(encoding="utf-8")
        .partition("from __future__ import annotations\n")[2]
    )
    return source.replace(line, code.strip() + "\n")


class OnnxAttentionRunner:
    """An export in its own program: features by kaldi-native-fbank, greedy search."""

    def __init__(self, directory: Path, variant: str, *, num_threads: int = 1) -> None:
        for name in (*attention_runtime.FILES[variant].values(), onnx_files.TOKENS):
            existing(directory / name)
        self.directory, self.variant, self.num_threads = directory, variant, num_threads

    @cached_property
    def recogniser(self) -> attention_runtime.Recogniser:
        """The loaded files.

        Raises:
            KdrecipeError: one is damaged.
        """
        try:
            return attention_runtime.Recogniser.load(
                self.directory, self.variant, num_threads=self.num_threads
            )
        except attention_runtime.RecogniserError as error:
            raise KdrecipeError(str(error)) from error

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (U + 1, V) log-posteriors of its tokens and of the end."""
        encoded = self.recogniser.encode(features_BTF, lens_B)
        return [self.recogniser.log_probs_along(encoded.row(i), list(path)) for i, path in enumerate(paths)]

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """The best token at each step."""
        return self.recogniser.greedy(self.recogniser.encode(features_TF[None], np.array([len(features_TF)])))

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length and sampling rate; tokens have no times."""
        found = self.recogniser.recognise(samples_S, sample_rate, longest_s=longest_s)
        return Hypothesis(found.text, found.tokens, score=found.score)


class Encoder(nn.Module):
    """Features to what the decoder reads, and what CTC says."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encode = Encode(model)
        self.attention: Any = model.get_submodule("heads.attention")
        self.ctc = dict(model.get_submodule("heads").named_children()).get("ctc")

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, ...]:
        hidden_NTD, lens_N = self.encode(x, x_lens)
        memory = self.attention.memory(hidden_NTD, lens_N)
        found = torch.stack(memory.keys), torch.stack(memory.values), lens_N
        if self.ctc is None:
            return found
        return *found, self.ctc(hidden_NTD, lens_N).log_softmax(-1)


class Decoder(nn.Module):
    """One step of a search."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.attention: Any = model.get_submodule("heads.attention")

    def forward(
        self,
        tokens: Tensor,
        self_keys: Tensor,
        self_values: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        cross_lens: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias_NT = attention_bias(frame_mask(cross_lens, cross_keys.shape[3]), cross_keys.dtype)
        memory = _layers(cross_keys, cross_values, bias_N11T=bias_NT[:, None, None, :])
        log_probs_NV, state = self.attention.step(tokens, _layers(self_keys, self_values), memory)
        return log_probs_NV, torch.stack(state.keys), torch.stack(state.values)


def _layers(keys: Tensor, values: Tensor, **more: Tensor) -> SimpleNamespace:
    """The head's memory or state, from stacked layers."""
    return SimpleNamespace(keys=list(keys.unbind(0)), values=list(values.unbind(0)), **more)


def _encoder(model: nn.Module, batch: tuple[Tensor, Tensor], about: dict[str, str]) -> onnx_files.Part:
    outputs = {"cross_keys": KEYS, "cross_values": KEYS, "cross_lens": ("N",)}
    if "ctc" in dict(model.get_submodule("heads").named_children()):
        outputs["ctc_log_probs"] = ("N", "T_out", "")
    return onnx_files.Part(
        "encoder", Encoder(model), batch, {"x": ("N", "T", ""), "x_lens": ("N",)}, outputs, about
    )


def _decoder(model: nn.Module, about: dict[str, str]) -> onnx_files.Part:
    head: Any = model.get_submodule("heads.attention")
    num_layers, num_rows, num_frames, num_tokens = len(head.layers), 2, 13, 5
    layer = head.layers[0]
    past = torch.zeros(num_layers, num_rows, layer.num_heads, num_tokens, layer.head_dim)
    cross = torch.zeros(num_layers, num_rows, layer.num_cross_heads, num_frames, layer.head_dim)
    cross_axes = ("", "M", "", "T_out", "")  # M is N or 1
    return onnx_files.Part(
        "decoder",
        Decoder(model),
        (torch.tensor([3, 4]), past, past.clone(), cross, cross.clone(), torch.tensor([13, 9])),
        {
            "tokens": ("N",),
            "self_keys": PAST,
            "self_values": PAST,
            "cross_keys": cross_axes,
            "cross_values": cross_axes,
            "cross_lens": ("M",),
        },
        {
            "log_probs": ("N", ""),
            "new_self_keys": ("", "N", "", "P_new", ""),
            "new_self_values": ("", "N", "", "P_new", ""),
        },
        about,
    )


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("onnx_attention", OnnxAttention)
