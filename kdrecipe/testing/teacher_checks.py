"""What every teacher has to do, as checks: padding, neighbours, shapes, rates, vocabularies, gradients.

B utterances, S samples, T frames, U tokens, K kept classes, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdrecipe.errors import DataError
from kdrecipe.frames import valid_frames
from kdrecipe.interfaces import (
    BLANK_ID,
    FORCED_KINDS,
    FRAME_KINDS,
    FRAME_SAMPLES,
    SAMPLE_RATE,
    VOCABULARY_KINDS,
    Batch,
    Hidden,
    Hypothesis,
    LatticePosteriors,
    NBest,
    Posteriors,
    TargetItem,
    Targets,
    TargetSpec,
)
from kdrecipe.testing.checks import CheckSkipped, by_id, check_config_strict, require
from kdrecipe.testing.models import random_batch

INPUT_DIM = 80
LENS = (113, 47, 90)
"""Feature frames of the utterances that teachers are tried with: 0.5 to 1.1 s."""
TEXTS = ("one two three", "four", "five six")
TOLERANCE = 2e-3
"""Of values, relative to the largest: matrix products depend a little on the shapes."""


@dataclass(frozen=True)
class TeacherCase:
    """A teacher class under test, with its options.

    Args:
        cls: the class.
        config: its options.
        input_dim: F, for teachers that hear features.
    """

    cls: Any
    config: Any
    input_dim: int = INPUT_DIM

    @cached_property
    def teacher(self) -> Any:
        """The teacher, loaded on the CPU once for all checks."""
        teacher = self.cls(self.config)
        teacher.load(torch.device("cpu"))
        return teacher

    @cached_property
    def specs(self) -> list[TargetSpec]:
        """What it provides."""
        return list(self.teacher.provides())

    def batch(self, lens: Sequence[int] = LENS, *, seed: int = 0) -> Batch:
        """Labelled utterances of noise that swells, with their audio; the second has no label."""
        batch = random_batch(
            lens, input_dim=self.input_dim, num_tokens=[2 + i % 2 for i in range(len(lens))], seed=seed
        )
        rng = torch.Generator().manual_seed(seed)
        sample_lens_B = batch.lens_B * FRAME_SAMPLES
        length = int(sample_lens_B.max())
        swell_S = torch.arange(length).div(SAMPLE_RATE / 9).sin().abs()
        samples_BS = 0.1 * torch.randn(len(lens), length, generator=rng) * swell_S
        inside_BS = torch.arange(length) < sample_lens_B[:, None]
        labelled_B = torch.arange(len(lens)) != 1
        token_lens_B = batch.token_lens_B * labelled_B
        places_BU = torch.arange(batch.tokens_BU.shape[1])
        return replace(
            batch,
            tokens_BU=batch.tokens_BU.masked_fill(places_BU >= token_lens_B[:, None], BLANK_ID),
            token_lens_B=token_lens_B,
            labelled_B=labelled_B,
            texts=[TEXTS[i % len(TEXTS)] if labelled_B[i] else "" for i in range(len(lens))],
            samples_BS=samples_BS * inside_BS,
            sample_lens_B=sample_lens_B,
        )

    def targets(self, batch: Batch, needs: Sequence[TargetSpec] | None = None) -> Targets:
        """What it says of ``batch``; None: all that it provides."""
        needs = self.specs if needs is None else needs
        targets: Targets = self.teacher.targets(batch, needs) if needs else Targets()
        return targets

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """What it recognises.

        Raises:
            CheckSkipped: it recognises nothing, as it says.
        """
        try:
            found: list[Hypothesis] = self.teacher.hypotheses(batch)
        except DataError as error:
            raise CheckSkipped(f"it recognises nothing: {error.problems[0].what}") from None
        return found

    def texts(self, batch: Batch) -> list[str] | None:
        """Its hypotheses' words; None if it recognises nothing."""
        try:
            return [hypothesis.text for hypothesis in self.hypotheses(batch)]
        except CheckSkipped:
            return None


