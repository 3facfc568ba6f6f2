"""The parts of a recipe, checked: what :mod:`kdrecipe.recipe.load` hands to the pipeline.

Pydantic models for what the core defines, plain records for what plugins have a say in. Plugins and
paths within a section are at first as the recipe writes them; the parser puts a checked :class:`Named` or a
:class:`Location` in their place (``model_copy``), which is what their type says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, SkipValidation, field_validator, model_validator

from kdrecipe.interfaces import Bounds, Options
from kdrecipe.recipe.budget import Budget
from kdrecipe.recipe.yaml import expand_env
from kdrecipe.score.keep import Keep
from kdrecipe.text_form import TextForm

Kind = Literal["trained", "pretrained", "distilled", "compressed"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)]


@dataclass(frozen=True)
class Named:
    """A plugin by name, with its options: validated, defaults filled in, JSON-like."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Term(Named):
    """A weighted loss.

    Args:
        weight: finite, 0 or more.
        teacher: the system it learns from; None: all teachers of its system, evenly.
        start_below: it begins when the dev token error has fallen below this share; None: at once.
    """

    weight: float = 1.0
    teacher: str | None = None
    start_below: float | None = None


@dataclass(frozen=True)
class Location:
    """A path as the recipe writes it; environment variables are looked up when it is used.

    Args:
        text: may hold ``${NAME}`` and ``~``.
        where: file and line in the recipe.
        base: directory that relative paths count from.
    """

    text: str
    where: str
    base: Path

    def path(self) -> Path:
        """The path; RecipeError naming the environment variable that is not set."""
        return self.base / Path(expand_env(self.text, self.where)).expanduser()


def _text_or_nothing(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"is {value!r}, it must be text")
    return value


Plugin = Annotated[Named, SkipValidation]
Place = Annotated[Location | None, PlainValidator(_text_or_nothing)]


class Corpus(Options):
    """``corpus``. The fields that are excluded are no keys of it: the parser fills them in.

    Args:
        location: ``root``, the directory of the raw corpus, if the plugin does not make it.
        on_error: whether faulty utterances stop the work or are left out and listed.
        max_utterances: of each split, of a few of its speakers; None: all.
        case: of all transcripts: as they are, in small letters or in capitals.
        subsets: named parts of the training split: name -> rule, see ``kdrecipe.corpus.subsets``.
        name: the corpus plugin.
        options: its options.
        lists: of the subsets whose utterances are listed somewhere: name -> where.
    """

    location: Place = Field(default=None, alias="root")
    on_error: Literal["stop", "skip"] = "stop"
    max_utterances: int | None = Field(default=None, ge=1)
    case: Literal["keep", "lower", "upper"] = "keep"
    subsets: dict[str, dict[str, Any]] = {}
    name: str = Field(default="", exclude=True)
    options: dict[str, Any] = Field(default={}, exclude=True)
    lists: dict[str, SkipValidation[Location]] = Field(default={}, exclude=True)

    @property
    def root(self) -> Path | None:
        """Directory of the raw corpus; RecipeError if it names an environment variable not set."""
        return self.location.path() if self.location else None

    def list_path(self, subset: str) -> Path:
        """The file or directory that lists a subset's utterances, whether or not it is there.

        A relative path counts from the root or else from a folder in it, as archives unpack, and
        without a root from the recipe's directory. RecipeError as for :attr:`root`.
        """
        location, root = self.lists[subset], self.root
        if root is None:
            return location.path()
        inner = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        paths = [replace(location, base=base).path() for base in (root, *inner)]
        return next((path for path in paths if path.exists()), paths[0])


class Subset(Options):
    """A rule for a part of the training split: exactly one of these.

    Args:
        speakers: number of speakers.
        utterances: number of utterances.
        hours: of speech.
        fraction: of the utterances, between 0 and 1.
        listed_in: a file whose lines begin with an utterance's id each, or a directory below
            which ``*.trans.txt`` files are such; ids of other splits do no harm.
        rest_of: (``except``) what another subset leaves over.
    """

    speakers: int | None = Field(default=None, ge=1)
    utterances: int | None = Field(default=None, ge=1)
    hours: Positive | None = None
    fraction: float | None = Field(default=None, gt=0, lt=1)
    listed_in: str | None = Field(default=None, min_length=1)
    rest_of: str | None = Field(default=None, alias="except")

    @model_validator(mode="after")
    def _one_rule(self) -> Subset:
        if len(self.rule()) != 1:
            rules = [info.alias or name for name, info in type(self).model_fields.items()]
            raise ValueError(f"a subset has exactly one rule, one of {', '.join(rules)}")
        return self

    def rule(self) -> dict[str, Any]:
        """The rule as a mapping with one key."""
        return self.model_dump(exclude_none=True, by_alias=True)


