"""The parity gate: an export must say what its bundle says.

For every variant of an export, on real utterances: its log-posteriors against the model's, the
tokens they spell, the texts that the device's runtime makes of the audio, and the word errors of
those. Deletions are watched by themselves, since that is how int8 goes wrong first.

Shapes: T frames, V vocabulary, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from kdrecipe.data.audio import SAMPLE_RATE, Utterance
from kdrecipe.data.features import extract
from kdrecipe.errors import ParityError, Problem
from kdrecipe.interfaces import BLANK_ID, BundleLike, Exporter, Runner, float_copy
from kdrecipe.sections import Parity

Item = TypeVar("Item")
PADDED_BATCH = 4  # utterances that are run together, too, to see that padding does no harm


@dataclass
class Edits:
    """Word or token errors, summed.

    Args:
        substitutions: of one item for another.
        deletions: items of the reference that are missing.
        insertions: items that are too many.
        length: items of the reference.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0

    def add(self, reference: Sequence[Item], hypothesis: Sequence[Item]) -> None:
        """Count one utterance."""
        found = edits(reference, hypothesis)
        self.substitutions += found.substitutions
        self.deletions += found.deletions
        self.insertions += found.insertions
        self.length += found.length

    @property
    def errors(self) -> int:
        """All kinds together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per item of the reference; 0 to above 1."""
        return self.errors / max(1, self.length)


@dataclass
class _Comparison:
    """One variant against the bundle, over all utterances."""

    max_diff: float = 0.0
    diff_sum: float = 0.0
    kl_sum: float = 0.0
    num_frames: int = 0
    same_length: bool = True
    tokens: Edits = field(default_factory=Edits)  # of the same features, against the model
    runtime: Edits = field(default_factory=Edits)  # of the runtime's own features, against that
    words: Edits = field(default_factory=Edits)  # of the runtime, against the transcript

    def add_frames(self, expected_TV: np.ndarray, found_TV: np.ndarray) -> None:
        if expected_TV.shape != found_TV.shape:
            self.same_length = False
            return
        expected_TV = expected_TV.astype(np.float64)
        diff_TV = found_TV - expected_TV
        self.max_diff = float(np.maximum(self.max_diff, np.abs(diff_TV).max(initial=0.0)))  # NaN stays NaN
        self.diff_sum += float(np.abs(diff_TV).mean(-1).sum())
        # in this form each term is at least 0, so that rounding can't add up below it
        self.kl_sum += float((np.exp(expected_TV) * (np.expm1(diff_TV) - diff_TV)).sum())
        self.num_frames += len(expected_TV)

    def figures(self) -> dict[str, float | int]:
        frames = max(1, self.num_frames)
        return {
            "max_log_prob_diff": self.max_diff,
            "mean_log_prob_diff": self.diff_sum / frames,
            "kl": self.kl_sum / frames,
            "token_error": self.tokens.rate,
            "runtime_token_error": self.runtime.rate,
            "wer": self.words.rate,
            "deletions": self.words.deletions / max(1, self.words.length),
        }


