"""Teacher ``onnx``: an ONNX file with a declared signature, run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnxruntime
import torch
from torch import Tensor

from kdrecipe import hookimpl

from .by_frames import LOGITS, FrameTeacher
from .onnx_header import OnnxSession, Shape, read_header
from .signature import Signature, SignatureOptions


class OnnxTeacher(FrameTeacher):
    """An ONNX file; utterances go through it one by one.

    Raises:
        RecipeError: a file is missing or damaged, or the file is not as declared: its inputs, the names
            of its outputs, their dimensions.
    """

    Config = SignatureOptions
    runtime = f"onnxruntime {onnxruntime.__version__}"

    def __init__(self, config: SignatureOptions) -> None:
        self.signature = signature = Signature(config, "onnx")
        self.frames, self.num_mel_bins = signature.frames, signature.frames.num_mel_bins
        self._header = read_header(signature.path)
        self._inputs = signature.inputs(list(self._header.inputs))
        self._check_input()
        for key in signature.names:
            self._check_output(key)
        if config.lens_output is not None:
            signature.pick(self._header.outputs, "lens_output", config.lens_output)
        self.input = config.input
        self.files = [*self._header.files, *signature.files[1:]]
        self.num_params: int | None = self._header.num_params
        self._loaded: tuple[int, OnnxSession] | None = None

    def load(self, device: torch.device) -> None:
        """Open it in onnxruntime, on the CPU with torch's number of threads, and let it speak once.

        Raises:
            KdrecipeError: onnxruntime can't load or run it, or it says other frames than declared.
        """
        num_threads = torch.get_num_threads()
        if self._loaded is None or self._loaded[0] != num_threads:
            first = self._loaded is None
            self._loaded = num_threads, OnnxSession(self.signature.path, *self._inputs, num_threads)
            if first:
                self.frames.check(self._say, str(self.signature.path))

    def _say(self, utterance: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        assert self._loaded is not None, "load() comes first"
        signature = self.signature
        return signature.say(self._loaded[1].run(signature.heard(utterance)), keys)

    def _check_input(self) -> None:
        config, (name, lens_name) = self.signature.config, self._inputs
        axes = ("batch", "samples") if config.input == "audio" else ("batch", "frames", "mel bins")
        shape = self._header.inputs[name].shape
        if len(shape) != len(axes):
            what = f"input {name!r} has {len(shape)} axes, {config.input} has {_axes(axes)}"
            raise self.signature.contradicts("input", what)
        if config.input == "features" and shape[2] not in (None, config.num_mel_bins):
            what = f"input {name!r} takes {shape[2]} mel bins, not {config.num_mel_bins}"
            raise self.signature.contradicts("num_mel_bins", what)
        if lens_name is not None and len(self._header.inputs[lens_name].shape) != 1:
            shown = _axes(self._header.inputs[lens_name].shape)
            raise self.signature.contradicts("lens_name", f"input {lens_name!r} is {shown}, not one number")

    def _check_output(self, key: str) -> None:
        option, name = self.signature.names[key]
        shape: Shape = self.signature.pick(self._header.outputs, option, name).shape
        (spec,) = (spec for spec in self.frames.specs if spec.key == key)
        if shape and len(shape) != 3:
            what = f"output {name!r} is {_axes(shape)}, not (batch, frames, classes)"
            raise self.signature.contradicts(option, what)
        if shape and shape[2] not in (None, spec.dim):
            option = "tokens" if key == LOGITS else "dim"
            tokens = self.frames.tokens
            says = f"{tokens.path} lists {spec.dim} tokens" if key == LOGITS and tokens else f"not {spec.dim}"
            option = self.signature.names[key][0].replace(".name", f".{option}")
            raise self.signature.contradicts(option, f"output {name!r} has {shape[2]} classes, {says}")


def _axes(sizes: Sequence[object]) -> str:
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("onnx", OnnxTeacher)