class Features(Options):
    """``features``: log-mel filter banks, one frame per 0.01 s.

    Args:
        name: ``fbank``.
        num_mel_bins: F.
        speed_perturb: speeds at which training utterances are seen, as separate copies; the
            speed 1.0 is always among them, whether or not it is listed.
    """

    name: Literal["fbank"] = "fbank"
    num_mel_bins: int = Field(default=80, ge=8, le=256)
    speed_perturb: tuple[Annotated[float, Field(ge=0.5, le=2.0)], ...] = (1.0,)

    @field_validator("speed_perturb")
    @classmethod
    def _speeds(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"the same speed twice: {list(value)}")
        return value if 1.0 in value else tuple(sorted((*value, 1.0)))


def _one_text(data: str | None, labels: str | None) -> None:
    if data is not None and labels is not None:
        raise ValueError("data names transcripts, labels hypotheses: give one of them")


class Tokens(Options):
    """``tokens``: SentencePiece, or what a teacher has.

    Args:
        name: ``bpe``, ``unigram`` or ``char``; ``from_teacher``: byte-level BPE of an imported teacher.
        vocab_size: number of tokens, the three special ones included; optional for ``char``; the text's
            own number for ``from_teacher``.
        data: subset whose transcripts they are learnt from, or ``all``; null: see :func:`shared_labels`.
            In a checked recipe, null is the whole training split, unless there are ``labels``.
        labels: imported teacher whose hypotheses they are learnt from instead.
        teacher: of ``from_teacher``: the system whose tokens they are.
        keep: of ``from_teacher``: ``seen``: those that the text uses, and all bytes.
    """

    name: Literal["bpe", "unigram", "char", "from_teacher"]
    vocab_size: int | None = Field(default=None, ge=5, le=65536)
    data: str | None = None
    labels: str | None = None
    teacher: str | None = None
    keep: Literal["seen"] = "seen"

    @model_validator(mode="after")
    def _options_of_name(self) -> Tokens:
        _one_text(self.data, self.labels)
        if self.name in ("bpe", "unigram") and self.vocab_size is None:
            raise ValueError(f"{self.name} needs a vocab_size")
        if self.name != "from_teacher":
            if given := {"teacher", "keep"} & self.model_fields_set:
                raise ValueError(f"{', '.join(sorted(given))}: of from_teacher only, not of {self.name}")
        elif self.teacher is None:
            raise ValueError("from_teacher needs a teacher: the name of an imported system")
        elif self.vocab_size is not None:
            raise ValueError("from_teacher takes the tokens that the text uses, whatever their number")
        return self


class Lm(Options):
    """``lm``: n-grams over tokens and over words, for searches; the orders are what KenLM reads as it comes
    from PyPI.

    Args:
        order: n over tokens.
        word_order: n over words.
        data: as of :class:`Tokens`.
        labels: as of :class:`Tokens`.
        text: a text file to estimate them from instead, a sentence per line.
    """

    name: Literal["ngram"] = "ngram"
    order: int = Field(default=6, ge=2, le=6)
    word_order: int = Field(default=3, ge=2, le=6)
    data: str | None = None
    labels: str | None = None
    text: Place = None

    @model_validator(mode="after")
    def _text_of_one(self) -> Lm:
        _one_text(self.data, self.labels)
        return self


Learnt = Tokens | Lm
"""What is learnt from text that all systems may see."""


ALL = "all"
"""In place of a subset's name: the whole training split, whatever systems must do without."""


NONE = "none"
"""In place of a subset's name: no utterance's transcript."""


EMA = "ema"
"""In place of a teacher's name: the running average of the student's own weights."""


class Ema(Options):
    """``ema``: the average that a student learns from.

    Args:
        decay: of the average, per step: it covers about 1 / (1 - decay) steps.
    """

    decay: float = Field(default=0.999, gt=0, lt=1)


def uses_lm(options: Mapping[str, Any]) -> bool:
    """Whether a decoder with these options asks for the recipe's language model."""
    return bool(options.get("lm_weight"))


