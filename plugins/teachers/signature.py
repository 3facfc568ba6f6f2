"""Files with a signature that the recipe declares: what they hear, and what their outputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.interfaces import Located, Options

from .by_frames import LOGITS, ByFrames
from .own_tokens import CtcTokens

Found = TypeVar("Found")


class FrameLogits(Options):
    """An output of CTC.

    Args:
        name: of the output, or its number from 0; logits, log-posteriors or posteriors (1, T, V).
        frame_shift_s: seconds from one frame to the next.
        tokens: a ``tokens.txt``; counts from the folder of the model's file.
        blank: the blank's id in it; None: found by its name.
    """

    name: str | int
    frame_shift_s: float = Field(gt=0)
    tokens: str = "tokens.txt"
    blank: int | None = None


class HiddenStates(Options):
    """An output of hidden states.

    Args:
        name: of the output, or its number from 0; (1, T, D).
        dim: D.
        frame_shift_s: seconds from one frame to the next.
    """

    name: str | int
    dim: int = Field(ge=1)
    frame_shift_s: float = Field(gt=0)


class Outputs(Options):
    """What the file gives, one of both at least: ``frame_logits``, and ``hidden`` by tap."""

    frame_logits: FrameLogits | None = None
    hidden: dict[str, HiddenStates] = {}

    @model_validator(mode="after")
    def _some(self) -> Outputs:
        if self.frame_logits is None and not self.hidden:
            raise ValueError("name an output: frame_logits, hidden or both")
        return self


class SignatureOptions(Options):
    """A file and its signature.

    Args:
        path: of the file.
        input: ``audio``, samples (1, S) at 16 kHz in [-1, 1], or ``features`` (1, T, F) of the recipe.
        outputs: what it gives.
        num_mel_bins: F.
        normalise: of audio: bring each utterance to mean 0 and variance 1, as wav2vec 2.0 wants it.
        input_name: name of its input; None: the first.
        lens_name: name of the input that takes the length; None: the second, if there are two.
        lens_output: name or number of the output that says how many frames are valid; None: all are.
    """

    path: Annotated[str, Located]
    input: Literal["audio", "features"]
    outputs: Outputs
    num_mel_bins: int = Field(default=80, ge=1)
    normalise: bool = False
    input_name: str | None = None
    lens_name: str | None = None
    lens_output: str | int | None = None


class Signature:
    """The options, with the tokens read.

    Args:
        config: the options.
        name: of the teacher, for messages.

    Attributes:
        names: by the key of each target, the option that names its output, and what it says.

    Raises:
        RecipeError: the file of the model or of its tokens is missing, or it is no list of tokens.
    """

    def __init__(self, config: SignatureOptions, name: str) -> None:
        self.config, self.path = config, Path(config.path)
        if not self.path.is_file():
            raise RecipeError("there is no such file", where=str(self.path))
        logits, tokens = config.outputs.frame_logits, None
        self.names: dict[str, tuple[str, str | int]] = {}
        if logits is not None:
            tokens = CtcTokens(self.path.parent / logits.tokens, logits.blank)
            self.names[LOGITS] = "outputs.frame_logits.name", logits.name
        for tap, hidden in config.outputs.hidden.items():
            self.names[f"hidden:{tap}"] = f"outputs.hidden.{tap}.name", hidden.name
        self.frames = ByFrames(
            f"{name} {self.path.name}",
            config.input,
            config.num_mel_bins if config.input == "features" else None,
            tokens,
            logits.frame_shift_s if logits else None,
            {tap: (hidden.dim, hidden.frame_shift_s) for tap, hidden in config.outputs.hidden.items()},
        )
        self.files = [self.path, *([tokens.path] if tokens else [])]

    def inputs(self, names: Sequence[str]) -> tuple[str, str | None]:
        """Of the file's inputs the one for the utterance, and the one for its length (or None).

        Raises:
            RecipeError: one that is named is not there, or one would be left without a value.
        """
        config = self.config
        for key, name in (("input_name", config.input_name), ("lens_name", config.lens_name)):
            if name is not None and name not in names:
                raise self._lacks(key, name, "input", names)
        first = config.input_name or next((name for name in names if name != config.lens_name), None)
        rest = [name for name in names if name != first]
        lens = config.lens_name or (rest[0] if len(rest) == 1 else None)
        left = [name for name in rest if name != lens]
        if first is None or left:
            raise RecipeError(
                f"its inputs are {', '.join(names) or 'none'}: one for the utterance and at most one for its "
                "length can be given",
                where=str(self.path),
                remedy="export it with these alone, and name them: input_name, lens_name",
            )
        return first, lens

    def pick(self, outputs: Mapping[str, Found], key: str, name: str | int) -> Found:
        """The output that the option ``key`` names.

        Raises:
            RecipeError: the file has none of that name or number.
        """
        if name in outputs:
            return outputs[str(name)]
        number = int(name) if str(name).isdecimal() else -1
        if not 0 <= number < len(outputs):
            raise self._lacks(key, name, "output", outputs)
        return list(outputs.values())[number]

    def say(self, outputs: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Tensor]:
        """Of what the file computed for one utterance the valid frames of each target: (T, D)."""
        num = None
        if self.config.lens_output is not None:
            num = int(self.pick(outputs, "lens_output", self.config.lens_output).reshape(-1)[0])
        said = {}
        for key in keys:
            option, name = self.names[key]
            found = self.pick(outputs, option, name)
            if found.dim() != 3:
                raise self.contradicts(option, f"has {found.dim()} axes, not (1, frames, classes)")
            said[key] = found[0, :num]
        return said

    def heard(self, utterance: Tensor) -> Tensor:
        """The utterance as the model wants it."""
        if self.config.input == "audio" and self.config.normalise:
            return normalised(utterance)
        return utterance

    def contradicts(self, key: str, what: str) -> RecipeError:
        """The error for a file that is not as the option ``key`` says."""
        return RecipeError(f"{key}: the file's {what}", where=str(self.path))

    def _lacks(self, key: str, name: str | int, kind: str, there: Sequence[str] | Mapping) -> RecipeError:
        remedy = did_you_mean(str(name), there)
        if remedy.startswith("did"):
            remedy += f" Its {kind}s: {', '.join(there)}"
        return RecipeError(f"{key}: the file has no {kind} {name!r}", where=str(self.path), remedy=remedy)


def normalised(samples_S: Tensor) -> Tensor:
    """Mean 0 and variance 1, as the extractor of wav2vec 2.0 does it."""
    return (samples_S - samples_S.mean()) / (samples_S.var(unbiased=False) + 1e-7).sqrt()
