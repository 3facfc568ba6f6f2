"""Imported models that teach.

B utterances, S audio samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from kdrecipe.interfaces.batches import Batch
from kdrecipe.interfaces.common import Options
from kdrecipe.interfaces.recognition import Hypothesis
from kdrecipe.interfaces.targets import Targets, TargetSpec

if TYPE_CHECKING:
    import torch


class Teacher(Protocol):
    """A model that teaches, wherever it was trained; built as ``cls(config)``.

    Building it is cheap and looks at what there is without loading weights: a directory without them, a
    package that is not installed, an option that this model can't serve are RecipeErrors then, before any
    work. Weights are read when :meth:`load` is called. Nothing that a teacher gives has a gradient. Options
    that are paths are marked by :class:`~kdrecipe.interfaces.Located`.

    ``input`` says what it hears of a batch: ``features``, those of the recipe, or ``audio``
    (:attr:`Batch.samples_BS`, 16 kHz in [-1, 1], padded with zeros). What it says of an utterance must not
    depend on the padding, nor on the other utterances of the batch.

    One that a model of kdrecipe's can be like has ``as_model() -> (description, state dict,
    pieces)``: what a recipe would write as ``model:``, with heads, its weights in that model's names, and the
    tokens that its heads' rows go by, named as kdrecipe's. Students then start with them (``init_from``).
    Weights ``encoder.input_map.*`` are left out where they depend on the recipe's features.

    Attributes:
        files: all files that it consists of; their content identifies it, their size is its size.
        num_params: parameters, after :meth:`load`; None where that can't be known (a runtime's model).

    One with tokens of its own that a recipe may take over is a :class:`TokenTeacher`.

    Two more attributes are optional: ``num_mel_bins``, of a teacher that hears features, and ``runtime``, the
    name and version of what its hypotheses run in where that is not torch: then its speed is in the table.
    """

    Config: ClassVar[type[Options]]
    files: Sequence[Path]
    num_params: int | None

    @property
    def input(self) -> Literal["features", "audio"]:
        """What it hears; known once it is built."""

    def provides(self) -> list[TargetSpec]:
        """The targets that it can give, with their dimensions, frame shifts and vocabularies."""

    def load(self, device: torch.device) -> None:
        """Make it ready to speak on ``device``; what can't run there stays on the CPU."""

    def targets(self, batch: Batch, needs: Sequence[TargetSpec]) -> Targets:
        """What it says of ``batch`` for each need, on the batch's device.

        Posteriors are natural log-probabilities over all classes or the ``top_k`` asked for, at temperature
        1, in float32; lengths are those of the valid frames.
        """

    def hypotheses(self, batch: Batch) -> list[Hypothesis]:
        """What it recognises by its own search, in the order of the batch.

        Raises:
            DataError: it recognises nothing (a bare encoder).
        """


@dataclass(frozen=True)
class Spelling:
    """How a teacher spells texts by those of its tokens that a recipe keeps.

    Args:
        encode: the teacher's own ids of a transcript.
        as_transcript: what it recognised, as the recipe's transcripts are written.
    """

    encode: Callable[[str], list[int]]
    as_transcript: Callable[[str], str]


class TokenTeacher(Teacher, Protocol):
    """A teacher whose tokens a recipe may take over (``tokens: {name: from_teacher}``).

    Attributes:
        tokenizer_file: a ``tokenizer.json`` of Hugging Face's with byte-level BPE, whose ids are the classes
            of ``token_logits``; None: it is not there.
        spelling: set by who asks for targets; then ``token_logits`` go along transcripts, and along the
            teacher's own hypotheses, as this spells them. None: as its own tokeniser does.
    """

    tokenizer_file: Path | None
    spelling: Spelling | None