class SpecAugment(Options):
    """Masks over the student's input (Park et al. 2019, arXiv 1904.08779), without time warp.

    Args:
        num_freq_masks: masks over mel bins.
        freq_width: bins, the widest of them.
        num_time_masks: masks over time.
        time_width: feature frames of 0.01 s, the widest of them.
        max_time_fraction: share of an utterance that time masks may cover, 0 to 1.
        start_below: masks begin when the dev token error has fallen below this share: before, they only
            slow a model that fits nothing yet; null, or no dev split: from the start.
    """

    num_freq_masks: int = Field(default=2, ge=0)
    freq_width: int = Field(default=27, ge=0)
    num_time_masks: int = Field(default=10, ge=0)
    time_width: int = Field(default=100, ge=0)
    max_time_fraction: float = Field(default=0.15, ge=0, le=1)
    start_below: Annotated[float, Field(gt=0)] | None = 0.5


Share = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(allow_inf_nan=False)]]


class Augment(Options):
    """Speech as devices hear it: with silence around it, joined, at other levels, in rooms, under noise.

    Made anew from the audio each time an utterance is heard, see :mod:`kdrecipe.data.augment`. A share of 0
    turns a part off; amounts are uniform in their range.

    Args:
        silence: share of batches with silence around their utterances.
        silence_s: seconds of it, before and after together, around the longest.
        join: share of batches whose utterances are joined.
        join_s: seconds that joined utterances last at most.
        gain: share of utterances at another level.
        gain_db: by so many decibels.
        reverb: share of utterances in a room.
        rt60_s: seconds in which the room's sound falls by 60 dB.
        noise: share of utterances with noise over them.
        snr_db: ratio of speech to noise.
        noises: a directory of audio files to take noise from, such as MUSAN's; null: made noise.
        start_below: it begins when the dev token error has fallen below this share: before, it only slows
            a model that fits nothing yet; null, or no dev split: from the start.
    """

    silence: Share = 0.3
    silence_s: Range = (0.0, 3.0)
    join: Share = 0.15
    join_s: Positive = 12.0
    gain: Share = 0.3
    gain_db: Range = (-20.0, 20.0)
    reverb: Share = 0.05
    rt60_s: Range = (0.1, 0.5)
    noise: Share = 0.1
    snr_db: Range = (5.0, 40.0)
    noises: str | None = None
    start_below: Annotated[float, Field(gt=0)] | None = 0.5

    @model_validator(mode="after")
    def _ranges(self) -> Augment:
        for name in ("silence_s", "gain_db", "rt60_s", "snr_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is a range: the lower end first, not [{low:g}, {high:g}]")
            if name.endswith("_s") and low < 0:
                raise ValueError(f"{name} are seconds, 0 or more")
        return self


MASKED_FROM = 5_000_000
"""Parameters. Smaller models do not fit what they hear on a small corpus, and masks take from that."""


