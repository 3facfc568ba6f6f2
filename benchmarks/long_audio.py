"""Memory and time of every runner on an hour of audio, each in a process of its own.

    python benchmarks/long_audio.py [--minutes 60] [--limit-mb 1500] [--only onnx_ctc ctc_greedy]

The model is a small student with random weights and the heads ``ctc``, ``attention`` and ``rnnt``, made to
say little, as a trained one does. The audio is noise with pauses. ``transcribe`` rows are
``kdrecipe transcribe`` on a bundle (by each search) and on each export; ``runtime`` rows the process that
stage 8 measures; ``recognise.py`` the program of attention exports. Fails if a row needs more than the limit.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from kdrecipe.data.tokens import Tokenizer
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.corpus import WORDS

HEADS = {"ctc": {}, "attention": {"num_layers": 2}, "rnnt": {}}
MODEL = {"name": "conformer", "num_layers": 3, "dim": 64, "heads": HEADS}
SEARCHES = (
    "ctc_greedy", "ctc_prefix_beam", "attention_greedy", "attention_beam", "rnnt_greedy", "rnnt_beam",
)  # fmt: skip
EXPORTERS = ("torchscript", "onnx_ctc", "onnx_attention", "onnx_transducer")
QUIET = 5.0  # added to the logit of the blank, or of the end

WORKER = """
import sys
from pathlib import Path
import soundfile
from kdrecipe.corpus.audio import Utterance, open_audio
from kdrecipe.measure.runtime import measure_export
from kdrecipe.plugin.loader import load_plugins
cls = load_plugins().registry.get("exporters", sys.argv[1])
audio, _ = soundfile.read(sys.argv[3], dtype="float32")
found = measure_export(cls, Path(sys.argv[2]), "fp32", [Utterance("long", audio)])
print(f"peak {found.peak_rss_mb:.0f}")
"""


def make_bundle(directory: Path) -> Bundle:
    """A model that has learnt nothing but to say little."""
    torch.manual_seed(0)
    registry = load_plugins().registry
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS.split(), size=4)) for _ in range(200)]
    tokens = Tokenizer.train(texts, "bpe", 60, directory / "tokens")
    model: Any = build_model(MODEL, input_dim=80, vocab_size=len(tokens), registry=registry).eval()
    model.norm.set_stats(np.full(80, -8.0), np.full(80, 4.0))
    with torch.no_grad():
        outputs = {"ctc": ("proj", 0), "rnnt": ("output", 0), "attention": ("proj", 1)}
        for head, (name, nothing) in outputs.items():
            output = getattr(model.heads[head], name)
            output.weight *= 4
            output.bias[nothing] += QUIET
    meta = {
        "name": "random", "kind": "trained", "parent": None, "seed": 0, "model": MODEL, "compression": [],
        "features": {"name": "fbank", "num_mel_bins": 80}, "plugin_files": {},
    }  # fmt: skip
    bundle = Bundle.save(directory / "bundle", model, tokens, meta)
    for name in EXPORTERS:
        cls = registry.get("exporters", name)
        cls(cls.Config()).export(Bundle.load(bundle.path, registry), directory / name)
    return bundle


def make_audio(path: Path, minutes: float) -> None:
    """Phrases of 1 to 8 s, pauses of 0.1 to 1 s."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
        left = round(minutes * 60 * SAMPLE_RATE)
        while left > 0:
            for level, low_s, high_s in ((0.1, 1, 8), (0.001, 0.1, 1)):
                num_samples = min(left, round(rng.uniform(low_s, high_s) * SAMPLE_RATE))
                file.write(level * rng.standard_normal(num_samples))
                left -= num_samples


def commands(directory: Path, audio: Path) -> dict[str, list[str]]:
    """Row -> what to run."""
    transcribe = [sys.executable, "-m", "kdrecipe.cli", "transcribe"]
    found = {
        f"transcribe, bundle, {search}": [
            *transcribe,
            str(directory / "bundle"),
            str(audio),
            "--decoder",
            search,
        ]
        for search in SEARCHES
    }
    for name in EXPORTERS:
        found[f"transcribe, {name}"] = [*transcribe, str(directory / name), str(audio), "--variant", "fp32"]
    for name in EXPORTERS[1:]:
        found[f"runtime, {name}"] = [sys.executable, "-c", WORKER, name, str(directory / name), str(audio)]
    program = str(directory / "onnx_attention" / "recognise.py")
    found["recognise.py, onnx_attention"] = [sys.executable, program, str(audio), "--variant", "fp32"]
    return found


def run(command: list[str], output: Path) -> tuple[float, float]:
    """Seconds, and the largest resident memory in MB: of the process, or as the process itself says."""
    start, peak_kb = time.perf_counter(), 0
    with output.open("wb") as file, subprocess.Popen(command, stdout=file) as process:
        while process.poll() is None:  # a child's ru_maxrss would begin with what this process has
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak_kb = max([peak_kb, *map(int, re.findall(r"VmHWM:\s+(\d+)", status))])
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ... failed")
    last = output.read_text().splitlines()[-1]
    peak_mb = float(last.split()[1]) if last.startswith("peak ") else peak_kb * 1024 / 1e6
    return time.perf_counter() - start, peak_mb


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--limit-mb", type=float, default=1500)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names contain one of these")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bundle = make_bundle(directory)
        make_audio(directory / "long.wav", options.minutes)
        print(f"{bundle.meta['params']} parameters, {options.minutes:g} minutes of audio, 1 thread\n")
        print("| runner | peak MB | seconds | characters said |\n|---|--:|--:|--:|", flush=True)
        for row, command in commands(directory, directory / "long.wav").items():
            if any(part in row for part in options.only):
                seconds, peak_mb = run(command, directory / "output")
                said = (directory / "output").stat().st_size
                print(f"| {row} | {peak_mb:.0f} | {seconds:.0f} | {said} |", flush=True)
                worst = max(worst, peak_mb)
    print(f"\nat most {worst:.0f} MB, {options.limit_mb:.0f} are allowed")
    return int(worst > options.limit_mb)


if __name__ == "__main__":
    sys.exit(main())
