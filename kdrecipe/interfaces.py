"""The interface between plugins and the core: data classes and small Protocols.

Plugins build on this module, :mod:`kdrecipe.errors`, :mod:`kdrecipe.layers` and
:mod:`kdrecipe.data` only.

Shapes, in names and docstrings: B utterances, S audio samples, F feature bins, T frames (of the
features, or of the encoder after subsampling), U tokens, V vocabulary, D width, K kept classes; of
a transducer: J width of the joiner, and P = U + 1 positions between tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # the command line imports this module; torch is slow to import
    import numpy as np
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSet
    from torch import Tensor, nn

BLANK_ID = 0
SOS_EOS_ID = 1
UNK_ID = 2

SAMPLE_RATE = 16000
"""Hz, of all audio that models hear."""

FRAME_SAMPLES = 160
"""Samples from one feature frame to the next: 0.01 s."""


class Options(BaseModel):
    """Base of every plugin's nested ``Config``: unknown keys are errors, numbers are finite, values do not
    change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


# ---------------------------------------------------------------- targets

TargetKind = Literal["frame_logits", "token_logits", "rnnt_lattice", "hidden", "codebooks", "hypotheses"]
FRAME_KINDS: tuple[TargetKind, ...] = ("frame_logits", "rnnt_lattice", "hidden")
"""Kinds whose targets go by frames, which must fall together with the student's."""
FORCED_KINDS: tuple[TargetKind, ...] = ("token_logits", "rnnt_lattice")
"""Kinds that a teacher can only give along a text."""
VOCABULARY_KINDS: tuple[TargetKind, ...] = ("frame_logits", "token_logits", "rnnt_lattice")
"""Kinds that are about tokens, which must be the student's."""


@dataclass(frozen=True)
class TargetSpec:
    """What a loss needs of a teacher, or what a teacher gives.

    Args:
        kind: what it is.
        tap: the head (``ctc``) for logits, the declared tap (``encoder.3``) for hidden states.
        dim: size of the last axis: V for logits, D for hidden; None in a need means any.
        frame_shift_s: seconds from one target frame to the next; None in a need means
            the student's own.
        vocab_id: hash of the token list that the last axis counts in; None: not a vocabulary.
        dtype: how it is stored (``float16`` or ``float32``).
        top_k: classes kept per frame, the rest as one tail mass; None means all.
    """

    kind: TargetKind
    tap: str = "ctc"
    dim: int | None = None
    frame_shift_s: float | None = None
    vocab_id: str | None = None
    dtype: str = "float16"
    top_k: int | None = None

    @property
    def key(self) -> str:
        """Name within :class:`Targets`: kind and tap."""
        return f"{self.kind}:{self.tap}"

    def mismatch(self, offered: TargetSpec) -> str | None:
        """Why ``offered`` (a teacher's) can't meet this need, or None if it does."""
        if self.key != offered.key:
            return f"needs {self.key}, the teacher offers {offered.key}"
        for name in ("dim", "frame_shift_s", "vocab_id"):
            need, has = getattr(self, name), getattr(offered, name)
            if need is not None and has is not None and need != has:
                return f"{self.key}: needs {name} {need}, the teacher's is {has}"
        return None


@dataclass
class Posteriors:
    """A teacher's posteriors at temperature 1: the kept classes and the mass of the rest.

    Classes that the teacher rules out have :data:`kdrecipe.frames.MIN_LOG_PROB`, not -inf, in what
    live and cached teachers give; so has an empty rest.

    Args:
        log_probs_BTK: float32, log-posteriors of the kept classes.
        lens_B: int64, valid frames (or tokens) of each utterance.
        indices_BTK: int64, the kept classes' ids; None: all V classes in order (K = V).
        log_tail_BT: float32, log of the mass of all other classes; None where none is left out.
    """

    log_probs_BTK: Tensor
    lens_B: Tensor
    indices_BTK: Tensor | None = None
    log_tail_BT: Tensor | None = None


@dataclass
class Hidden:
    """A teacher's hidden states: values_BTD float32, lens_B int64 valid frames."""

    values_BTD: Tensor
    lens_B: Tensor