class Training(Options):
    """``training``: the one loop's settings; a system overrides any of them.

    Args:
        epochs: passes over the data, at least 1; with ``schedule: wsd`` a bound, else their number.
        batch_duration_s: audio per batch and process, in seconds.
        optimizer: ``muon`` for the matrices between hidden states and AdamW for the rest, or ``adamw`` alone.
        lr: the highest learning rate; ``auto``: by the optimiser and the model's size, see :meth:`for_model`.
        warmup_steps: in which the rate rises from 0; at most a tenth of all.
        schedule: afterwards: ``wsd`` holds the rate until the dev error is flat and then lets it fall to
            0; of fixed length are ``cosine`` and ``linear`` (to 0), ``constant`` and ``noam`` (inverse square
            root of the step).
        flat: of ``wsd``: a dev error is flat that fell by less than this share over the last quarter of the
            evaluations, six at least.
        cooldown: of ``wsd``: the last part, in which the rate falls, as a share of what came before it.
        flat_start: steps over which a flat start of CTC fades, at most a quarter of all; 0: none, which is
            also what models have that start from others' weights. See :mod:`kdrecipe.train.flat_start`.
        weight_decay: on matrices only.
        betas: of AdamW.
        grad_clip: highest norm of the gradient; null: no clipping.
        average: whether the running average of the weights is scored and kept, or the last weights.
        precision: ``auto`` takes bf16 where the hardware has it.
        accumulate: batches per optimiser step.
        shard: under ``torchrun``, weights, gradients and the optimiser's state are divided among the
            processes (FSDP2), for models that one GPU does not hold; with ``optimizer: adamw``.
        spec_augment: masks over the input; null: none; ``auto``: those of :class:`SpecAugment` for models
            that have at least :data:`MASKED_FROM` parameters or a loss that compares views.
        augment: what surrounds and covers speech in training; null: nothing.
        log_every: steps from one line of the log to the next.
        checkpoint_every_s: seconds from one checkpoint to the next within an epoch.
        dev_every: epochs from one pass over the development data to the next.
    """

    epochs: int = Field(default=100, ge=1)
    batch_duration_s: Positive = 60.0
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: Positive | Literal["auto"] = "auto"
    warmup_steps: int = Field(default=100, ge=0)
    schedule: Literal["wsd", "cosine", "linear", "constant", "noam"] = "wsd"
    flat: float = Field(default=0.05, ge=0, lt=1)
    cooldown: float = Field(default=0.25, gt=0)
    flat_start: int = Field(default=100, ge=0)
    weight_decay: NotNegative = 1e-2
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    grad_clip: Positive | None = 5.0
    average: bool = True
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: int = Field(default=1, ge=1)
    shard: bool = False
    spec_augment: SpecAugment | Literal["auto"] | None = "auto"
    augment: Augment | None = None
    log_every: int = Field(default=20, ge=1)
    checkpoint_every_s: Positive = 600.0
    dev_every: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _shard_by_adamw(self) -> Training:
        if self.shard and (self.optimizer != "adamw" or self.precision == "fp16"):
            raise ValueError("shard: true goes with optimizer: adamw, and with fp32 or bf16")
        return self

    def for_model(self, num_params: int, num_views: int = 1) -> Training:
        """These settings with every ``auto`` decided, save that of ``precision``.

        The learning rate is 4e-3 (AdamW: 2e-3) at 3 M parameters and goes by the cube root of
        their number, within 1e-3 and 1e-2: a narrow model bears, and needs, a higher rate than a wide one.

        Args:
            num_params: of the model.
            num_views: of the input, that its losses compare.
        """
        lr, masks = self.lr, self.spec_augment
        if lr == "auto":
            scale = (3e6 / max(1, num_params)) ** (1 / 3)
            lr = min(1e-2, max(1e-3, (4e-3 if self.optimizer == "muon" else 2e-3) * scale))
        if masks == "auto":
            masks = SpecAugment() if num_params >= MASKED_FROM or num_views > 1 else None
        return self.model_copy(update={"lr": lr, "spec_augment": masks})


class TargetOptions(Options):
    """``targets``.

    Args:
        mode: ``cached``: teachers of stage 3 speak once, onto disk; ``live``: at every step.
        view: what teachers hear: ``clean``: the features as they are; ``masked``: the student's own, with its
            masks; with ``mode: live``.
        top_k: classes kept per frame by losses that have this option and do not set it; null: all.
    """

    mode: Literal["cached", "live"] = "cached"
    view: Literal["clean", "masked"] = "clean"
    top_k: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _masked_live(self) -> TargetOptions:
        if self.view == "masked" and self.mode != "live":
            raise ValueError("view: masked goes with mode: live; masks are new at every step")
        return self


class Parity(Options):
    """``parity``: how far an export may stray from its bundle before the recipe fails.

    Every exporter has bounds of its own for each variant (``fp32``, ``int8``, ...). A number given here takes
    the place of those that there are of that kind: one for all variants, or by variant (``{int8: 0.1}``).
    Token and word errors are counted against what the bundle itself recognises, not against the
    transcripts. Percentage points are those of the word error rate.

    Args:
        max_log_prob_diff: largest difference of any log-probability at any step.
        max_kl: nats per frame (attention: per token), mean divergence of the file's posteriors.
        max_token_error: share of tokens, 0 to 1, that the file recognises otherwise.
        max_wer_increase: percentage points.
        max_deletion_increase: percentage points of words left out: what few bits break first.
        max_token_error_runtime: share of tokens, 0 to 1, that the device's runtime recognises
            otherwise than the same file does on the features of the training; where ``max_token_error`` is
            larger, that.
        max_rewritten: share of words, 0 to 1, that the device's runtime writes otherwise than its tokens
            spell, by a rule such as no space before an apostrophe. That is no near tie: ``slack`` does not
            apply. Stage 2 holds the transcripts of dev and ``decode.splits`` to it, stage 7 what is said.
        slack: tokens or words; a difference of so few is never held against an export, since a
            handful of near ties proves nothing; nor is one of words that chance explains, within three
            standard deviations over the utterances.
        num_utterances: taken for the comparison, drawn over all speakers of dev (without it, of train).
    """

    max_log_prob_diff: Positive | dict[str, Positive] | None = None
    max_kl: Positive | dict[str, Positive] | None = None
    max_token_error: Share | dict[str, Share] | None = None
    max_wer_increase: NotNegative | dict[str, NotNegative] | None = None
    max_deletion_increase: NotNegative | dict[str, NotNegative] | None = None
    max_token_error_runtime: float = Field(default=0.02, ge=0, le=1)
    max_rewritten: float = Field(default=0.0, ge=0, le=1)
    slack: int = Field(default=3, ge=0)
    num_utterances: int = Field(default=50, ge=1)

    def bounds(self, variant: str, own: Bounds) -> Bounds:
        """Those of a variant, by default ``own``."""
        found: dict[str, float | None] = {}
        for bound in fields(own):
            default, given = getattr(own, bound.name), getattr(self, bound.name)
            value = given.get(variant) if isinstance(given, dict) else given
            found[bound.name] = default if default is None or value is None else value
        return Bounds(**found)