def check_provides_valid(case: TeacherCase) -> None:
    """Each target is declared once, before weights are read: size, frame shift and vocabulary."""
    specs = list(case.cls(case.config).provides())
    keys = [spec.key for spec in specs]
    require(len(set(keys)) == len(keys), f"declared twice: {sorted({k for k in keys if keys.count(k) > 1})}")
    for spec in specs:
        if spec.kind != "hypotheses" and spec.kind != "codebooks":
            require(bool(spec.dim and spec.dim > 0), f"{spec.key} has no dim")
        if spec.kind in FRAME_KINDS:
            require(bool(spec.frame_shift_s and spec.frame_shift_s > 0), f"{spec.key} has no frame_shift_s")
        if spec.kind in VOCABULARY_KINDS:
            require(bool(spec.vocab_id), f"{spec.key} has no vocab_id")


def check_describes_itself(case: TeacherCase) -> None:
    """``input`` is ``features`` or ``audio``, ``files`` exist, ``num_params`` is a number or None."""
    teacher = case.cls(case.config)
    require(teacher.input in ("features", "audio"), f"input is {teacher.input!r}")
    require(len(teacher.files) > 0, "it has no files: nothing would tell when it changes")
    missing = [str(path) for path in teacher.files if not Path(path).is_file()]
    require(not missing, f"no such file: {', '.join(missing[:3])}")
    num_params = case.teacher.num_params
    require(num_params is None or num_params > 0, f"num_params is {num_params}")


def check_padding_invariance(case: TeacherCase) -> None:
    """More padding changes nothing."""
    batch = case.batch()
    samples_BS, features_BTF = batch.samples_BS, batch.features_BTF
    assert samples_BS is not None
    padded = replace(
        batch,
        features_BTF=F.pad(features_BTF, (0, 0, 0, 40), value=7.0),
        samples_BS=F.pad(samples_BS, (0, 40 * FRAME_SAMPLES)),
    )
    want, found = case.targets(batch), case.targets(padded)
    for row in range(len(batch)):
        _same(case, want, row, found, row, "with more padding")
    require(case.texts(batch) == case.texts(padded), "hypotheses change with more padding")


def check_batch_invariance(case: TeacherCase) -> None:
    """What it says of an utterance does not depend on the others of the batch."""
    batch = case.batch()
    together, texts = case.targets(batch), case.texts(batch)
    for row in range(len(batch)):
        alone = _only(batch, row)
        _same(case, together, row, case.targets(alone), 0, "alone")
        require(texts is None or case.texts(alone) == [texts[row]], f"the hypothesis of {row} changes alone")


_ITEMS: dict[str, type] = {
    "hidden": Hidden,
    "token_hidden": Hidden,
    "rnnt_lattice": LatticePosteriors,
    "hypotheses": NBest,
}


def check_declared_shapes(case: TeacherCase) -> None:
    """Targets have the declared keys, kinds and sizes, in float32, and as many positions as their texts."""
    batch = case.batch()
    targets = case.targets(batch)
    asked = {spec.key for spec in case.specs}
    require(set(targets.items) == asked, f"asked for {sorted(asked)}, given {sorted(targets.items)}")
    for spec in case.specs:
        item = targets.items[spec.key]
        kind = _ITEMS.get(spec.kind, Posteriors)
        require(isinstance(item, kind), f"{spec.key} is a {type(item).__name__}, not a {kind.__name__}")
        for name, values in _tensors(item):
            require(len(values) == len(batch), f"{spec.key}.{name} has {len(values)} rows for {len(batch)}")
            if name.startswith(("values", "log_")):
                require(values.dtype == torch.float32, f"{spec.key}.{name} is {values.dtype}")
        if not isinstance(item, Hidden | Posteriors):
            continue
        values = item.values_BTD if isinstance(item, Hidden) else item.log_probs_BTK
        require(
            values.shape[-1] == spec.dim, f"{spec.key} has size {values.shape[-1]}, {spec.dim} is declared"
        )
        longest = int(item.lens_B.max())
        require(
            values.shape[1] >= longest, f"{spec.key} has {values.shape[1]} positions, its lengths {longest}"
        )
        if spec.kind == "token_logits":
            _check_along(spec, targets, item.lens_B)


