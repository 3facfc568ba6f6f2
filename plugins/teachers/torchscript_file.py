"""Teacher ``torchscript``: a scripted or traced file with a declared signature."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrecipe import hookimpl
from kdrecipe.errors import RecipeError

from .by_frames import FrameTeacher
from .signature import Signature, SignatureOptions


class TorchScriptTeacher(FrameTeacher):
    """A TorchScript file; utterances go through it one by one. Its names show when it is loaded.

    Raises:
        RecipeError: a file is missing, or it is no TorchScript.
    """

    Config = SignatureOptions

    def __init__(self, config: SignatureOptions) -> None:
        self.signature = Signature(config, "torchscript")
        path = self.signature.path
        if not _is_torchscript(str(path)):
            raise RecipeError(
                "not a TorchScript file",
                where=str(path),
                remedy="make it by torch.jit.save(torch.jit.script(model), path)",
            )
        self.input = config.input
        self.frames, self.num_mel_bins = self.signature.frames, self.signature.frames.num_mel_bins
        self.files = self.signature.files
        self.num_params: int | None = None
        self._model: Any = None
        self._device = torch.device("cpu")
        self._inputs: tuple[str, str | None] = "", None

    def load(self, device: torch.device) -> None:
        """Load it onto ``device``, and let it speak once.

        Raises:
            RecipeError: it is damaged, fails, or is not as declared.
        """
        if self._model is not None:
            if device != self._device:
                self._model, self._device = self._model.to(device), device
            return
        path = str(self.signature.path)
        try:
            model: Any = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(f"torch can't load it: {reason}", where=path) from error
        needed = [x.name for x in model.forward.schema.arguments[1:] if not x.has_default_value()]
        self._inputs = self.signature.inputs(needed)
        self.num_params = sum(p.numel() for p in model.parameters())
        self._model, self._device = model, device
        self.frames.check(self._say, path)

    def _say(self, utterance: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        assert self._model is not None, "load() comes first"
        name, lens_name = self._inputs
        fed = {name: self.signature.heard(utterance)[None].to(self._device)}
        if lens_name is not None:
            fed[lens_name] = torch.tensor([len(utterance)], device=self._device)
        return self.signature.say(_by_name(self._model(**fed)), keys)


def _by_name(said: Any) -> Mapping[str, Tensor]:
    """A model's tensor, tuple or mapping as outputs by name; those without names by number."""
    if isinstance(said, Tensor):
        return {"0": said}
    if isinstance(said, dict):
        return {str(name): value for name, value in said.items() if isinstance(value, Tensor)}
    names = getattr(said, "_fields", [str(i) for i in range(len(said))])
    return dict(zip(names, said, strict=True))


def _is_torchscript(path: str) -> bool:
    """Whether it is an archive that holds code, as weights alone do not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


@hookimpl
def register_teachers(register: Callable[[str, type], None]) -> None:
    register("torchscript", TorchScriptTeacher)
