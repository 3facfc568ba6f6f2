"""Teacher ``sherpa_onnx``: a model in a folder, as sherpa-onnx's publishers pack them.

S samples, T frames, F feature bins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.corpus.audio import recognise_long
from kdrecipe.data.features import extract
from kdrecipe.data.tokens import ids_by_name
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import (
    SAMPLE_RATE,
    Batch,
    Hypothesis,
    Located,
    Options,
    Targets,
    TargetSpec,
)

from ..exporters import sherpa
from .by_frames import LOGITS, TRIAL_S, ByFrames, audio_of
from .onnx_header import OnnxSession, Shape, read_header
from .own_tokens import CtcTokens, read_tokens
from .sherpa_files import check_kind, find_files

CTC = "zipformer_ctc"
"""The kind of model whose posteriors can be had: it hears Lhotse's features."""

_TRIAL = """
import json, sys
import numpy, sherpa_onnx
factory, arguments = json.loads(sys.argv[1])
recogniser = getattr(sherpa_onnx.OfflineRecognizer, factory)(**arguments)
stream = recogniser.create_stream()
stream.accept_waveform(16000, numpy.zeros(16000, dtype=numpy.float32))
recogniser.decode_stream(stream)
"""


class SherpaOnnxTeacher:
    """A model that sherpa-onnx runs, on the CPU.

    Its hypotheses are sherpa-onnx's, with times where it gives any, and with ``avg_log_prob`` of transducers.
    Of a ``zipformer_ctc`` they come from its posteriors, which onnxruntime computes, spelled as sherpa-onnx
    spells; these it can teach, too.

    Raises:
        RecipeError: unknown kind of model or option, a file is missing, or ``tokens.txt`` is not its list.
    """

    class Config(Options):
        """A folder and the kind of model in it.

        Args:
            path: of the folder.
            model: its kind, as sherpa-onnx's factories are called: ``transducer``, ``zipformer_ctc``,
                ``nemo_ctc``, ``whisper``, ``moonshine``, ``sense_voice``, ``paraformer`` and more.
            int8: take the files with int8 weights.
            files: file names by part, of those that are not found by their names (``{encoder: e.onnx}``).
            options: further arguments of sherpa-onnx's factory (``{language: de}``).
        """

        path: Annotated[str, Located]
        model: str
        int8: bool = False
        files: dict[str, str] = {}
        options: dict[str, str | int | float | bool] = {}

    input: ClassVar[Literal["features", "audio"]] = "audio"

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.path)
        parts = check_kind(config.model, config.options)
        self._parts = find_files(self.path, parts, config.files, int8=config.int8)
        graphs = [p for p in self._parts.values() if p.suffix == ".onnx"]
        headers = {path: read_header(path) for path in graphs}
        self.files = [file for path in self._parts.values() for file in _all_files(path, headers)]
        counted = [header.num_params for header in headers.values()]
        all_are_onnx = not any(path.suffix == ".ort" for path in self._parts.values())
        self.num_params: int | None = sum(counted) if all_are_onnx else None
        self._ctc = _CtcGraph(self._parts["model"], self._parts["tokens"]) if config.model == CTC else None
        if config.model == "transducer" and config.options.get("model_type", "transducer") == "transducer":
            joiner = next(iter(read_header(self._parts["joiner"]).outputs.values())).shape
            _check_count(read_tokens(self._parts["tokens"]), joiner, self._parts["tokens"])
        self._by_sherpa = self._ctc is None or self._ctc.is_byte_bpe
        self.runtime = _runtime() if self._by_sherpa else f"onnxruntime {onnxruntime.__version__}"
        self._recogniser: Any = None
        self._ids: dict[str, int] = {}
        self._num_threads = 0

    def provides(self) -> list[TargetSpec]:
        """Posteriors of a ``zipformer_ctc``; nothing else."""
        return self._ctc.frames.specs if self._ctc else []

    def load(self, device: torch.device) -> None:
        """Load it on the CPU, with torch's number of threads.

        Raises:
            KdrecipeError: sherpa-onnx or onnxruntime can't load it or run it.
        """
        num_threads = torch.get_num_threads()
        if num_threads == self._num_threads:
            return
        if self._ctc is not None:
            self._ctc.load(num_threads)
        if self._by_sherpa:
            import sherpa_onnx

            arguments = self._arguments(num_threads)
            if self._recogniser is None:
                self._try_out(arguments)
                self._ids = _ids(self._parts.get("tokens"))
            factory = getattr(sherpa_onnx.OfflineRecognizer, f"from_{self.config.model}")
            self._recogniser = factory(**arguments)
        self._num_threads = num_threads

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """Posteriors of a ``zipformer_ctc``, one frame for every subsampled one of the audio."""
        assert self._ctc is not None, "provides() offers none"
        return self._ctc.frames.targets(batch, needs, self._ctc.say)

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """What sherpa-onnx recognises, of long audio pause by pause."""
        if not self._by_sherpa:
            assert self._ctc is not None
            return self._ctc.frames.hypotheses(batch, self._ctc.say_unpadded)
        heard = audio_of(batch, fill=False)
        return [recognise_long(self._recognise, [samples_S.numpy()], SAMPLE_RATE) for samples_S in heard]

    def _recognise(self, samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        assert self._recogniser is not None, "load() comes first"
        stream = self._recogniser.create_stream()
        stream.accept_waveform(sample_rate, _long_enough(np.asarray(samples_S, dtype=np.float32)))
        self._recogniser.decode_stream(stream)
        found = stream.result
        tokens = [self._ids.get(token, -1) for token in found.tokens]
        times_s = list(found.timestamps)
        if -1 in tokens:  # bytes of a letter, or a list of another kind: ids would be guesses
            tokens, times_s = [], []
        log_probs = list(found.ys_log_probs)
        mean = float(np.mean(log_probs)) if log_probs and len(log_probs) == len(tokens) else None
        return Hypothesis(
            found.text.strip(), tokens, times_s if len(times_s) == len(tokens) else [], None, mean
        )

    def _arguments(self, num_threads: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {part: str(path) for part, path in self._parts.items()}
        if self.config.model in (CTC, "transducer"):
            part = self._parts["model" if self.config.model == CTC else "encoder"]
            shape = next(iter(read_header(part).inputs.values())).shape
            if len(shape) == 3 and shape[2] is not None:
                arguments["feature_dim"] = shape[2]
        return {**arguments, **self.config.options, "num_threads": num_threads}

    def _try_out(self, arguments: dict[str, Any]) -> None:
        """In a process of its own: sherpa-onnx ends the process if a file is not of the kind it expects."""
        call = json.dumps([f"from_{self.config.model}", arguments])
        done = subprocess.run([sys.executable, "-c", _TRIAL, call], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            reason = said[-1] if said else f"exit status {done.returncode}"
            raise RecipeError(
                f"sherpa-onnx can't run it as {self.config.model!r}: {reason}",
                where=str(self.path),
                remedy="look at model: and options: which kind is it, and for which version was it made?",
            )


class _CtcGraph:
    """A CTC model on Lhotse's features, run by onnxruntime.

    Args:
        path: of its graph: ``x`` (N, T, F) and ``x_lens`` to log-posteriors and their lengths.
        tokens: its ``tokens.txt``.
    """

    def __init__(self, path: Path, tokens: Path) -> None:
        self._path, header = path, read_header(path)
        shapes = [value.shape for value in header.inputs.values()]
        if [len(shape) for shape in shapes] != [3, 1] or not header.outputs:
            raise RecipeError(
                f"it is no {CTC}: its inputs are {', '.join(header.inputs)}, not features and their lengths",
                where=str(path),
                remedy="which kind of model is it? See model",
            )
        self._features = {"name": "fbank", "num_mel_bins": shapes[0][2] or 80}
        self._subsampling = int(header.metadata.get("subsampling_factor", sherpa.SUBSAMPLING))
        listed = read_tokens(tokens)
        _check_count(listed, next(iter(header.outputs.values())).shape, tokens)
        self.is_byte_bpe = sherpa.taken_for_byte_bpe(listed)
        frame_shift_s = round(0.01 * self._subsampling, 9)
        own = CtcTokens(tokens, speller=sherpa.ctc_speller)
        self.frames = ByFrames(f"sherpa_onnx {path.name}", "audio", None, own, frame_shift_s, {})
        self._session: OnnxSession | None = None
        self._edges = 0

    def load(self, num_threads: int) -> None:
        """Open it; see how many frames its front end drops at the ends."""
        first, (input_name, lens_name) = self._session is None, read_header(self._path).inputs
        self._session = OnnxSession(self._path, input_name, lens_name, num_threads)
        if first:
            trial = torch.zeros(round(TRIAL_S * SAMPLE_RATE))
            expected = round(TRIAL_S * 100) // self._subsampling
            dropped = expected - len(self.say_unpadded(trial, [LOGITS])[LOGITS])
            self._edges = max(0, dropped) * self._subsampling
            self.frames.check(self.say, str(self._path))

    def say(self, samples_S: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Posteriors with as many frames as the audio has.

        A Zipformer's front end drops two, one at either end. So the features are continued there by their
        first and last frame: then frames count from the same instant as those of a student that pads.
        """
        features_TF = self._hear(samples_S)
        before = self._edges // 2
        ends = (features_TF[:1].expand(before, -1), features_TF[-1:].expand(self._edges - before, -1))
        return self._run(torch.cat([ends[0], features_TF, ends[1]]))

    def say_unpadded(self, samples_S: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Posteriors as sherpa-onnx has them."""
        return self._run(self._hear(torch.from_numpy(_long_enough(samples_S.numpy()))))

    def _hear(self, samples_S: Tensor) -> Tensor:
        return torch.from_numpy(extract(samples_S.numpy(), SAMPLE_RATE, self._features))

    def _run(self, features_TF: Tensor) -> dict[str, Tensor]:
        assert self._session is not None, "load() comes first"
        log_probs_1TV, *lens = self._session.run(features_TF).values()
        return {LOGITS: log_probs_1TV[0, : int(lens[0][0]) if lens else None]}


def _long_enough(samples_S: np.ndarray) -> np.ndarray:
    """With zeros up to 0.1 s: a Zipformer's front end fails on less."""
    return np.pad(samples_S, (0, max(0, SAMPLE_RATE // 10 - len(samples_S))))


def _check_count(tokens: Sequence[str], shape: Shape, path: Path) -> None:
    """RecipeError unless the last axis of the model's output has as many classes."""
    num_classes = shape[-1] if shape else None
    if num_classes is not None and num_classes != len(tokens):
        raise RecipeError(
            f"it lists {len(tokens)} tokens, the model's output has {num_classes} classes",
            where=str(path),
            remedy="copy the tokens.txt that belongs to this model",
        )


def _all_files(path: Path, headers: dict[Path, Any]) -> list[Path]:
    """A part's files: its graph with its weights, or all in its folder."""
    if path in headers:
        return list(headers[path].files)
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _ids(tokens: Path | None) -> dict[str, int]:
    """Ids by the names in results; none where the list is of another form (Whisper's is)."""
    try:
        return ids_by_name(read_tokens(tokens)) if tokens else {}
    except RecipeError:
        return {}


def _runtime() -> str:
    import sherpa_onnx

    return f"sherpa-onnx {sherpa_onnx.__version__}"


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("sherpa_onnx", SherpaOnnxTeacher)