def check_parity(
    bundle: BundleLike,
    exporter: Exporter,
    directory: Path,
    utterances: Sequence[Utterance],
    limits: Parity | None = None,
    *,
    variants: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Hold every variant of an export to its bundle.

    The fp32 variant answers to the bundle's model with float weights, the int8 variant to the model
    as it is (which of an int8 bundle computes in int8, too).

    Args:
        bundle: what was exported.
        exporter: what exported it.
        directory: where to.
        utterances: a few dozen, with transcripts.
        limits: see :class:`kdrecipe.sections.Parity`.
        variants: those that were exported; None: all that the exporter knows.

    Returns:
        ``{"num_utterances", "num_words", "bundle": {"wer", "deletions"}, <variant>: figures}``: figures
        of each variant: ``max_log_prob_diff``, ``mean_log_prob_diff``, ``kl`` (nats per frame),
        ``token_error``, ``runtime_token_error``, ``wer`` and ``deletions`` (shares, not percent).

    Raises:
        ParityError: naming every bound that broke, with the numbers.
    """
    limits = limits or Parity()
    utterances = list(utterances)[: limits.num_utterances]
    if not utterances:
        raise ParityError("there is no utterance to compare on", where=bundle.name)
    features = [extract(u.samples_S, SAMPLE_RATE, bundle.meta["features"]) for u in utterances]
    own = _words_of_bundle(bundle, features, utterances)
    result: dict[str, Any] = {
        "num_utterances": len(utterances),
        "num_words": own.length,
        "bundle": {"wer": own.rate, "deletions": own.deletions / max(1, own.length)},
    }
    problems: list[Problem] = []
    for variant in exporter.variants if variants is None else variants:
        runner = exporter.load(directory, variant)
        model = bundle.model if variant == "int8" else float_copy(bundle.model)
        expected = [_model_log_probs(model, f) for f in features]
        found = _compare(runner, expected, features, utterances)
        if variant != "int8":  # its activations share a scale over the whole batch
            _add_padded_batch(found, runner, expected, features)
        result[variant] = found.figures()
        problems += _broken(variant, found, own, limits, f"{bundle.name}, {variant}")
    if problems:
        raise ParityError(problems)
    return result


def _model_log_probs(model: nn.Module, features_TF: np.ndarray) -> np.ndarray:
    """(T, V) log-posteriors of one utterance by the bundle's model."""
    with torch.no_grad():
        out = model(torch.from_numpy(features_TF)[None], torch.tensor([len(features_TF)]))
    log_probs_TV: np.ndarray = out.logits["ctc"][0, : int(out.lens_B[0])].log_softmax(-1).numpy()
    return log_probs_TV


def _compare(
    runner: Runner, expected: list[np.ndarray], features: list[np.ndarray], utterances: list[Utterance]
) -> _Comparison:
    """One variant on every utterance by itself, as a device runs it."""
    found = _Comparison()
    for expected_TV, features_TF, utterance in zip(expected, features, utterances, strict=True):
        log_probs_BTV, lens_B = runner.log_probs(features_TF[None], np.array([len(features_TF)]))
        found_TV = log_probs_BTV[0, : lens_B[0]]
        found.add_frames(expected_TV, found_TV)
        tokens = greedy(found_TV)
        found.tokens.add(greedy(expected_TV), tokens)
        said = runner.transcribe(utterance.samples_S, SAMPLE_RATE)
        found.runtime.add(tokens, said.tokens)
        found.words.add(utterance.text.split(), said.text.split())
    return found


def _add_padded_batch(
    found: _Comparison, runner: Runner, expected: list[np.ndarray], features: list[np.ndarray]
) -> None:
    """The first few utterances in one batch, the shorter ones padded with loud nonsense."""
    batch = features[:PADDED_BATCH]
    lens_B = np.array([len(f) for f in batch])
    features_BTF = np.full((len(batch), lens_B.max(), batch[0].shape[1]), 5.0, dtype=np.float32)
    for row, features_TF in zip(features_BTF, batch, strict=True):
        row[: len(features_TF)] = features_TF
    log_probs_BTV, out_lens_B = runner.log_probs(features_BTF, lens_B)
    for expected_TV, log_probs_TV, length in zip(expected, log_probs_BTV, out_lens_B, strict=False):
        found.add_frames(expected_TV, log_probs_TV[:length])


def _words_of_bundle(bundle: BundleLike, features: list[np.ndarray], utterances: list[Utterance]) -> Edits:
    """The bundle's own word errors."""
    words = Edits()
    for features_TF, utterance in zip(features, utterances, strict=True):
        tokens = greedy(_model_log_probs(bundle.model, features_TF))
        words.add(utterance.text.split(), bundle.tokens.decode(tokens).split())
    return words


def _broken(variant: str, found: _Comparison, own: Edits, limits: Parity, where: str) -> list[Problem]:
    """Every bound that a variant breaks."""
    slack = limits.slack
    more_errors = found.words.errors - own.errors
    more_deletions = found.words.deletions - own.deletions
    tokens = found.tokens.rate if found.tokens.errors > slack else 0.0
    runtime = found.runtime.rate if found.runtime.errors > slack else 0.0
    words = max(1, own.length)
    if variant == "int8":
        remedy = _INT8_REMEDY
        bounds = [
            ("divergence, nats per frame", found.figures()["kl"], "max_kl_int8"),
            ("share of tokens that differ", tokens, "max_token_error_int8"),
            (
                "WER, percentage points",
                100 * more_errors / words * (more_errors > slack),
                "max_wer_increase_int8",
            ),
            (
                "deletions, percentage points",
                100 * more_deletions / words * (more_deletions > slack),
                "max_deletion_increase_int8",
            ),
        ]
    else:
        remedy = _FP32_REMEDY
        bounds = [
            ("largest difference of log-probabilities", found.max_diff, "max_log_prob_diff_fp32"),
            ("share of tokens that differ", tokens, "max_token_error_fp32"),
        ]
    problems = [
        Problem(
            f"{what}: {value:.4g}, at most {getattr(limits, name):.4g} allowed (parity.{name})", where, remedy
        )
        for what, value, name in bounds
        if not value <= getattr(limits, name)  # NaN breaks it, too
    ]
    if not found.same_length:
        problems.append(Problem("it gives other numbers of frames than the model", where, _FP32_REMEDY))
    if runtime > limits.max_token_error_runtime:
        what = f"share of tokens that the runtime changes: {runtime:.4g}, at most "
        what += f"{limits.max_token_error_runtime:.4g} allowed (parity.max_token_error_runtime)"
        problems.append(Problem(what, where, _RUNTIME_REMEDY))
    return problems


_FP32_REMEDY = "the graph computes something else: look for Python numbers in forward() that tracing froze"
_INT8_REMEDY = (
    "ship the fp32 file, keep the output layer in float (int8_dynamic: output_layer: false), or on an x86 "
    "processor without VNNI set reduce_range: true under export"
)
_RUNTIME_REMEDY = "the runtime computes other features: it needs 16 kHz audio, and mel bins as Lhotse's Fbank"


def greedy(log_probs_TV: np.ndarray) -> list[int]:
    """Tokens of the best path."""
    best_T = log_probs_TV.argmax(-1)
    previous_T = np.concatenate([[BLANK_ID], best_T[:-1]])
    tokens: list[int] = best_T[(best_T != BLANK_ID) & (best_T != previous_T)].tolist()
    return tokens


def edits(reference: Sequence[Item], hypothesis: Sequence[Item]) -> Edits:
    """Fewest edits from reference to hypothesis; of equally few, those with fewest deletions."""
    # per prefix of the hypothesis: (errors, deletions, insertions, substitutions)
    row = [(j, 0, j, 0) for j in range(len(hypothesis) + 1)]
    for i, expected in enumerate(reference, 1):
        previous, row = row, [(i, i, 0, 0)]
        for j, found in enumerate(hypothesis, 1):
            errors, deletions, insertions, substitutions = previous[j - 1]
            if expected == found:
                row.append(previous[j - 1])
                continue
            row.append(
                min(
                    (errors + 1, deletions, insertions, substitutions + 1),
                    (previous[j][0] + 1, previous[j][1] + 1, *previous[j][2:]),
                    (row[-1][0] + 1, row[-1][1], row[-1][2] + 1, row[-1][3]),
                )
            )
    _, deletions, insertions, substitutions = row[-1]
    return Edits(substitutions, deletions, insertions, len(reference))
