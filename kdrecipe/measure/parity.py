"""The parity gate: an export must give the results of its bundle.

For every variant of an export, on real utterances, it compares the log-posteriors with the model's, along
the model's own greedy path; the tokens that greedy search finds; and the texts that the device's runtime
recognises, with their word errors. Deletions have a limit of their own, since they are the first thing
that goes wrong in few bits. A text that is not what its tokens spell is told from tokens that were heard
otherwise: it is no near tie, but a rule of the runtime.

Shapes: T frames, F feature bins, V vocabulary, M steps of a path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdrecipe.corpus.audio import Utterance
from kdrecipe.data.features import extract
from kdrecipe.errors import ParityError, Problem
from kdrecipe.interfaces import SAMPLE_RATE, Bounds, BundleLike, Exporter, Hypothesis, Runner, float_copy
from kdrecipe.measure.edits import Edits, edits
from kdrecipe.measure.reference import STEPS, Reference, reference
from kdrecipe.measure.spelling import Spelling, speller_of
from kdrecipe.measure.strain import CLICK, Strain
from kdrecipe.recipe.sections import Parity
from kdrecipe.text import clean

PADDED_BATCH = 4  # utterances that are also run as one batch, to check that padding changes nothing


@dataclass
class _Comparison:
    """One variant against the bundle, over all utterances."""

    spelling: Spelling
    max_diff: float = 0.0
    diff_sum: float = 0.0
    kl_sum: float = 0.0
    num_steps: int = 0
    same_length: bool = True
    tokens: Edits = field(default_factory=Edits)  # of the same features, against the model
    runtime: Edits = field(default_factory=Edits)  # of the runtime's own features, against that
    words: Edits = field(default_factory=Edits)  # of the runtime, against the transcript
    more: list[tuple[int, int]] = field(default_factory=list)  # errors and deletions, by utterance
    strain: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_words(self, reference: str, said: Hypothesis, greedy: list[int], own: Edits) -> None:
        """Count one utterance; ``greedy``: tokens by the model's graph, ``own``: the bundle's edits."""
        words = clean(reference).split()
        heard = self.spelling.heard(said, greedy)
        self.runtime.add(greedy, heard)
        self.spelling.add(heard, said.text)
        self.words.add(words, clean(said.text).split())
        found = edits(words, self.spelling.tokens.decode(heard).split())
        self.more.append((found.errors - own.errors, found.deletions - own.deletions))

    def add_steps(self, expected_MV: np.ndarray, found_MV: np.ndarray) -> None:
        if expected_MV.shape != found_MV.shape:
            self.same_length = False
            return
        expected_MV = expected_MV.astype(np.float64)
        diff_MV = found_MV - expected_MV
        self.max_diff = float(np.maximum(self.max_diff, np.abs(diff_MV).max(initial=0.0)))  # NaN stays NaN
        self.diff_sum += float(np.abs(diff_MV).mean(-1).sum())
        # in this form each term is at least 0, so that rounding can't add up below it
        self.kl_sum += float((np.exp(expected_MV) * (np.expm1(diff_MV) - diff_MV)).sum())
        self.num_steps += len(expected_MV)

    def figures(self) -> dict[str, Any]:
        steps = max(1, self.num_steps)
        return {
            "max_log_prob_diff": self.max_diff,
            "mean_log_prob_diff": self.diff_sum / steps,
            "kl": self.kl_sum / steps,
            "token_error": self.tokens.rate,
            "runtime_token_error": self.runtime.rate,
            "wer": self.words.rate,
            "deletions": self.words.deletions / max(1, self.words.length),
            "rewritten": self.spelling.rate,
            "strain": self.strain,
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
    """Compare every variant of an export with its bundle.

    A variant that computes in floats is compared with the bundle's model in float weights, any other with the
    model as it is (that of a quantised bundle computes in integers, too). Long audio and audio with a click
    are compared, too (:mod:`kdrecipe.measure.strain`), within the same bounds.

    Args:
        bundle: the bundle that was exported.
        exporter: the exporter that wrote the files.
        directory: where they are.
        utterances: a few dozen, with transcripts.
        limits: see :class:`kdrecipe.recipe.sections.Parity`.
        variants: those that were exported; None: all that are there.

    Returns:
        ``{"num_utterances", "num_words", "bundle": {"wer", "deletions"}, <variant>: figures}``: figures
        of each variant: ``max_log_prob_diff``, ``mean_log_prob_diff``, ``kl`` (nats per frame, of
        attention per token), ``token_error``, ``runtime_token_error``, ``wer``, ``deletions`` and
        ``rewritten`` (shares, not percent), and ``strain``: see
        :meth:`kdrecipe.measure.strain.Strain.compare`.

    Raises:
        ParityError: names every limit that was exceeded, with the numbers.
    """
    limits = limits or Parity()
    utterances = list(utterances)[: limits.num_utterances]
    if not utterances:
        raise ParityError("there is no utterance to compare on", where=bundle.name)
    head = exporter.head
    features = [extract(u.samples_S, SAMPLE_RATE, bundle.meta["features"]) for u in utterances]
    own_references = [reference(bundle.model, head, f) for f in features]
    own, own_edits = Edits(), []
    for said, utterance in zip(own_references, utterances, strict=True):
        words = clean(utterance.text).split(), bundle.tokens.decode(said.tokens).split()
        own.add(*words)
        own_edits.append(edits(*words))
    result: dict[str, Any] = {
        "num_utterances": len(utterances),
        "num_words": own.length,
        "bundle": {"wer": own.rate, "deletions": own.deletions / max(1, own.length)},
    }
    spoken = [found.tokens for found in own_references]
    strain = Strain(bundle.model, head, utterances, bundle.meta["features"], spoken)
    in_floats = own_references, strain.expected
    if any(hasattr(m, "to_float") for m in bundle.model.modules()):
        model = float_copy(bundle.model)
        in_floats = [reference(model, head, f) for f in features], strain.by(model, head)
    problems: list[Problem] = []
    speller = speller_of(exporter, bundle.tokens.pieces)
    runtime = exporter.runtime.name if exporter.runtime else "the export's program"
    for variant in _there(exporter, directory) if variants is None else variants:
        kind = exporter.variants[variant]
        runner = exporter.load(directory, variant)
        expected, under_strain = in_floats if kind.in_floats else (own_references, strain.expected)
        found = _Comparison(Spelling(bundle.tokens, speller, runtime))
        _compare(found, runner, expected, own_edits, features, utterances)
        _add_padded_batch(found, runner, expected, features)
        found.strain = strain.compare(runner, under_strain)
        result[variant] = found.figures()
        held = _Held(
            limits.bounds(variant, kind.bounds), kind.remedy, f"{bundle.name}, {head} {variant}", STEPS[head]
        )
        problems += held.broken(found, own, limits)
    if problems:
        raise ParityError(problems)
    return result


def _there(exporter: Exporter, directory: Path) -> list[str]:
    """The variants whose files are in a directory."""
    return [
        variant
        for variant, files in exporter.files.items()
        if all((directory / name).is_file() for name in files.values())
    ]


def _compare(
    found: _Comparison,
    runner: Runner,
    expected: list[Reference],
    own_edits: list[Edits],
    features: list[np.ndarray],
    utterances: list[Utterance],
) -> None:
    """One variant on one utterance at a time, as a device runs it."""
    rows = zip(expected, own_edits, features, utterances, strict=True)
    for wanted, own, features_TF, utterance in rows:
        (found_MV,) = runner.log_probs_along(features_TF[None], np.array([len(features_TF)]), [wanted.path])
        found.add_steps(wanted.log_probs_MV, found_MV)
        tokens = runner.greedy(features_TF)
        found.tokens.add(wanted.tokens, tokens)
        found.add_words(utterance.text, runner.transcribe(utterance.samples_S, SAMPLE_RATE), tokens, own)


def _add_padded_batch(
    found: _Comparison, runner: Runner, expected: list[Reference], features: list[np.ndarray]
) -> None:
    """The first few utterances in one batch; the padding of the shorter ones has values far from silence."""
    batch = features[:PADDED_BATCH]
    lens_B = np.array([len(f) for f in batch])
    features_BTF = np.full((len(batch), lens_B.max(), batch[0].shape[1]), 5.0, dtype=np.float32)
    for row, features_TF in zip(features_BTF, batch, strict=True):
        row[: len(features_TF)] = features_TF
    paths = [wanted.path for wanted in expected[: len(batch)]]
    rows = runner.log_probs_along(features_BTF, lens_B, paths)
    for wanted, found_MV in zip(expected, rows, strict=False):
        found.add_steps(wanted.log_probs_MV, found_MV)


@dataclass
class _Held:
    """What a variant is held to.

    Args:
        bounds: of it.
        remedy: where one is exceeded.
        where: names system, head and variant.
        step: what a step of the head's path is called.
    """

    bounds: Bounds
    remedy: str
    where: str
    step: str

    def broken(self, found: _Comparison, own: Edits, limits: Parity) -> list[Problem]:
        """Every bound that it exceeds."""
        slack, words = limits.slack, max(1, own.length)
        more_errors, more_deletions = (_beyond_chance(m, slack) for m in zip(*found.more, strict=True))
        tokens = found.tokens.rate if found.tokens.errors > slack else 0.0
        problems = [
            *self._over("largest difference of log-probabilities", found.max_diff, "max_log_prob_diff"),
            *self._over(f"divergence, nats per {self.step}", found.figures()["kl"], "max_kl"),
            *self._over("share of tokens that differ", tokens, "max_token_error"),
            *self._over("WER, percentage points", 100 * more_errors / words, "max_wer_increase"),
            *self._over(
                "deletions, percentage points", 100 * more_deletions / words, "max_deletion_increase"
            ),
        ]
        for name, figures in found.strain.items():
            of_it = f" ({_STRAINS.get(name, f'{name} of audio')})"
            for what, figure, bound in (
                ("largest difference of log-probabilities", "max_log_prob_diff", "max_log_prob_diff"),
                (f"divergence, nats per {self.step}", "kl", "max_kl"),
                (f"share of {self.step}s whose best token differs", "step_error", "max_token_error"),
            ):
                problems += self._over(what + of_it, figures[figure], bound)
        if not found.same_length:
            what = f"its number of {self.step}s differs from the model's"
            problems.append(Problem(what, self.where, _LENGTH_REMEDY))
        # If the runtime's features differ from those of training, this shows it. With few bits, the last
        # digits of a feature decide how activations are rounded, so the limit is that of the tokens.
        limit, name = limits.max_token_error_runtime, "max_token_error_runtime"
        if self.bounds.max_token_error is not None and self.bounds.max_token_error > limit:
            limit, name = self.bounds.max_token_error, "max_token_error"
        runtime = found.runtime.rate if found.runtime.errors > slack else 0.0
        if runtime > limit:
            what = f"share of tokens that the runtime changes: {runtime:.4g}, at most {limit:.4g}"
            problems.append(Problem(f"{what} allowed (parity.{name})", self.where, _RUNTIME_REMEDY))
        if found.spelling.rate > limits.max_rewritten:  # no slack: this is no near tie
            problems.append(found.spelling.problem(self.where, limits.max_rewritten))
        return problems

    def _over(self, what: str, value: float, name: str) -> list[Problem]:
        limit: float | None = getattr(self.bounds, name)
        if limit is None or value <= limit:  # NaN is not
            return []
        return [
            Problem(
                f"{what}: {value:.4g}, at most {limit:.4g} allowed (parity.{name})", self.where, self.remedy
            )
        ]


def _beyond_chance(more: Sequence[int], slack: int) -> int:
    """By how much all utterances together are worse, 0 if by no more than near ties would make them.

    Were each utterance's difference as likely the other way round, their sum would stay within three
    standard deviations (the root of their squares' sum) 999 times in 1000: a recipe makes dozens of
    such comparisons, and must not fail by the luck of one.
    """
    total = sum(more)
    return total if total > max(slack, 3 * math.sqrt(sum(m * m for m in more))) else 0


_STRAINS = {CLICK: "audio with one click"}
_LENGTH_REMEDY = "the graph computes something else: look for Python numbers in forward() that tracing froze"
_RUNTIME_REMEDY = "the runtime computes other features: it needs 16 kHz audio, and mel bins as Lhotse's Fbank"
