"""ONNX for sherpa-onnx's slot of offline transducers.

::

    encoder.onnx  decoder.onnx  joiner.onnx  tokens.txt
    encoder.int8.onnx  decoder.int8.onnx  joiner.int8.onnx

    sherpa_onnx.OfflineRecognizer.from_transducer(
        encoder="encoder.int8.onnx", decoder="decoder.int8.onnx", joiner="joiner.int8.onnx",
        tokens="tokens.txt",
    )

As icefall exports them: the encoder's file holds its projection to the joiner, the decoder's the
predictor and its projection. Encoder: ``x`` (N, T, F) float32 log-mel features, not normalised, and
``x_lens`` (N,) int64, to ``encoder_out`` (N, T', J) and ``encoder_out_lens`` (N,). Decoder: ``y`` (N, C)
int64, the last C tokens (-1 and 0 before the first), to ``decoder_out`` (N, J). Joiner:
``encoder_out`` and ``decoder_out`` (N, J) to ``logit`` (N, V).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from kdrecipe import hookimpl
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.data.tokens import ids_by_name, read_pieces
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import (
    BLANK_ID,
    UNK_ID,
    BundleLike,
    Hypothesis,
    Runner,
    Runtime,
    RuntimeSearch,
)

from . import onnx_files, sherpa
from .shared import Encode, check_head, existing, valid_rows

PARTS = ("encoder", "decoder", "joiner")
LSTM = "sherpa-onnx's transducers have a predictor without state, this one is an LSTM"


class OnnxTransducer:
    """Exporter ``onnx_transducer``: encoder and ``rnnt`` head, nothing of other heads."""

    head = "rnnt"
    runtime = Runtime(
        "sherpa-onnx",
        "kdrecipe_plugins.exporters.runtimes:sherpa_transducer",
        {
            "rnnt_greedy": RuntimeSearch("greedy_search"),
            "rnnt_beam": RuntimeSearch("modified_beam_search", ("beam",)),
        },
    )
    variants = onnx_files.VARIANTS
    ships = staticmethod(onnx_files.ships)
    files = onnx_files.file_names(*PARTS)
    Config = onnx_files.OnnxOptions
    speller = staticmethod(sherpa.transducer_speller)

    def __init__(self, config: onnx_files.OnnxOptions) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write the variants; that of a quantised bundle has exactly its integers and scales.

        Raises:
            KdrecipeError: no head ``rnnt``, an LSTM as its predictor, or another frame rate than the slot's.
        """
        check_head(bundle, self.head, "onnx_transducer")
        sherpa.check_frame_shift(bundle, "onnx_transducer")
        context_size = getattr(bundle.model.get_submodule("heads.rnnt.predictor"), "context_size", None)
        if context_size is None:
            raise KdrecipeError(LSTM, where=bundle.name, remedy="train the system with predictor: stateless")
        batch = onnx_files.example_batch(int(bundle.meta["features"]["num_mel_bins"]))

        def parts(model: nn.Module) -> list[onnx_files.Part]:
            return _parts(model, bundle, context_size, batch)

        written = onnx_files.write(parts, bundle, self.config, directory)
        sherpa.write_tokens(directory)
        return written

    @staticmethod
    def unfit(model: Mapping[str, Any]) -> str | None:
        """An LSTM as predictor fits no slot of sherpa-onnx."""
        return LSTM if (model["heads"]["rnnt"] or {}).get("predictor") == "lstm" else None

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant.

        Raises:
            KdrecipeError: a file is missing.
        """
        return OnnxTransducerRunner(Path(directory), variant, num_threads=num_threads)


class OnnxTransducerRunner:
    """An export with the ``tokens.txt`` beside it.

    Log-posteriors come from onnxruntime, texts from sherpa-onnx, its features included: what a
    device runs.

    Args:
        directory: where it is.
        variant: ``fp32``, ``int8``, ...
        num_threads: of the runtimes.
        search: ``greedy_search`` or ``modified_beam_search``, of sherpa-onnx.
        beam: hypotheses that the latter keeps.
    """

    def __init__(
        self,
        directory: Path,
        variant: str,
        *,
        num_threads: int = 1,
        search: str = "greedy_search",
        beam: int = 4,
    ) -> None:
        names = OnnxTransducer.files[variant]
        self.files = {part: existing(directory / name) for part, name in names.items()}
        self.tokens = existing(directory / onnx_files.TOKENS)
        self.num_threads, self.search, self.beam = num_threads, search, beam

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (T, V) log-posteriors of the joiner at each frame of its path."""
        encoded = self._encode(features_BTF, lens_B)
        return [self._walk(encoder_TJ, path)[1] for encoder_TJ, path in zip(encoded, paths, strict=True)]

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """The best label at each frame."""
        (encoder_TJ,) = self._encode(features_TF[None], np.array([len(features_TF)]))
        return [label for label in self._walk(encoder_TJ, None)[0] if label != BLANK_ID]

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length; sherpa-onnx resamples if it must."""
        return sherpa.recognise(self._recogniser, self._ids, samples_S, sample_rate, longest_s)

    def _encode(self, features_BTF: np.ndarray, lens_B: np.ndarray) -> list[np.ndarray]:
        inputs = {"x": features_BTF.astype(np.float32), "x_lens": lens_B.astype(np.int64)}
        return valid_rows(*onnx_files.run(self._sessions["encoder"], inputs))

    def _walk(self, encoder_TJ: np.ndarray, path: Sequence[int] | None) -> tuple[list[int], np.ndarray]:
        """Labels and (T, V) log-posteriors, frame by frame along ``path``; None: along the best labels."""
        context = [BLANK_ID] * int(self._sessions["decoder"].get_inputs()[0].shape[1])
        side_NJ = self._predict(context)
        labels: list[int] = []
        rows = []
        for frame, encoder_J in enumerate(encoder_TJ):
            inputs = {"encoder_out": encoder_J[None], "decoder_out": side_NJ}
            (logit_NV,) = onnx_files.run(self._sessions["joiner"], inputs)
            rows.append(_log_softmax(logit_NV[0]))
            if path is not None:
                label = int(path[frame]) if frame < len(path) else BLANK_ID
            else:
                label = int(logit_NV[0].argmax())
            labels.append(BLANK_ID if label == UNK_ID else label)  # sherpa-onnx takes <unk> for the blank
            if labels[-1] != BLANK_ID:
                context = [*context[1:], label]
                side_NJ = self._predict(context)
        return labels, np.stack(rows) if rows else np.zeros((0, 0))

    def _predict(self, context: list[int]) -> np.ndarray:
        inputs = {"y": np.array([context], dtype=np.int64)}
        (side_NJ,) = onnx_files.run(self._sessions["decoder"], inputs)
        return side_NJ

    @cached_property
    def _sessions(self) -> dict[str, onnxruntime.InferenceSession]:
        return {part: onnx_files.session(path, self.num_threads) for part, path in self.files.items()}

    @cached_property
    def _recogniser(self) -> Any:
        import sherpa_onnx

        # sherpa-onnx ends the process when a file is damaged; onnxruntime says what is wrong
        num_bins = self._sessions["encoder"].get_inputs()[0].shape[2]
        return sherpa_onnx.OfflineRecognizer.from_transducer(
            encoder=str(self.files["encoder"]),
            decoder=str(self.files["decoder"]),
            joiner=str(self.files["joiner"]),
            tokens=str(self.tokens),
            num_threads=self.num_threads,
            feature_dim=num_bins,
            decoding_method=self.search,
            max_active_paths=self.beam,
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return ids_by_name(read_pieces(self.tokens))


def _log_softmax(logit_V: np.ndarray) -> np.ndarray:
    shifted_V: np.ndarray = logit_V - logit_V.max()
    log_probs_V: np.ndarray = shifted_V - np.log(np.exp(shifted_V).sum())
    return log_probs_V


class Encoder(nn.Module):
    """Encoder and its projection to the joiner."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encode = Encode(model)
        self.proj = model.get_submodule("heads.rnnt.encoder_proj")

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NTD, lens_N = self.encode(x, x_lens)
        return self.proj(hidden_NTD), lens_N


