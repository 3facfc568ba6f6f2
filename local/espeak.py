"""Speech from espeak-ng, in a separate process.

espeak-ng is free software under the GPL-3. It comes with the package ``espeakng-loader``, which
brings the library and its data; neither is needed by anything else here. It keeps hidden state
from one utterance to the next, so every voice gets a fresh process: what it says then depends on
the request alone. That process is this file run as a program: standard library only, quick to start.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

SAMPLE_RATE = 22050

# of speak_lib.h
_SYNCHRONOUS, _UTF8, _CHARACTERS = 2, 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4


@dataclass(frozen=True)
class Voice:
    """How espeak-ng sounds.

    Args:
        name: language and variant, such as ``en-us+f2``.
        rate: words per minute, 80 to 450.
        pitch: 0 to 100, 50 being the voice's own.
        range: of the pitch, 0 (monotone) to 100.
    """

    name: str
    rate: int = 175
    pitch: int = 50
    range: int = 50


def synthesise(voice: Voice, texts: Sequence[str], max_duration_s: float | None = None) -> list[np.ndarray]:
    """Speak texts one after the other.

    Args:
        voice: one voice for all of them.
        texts: lower-case; single letters but ``a`` and ``i`` are spelled.
        max_duration_s: stop after the text with which this much has been spoken.

    Returns:
        int16 (S,) at :data:`SAMPLE_RATE`, one array per text spoken.

    Raises:
        MissingExtra: if ``espeakng-loader`` is not installed.
        DataError: if espeak-ng fails (no such voice, a crash).
    """
    import numpy as np

    from kdrecipe.errors import DataError, MissingExtra

    try:
        import espeakng_loader as loader
    except ImportError:
        raise MissingExtra(
            "espeakng-loader", "corpus 'voice_commands'", "pip install 'kdrecipe[espeak]'"
        ) from None
    request = {
        "library": loader.get_library_path(),
        "data": loader.get_data_path(),
        "voice": asdict(voice),
        "texts": list(texts),
        "max_samples": None if max_duration_s is None else round(max_duration_s * SAMPLE_RATE),
    }
    # -I: nothing of the caller's paths and environment; -S: no site-packages, which it does not need.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(Path(__file__).absolute())],
        input=json.dumps(request).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = said[-1] if said else f"exit status {done.returncode}"
        raise DataError(
            f"espeak-ng failed: {why}",
            where=voice.name,
            remedy="pip install --force-reinstall espeakng-loader, or leave this voice out",
        )
    pieces, offset = [], 0
    while offset < len(done.stdout):
        size = int.from_bytes(done.stdout[offset : offset + 4], "little")
        pieces.append(np.frombuffer(done.stdout, np.int16, size, offset + 4))
        offset += 4 + 2 * size
    return pieces


def _serve(request: dict[str, Any], out: BinaryIO) -> None:
    """Speak a request; each text's samples go out as a count (4 bytes) and int16 values."""
    library = ctypes.CDLL(request["library"])
    samples = bytearray()

    def collect(wave: int | None, count: int, _events: int | None) -> int:
        if wave and count > 0:
            samples.extend(ctypes.string_at(wave, 2 * count))
        return 0

    # held by name as long as the library may call it
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(collect)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, request["data"].encode(), 0)
    if rate != SAMPLE_RATE:
        raise SystemExit(f"espeak_Initialize gave {rate}, expected a rate of {SAMPLE_RATE}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of its breath noise; else it is the time of day
    library.espeak_SetSynthCallback(callback)
    voice = request["voice"]
    if library.espeak_SetVoiceByName(voice["name"].encode()):
        raise SystemExit(f"no voice {voice['name']!r}")
    for parameter, value in ((_RATE, voice["rate"]), (_PITCH, voice["pitch"]), (_RANGE, voice["range"])):
        library.espeak_SetParameter(parameter, value, 0)
    total = 0
    for text in request["texts"]:
        samples.clear()
        raw = text.encode() + b"\0"
        if library.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, _CHARACTERS, 0, _UTF8, None, None):
            raise SystemExit(f"can't speak {text!r}")
        out.write((len(samples) // 2).to_bytes(4, "little"))
        out.write(samples)
        total += len(samples) // 2
        if request["max_samples"] is not None and total >= request["max_samples"]:
            break
    out.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.stdin.buffer.read()), sys.stdout.buffer)
