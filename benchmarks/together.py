#!/usr/bin/env python3
"""Two processes of torchrun against one: are the loss curves the same?

    python benchmarks/together.py [--steps 200] [--work DIR]

Trains a small CTC model, an attention decoder and a transducer, each from a cached teacher, on a
synthetic corpus, once in two processes (gloo) and once in one with ``accumulate: 2``. Prints the
largest relative difference of any step's loss, the speed of both, and exits with 1 above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages.run import run_recipe
from kdrecipe.testing.corpus import make_corpus

TOLERANCE = 1e-4
BATCHES = 13  # of an epoch: the last step has one for two processes

RECIPE = """
corpus: {{name: manifests, root: {corpus}}}
features: {{name: fbank, num_mel_bins: 40}}
tokens: {{name: char}}
seeds: [1]
training:
  {{epochs: {epochs}, batch_duration_s: 6, precision: fp32, schedule: cosine, log_every: 1, flat_start: 0,
   lr: 1e-3, optimizer: adamw, dev_every: 1000}}
systems:
  teacher:
    train:
      model: &model
        {{name: conformer, num_layers: 2, dim: 48, num_heads: 4,
         heads: {{attention: {{num_layers: 1}}, ctc: {{}}, rnnt: {{predictor_dim: 48, joiner_dim: 48}}}}}}
      losses: [{{name: attention, weight: 0.3}}, {{name: ctc, weight: 0.4}}, {{name: rnnt, weight: 0.3}}]
  ctc:
    distill: &kd {{teachers: [teacher], model: *model, losses: [{{name: ctc}}, {{name: kl, head: ctc}}]}}
  attention:
    distill: {{<<: *kd, losses: [{{name: attention}}, {{name: kl, head: attention}}]}}
  rnnt:
    distill: {{<<: *kd, losses: [{{name: rnnt}}, {{name: rnnt_kl}}]}}
"""


def main() -> int:
    """Run both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        work = options.work or Path(made)
        corpus = make_corpus(work / "corpus", num_speakers=6, utterances_per_speaker=11)
        epochs = -(-options.steps // ((BATCHES + 1) // 2))
        (work / "recipe.yaml").write_text(RECIPE.format(corpus=corpus, epochs=epochs))
        run_recipe(load_recipe(work), 0, 4, work=work / "one")
        subprocess.run(["cp", "-r", work / "one", work / "two"], check=True)
        _two(work)
        # The targets stay as they are: of one teacher for both.
        for system in ("ctc", "attention", "rnnt"):
            accumulate = f"systems.{system}.distill.training.accumulate=2"
            run_recipe(
                load_recipe(work, overrides=[accumulate]), 5, 5, work=work / "one", job=f"{system}/seed1"
            )
        worst = [_compare(work, system) for system in ("ctc", "attention", "rnnt")]
    return int(max(worst) > TOLERANCE)


def _two(work: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "kdrecipe.cli", "run", work, "--work", work / "two", "--stage", "5"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command), "--stop-stage", "5"], check=True, env=env)


def _compare(work: Path, system: str) -> float:
    one, two = (_steps(work / name / "systems" / system / "seed1") for name in ("one", "two"))
    assert len(one) == len(two), (len(one), len(two))
    worst = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, two, strict=True))
    speeds = [sorted(e["audio_s_per_s"] for e in steps)[len(steps) // 2] for steps in (one, two)]
    print(
        f"{system:10s} {len(one)} steps, loss {one[0]['loss']:.3f} to {one[-1]['loss']:.3f}; "
        f"largest relative difference {worst:.1e}; "
        f"{speeds[0]:.0f} audio-s/s in one process, {speeds[1]:.0f} in two"
    )
    return worst


def _steps(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "train" / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "step"]


if __name__ == "__main__":
    sys.exit(main())
