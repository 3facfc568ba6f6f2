"""Exports, and the runtimes that load them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kdrecipe.interfaces.common import Options
from kdrecipe.interfaces.recognition import Hypothesis, TokenTable

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class BundleLike(Protocol):
    """A bundle as exporters see it (:class:`kdrecipe.model.bundle.Bundle`)."""

    path: Path
    meta: dict[str, Any]

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def tokens(self) -> TokenTable: ...

    @property
    def number_formats(self) -> frozenset[str]:
        """What its layers say they are stored in (``number_format``), or the weights' type (``fp32``)."""


class Runner(Protocol):
    """An exported model, loaded."""

    def log_probs_along(
        self, features_BTF: np.ndarray, lens_B: np.ndarray, paths: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Per utterance, (M, V) log-posteriors at every step of its path, for the parity gate.

        The batch goes through the encoder as one. Paths and steps are those of the head: ``ctc``
        needs no path, and a step is a frame; ``attention``: tokens, and one step more for the end
        of the sentence; ``rnnt``: a label per frame, blank or the token that is found there, and a
        step is a frame.
        """

    def greedy(self, features_TF: np.ndarray) -> list[int]:
        """Tokens by greedy search on the features of the training, for the parity gate."""

    def transcribe(self, samples_S: np.ndarray, sample_rate: int, *, longest_s: float = 30.0) -> Hypothesis:
        """Recognise audio of any length as the device does, samples in [-1, 1].

        Less than 0.025 s is no text. What is longer than ``longest_s`` is recognised in pieces, so that hours
        need no more memory: see :func:`kdrecipe.corpus.audio.recognise_long`.
        """


@dataclass(frozen=True)
class RuntimeSearch:
    """How a runtime does the search of a decoder.

    Args:
        name: what the runtime calls it: ``modified_beam_search``.
        options: options of the decoder that the runtime takes. With any other option away from its
            default the runtime does not have the search.
    """

    name: str
    options: tuple[str, ...] = ()


Speller = Callable[[Sequence[int]], str]
"""The text that a runtime writes for token ids."""


@dataclass(frozen=True)
class Runtime:
    """What runs an export on the device.

    ``start`` names a function, ``package.module:function``, or ``/path/file.py:function`` for a plugin
    that is a file. It is called in a process that measures memory, so its module imports neither
    torch nor lhotse nor anything that does. It imports the runtime and returns ``(version, load)``:
    the runtime's name with its version, and a function ``load(spec) -> recognise``. ``spec`` has
    ``files`` (part -> path), ``tokens`` (path of ``tokens.txt``), ``num_bins`` (of
    the first file's input; None if it is not ONNX), ``num_threads``, ``search`` (a name of ``searches``) and
    ``options`` of it. ``recognise(samples_S, sample_rate)`` returns a dict
    with ``text``, ``tokens`` (as the runtime writes them) and ``times_s`` (start of each, or empty).

    Args:
        name: ``sherpa-onnx``.
        start: see above.
        searches: decoder (``rnnt_beam``) -> how the runtime does it. The first one is the default.
    """

    name: str
    start: str
    searches: Mapping[str, RuntimeSearch]


@dataclass(frozen=True)
class Bounds:
    """How far a variant of an export may stray from the model that it is compared with; None: any distance.

    Args:
        max_log_prob_diff: largest difference of any log-probability at any step.
        max_kl: nats per frame (attention: per token), mean divergence of the posteriors.
        max_token_error: share of tokens, 0 to 1, that it recognises otherwise.
        max_wer_increase: percentage points.
        max_deletion_increase: percentage points of words left out.
    """

    max_log_prob_diff: float | None = None
    max_kl: float | None = None
    max_token_error: float | None = None
    max_wer_increase: float | None = None
    max_deletion_increase: float | None = None


@dataclass(frozen=True)
class Variant:
    """A number format that an exporter writes.

    Args:
        bounds: of parity, unless the recipe has others.
        remedy: what to do where one is exceeded.
        in_floats: it computes with weights in floating point, so of a quantised bundle it is compared with
            the copy in floating point; any other with the model as it is.
    """

    bounds: Bounds
    remedy: str
    in_floats: bool = False


class Exporter(Protocol):
    """Writes a bundle where it runs, built as ``cls(config)``.

    ``head`` names the head that it exports; systems without it are skipped. ``runtime`` is the
    runtime whose texts, time and memory make the row of the table; None: it has none here. ``variants``
    are the number formats that it knows, by names of its own; the last of them that a directory holds is
    what ``kdrecipe transcribe`` runs. ``ships`` (static) says which of them computes as a bundle with layers
    of these number formats does: that makes the row. ``files`` says what the runtime loads: variant ->
    part (``encoder``) -> file name, in the order of ``variants``.
    Layers come to an exporter as the compressor left them, integers and scales included; ``float_copy`` gives
    their twin in floating point.

    Optional static methods: ``unfit(model)`` says why a model of this description (``{name, <options>,
    heads: {...}}``) can't be exported, or None; such a system keeps its row, without size and speed.
    ``speller(pieces)`` gives the :data:`Speller` of the runtime for these tokens, where its text is not
    simply their pieces in a row: stage 2 then says what becomes of the corpus's texts, before any training.
    ``load_file(path)`` loads a file of any name that came from elsewhere; exporters with it have an
    attribute ``suffix`` (``.onnx``), that of such files, and one part.
    """

    Config: ClassVar[type[Options]]
    head: ClassVar[str]
    variants: ClassVar[Mapping[str, Variant]]
    runtime: ClassVar[Runtime | None]
    files: ClassVar[Mapping[str, Mapping[str, str]]]

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write files; returns variant -> file names that ship with it."""

    @staticmethod
    def ships(number_formats: Collection[str]) -> str:
        """The variant that computes as a bundle of these number formats does."""

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant that :meth:`export` wrote."""
