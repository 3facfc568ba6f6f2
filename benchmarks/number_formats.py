"""What each number format costs and wins on a trained system: errors, divergence, bytes, time on one thread.

::

    python benchmarks/number_formats.py recipes/an4/ctc_kd/exp --system teacher --split test

Each row is a compressor with its options, applied to the bundle, exported, and run by onnxruntime. Errors
are those of greedy search on the split; the divergence (nats per frame) is that from the float bundle on 5,
20 and 40 s of the split's audio in a row, and on the 5 s with one full-scale click. Calibration is on dev.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdrecipe.corpus.audio import Utterance, utterances_from_cuts
from kdrecipe.corpus.subsets import drawn_over_speakers
from kdrecipe.data.features import extract, load_cuts
from kdrecipe.interfaces import SAMPLE_RATE, Batch, CompressContext
from kdrecipe.measure.edits import Edits
from kdrecipe.measure.strain import Strain
from kdrecipe.model.bundle import Bundle, number_format
from kdrecipe.text import clean

STEPS: list[dict[str, Any]] = [
    {},
    {"name": "int8_dynamic"},
    {"name": "int8_static", "smooth": 0.0},
    {"name": "int8_static", "smooth": 0.0, "clip": False},
    {"name": "int8_static"},
    {"name": "int4"},
    {"name": "int4", "group": 128},
]
NUM_REPEATS = 5


def calibration(bundle: Bundle, utterances: list[Utterance]) -> Iterator[Batch]:
    """Batches of one utterance."""
    for utterance in utterances:
        features_TF = extract(utterance.samples_S, SAMPLE_RATE, bundle.meta["features"])
        tokens = torch.tensor(bundle.tokens.encode(clean(utterance.text)), dtype=torch.int64)
        yield Batch(
            ids=[utterance.id],
            features_BTF=torch.from_numpy(features_TF)[None],
            lens_B=torch.tensor([len(features_TF)]),
            tokens_BU=tokens[None],
            token_lens_B=torch.tensor([len(tokens)]),
            labelled_B=torch.ones(1, dtype=torch.bool),
        )


class Compressed:
    """A compressed bundle as exporters see it."""

    def __init__(self, bundle: Bundle, step: dict[str, Any], context: CompressContext) -> None:
        self.path, self.name, self.tokens = bundle.path, bundle.name, bundle.tokens
        self.model = copy.deepcopy(bundle.model)
        if step:
            cls = bundle.registry.get("compressors", step["name"])
            compressor = cls(cls.Config(**{k: v for k, v in step.items() if k != "name"}))
            self.model = compressor.finish(compressor.apply(self.model, context))
        self.meta = {**bundle.meta, "number_format": number_format(self.model)}
        self.number_formats = frozenset(self.meta["number_format"].split("+"))


def seconds(runner: Any, features_TF: np.ndarray, head: str) -> float:
    """The least processor time of the encoder and the head on an utterance, over a few runs."""
    lens_B, path = np.array([len(features_TF)]), [[]]
    times = []
    for _ in range(NUM_REPEATS):
        start = time.process_time()
        runner.log_probs_along(features_TF[None], lens_B, path)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp", type=Path, help="a recipe's exp, its stages 1 to 5 done")
    parser.add_argument("--system", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--exporter", default="onnx_ctc")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num", type=int, default=0, help="utterances of the split; default: all")
    parser.add_argument("--steps", help="JSON list of {name, <options>} in place of the usual rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.load(options.exp / "systems" / options.system / f"seed{options.seed}", trust_plugins=True)
    cuts = list(load_cuts(options.exp / "features", options.split))
    utterances = list(utterances_from_cuts(drawn_over_speakers(cuts, options.num or len(cuts))))
    dev = list(utterances_from_cuts(drawn_over_speakers(load_cuts(options.exp / "features", "dev"), 100)))
    context = CompressContext(lambda: calibration(bundle, dev))
    cls = bundle.registry.get("exporters", options.exporter)
    strain = Strain(bundle.model, cls.head, utterances[:40], bundle.meta["features"])
    features = [extract(u.samples_S, SAMPLE_RATE, bundle.meta["features"]) for u in utterances]
    base: tuple[float, float] | None = None
    print("| step | variant | WER % | KL 5 s | 20 s | 40 s | click | MB | smaller | ms for 10 s | faster |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for step in json.loads(options.steps) if options.steps else STEPS:
        with tempfile.TemporaryDirectory() as name:
            compressed: Any = Compressed(bundle, step, context)
            exporter = cls(cls.Config(variants=("fp32",)))
            exporter.export(compressed, Path(name))
            variant = cls.ships(compressed.number_formats)
            runner = exporter.load(Path(name), variant)
            errors = Edits()
            for utterance, features_TF in zip(utterances, features, strict=True):
                said = bundle.tokens.decode(runner.greedy(features_TF))
                errors.add(clean(utterance.text).split(), said.split())
            kls = [f"{found['kl']:.2g}" for found in strain.compare(runner, strain.expected).values()]
            ten_s = np.concatenate(features)[:1000]
            took = seconds(runner, ten_s, cls.head)
            size = sum((Path(name) / file).stat().st_size for file in cls.files[variant].values())
            base = base or (size, took)
            cells = [json.dumps(step), variant, f"{100 * errors.rate:.2f}", *kls, f"{size / 1e6:.2f}"]
            cells += [f"{base[0] / size:.2f}", f"{1000 * took:.0f}", f"{base[1] / took:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