class Predictor(nn.Module):
    """The stateless predictor and its projection to the joiner."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.predictor: Any = model.get_submodule("heads.rnnt.predictor")
        self.proj = model.get_submodule("heads.rnnt.predictor_proj")

    def forward(self, y: Tensor) -> tuple[Tensor]:
        return (self.proj(self.predictor.output(SimpleNamespace(parts=(y,)))),)


class Joiner(nn.Module):
    """Both sides to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.output = model.get_submodule("heads.rnnt.output")

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> tuple[Tensor]:
        return (self.output(torch.tanh(encoder_out + decoder_out)),)


def _parts(
    model: nn.Module, bundle: BundleLike, context_size: int, batch: tuple[Tensor, Tensor]
) -> list[onnx_files.Part]:
    encoder_proj: Any = model.get_submodule("heads.rnnt.encoder_proj")
    joiner_dim = encoder_proj.out_features
    sides = torch.zeros(2, joiner_dim), torch.zeros(2, joiner_dim)
    # sherpa-onnx reads the predictor's sizes here, and finds the kind of model by its type if none is named
    about = onnx_files.metadata(
        bundle, "conformer", context_size=context_size, joiner_dim=joiner_dim, subsampling_factor=4
    )
    return [
        onnx_files.Part(
            "encoder",
            Encoder(model),
            batch,
            {"x": ("N", "T", ""), "x_lens": ("N",)},
            {"encoder_out": ("N", "T_out", ""), "encoder_out_lens": ("N",)},
            about,
        ),
        onnx_files.Part(
            "decoder",
            Predictor(model),
            (torch.zeros(2, context_size, dtype=torch.int64),),
            {"y": ("N", "")},
            {"decoder_out": ("N", "")},
            about,
        ),
        onnx_files.Part(
            "joiner",
            Joiner(model),
            sides,
            {"encoder_out": ("N", ""), "decoder_out": ("N", "")},
            {"logit": ("N", "")},
            about,
        ),
    ]


@hookimpl
def register_exporters(register: Callable[[str, type], None]) -> None:
    register("onnx_transducer", OnnxTransducer)
