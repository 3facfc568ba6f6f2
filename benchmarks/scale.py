#!/usr/bin/env python3
"""How memory and time grow with the number of cuts: manifests of 10 thousand, 100 thousand, 1 million.

    python benchmarks/scale.py [--cuts 10000 100000 1000000] [--only NAME ...] [--max-gb 3]

No audio is written: all cuts share one array of features. Each measurement is a process of its own;
memory is its peak, less that of importing what it uses. A process that would take more than
``--max-gb`` is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.artifacts import list_result, write_jsonl_gz
from kdrecipe.data.stored_cuts import StoredCuts

FRAMES, BINS = 300, 80
WORDS = ["SUN", "MOON", "RIVER", "STONE", "CLOUD", "FOREST", "WINTER", "SUMMER"]


def cuts(number: int) -> Iterator[dict[str, Any]]:
    """As stage 1 writes them."""
    rng = np.random.default_rng(0)
    for k in range(number):
        duration = round(float(rng.uniform(2, 16)), 2)
        text = " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), round(2.5 * duration)))
        recording = {
            "id": f"speaker{k % 997}-chapter{k // 50}-{k:07d}",
            "num_samples": round(duration * 16000),
        }
        recording |= {"sampling_rate": 16000, "duration": duration, "channel_ids": [0]}
        recording["sources"] = [{"type": "file", "channels": [0], "source": f"audio/{recording['id']}.flac"}]
        features = {"type": "kaldi-fbank", "num_frames": FRAMES, "num_features": BINS, "frame_shift": 0.01}
        features |= {"sampling_rate": 16000, "start": 0, "duration": duration, "storage_type": "numpy_files"}
        features |= {"storage_path": "storage/train", "storage_key": "shared.npy", "channels": 0}
        supervision = {
            "id": recording["id"],
            "recording_id": recording["id"],
            "start": 0.0,
            "duration": duration,
        }
        supervision |= {"channel": 0, "text": text, "speaker": f"speaker{k % 997}"}
        cut = {"id": recording["id"], "start": 0, "duration": duration, "channel": 0}
        yield cut | {
            "supervisions": [supervision], "features": features, "recording": recording, "type": "MonoCut"
        }  # fmt: skip


def write(folder: Path, number: int) -> None:
    """Manifests and a features directory."""
    storage = folder / "features" / "storage" / "train"
    storage.mkdir(parents=True)
    np.save(storage / "shared.npy", np.zeros((FRAMES, BINS), np.float32))
    write_jsonl_gz(folder / "features" / "train.jsonl.gz", cuts(number))
    manifests = folder / "manifests" / "train"
    write_jsonl_gz(Path(f"{manifests}_recordings.jsonl.gz"), (cut["recording"] for cut in cuts(number)))
    write_jsonl_gz(
        Path(f"{manifests}_supervisions.jsonl.gz"), (cut["supervisions"][0] for cut in cuts(number))
    )
    StoredCuts(folder / "features" / "train.jsonl.gz")  # writes the index, as stage 1 does


class Letters:
    """Tokens, one per letter."""

    vocab_id = "letters"

    def __len__(self) -> int:
        return 32

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 29 for letter in text]


# ---------------------------------------------------------------- what is measured


def spoken(folder: Path) -> None:
    """The cuts that stage 1 computes features of."""
    from kdrecipe.data.features import SplitCuts

    for _ in SplitCuts(folder / "manifests", "train"):
        pass


def load(folder: Path) -> None:
    """The training cuts, as stages 3 to 6 begin with them."""
    from kdrecipe.data.features import load_cuts

    load_cuts(folder / "features", "train")


def start(folder: Path) -> None:
    """A training start: cuts, the steps of a hundred epochs, plan of the first, first batch."""
    batches = _batches(folder)
    sum(batches.num_batches(epoch) for epoch in range(100))
    batches.load(batches.epoch(0)[0])


def resume(folder: Path) -> None:
    """The same in the middle of the hundredth epoch; the checkpoint knows the steps of all."""
    batches = _batches(folder)
    plan = batches.epoch(99)
    batches.load(plan[len(plan) // 2])


def freshness(folder: Path) -> None:
    """Whether a finished stage of so many files is up to date."""
    from kdrecipe.jobs.stamps import Job, why_run

    job = Job(1, "features", folder / "stamped", {}, lambda out: None)
    assert why_run(job, {job.name: job}) is None


def _batches(folder: Path) -> Any:
    from kdrecipe.data.batches import CutBatches
    from kdrecipe.data.features import load_cuts

    listed: Any = load_cuts(folder / "features", "train")
    return CutBatches(listed, Letters(), batch_duration_s=600, seed=1)


def _stamped(folder: Path, number: int) -> None:
    """Today's layout: an array per cut."""
    out = folder / "stamped"
    for k in range(number):
        path = out / f"{k // 1000:03d}" / f"{k}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files, folders = list_result(out)
    stamp = {"inputs": {}, "needs": {}, "content": "", "files": files, "folders": folders, "sources": None}
    (out / "stamp.json").write_text(json.dumps(stamp))


MEASURED: dict[str, Callable[[Path], None]] = {
    "spoken": spoken, "load": load, "start": start, "resume": resume, "freshness": freshness
}  # fmt: skip


def child(name: str, folder: Path) -> None:
    """Measure one thing in this process."""
    import lhotse  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    MEASURED[name](folder)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"kb": peak - before, "seconds": seconds}))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cuts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", choices=MEASURED, nargs="+", default=list(MEASURED))
    parser.add_argument("--max-gb", type=float, default=3.0)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    print(f"{'':10s}{'cuts':>10s}{'seconds':>10s}{'MB':>10s}{'bytes/cut':>12s}")
    for number in options.cuts:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            write(folder, number)
            for name in options.only:
                if name == "freshness":
                    _stamped(folder, number)
                print(f"{name:10s}{number:10d}{_measured(name, folder, number, options.max_gb)}", flush=True)


def _measured(name: str, folder: Path, number: int, max_gb: float) -> str:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(max_gb * 2**30), int(max_gb * 2**30)))

    command = [sys.executable, __file__, "--child", name, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=limit, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"  failed: {last[:80]}"
    found = json.loads(done.stdout)
    each = 1024 * found["kb"] / number
    return f"{found['seconds']:10.1f}{found['kb'] / 1024:10.0f}{each:12.0f}"


if __name__ == "__main__":
    main()