DEFAULT_DECODERS = ("ctc_greedy", "attention_greedy", "rnnt_greedy")
"""Those of them that are installed and suit some system."""


class Decode(Options):
    """``decode``.

    Args:
        splits: splits to recognise; the first one is the main table's, and time and memory are of it.
        decoders: the searches, by label; see :mod:`kdrecipe.recipe.suitable` for which serve a system.
        metrics: figures over the hypotheses; the first one is the table's.
        compare: pairs of systems whose difference is tested for significance.
        measure_max: utterances of the first split, over all speakers, on which searches are timed in torch.
        robustness: so many of them are also recognised with silence around, joined, at other levels and
            under noise, see :mod:`kdrecipe.measure.conditions`; 0: none.
        longest_s: seconds that are recognised as one; longer utterances are cut where they are quietest.
    """

    splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("test",)
    decoders: Annotated[dict[str, Plugin], Field(min_length=1)] = {n: Named(n) for n in DEFAULT_DECODERS}
    metrics: Annotated[tuple[Plugin, ...], Field(min_length=1)] = (Named("wer"), Named("cer"))
    compare: tuple[tuple[str, str], ...] = ()
    measure_max: int = Field(default=100, ge=1)
    robustness: int = Field(default=100, ge=0)
    longest_s: float = Field(default=30.0, ge=1.0)


class Claim(Options):
    """One of ``claims``: a figure that somebody else published, to stand beside what is measured here.

    Args:
        text: what is claimed, in words.
        system: the system that it is about; null if nothing here measures it.
        figure: ``wer``, or ``params_ratio`` and ``size_ratio`` of ``system`` over ``of``.
        value: as claimed: percent for ``wer``, a fraction for the ratios.
        of: the system that a ratio is taken over.
        split: of a ``wer``; null: the first that is decoded.
        on: the corpus and split that it was claimed on, such as ``LibriSpeech test-clean``.
        source: where it is claimed.
    """

    text: Annotated[str, Field(min_length=1)]
    system: str | None = None
    figure: Literal["wer", "params_ratio", "size_ratio"] | None = None
    value: NotNegative | None = None
    of: str | None = None
    split: str | None = None
    on: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if (self.figure is None) != (self.value is None):
            raise ValueError("figure and value go together")
        if self.system is not None and self.figure is None:
            raise ValueError("a claim about a system needs a figure and its value")
        is_ratio = self.figure in ("params_ratio", "size_ratio")
        if is_ratio and self.system is not None and self.of is None:
            raise ValueError(f"{self.figure} is a ratio: of: names the system that it is taken over")
        if not is_ratio and self.of is not None:
            raise ValueError("only params_ratio and size_ratio are taken of another system")
        if self.figure != "wer" and self.split is not None:
            raise ValueError("only a wer is of a split")
        return self