def check_rates(case: TeacherCase) -> None:
    """There are as many frames as the duration and the declared frame shift say, within one."""
    batch = case.batch((113, 47, 90, 160))
    targets = case.targets(batch)
    for spec in case.specs:
        if spec.kind not in FRAME_KINDS:
            continue
        assert spec.frame_shift_s is not None
        found = targets.items[spec.key].lens_B.tolist()
        for frames, length in zip(found, batch.lens_B.tolist(), strict=True):
            duration_s = length * FRAME_SAMPLES / SAMPLE_RATE
            wanted = round(duration_s / spec.frame_shift_s)
            require(
                abs(frames - wanted) <= 1,
                f"{spec.key}: {frames} frames of {spec.frame_shift_s} s for {duration_s:g} s, not {wanted}",
            )


def check_no_gradient(case: TeacherCase) -> None:
    """Targets carry no gradient and can stand in a graph of the student's; the weights stay as they are."""
    batch = case.batch()
    with torch.enable_grad():
        targets = case.targets(batch)
    for spec in case.specs:
        for name, values in _tensors(targets.items[spec.key]):
            require(not values.requires_grad, f"{spec.key}.{name} carries a gradient")
            require(not values.is_inference(), f"{spec.key}.{name} is an inference tensor: use no_grad")


def check_normalised(case: TeacherCase) -> None:
    """Posteriors sum to 1, also with ``top_k`` classes and the mass of the rest."""
    specs = [spec for spec in case.specs if spec.kind in ("frame_logits", "token_logits")]
    if not specs:
        raise CheckSkipped("it gives no posteriors")
    for top_k in (None, 2):
        targets = case.targets(case.batch(), [replace(spec, top_k=top_k) for spec in specs])
        for spec in specs:
            item = targets.items[spec.key]
            assert isinstance(item, Posteriors)
            parts = [valid_frames(item.log_probs_BTK, item.lens_B)]
            if item.log_tail_BT is not None:
                parts.append(valid_frames(item.log_tail_BT[..., None], item.lens_B))
            off = float(torch.cat(parts, -1).detach().logsumexp(-1).abs().max())
            what = spec.key if top_k is None else f"{spec.key} with top_k: {top_k}"
            require(off < TOLERANCE, f"{what}: posteriors sum to exp({off:.3g}) at worst")
            num_kept = item.log_probs_BTK.shape[-1]
            require(top_k in (None, num_kept), f"{what} gives {num_kept} classes")


def check_same_twice(case: TeacherCase) -> None:
    """Asked twice, it says the same."""
    batch = case.batch()
    first, second = case.targets(batch), case.targets(batch)
    for row in range(len(batch)):
        _same(case, first, row, second, row, "the second time")
    require(case.texts(batch) == case.texts(batch), "hypotheses change the second time")


def check_hypotheses(case: TeacherCase) -> None:
    """One hypothesis per utterance, with probabilities that are ones and times within it, in order."""
    batch = case.batch()
    found = case.hypotheses(batch)
    require(len(found) == len(batch), f"{len(found)} hypotheses for {len(batch)} utterances")
    for hypothesis, length in zip(found, batch.lens_B.tolist(), strict=True):
        require(isinstance(hypothesis.text, str), f"the text is {hypothesis.text!r}")
        mean, silence = hypothesis.avg_log_prob, hypothesis.no_speech_prob
        require(mean is None or mean <= 0, f"avg_log_prob is {mean}")
        require(silence is None or 0 <= silence <= 1, f"no_speech_prob is {silence}")
        times_s = hypothesis.times_s
        require(len(times_s) in (0, len(hypothesis.tokens)), "as many times as tokens, or none")
        limits = [0.0, *times_s, length * FRAME_SAMPLES / SAMPLE_RATE]
        require(limits == sorted(limits), f"times {times_s} are not in order within {limits[-1]} s")


