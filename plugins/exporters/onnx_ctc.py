"""ONNX for sherpa-onnx's slot of CTC models that subsample by 4, in fp32 and int8.

::

    model.onnx  model.int8.onnx  tokens.txt

    sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model="model.int8.onnx", tokens="tokens.txt")

Inputs: ``x`` (N, T, F) float32 log-mel features, not normalised, and ``x_lens`` (N,) int64; outputs:
``log_probs`` (N, T', V) and ``log_probs_len`` (N,). N and T vary; sherpa-onnx reads V from the shape.
"""

from __future__ import annotations

import io
import shutil
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from kdrecipe import hookimpl
from kdrecipe.errors import KdrecipeError, Problem
from kdrecipe.interfaces import BundleLike, Hypothesis, Options, Runner, float_copy
from kdrecipe_plugins.exporters.ctc import CtcLogProbs, check_head, existing, read_pieces
from kdrecipe_plugins.exporters.onnx_graph import quantise, slim

OPSET = 17  # the first with LayerNormalization; any onnxruntime since 2022 reads it
FRAME_SHIFT_S = 0.04  # fixed in sherpa-onnx for this slot
FILES = {"fp32": "model.onnx", "int8": "model.int8.onnx"}


class OnnxCtc:
    """Exporter ``onnx_ctc``."""

    variants = ("fp32", "int8")

    class Config(Options):
        """Options.

        Args:
            conv_weights: how the int8 file stores convolutions' weights; they compute in float32
                either way.
            reduce_range: 7 instead of 8 bits for the weights of matrix products, for x86 processors
                without VNNI (before 2019), whose 8-bit sums saturate; others lose precision by it.
        """

        conv_weights: Literal["int8", "float32"] = "int8"
        reduce_range: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write both variants; that of an int8 bundle keeps exactly its int8 weights.

        Raises:
            KdrecipeError: no CTC head, or another frame rate than the slot's.
        """
        _check(bundle)
        directory.mkdir(parents=True, exist_ok=True)
        num_bins = int(bundle.meta["features"]["num_mel_bins"])
        float_model = slim(_to_onnx(float_copy(bundle.model), num_bins))
        # Layers that an int8 bundle left in float stay so; in a float bundle there is no choice yet.
        linears = [m for m in bundle.model.modules() if type(m) is nn.Linear] if bundle.is_int8 else []
        int8_model = quantise(
            float_model,
            keep_float={m.weight.detach().t().contiguous().numpy().tobytes() for m in linears},
            convs=self.config.conv_weights == "int8",
            reduce_range=self.config.reduce_range,
        )
        for variant, model in (("fp32", float_model), ("int8", int8_model)):
            onnx.helper.set_model_props(model, _metadata(bundle))
            onnx.checker.check_model(model)
            (directory / FILES[variant]).write_bytes(model.SerializeToString())
        shutil.copyfile(bundle.path / "tokens.txt", directory / "tokens.txt")
        return {variant: [name, "tokens.txt"] for variant, name in FILES.items()}

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant.

        Raises:
            KdrecipeError: there is no such file.
        """
        return OnnxRunner(Path(directory) / FILES[variant], num_threads=num_threads)