@dataclass
class LatticePosteriors:
    """A teacher's transducer posteriors at temperature 1, at every frame and position of the lattice.

    Three classes: the next token of the text, the blank, and all other tokens together, whose
    mass is what the two leave (Panchapagesan 2020, arXiv 2011.06110).

    Args:
        log_probs_BTP2: float32, log-posteriors of the next token and of the blank; after the last
            token there is no next one, and its position has no meaning.
        lens_B: int64, valid frames.
        token_lens_B: int64, U of each utterance; its positions are 0 to U.
    """

    log_probs_BTP2: Tensor
    lens_B: Tensor
    token_lens_B: Tensor


@dataclass
class Targets:
    """All that one teacher says about a batch, by :attr:`TargetSpec.key`.

    Args:
        items: the targets.
        tokens_BU: int64, the texts along which ``token_logits`` and ``rnnt_lattice`` were
            computed: the transcript of a labelled utterance, the teacher's own hypothesis of any
            other; None if there are no such targets.
        token_lens_B: int64, their lengths.
    """

    items: dict[str, Posteriors | Hidden | LatticePosteriors] = field(default_factory=dict)
    tokens_BU: Tensor | None = None
    token_lens_B: Tensor | None = None

    def posteriors(self, head: str = "ctc", kind: TargetKind = "frame_logits") -> Posteriors:
        """Frame (or token) posteriors of the teacher's ``head``."""
        item = self.items[f"{kind}:{head}"]
        assert isinstance(item, Posteriors)
        return item

    def hidden(self, tap: str) -> Hidden:
        """Hidden states at the teacher's ``tap``."""
        item = self.items[f"hidden:{tap}"]
        assert isinstance(item, Hidden)
        return item

    def lattice(self, head: str = "rnnt") -> LatticePosteriors:
        """Transducer posteriors of the teacher's ``head``."""
        item = self.items[f"rnnt_lattice:{head}"]
        assert isinstance(item, LatticePosteriors)
        return item

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """A copy with every tensor changed (moved, repeated, selected by row)."""
        result: Targets = _map_tensors(self, change)
        return result