def check_next_to_no_audio(case: TeacherCase) -> None:
    """Utterances of 0, 1 and 300 samples, if it hears audio, are answered, and the others as without them."""
    batch = case.batch()
    if case.teacher.input != "audio":
        raise CheckSkipped("it hears features")
    assert batch.samples_BS is not None
    assert batch.sample_lens_B is not None
    want = case.targets(batch)
    sample_lens_B = torch.cat([torch.tensor([0, 1, 300]), batch.sample_lens_B])
    samples_BS = torch.cat([batch.samples_BS, batch.samples_BS])
    few = batch.repeat(2)
    inside_BS = torch.arange(samples_BS.shape[1]) < sample_lens_B[:, None]
    lens_B = sample_lens_B // FRAME_SAMPLES
    few = replace(few, samples_BS=samples_BS * inside_BS, sample_lens_B=sample_lens_B, lens_B=lens_B)
    found = case.targets(few)
    for row in range(len(batch)):
        _same(case, want, row, found, row + 3, "beside next to no audio")
    texts = case.texts(few)
    require(texts is None or len(texts) == len(few), "a hypothesis per utterance, be it empty")


TEACHER_CHECKS = by_id(
    check_provides_valid,
    check_describes_itself,
    check_padding_invariance,
    check_batch_invariance,
    check_declared_shapes,
    check_rates,
    check_no_gradient,
    check_normalised,
    check_same_twice,
    check_hypotheses,
    check_next_to_no_audio,
    check_config_strict,
)
"""Contract of a teacher, by check id."""


def _only(batch: Batch, row: int) -> Batch:
    """One utterance of a batch, without padding."""
    one = batch.select(torch.arange(len(batch)) == row)
    assert one.samples_BS is not None
    assert one.sample_lens_B is not None
    return replace(
        one,
        features_BTF=one.features_BTF[:, : int(one.lens_B)],
        samples_BS=one.samples_BS[:, : int(one.sample_lens_B)],
        tokens_BU=one.tokens_BU[:, : int(one.token_lens_B)],
    )


def _tensors(item: TargetItem) -> Iterator[tuple[str, Tensor]]:
    return ((name, values) for name, values in vars(item).items() if isinstance(values, Tensor))


def _check_along(spec: TargetSpec, targets: Targets, lens_B: Tensor) -> None:
    """That token posteriors come with their texts, and one more for the end."""
    require(
        targets.tokens_BU is not None and targets.token_lens_B is not None,
        f"{spec.key} is given without tokens_BU and token_lens_B, the texts along which it was computed",
    )
    assert targets.token_lens_B is not None
    require(
        (targets.token_lens_B + 1).tolist() == lens_B.tolist(),
        f"{spec.key} has {lens_B.tolist()} positions for texts of {targets.token_lens_B.tolist()} tokens",
    )


def _same(case: TeacherCase, a: Targets, row_a: int, b: Targets, row_b: int, when: str) -> None:
    """CheckFailed unless two answers of an utterance are the same at all that is valid."""
    for spec in case.specs:
        x, y = a.items[spec.key], b.items[spec.key]
        length, other = int(x.lens_B[row_a]), int(y.lens_B[row_b])
        require(length == other, f"{spec.key} has {length} positions, {other} {when}")
        for (name, values), (_, others) in zip(_tensors(x), _tensors(y), strict=True):
            if name == "lens_B" or values.dim() < 2:
                continue
            left, right = values[row_a, :length].detach().float(), others[row_b, :length].detach().float()
            if isinstance(x, LatticePosteriors):
                width = int(x.token_lens_B[row_a])
                left, right = left[:, :width], right[:, :width]
            scale = max(1.0, float(left.abs().amax())) if left.numel() else 1.0
            off = float((left - right).abs().amax()) / scale if left.numel() else 0.0
            require(off < TOLERANCE, f"{spec.key}.{name} differs by {off:.3g} (relative) {when}")
    if any(spec.kind in FORCED_KINDS for spec in case.specs) and a.tokens_BU is not None:
        assert b.tokens_BU is not None
        assert a.token_lens_B is not None
        size = int(a.token_lens_B[row_a])
        texts = a.tokens_BU[row_a, :size].tolist(), b.tokens_BU[row_b, :size].tolist()
        require(texts[0] == texts[1], f"goes along {texts[0]}, {texts[1]} {when}")
