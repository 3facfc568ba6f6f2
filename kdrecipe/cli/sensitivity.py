"""What int8, int4 and pruning cost and win in each layer of a bundle, and where its export parts from it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrecipe.artifacts import write_atomic, write_json
from kdrecipe.cli.models import exporter_of
from kdrecipe.corpus.audio import Utterance
from kdrecipe.errors import DataError, KdrecipeError, ParityError
from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.report.sensitivity import sensitivity_page, sensitivity_text

if TYPE_CHECKING:
    from kdrecipe.model.bundle import Bundle

NUM_UTTERANCES = 32


def sensitivity(
    path: Path,
    *,
    data: Path | None = None,
    split: str = "dev",
    most: int | None = None,
    out: Path | None = None,
    trust_plugins: bool = False,
) -> dict[str, Any]:
    """Measure, print the layers that stand out, and compare the export.

    Args:
        path: the bundle's directory.
        data: manifests or a recipe's work directory; None: of the work directory that the bundle is in.
        split: of ``data``.
        most: at most so many utterances; None: 32.
        out: a directory for ``sensitivity.json`` and ``sensitivity.html``.
        trust_plugins: run the plugin files that the bundle brings.

    Returns:
        See :func:`kdrecipe.measure.sensitivity.sensitivity`; also ``export``: what the parity gate says.

    Raises:
        KdrecipeError: no bundle, or one with integer weights.
        DataError: no utterances with transcripts.
    """
    from kdrecipe.data.features import extract
    from kdrecipe.measure import sensitivity as measure
    from kdrecipe.model.bundle import Bundle

    bundle = Bundle.load(path, trust_plugins=trust_plugins)
    if any(hasattr(m, "to_float") for m in bundle.model.modules()):
        raise KdrecipeError(
            "its layers are stored as integers already",
            where=str(path),
            remedy="give the bundle that it was made from",
        )
    utterances = _utterances(path, data, split, most)
    features = [extract(u.samples_S, SAMPLE_RATE, bundle.meta["features"]) for u in utterances]
    head = next(iter(bundle.meta["model"]["heads"]))
    texts = [u.text for u in utterances]
    found = measure.sensitivity(bundle.model, head, bundle.tokens, features, texts, _progress)
    found["export"] = _of_export(bundle, utterances, features)
    print(sensitivity_text(found))
    if out is not None:
        write_json(out / "sensitivity.json", found)
        write_atomic(out / "sensitivity.html", sensitivity_page(found, bundle.name))
        print(f"all layers, and a plot: {out / 'sensitivity.html'}")
    return found


def _utterances(path: Path, data: Path | None, split: str, most: int | None) -> list[Utterance]:
    from kdrecipe.data.test_sets import find_manifests, read_test_set

    folder = data or next((above for above in path.absolute().parents if find_manifests(above)), None)
    if folder is None:
        raise DataError(
            "there are no manifests above this bundle to measure on",
            where=str(path),
            remedy="--data DIRECTORY of manifests, or a recipe's work directory (exp)",
        )
    utterances = list(read_test_set(folder, split, most or NUM_UTTERANCES))
    if not any(u.text for u in utterances):
        raise DataError(f"the split {split!r} has no transcripts", where=str(folder))
    return utterances


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} changes", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _of_export(bundle: Bundle, utterances: Sequence[Utterance], features: Sequence[np.ndarray]) -> list[str]:
    """What the parity gate says of the bundle's export and, if it fails, the first layer that differs."""
    from kdrecipe.measure.parity import check_parity

    exporter = exporter_of(bundle)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        variants = list(exporter.export(bundle, directory))
        said = []
        for variant in variants:
            try:
                check_parity(bundle, exporter, directory, utterances, variants=[variant])
                said.append(f"export {variant}: within the bounds of the parity gate")
            except ParityError as error:
                said += [f"export {variant}: {problem.what}" for problem in error.problems]
                file = directory / next(iter(exporter.files[variant].values()))
                said.append(_parting(bundle, features[0], file, variant))
    return said


def _parting(bundle: Bundle, features_TF: np.ndarray, file: Path, variant: str) -> str:
    from kdrecipe.measure.parting import CLOSE, CLOSE_INTEGERS, distances, first_parting

    if file.suffix != ".onnx":
        return f"export {variant}: tensors of {file.suffix} files can't be looked at"
    found = distances(bundle.model, features_TF, file)
    first = first_parting(found, CLOSE if variant == "fp32" else CLOSE_INTEGERS)
    if first is None:
        return f"export {variant}: all layers agree; what follows them does not"
    return f"export {variant}: the first layer that differs is {first.layer}, by {first.distance:.1%}"
