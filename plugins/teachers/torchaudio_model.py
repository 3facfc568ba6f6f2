"""Teacher ``torchaudio``: wav2vec 2.0, HuBERT and WavLM by torchaudio's factories, with a file of weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError, did_you_mean
from kdrecipe.interfaces import SAMPLE_RATE, Located, Options

from .by_frames import LOGITS, ByFrames, FrameTeacher
from .own_tokens import CtcTokens
from .signature import normalised


class TorchaudioTeacher(FrameTeacher):
    """A model of ``torchaudio.models``; utterances go through it one by one.

    It gives the output of each layer as ``encoder.N``, and posteriors if its weights have an output layer.

    Raises:
        RecipeError: a file is missing, there is no such factory, or the weights are not those of its model.
    """

    class Config(Options):
        """A factory and its weights.

        Args:
            model: name of the factory, ``wav2vec2_base``; of ``wav2vec2_model`` the ``options`` say all.
            path: of the state dict.
            tokens: ``tokens.txt`` of the output layer; None: it has none.
            blank: the blank's id in it.
            normalise: bring each utterance to mean 0 and variance 1 first, as large models want it.
            options: further arguments of the factory.
        """

        model: str
        path: Annotated[str, Located]
        tokens: Annotated[str | None, Located] = None
        blank: int = 0
        normalise: bool = False
        options: dict[str, Any] = {}

    input: ClassVar[Literal["features", "audio"]] = "audio"

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(config.path)
        if not self.path.is_file():
            raise RecipeError("there is no such file", where=str(self.path))
        shapes = {name: weight.shape for name, weight in _weights(self.path, "meta").items()}
        outputs = shapes.get("aux.weight")
        self._outputs = None if outputs is None else outputs[0]
        with torch.device("meta"):
            model = self._build()
        self._check_weights({name: weight.shape for name, weight in model.state_dict().items()}, shapes)
        tokens = self._tokens()
        strides = [layer.conv.stride[0] for layer in model.feature_extractor.conv_layers]
        frame_shift_s = round(prod(strides) / SAMPLE_RATE, 9)
        layers = model.encoder.transformer.layers
        dim = model.encoder.feature_projection.projection.out_features
        taps = {f"encoder.{i}": (dim, frame_shift_s) for i in range(len(layers))}
        name = f"torchaudio {config.model}"
        self.frames = ByFrames(name, "audio", None, tokens, frame_shift_s if tokens else None, taps)
        self.files = [self.path, *([tokens.path] if tokens else [])]
        self.num_params: int | None = None
        self._model: Any = None
        self._device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        """Load it onto ``device``, and let it speak once."""
        if self._model is None:
            model = self._build()
            model.load_state_dict(_weights(self.path, "cpu"))
            self._model = model.eval().requires_grad_(False).to(device)
            self._device, self.num_params = device, sum(p.numel() for p in model.parameters())
            self.frames.check(self._say, str(self.path))
        elif device != self._device:
            self._model, self._device = self._model.to(device), device

    def _say(self, utterance: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        assert self._model is not None, "load() comes first"
        if self.config.normalise:
            utterance = normalised(utterance)
        wave_1S = utterance[None].to(self._device)
        layers = {key: int(key.rpartition(".")[2]) for key in keys if key != LOGITS}
        said = {}
        if layers:
            outputs, _ = self._model.extract_features(wave_1S, num_layers=max(layers.values()) + 1)
            said = {key: outputs[number][0] for key, number in layers.items()}
        if LOGITS in keys:
            said[LOGITS] = self._model(wave_1S)[0][0]
        return said

    def _build(self) -> Any:
        import torchaudio

        name, options = self.config.model, self.config.options
        models = torchaudio.models
        known = [n for n, thing in vars(models).items() if _returns(thing) is models.Wav2Vec2Model]
        if name not in known:
            what = f"torchaudio has no model {name!r} that can teach"
            raise RecipeError(what, remedy=did_you_mean(name, known))
        factory = getattr(models, name)
        arguments = set(inspect.signature(factory).parameters)
        for option in options:
            if option not in arguments:
                remedy = did_you_mean(option, arguments)
                raise RecipeError(f"options: {name} has no argument {option!r}", remedy=remedy)
        try:
            return factory(**{"aux_num_out": self._outputs, **options})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"options: torchaudio can't make {name}: {error}") from error

    def _check_weights(self, wanted: Mapping[str, Any], there: Mapping[str, Any]) -> None:
        lacking = [name for name in wanted if name not in there]
        further = [name for name in there if name not in wanted]
        other = [name for name in wanted if name in there and wanted[name] != there[name]]
        for names, what in (
            (lacking, "the file lacks"),
            (further, "the model has no"),
            (other, "the model has another shape of"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise RecipeError(
                    f"these are no weights of {self.config.model}: {what} {names[0]}{more}",
                    where=str(self.path),
                    remedy="name the factory that they are of",
                )

    def _tokens(self) -> CtcTokens | None:
        config = self.config
        if config.tokens is None:
            if self._outputs is not None:
                raise RecipeError(
                    f"its output layer has {self._outputs} tokens, and tokens names no list of them",
                    where=str(self.path),
                    remedy="write them to a tokens.txt, a token and its id on each line: tokens: tokens.txt",
                )
            return None
        tokens = CtcTokens(Path(config.tokens), config.blank)
        if len(tokens) != self._outputs:
            has = f"{self._outputs} outputs" if self._outputs else "no output layer"
            raise RecipeError(f"it lists {len(tokens)} tokens, the model has {has}", where=str(tokens.path))
        return tokens


def _returns(thing: Any) -> Any:
    return getattr(thing, "__annotations__", {}).get("return") if inspect.isfunction(thing) else None


def _weights(path: Path, device: str) -> dict[str, Tensor]:
    """A state dict; on ``meta`` shapes alone.

    Raises:
        RecipeError: it is none.
    """
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zipfile's, pickle's and torch's own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(f"torch can't load it: {reason[0]}", where=str(path)) from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise RecipeError(
            "no state dict: it must map names to tensors alone",
            where=str(path),
            remedy="save it again: torch.save(model.state_dict(), path)",
        )
    return {_renamed(name): weight for name, weight in found.items()}


def _renamed(name: str) -> str:
    """What torch before 2.0 called a normalised weight is called otherwise now."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        if name.endswith(f".{old}"):
            return f"{name.removesuffix(old)}parametrizations.weight.{new}"
    return name


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("torchaudio", TorchaudioTeacher)
