"""The runtimes of the exporters, as the measured process starts them.

Nothing here imports torch, nor anything of the core: memory that is not the model's would count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Recognise = Callable[[Any, int], dict[str, Any]]
Started = tuple[str, Callable[[dict[str, Any]], Recognise]]


def sherpa_ctc() -> Started:
    """sherpa-onnx for CTC models; its only search is the greedy one."""
    import sherpa_onnx

    def load(spec: dict[str, Any]) -> Recognise:
        build = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc
        return _sherpa(build(**_sherpa_arguments(spec)))

    return f"sherpa-onnx {sherpa_onnx.__version__}", load


def sherpa_transducer() -> Started:
    """sherpa-onnx for transducers: ``greedy_search`` and ``modified_beam_search``."""
    import sherpa_onnx

    def load(spec: dict[str, Any]) -> Recognise:
        build = sherpa_onnx.OfflineRecognizer.from_transducer
        return _sherpa(build(**_sherpa_arguments(spec), max_active_paths=spec["options"].get("beam", 4)))

    return f"sherpa-onnx {sherpa_onnx.__version__}", load


def sherpa_attention() -> Started:
    """sherpa-onnx for encoder-decoders, in its slot ``moonshine``; its only search is the greedy one."""
    import sherpa_onnx

    def load(spec: dict[str, Any]) -> Recognise:
        build = sherpa_onnx.OfflineRecognizer.from_moonshine
        return _sherpa(build(**spec["files"], tokens=spec["tokens"], num_threads=spec["num_threads"]))

    return f"sherpa-onnx {sherpa_onnx.__version__}", load


def _sherpa_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        **spec["files"],
        "tokens": spec["tokens"],
        "num_threads": spec["num_threads"],
        "feature_dim": spec["num_bins"],
        "decoding_method": spec["search"],
    }


def names_of(found: Any) -> tuple[list[str], bool]:
    """Names of the tokens in a result of sherpa-onnx, and whether these are the ones that it said.

    Python can't read the name of a token that is part of a letter. Then each byte of the text is named.
    """
    try:
        return list(found.tokens), True
    except UnicodeDecodeError:
        return [f"<0x{byte:02X}>" for byte in found.text.strip().encode()], False


def _sherpa(recogniser: Any) -> Recognise:
    def recognise(samples_S: Any, sample_rate: int) -> dict[str, Any]:
        stream = recogniser.create_stream()
        stream.accept_waveform(sample_rate, samples_S)
        recogniser.decode_stream(stream)
        found = stream.result
        return {
            "text": found.text.strip(),
            "tokens": names_of(found)[0],
            "times_s": list(found.timestamps),
        }

    return recognise


def attention() -> Started:
    """onnxruntime, with the program beside an attention model's files."""
    import onnxruntime

    from . import attention_runtime

    def load(spec: dict[str, Any]) -> Recognise:
        paths = {part: Path(path) for part, path in {**spec["files"], "tokens": spec["tokens"]}.items()}
        recogniser = attention_runtime.Recogniser(**paths, num_threads=spec["num_threads"])

        def recognise(samples_S: Any, sample_rate: int) -> dict[str, Any]:
            longest_s = math.inf  # whoever calls has cut long audio
            found = recogniser.recognise(samples_S, sample_rate, longest_s=longest_s, **spec["options"])
            return {"text": found.text, "tokens": [recogniser.pieces[i] for i in found.tokens], "times_s": []}

        return recognise

    return f"onnxruntime {onnxruntime.__version__}", load