@dataclass(frozen=True)
class System:
    """One row of the result table.

    Args:
        name: its name.
        kind: what it is.
        seeds: one model is made for each.
        training: the recipe's settings with this system's own put over them.
        targets: the recipe's settings with this system's own put over them.
        model: ``{name, <options>, heads: {<head>: {...}}}``, defaults filled in; None if it comes
            from elsewhere (compressed, pretrained).
        data: subset of the training split whose transcripts are labels; None: all of it; :data:`NONE`.
        unlabelled: subset, or :data:`ALL`, whose transcripts are not used.
        labels: the teacher whose hypotheses are the labels there; None: only terms without labels see it.
        keep: which of those hypotheses are labels.
        teachers: systems it learns from.
        ema: of its own weights, which teaches it, too; None: it does not.
        parent: system it is compressed from.
        init_from: system with the same encoder, whose weights it starts with: those of the encoder and
            of the heads that both have; other heads start from random weights.
        init_layers: ``encoder`` or a head's name -> the layers of ``init_from`` that it starts with, in
            order; parts not named have as many as there.
        terms: its objective. A compressed system without one has that of the system that it stems from,
            teachers and data included: see :func:`kdrecipe.recipe.suitable.objective_of`.
        steps: compressors, in order.
        budget: that the steps meet; None: their options say how much.
        free_steps: numbers of those whose strength the budget decides.
        location: of a pretrained bundle; of what a plugin imports, where its options' paths count from.
        plugin: what imports a pretrained model that is no bundle, with its options as the recipe has them.
        text: how the hypotheses of that model become transcripts.
    """

    name: str
    kind: Kind
    seeds: tuple[int, ...]
    training: Training
    targets: TargetOptions = field(default_factory=TargetOptions)
    model: dict[str, Any] | None = None
    data: str | None = None
    unlabelled: str | None = None
    labels: str | None = None
    keep: Keep | None = None
    teachers: tuple[str, ...] = ()
    ema: Ema | None = None
    parent: str | None = None
    init_from: str | None = None
    init_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    terms: tuple[Term, ...] = ()
    steps: tuple[Named, ...] = ()
    budget: Budget | None = None
    free_steps: tuple[int, ...] = ()
    location: Location | None = None
    plugin: Named | None = None
    text: TextForm = field(default_factory=TextForm)

    @property
    def all_teachers(self) -> tuple[str, ...]:
        """Whom its losses learn from: its teachers, and :data:`EMA`."""
        return (*self.teachers, EMA) if self.ema else self.teachers

    @property
    def learns(self) -> bool:
        """Whether it has an objective of its own."""
        return self.kind in ("trained", "distilled") or bool(self.terms)

    @property
    def is_imported(self) -> bool:
        """Whether it comes through a plugin: it teaches and has a row, and that is all."""
        return self.plugin is not None

    @property
    def bundle(self) -> Path | None:
        """Directory of a pretrained bundle; RecipeError if an environment variable is not set."""
        return self.location.path() if self.location and not self.is_imported else None

    @property
    def needs(self) -> tuple[str, ...]:
        """Systems that must be built before this one."""
        others = (self.parent, self.init_from)
        return tuple(dict.fromkeys([*self.teachers, *(o for o in others if o is not None)]))


def depth_first(systems: Mapping[str, System]) -> tuple[list[str], list[list[str]]]:
    """Names such that each comes after what it needs, and the circles that prevent it."""
    order: list[str] = []
    circles: list[list[str]] = []
    state: dict[str, str] = {}

    def visit(name: str, trail: list[str]) -> None:
        if state.get(name) == "open":
            circles.append([*trail[trail.index(name) :], name])
            return
        if name in state or name not in systems:
            return
        state[name] = "open"
        for need in systems[name].needs:
            visit(need, [*trail, name])
        state[name] = "done"
        order.append(name)

    for name in systems:
        visit(name, [])
    return order, circles


def shared_labels(systems: Mapping[str, System]) -> tuple[str, ...]:
    """Subsets that systems with an objective have labels of; empty: all have the whole split.

    One name is the part whose transcripts all systems may see: tokens and language models, which
    all systems share, are learnt from it unless the recipe says otherwise. With several names
    there is no such part that the recipe names. See :func:`without_transcripts`.
    """
    names = [s.data for s in systems.values() if s.learns]
    return tuple(dict.fromkeys(name for name in names if name is not None and name != NONE))


def without_transcripts(systems: Mapping[str, System]) -> list[System]:
    """All systems with an objective, if none of them has labels by people; else empty."""
    made = [s for s in systems.values() if s.learns]
    return made if all(s.data == NONE for s in made) else []


def beyond_labels(
    systems: Mapping[str, System], data: str | None, subsets: Mapping[str, set[str]]
) -> list[str]:
    """Systems whose labels do not cover what tokens or a language model were learnt from.

    Args:
        systems: of the recipe.
        data: the subset that was learnt from; None: the whole training split.
        subsets: name -> utterances.
    """
    return [
        name
        for name, system in systems.items()
        if system.data is not None and (data is None or not subsets[data] <= subsets.get(system.data, set()))
    ]