class OnnxRunner:
    """``model.onnx`` with the ``tokens.txt`` beside it.

    Log-posteriors come from onnxruntime, texts from sherpa-onnx, its features included: what a
    device runs.
    """

    def __init__(self, model: Path, *, num_threads: int = 1) -> None:
        self.model = existing(model)
        self.tokens = existing(model.parent / "tokens.txt")
        self.num_threads = num_threads

    def log_probs(self, features_BTF: np.ndarray, lens_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, V) log-posteriors and (B,) lengths."""
        inputs = {"x": features_BTF.astype(np.float32), "x_lens": lens_B.astype(np.int64)}
        log_probs_BTV, out_lens_B = self._session.run(None, inputs)
        return log_probs_BTV, out_lens_B

    def transcribe(self, samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        """Recognise one utterance; sherpa-onnx resamples if it must."""
        stream = self._recogniser.create_stream()
        stream.accept_waveform(sample_rate, np.ascontiguousarray(samples_S, dtype=np.float32))
        self._recogniser.decode_stream(stream)
        result = stream.result
        tokens = [self._ids[token] for token in result.tokens]
        return Hypothesis(result.text.strip(), tokens, list(result.timestamps))

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(self.model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own types, one for every kind of damage
            raise KdrecipeError(
                f"onnxruntime can't load the model: {error}", where=str(self.model)
            ) from error

    @cached_property
    def _recogniser(self) -> Any:
        import sherpa_onnx

        # sherpa-onnx ends the process when a file is damaged; onnxruntime says what is wrong
        num_bins = self._session.get_inputs()[0].shape[2]
        return sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
            model=str(self.model),
            tokens=str(self.tokens),
            num_threads=self.num_threads,
            feature_dim=num_bins,
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Token ids by name; sherpa-onnx shows the word-start mark of SentencePiece as a space."""
        ids = {}
        for number, piece in enumerate(read_pieces(self.tokens)):
            ids[piece] = ids[piece.replace("\u2581", " ")] = number
        return ids


def _to_onnx(model: nn.Module, num_bins: int) -> onnx.ModelProto:
    """Trace with torch's older exporter: the newer one needs a package more, and its graphs of the
    same model differ from one torch version to the next."""
    example = torch.zeros(2, 77, num_bins), torch.tensor([77, 50])
    buffer = io.BytesIO()
    # Warnings are about the exporter's age and about traced Python numbers, and the parity gate
    # finds any that matter.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            CtcLogProbs(model).eval(),
            example,
            buffer,
            input_names=["x", "x_lens"],
            output_names=["log_probs", "log_probs_len"],
            dynamic_axes={
                "x": {0: "N", 1: "T"},
                "x_lens": {0: "N"},
                "log_probs": {0: "N", 1: "T_out"},
                "log_probs_len": {0: "N"},
            },
            opset_version=OPSET,
            dynamo=False,
        )
    exported = onnx.load_from_string(buffer.getvalue())
    vocab_size = CtcLogProbs(model).eval()(*example)[0].shape[-1]
    # sherpa-onnx reads V from here
    exported.graph.output[0].type.tensor_type.shape.dim[2].dim_value = vocab_size
    return exported


def _check(bundle: BundleLike) -> None:
    check_head(bundle, "onnx_ctc")
    frame_shift_s = bundle.meta["frame_shift_s"]
    if abs(frame_shift_s - FRAME_SHIFT_S) > 1e-6:
        raise KdrecipeError(
            f"the model gives a frame every {frame_shift_s} s, sherpa-onnx assumes {FRAME_SHIFT_S} s of "
            "every model in this slot: all its times would be wrong",
            where=bundle.name,
            remedy="use an architecture that subsamples by 4, or the exporter torchscript",
        )


def _metadata(bundle: BundleLike) -> dict[str, str]:
    """What sherpa-onnx goes by if nobody names the slot, and what a person wants to know."""
    return {
        "model_type": "zipformer2_ctc",
        "version": "1",
        "model_author": "kdrecipe",
        "comment": f"{bundle.meta['model']['name']} CTC, system {bundle.name}",
        "vocab_size": str(len(bundle.tokens)),
        "subsampling_factor": "4",
        "num_params": str(bundle.meta["params"]),
    }


@hookimpl
def register_exporters(register):
    register("onnx_ctc", OnnxCtc)


@hookimpl
def check_recipe(recipe):
    """Speed and memory are measured on what this exporter writes, so it has to be among them."""
    if any(exporter.name == "onnx_ctc" for exporter in recipe.export):
        return []
    where = recipe.document.where(("export",))
    return [Problem("speed and memory are measured on what onnx_ctc writes", where, "add {name: onnx_ctc}")]
