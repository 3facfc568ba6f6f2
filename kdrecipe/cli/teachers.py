"""An imported model (``whisper:DIRECTORY``) as a recogniser, without a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kdrecipe.corpus.audio import recognise_long, resample
from kdrecipe.corpus.segments import LONGEST_S
from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import SAMPLE_RATE, Batch, Hypothesis, Teacher

if TYPE_CHECKING:
    from kdrecipe.cli.transcribe import Recogniser

NUM_MEL_BINS = 80  # of teachers that hear features and do not say how many


def open_teacher(text: str) -> Recogniser | None:
    """The model that ``PLUGIN:PATH`` names, ready to recognise on the CPU; None if no teacher has that name.

    Raises:
        KdrecipeError: the plugin can't import it.
    """
    import torch
    from pydantic import ValidationError

    from kdrecipe.plugin.loader import load_plugins

    plugin, colon, path = text.partition(":")
    registry = load_plugins().registry
    if not colon or plugin not in registry.names("teachers"):
        return None
    cls = registry.get("teachers", plugin)
    try:
        teacher: Teacher = cls(cls.Config.model_validate({"path": path}))
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise KdrecipeError(
            f"the teacher {plugin!r} can't be opened by its path: {what}", where=path
        ) from error
    teacher.load(torch.device("cpu"))
    return TeacherRunner(teacher)


class TeacherRunner:
    """A teacher as a :class:`~kdrecipe.cli.transcribe.Recogniser`."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def transcribe(
        self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = LONGEST_S
    ) -> Hypothesis:
        """Recognise audio of any length and sampling rate."""
        return recognise_long(self._recognise, [samples_S], sample_rate, longest_s)

    def _recognise(self, samples_S: np.ndarray, sample_rate: int) -> Hypothesis:
        import torch

        from kdrecipe.data.features import extract

        samples_S = resample(samples_S, sample_rate)
        bins = int(getattr(self._teacher, "num_mel_bins", None) or NUM_MEL_BINS)
        features_TF = extract(samples_S, SAMPLE_RATE, {"name": "fbank", "num_mel_bins": bins})
        none = torch.zeros(1, 0, dtype=torch.int64)
        batch = Batch(
            ids=["audio"],
            features_BTF=torch.from_numpy(features_TF)[None],
            lens_B=torch.tensor([len(features_TF)]),
            tokens_BU=none,
            token_lens_B=torch.zeros(1, dtype=torch.int64),
            labelled_B=torch.zeros(1, dtype=torch.bool),
            texts=[""],
            samples_BS=torch.from_numpy(samples_S)[None].float(),
            sample_lens_B=torch.tensor([len(samples_S)]),
        )
        with torch.no_grad():
            return self._teacher.hypotheses(batch)[0]