def _map_tensors(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``item`` (a dataclass) with ``change`` applied to each tensor in it, also within dicts and dataclasses.

    Fields that are no arguments (``init=False``: kept results) start empty.
    """
    import torch

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, dict):
            return {k: one(v) for k, v in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return _map_tensors(value, change)
        return value

    return replace(item, **{f.name: one(getattr(item, f.name)) for f in fields(item) if f.init})


# ---------------------------------------------------------------- batches and outputs


@dataclass(frozen=True)
class Piece:
    """A cut within a row of a batch.

    Args:
        id: of the cut.
        start: feature frame at which it begins.
        num_frames: its feature frames.
    """

    id: str
    start: int
    num_frames: int


@dataclass
class Batch:
    """Utterances as a model sees them, padded at the end.

    Args:
        ids: cut ids, B of them; of cuts that were joined, with ``+`` between them.
        features_BTF: float32 log-mel features, padding arbitrary.
        lens_B: int64, valid feature frames.
        tokens_BU: int64 labels, padded with BLANK_ID; unlabelled utterances have length 0.
        token_lens_B: int64.
        labelled_B: bool, False where the text must not be used (or is not known).
        texts: transcripts ('' where unlabelled).
        pieces: the cuts that each row consists of, with silence around them; empty: a row is its cut.
    """

    ids: list[str]
    features_BTF: Tensor
    lens_B: Tensor
    tokens_BU: Tensor
    token_lens_B: Tensor
    labelled_B: Tensor
    texts: list[str] = field(default_factory=list)
    pieces: list[tuple[Piece, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def pieces_of(self, row: int) -> tuple[Piece, ...]:
        """The cuts that a row consists of, in order."""
        return self.pieces[row] if self.pieces else (Piece(self.ids[row], 0, int(self.lens_B[row])),)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed; ids and texts stay."""
        result: Batch = _map_tensors(self, change)
        return result

    def select(self, rows_B: Tensor) -> Batch:
        """The utterances where ``rows_B`` (bool) is True."""
        keep = rows_B.nonzero().flatten().tolist()
        picked = self.map(lambda x: x[rows_B])
        texts = [self.texts[i] for i in keep] if self.texts else []
        pieces = [self.pieces[i] for i in keep] if self.pieces else []
        return replace(picked, ids=[self.ids[i] for i in keep], texts=texts, pieces=pieces)

    def repeat(self, num_views: int) -> Batch:
        """The batch ``num_views`` times over, whole copies one after the other."""
        if num_views == 1:
            return self
        copies = self.map(lambda x: x.repeat(num_views, *[1] * (x.dim() - 1)))
        return replace(
            copies,
            ids=self.ids * num_views,
            texts=self.texts * num_views,
            pieces=self.pieces * num_views,
        )


@dataclass
class Lattice:
    """The two sides of a transducer for a batch and its tokens, not yet joined.

    The joined logits (B, T, P, V) would fill the memory: :mod:`kdrecipe.lattice` finds, by
    the *simple* joiner, which is a sum of the two sides, the few positions per frame that matter,
    and joins there only (Kuang 2022, arXiv 2206.13236).

    Args:
        am_BTV: the encoder's side of the simple joiner, not normalised.
        lm_BPV: the predictor's side of the simple joiner.
        encoder_BTJ: the encoder's side of the joiner.
        predictor_BPJ: the predictor's side of the joiner.
        tokens_BU: int64, the text, padded with BLANK_ID.
        lens_B: int64, valid frames.
        token_lens_B: int64, U of each utterance.
        join: ``(encoder (..., J), predictor (..., J)) -> logits (..., V)``, broadcasting.
    """

    am_BTV: Tensor
    lm_BPV: Tensor
    encoder_BTJ: Tensor
    predictor_BPJ: Tensor
    tokens_BU: Tensor
    lens_B: Tensor
    token_lens_B: Tensor
    join: Callable[[Tensor, Tensor], Tensor]
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Results that several losses need, by whatever computed them; a changed copy starts without."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Lattice:
        """A copy with every tensor changed."""
        result: Lattice = _map_tensors(self, change)
        return result


@dataclass
class ModelOutput:
    """What a model computed.

    Args:
        hidden_BTD: the encoder's output.
        lens_B: int64, its valid frames.
        logits: by head name, not normalised; ``ctc``: (B, T, V); ``attention``: (B, U + 1, V), the
            tokens of the batch and the end of the sentence, each given those before it.
        taps: by declared name, those that were asked for: (B, T, D).
        num_views: how many differently augmented copies of the batch follow one another
            along B (1: none; see :meth:`views`).
        lattices: by head name, of heads that are transducers.
    """

    hidden_BTD: Tensor
    lens_B: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    num_views: int = 1
    lattices: dict[str, Lattice] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelOutput:
        """A copy with every tensor changed."""
        result: ModelOutput = _map_tensors(self, change)
        return result

    def select(self, rows_B: Tensor) -> ModelOutput:
        """The utterances where ``rows_B`` (bool) is True."""
        return self.map(lambda x: x[rows_B])

    def views(self) -> list[ModelOutput]:
        """The views one by one, each with B / num_views utterances in the same order."""
        size = self.lens_B.shape[0] // self.num_views
        parts = [self.map(lambda x, i=i: x[i * size : (i + 1) * size]) for i in range(self.num_views)]  # type: ignore[misc]
        return [replace(p, num_views=1) for p in parts]


# ---------------------------------------------------------------- models


@runtime_checkable
class Architecture(Protocol):
    """An encoder; an ``nn.Module`` built as ``cls(config, input_dim)``.

    ``forward(features_BTF, lens_B) -> (hidden_BTD, lens_B)``. Output on valid frames must not
    depend on padding. ``output_len`` gives the output length for a number of feature frames.
    A method ``tap_subsampling() -> dict[str, int]``, optional, names the taps whose frames are not those
    of the output, with their number of feature frames per frame.
    """

    Config: ClassVar[type[Options]]
    output_dim: int
    subsampling: int

    def taps(self) -> dict[str, tuple[nn.Module, int]]:
        """Declared intermediate tensors: name -> (module whose output it is, D)."""

    def output_len(self, num_frames: int) -> int:
        """Output frames for ``num_frames`` feature frames."""


class Head(Protocol):
    """A head on an encoder; an ``nn.Module`` built as ``cls(config, input_dim, vocab_size)``.

    ``forward(hidden_BTD, lens_B, batch) -> logits``, a :class:`Lattice`, or None; ``batch`` is None
    where no text is known, and then heads that need one give None. The attribute ``vocab_size``
    is V. A class attribute ``subsampling``, optional, is the number of the encoder's frames per frame of
    the head's output (1 without it).
    """

    Config: ClassVar[type[Options]]
    target_kinds: ClassVar[tuple[TargetKind, ...]]

    def greedy(self, hidden_BTD: Tensor, lens_B: Tensor) -> list[list[int]]:
        """Tokens of each utterance, the best one at each step."""


@dataclass(frozen=True)
class ModelInfo:
    """What losses may know of a model before it runs.

    Args:
        vocab_id: hash of its token list.
        vocab_size: V.
        frame_shift_s: seconds per output frame.
        heads: name of each head -> the kinds of targets that it can give; the first head is the
            one by which the model is judged.
        taps: name -> D of each declared tap.
        head_shifts_s: name -> seconds per frame of each head; those not named: ``frame_shift_s``.
        tap_shifts_s: name -> seconds per frame of each tap; those not named: ``frame_shift_s``.
    """

    vocab_id: str
    vocab_size: int
    frame_shift_s: float
    heads: Mapping[str, tuple[TargetKind, ...]]
    taps: Mapping[str, int]
    head_shifts_s: Mapping[str, float] = field(default_factory=dict)
    tap_shifts_s: Mapping[str, float] = field(default_factory=dict)

    def head_shift_s(self, head: str) -> float:
        """Seconds from one frame of a head's output to the next."""
        return self.head_shifts_s.get(head, self.frame_shift_s)

    def tap_shift_s(self, tap: str) -> float:
        """Seconds from one frame at a tap to the next."""
        return self.tap_shifts_s.get(tap, self.frame_shift_s)

    def provides(self) -> list[TargetSpec]:
        """The targets that a model like this can give as a teacher."""
        specs = [
            TargetSpec(
                kind,
                head,
                self.vocab_size,
                self.head_shift_s(head) if kind in FRAME_KINDS else None,
                self.vocab_id,
            )
            for head, kinds in self.heads.items()
            for kind in kinds
        ]
        specs += [TargetSpec("hidden", tap, dim, self.tap_shift_s(tap)) for tap, dim in self.taps.items()]
        return specs

    def pinned(self, need: TargetSpec) -> TargetSpec:
        """What a loss needs of a teacher, with what follows from this student filled in.

        Frames must fall together: with those of the student's head of that name for logits, with
        those of its encoder's output for hidden states. Logits must count in the same vocabulary.
        """
        if need.kind in FRAME_KINDS and need.frame_shift_s is None:
            is_hidden = need.kind == "hidden"
            shift_s = self.frame_shift_s if is_hidden else self.head_shift_s(need.tap)
            need = replace(need, frame_shift_s=shift_s)
        if need.kind in VOCABULARY_KINDS:
            need = replace(need, dim=self.vocab_size, vocab_id=self.vocab_id)
        return need


def tap_shifts_s(encoder: Architecture, feature_frame_shift_s: float = 0.01) -> dict[str, float]:
    """Seconds per frame at each tap of an encoder: as its ``tap_subsampling()`` says, else as its output."""
    other: Mapping[str, int] = encoder.tap_subsampling() if hasattr(encoder, "tap_subsampling") else {}
    return {
        tap: round(feature_frame_shift_s * other.get(tap, encoder.subsampling), 9) for tap in encoder.taps()
    }


# ---------------------------------------------------------------- losses


@dataclass
class LossOutput:
    """A loss over a batch, not yet normalised.

    Args:
        total: scalar, the *sum* over valid frames, tokens or utterances.
        count: how many of those there were (0 is allowed: total must then be 0).
        metrics: extra numbers to log, sums as well (the loop divides them by count).
    """

    total: Tensor
    count: Tensor | int
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossSetup:
    """The pair of models a loss works between; ``teacher`` is None without one."""

    student: ModelInfo
    teacher: ModelInfo | None = None

    def require_head(self, head: str, loss: str) -> None:
        """Refuse a student without ``head``, which ``loss`` reads.

        Raises:
            RecipeError: naming the heads that there are.
        """
        from kdrecipe.errors import RecipeError

        if head not in self.student.heads:
            raise RecipeError(
                f"{loss!r} reads the head {head!r}; the student has {', '.join(self.student.heads)}",
                remedy=f"add {head}: {{}} to the model's heads, or remove the loss",
            )


class Loss(Protocol):
    """A loss term, built as ``cls(config, setup)``.

    May be an ``nn.Module`` with its own parameters (projections), which are trained too and
    not kept. Class attributes, both optional: ``supervised = True`` gives it labelled utterances
    only; ``num_views = 2`` asks for two differently augmented copies of each batch. The object's
    attribute ``taps``, optional too, names the student's taps that it reads from ``out.taps``.
    """

    Config: ClassVar[type[Options]]

    @staticmethod
    def requires(config: Any) -> list[TargetSpec]:
        """Targets needed of each teacher; empty for losses that need none."""

    def __call__(self, out: ModelOutput, targets: Targets, batch: Batch) -> LossOutput:
        """The loss; ``targets`` is empty if it requires none."""


# ---------------------------------------------------------------- compressors, exporters, decoders


@dataclass
class CompressContext:
    """What a compressor may use besides the model.

    Args:
        calibration: batches of features from the calibration split, from the start at each call.
        seed: for anything drawn at random.
    """

    calibration: Callable[[], Iterable[Batch]]
    seed: int = 0


class Compressor(Protocol):
    """One step of compression, built as ``cls(config)``.

    ``apply`` may change the model in place. If ``num_epochs`` is above 0, training continues
    for that long with the parent's own losses and teachers, ``on_step`` being called after
    every optimiser step, then ``finish``. ``rebuild`` gives an untrained model the structure of a
    compressed one, so that its weights can be loaded from a bundle.

    Where that structure does not follow from the options alone (which channels were kept), a compressor
    has two more methods: ``state() -> dict``, JSON-like, asked after ``finish`` and kept in the bundle,
    and ``load_state(state)``, called before ``rebuild``.
    """

    Config: ClassVar[type[Options]]
    num_epochs: int

    def apply(self, model: nn.Module, context: CompressContext) -> nn.Module:
        """Compress, or prepare for compression during training."""

    def on_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        """After optimiser step ``step`` (1-based) of ``num_steps``."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Make it final; the result is what the bundle stores."""

    def rebuild(self, model: nn.Module) -> nn.Module:
        """The same structure as ``finish`` gave, weights arbitrary."""

    def report(self) -> dict[str, float]:
        """Numbers for the report (sparsity, share of int8 weights, ...)."""


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in floating point, with the same (rounded) weights.

    A compressor's layers with weights in another format must have ``to_float()``, which gives an
    equivalent module with float32 weights: what fp32 exports are made of.
    """
    import copy

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "to_float"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_float())
    return model


@dataclass
class Hypothesis:
    """A recognised utterance.

    Args:
        text: the words.
        tokens: token ids.
        times_s: start of each token in seconds, as many as tokens (or empty).
        score: log-score of the search, higher is better; None where the runtime gives none.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    score: float | None = None


class TokenTable(Protocol):
    """Tokens of a bundle; :class:`kdrecipe.data.tokens.Tokenizer` is one."""

    vocab_id: str
    pieces: list[str]
    """The text of each token, as ``tokens.txt`` has it."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class LanguageModel(Protocol):
    """A model of token sequences; :class:`kdrecipe.data.ngram.NgramModel` is one.

    States are values: nothing that is done with one changes it.
    """

    def start(self) -> Any:
        """The state before the first token of a sentence."""

    def score(self, state: Any, token: int) -> tuple[float, Any]:
        """Natural log-probability of ``token`` after ``state``, and the state after it."""

    def end(self, state: Any) -> float:
        """Natural log-probability that the sentence ends after ``state``."""


class Decoder(Protocol):
    """A search on the outputs of one head, built as ``cls(config, tokens, frame_shift_s)``.

    A decoder whose options have ``lm_weight`` is built as ``cls(config, tokens, frame_shift_s, lm)``, ``lm``
    being the recipe's :class:`LanguageModel`, or None where ``lm_weight`` is 0 (the default). A static
    method ``beside(config)``, optional, names further heads that it reads.
    """

    Config: ClassVar[type[Options]]
    head: ClassVar[str]

    def decode(self, model: nn.Module, out: ModelOutput) -> list[Hypothesis]:
        """Hypotheses of a batch, in its order."""


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
    def is_int8(self) -> bool: ...


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


class Exporter(Protocol):
    """Writes a bundle where it runs, built as ``cls(config)``.

    ``head`` names the head that it exports; systems without it are skipped. ``runtime`` is the
    runtime whose texts, time and memory make the row of the table; None: it has none here. ``files``
    says what the runtime loads: variant -> part (``encoder``) -> file name.

    Optional static methods: ``unfit(model)`` says why a model of this description (``{name, <options>,
    heads: {...}}``) can't be exported, or None; such a system keeps its row, without size and speed.
    ``speller(pieces)`` gives the :data:`Speller` of the runtime for these tokens, where its text is not
    simply their pieces in a row: stage 2 then says what becomes of the corpus's texts, before any training.
    ``load_file(path)`` loads a file of any name that came from elsewhere; exporters with it have an
    attribute ``suffix`` (``.onnx``), that of such files, and one part.
    """

    Config: ClassVar[type[Options]]
    head: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]
    runtime: ClassVar[Runtime | None]
    files: ClassVar[Mapping[str, Mapping[str, str]]]

    def export(self, bundle: BundleLike, directory: Path) -> dict[str, list[str]]:
        """Write files; returns variant (``fp32``, ``int8``) -> file names that ship with it."""

    def load(self, directory: Path, variant: str, *, num_threads: int = 1) -> Runner:
        """Load a variant that :meth:`export` wrote."""


class Metric(Protocol):
    """A figure over a split, built as ``cls(config)``.

    A metric may also have ``details(reference, hypothesis) -> dict[str, int]`` that splits the
    errors into ``sub``, ``ins`` and ``del``; the report shows them for the recipe's first metric. It may
    have ``notes(references, hypotheses) -> list[str]``, what the report must state of it on these texts.
    """

    Config: ClassVar[type[Options]]

    def errors(self, reference: str, hypothesis: str) -> tuple[int, int]:
        """(errors, reference length) of one utterance; the score is the ratio of sums."""


# ---------------------------------------------------------------- corpora


@dataclass
class Prepared:
    """A corpus plugin's result.

    Args:
        splits: name (``train``, ``dev``, ``test``) -> recordings and supervisions.
        problems: what is wrong with the input, one entry each: all of them, not the first.
        notes: facts that the report must state (``25 of 99 test sentences occur in train``).
    """

    splits: dict[str, tuple[RecordingSet, SupervisionSet]]
    problems: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Corpus(Protocol):
    """A corpus, built as ``cls(config)``.

    May have ``split_names``, the splits that it will give where its options say so much: then a recipe that
    decodes any other is refused before any work, instead of after stage 0.
    """

    Config: ClassVar[type[Options]]

    def prepare(self, corpus_dir: Path | None, out_dir: Path) -> Prepared:
        """Manifests from the raw corpus in ``corpus_dir``; synthesised audio goes to ``out_dir``."""
