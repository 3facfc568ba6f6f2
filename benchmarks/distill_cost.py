"""What distillation costs: a training step with a teacher beside one without, bytes on disk, teachers' speed.

    python benchmarks/distill_cost.py [--work DIR] [--whisper DIR] [--wav2vec2 DIR] [--only losses] [--quick]

Steps are those of the training loop (``kdrecipe.train.step``), optimiser included, of a Conformer of 6 x 144
taught by one of 12 x 256. Each kind of target is measured in turn: a step without the teacher, one with
cached and one with live targets, on the same batch, round by round; figures are medians over the rounds, and
the ratios are medians of each round's. The second table has every distilling loss with cached targets, in the
same way. With ``--work``, the work directory of a recipe whose stages 0 to 2
are done, batches are its own; without, they are noise. Teachers of Hugging Face's library have random
weights of the shape of tiny.en and of wav2vec 2.0 base unless a directory is given.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile
import torch
from lhotse.audio import Recording
from lhotse.cut import CutSet

from kdrecipe.data.batches import CutBatches
from kdrecipe.data.features import extract, load_cuts
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.frames import valid_frames
from kdrecipe.interfaces import SAMPLE_RATE, Batch, LossSetup, TargetSpec, Teacher
from kdrecipe.model.asr import AsrModel, build_model, model_info
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.sections import EMA, Training
from kdrecipe.targets import TargetSource
from kdrecipe.targets.cache import TargetCache, write_targets
from kdrecipe.targets.kinds import KINDS
from kdrecipe.targets.live import LiveTargets, ModelTeacher
from kdrecipe.targets.quantiser import CodedTeacher, train_quantiser
from kdrecipe.testing.pretrained import save_wav2vec2, save_whisper
from kdrecipe.train.distribution import Workers
from kdrecipe.train.ema import MovingAverage
from kdrecipe.train.objective import Objective, Term
from kdrecipe.train.optimisation import make_optimizer
from kdrecipe.train.step import Stepper

FEATURES = {"name": "fbank", "num_mel_bins": 80}
ATTENTION = {"attention": {"num_layers": 2}}
LAST_TAP = "last layer"
LAST = {LAST_TAP: LAST_TAP}
WARM_UP = 2  # steps: a part of the others reads the cache from disk, as the first epoch does
LABELS = "hypotheses as labels"
TEACHERS = "teachers"
LOSSES = "losses"
TEACHER, SECOND = "teacher", "teacher_2"


@dataclass(frozen=True)
class Case:
    """A kind of target and what learns from it.

    Args:
        title: of its row.
        heads: of student and teacher.
        plain: the supervised loss.
        distilling: the loss that learns from the teacher, with its options; :data:`LAST_TAP` stands for the
            last layer.
        teachers: whom it learns from; :data:`EMA` is at work in each step, others are cached.
    """

    title: str
    heads: Mapping[str, Any]
    plain: str
    distilling: Mapping[str, Any]
    teachers: tuple[str, ...] = (TEACHER,)


CASES: tuple[tuple[str, Case], ...] = (
    ("frame_logits", Case("frame_logits, all classes", {"ctc": {}}, "ctc", {"name": "kl"})),
    ("frame_logits", Case("frame_logits, top_k: 8", {"ctc": {}}, "ctc", {"name": "kl", "top_k": 8})),
    (
        "token_logits",
        Case("token_logits, all classes", ATTENTION, "attention", {"name": "kl", "head": "attention"}),
    ),
    ("hidden", Case("hidden, one layer", {"ctc": {}}, "ctc", {"name": "hidden_mse", "layers": LAST})),
    (
        "token_hidden",
        Case(
            "token_hidden, queries, keys and values",
            ATTENTION,
            "attention",
            {"name": "minilm", "part": "decoder", "layers": {"attention.1": "attention.1"}},
        ),
    ),
    (
        "codebooks",
        Case("codebooks, 16", {"ctc": {}}, "ctc", {"name": "mvq", "layer": LAST_TAP}),
    ),
    ("rnnt_lattice", Case("rnnt_lattice", {"rnnt": {}}, "rnnt", {"name": "rnnt_kl"})),
    ("hypotheses", Case("hypotheses, the best text", {"ctc": {}}, "ctc", {"name": "ctc_nbest"})),
)


LOSS_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "askd": {"steps": 1000},
    "taid": {"steps": 1000},
    "ctc_nbest": {"num_texts": 4},
    "ctc_full_sum": {"num_texts": 4},
    "inter_ctc_kl": {"layers": [LAST_TAP]},
    "self_ctc_kl": {"layers": ["encoder.0"]},
    "mvq": {"layer": LAST_TAP},
    "rkd": {"layer": LAST_TAP},
    **{name: {"layers": LAST} for name in ("hidden_mse", "hidden_l1_cos", "fitnets_hint", "hidden_weighted")},
    "minilm": {"layers": LAST},
}
"""Of losses whose defaults do not do."""
LOSS_TEACHERS = {"ensemble_kl": (TEACHER, SECOND), "askd": (TEACHER, EMA), "cr_ctc": (), "self_ctc_kl": ()}


def loss_cases() -> list[Case]:
    """A case for each distilling loss that is installed."""
    registry = load_plugins().registry
    cases = []
    for name in registry.names("losses"):
        if registry.problem("losses", name) or getattr(registry.get("losses", name), "supervised", False):
            continue
        head = "rnnt" if name.startswith("rnnt_") else "ctc"
        options = {"name": name, **LOSS_OPTIONS.get(name, {})}
        cases.append(Case(name, {head: {}}, head, options, LOSS_TEACHERS.get(name, (TEACHER,))))
    return cases


@dataclass(frozen=True)
class Sizes:
    """What is measured: real sizes, or toys for ``--quick``.

    Args:
        student: layers and width.
        teacher: layers and width.
        batches: of this many seconds each, as many as rounds.
        batch_s: seconds of audio in a batch.
        rounds: after the warm-up.
        whisper: what differs from the small random one.
        wav2vec2: what differs from the small random one.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]
    batches: int
    batch_s: float
    rounds: int
    whisper: Mapping[str, Any] = field(default_factory=dict)
    wav2vec2: Mapping[str, Any] = field(default_factory=dict)


REAL = Sizes(
    (6, 144),
    (12, 256),
    batches=6,
    batch_s=60.0,
    rounds=8,
    whisper={
        "max_source_positions": 1500,
        "num_mel_bins": 80,
        "d_model": 384,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 6,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "decoder_ffn_dim": 1536,
        "init_std": 0.02,
    },
    wav2vec2={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "conv_dim": (512,) * 7,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
        "initializer_range": 0.02,
    },
)
QUICK = Sizes((2, 32), (2, 48), batches=2, batch_s=6.0, rounds=1)


# ---------------------------------------------------------------- data


@dataclass
class Data:
    """Some batches with their audio, and the cuts that they hold."""

    batches: Mapping[tuple[str, ...], Batch]
    cuts: CutSet
    vocab_size: int

    def epoch(self, number: int) -> list[list[str]]:
        """Ids of each batch."""
        return [list(ids) for ids in self.batches]

    def load(self, ids: Sequence[str]) -> Batch:
        """One of them."""
        return self.batches[tuple(ids)]

    @property
    def listed(self) -> list[Batch]:
        """All batches."""
        return list(self.batches.values())

    @property
    def hours(self) -> float:
        """Of audio, padding not counted."""
        return sum(int(batch.lens_B.sum()) for batch in self.listed) / 100 / 3600


def of_recipe(work: Path, sizes: Sizes) -> Data:
    """Batches of a recipe's training audio."""
    tokens = Tokenizer.load(work / "tokens")
    cuts: Any = load_cuts(work / "features", "train")
    whole = CutBatches(cuts, tokens, batch_duration_s=sizes.batch_s, seed=0, with_audio=True)
    chosen = whole.epoch(0)[: sizes.batches]
    ids = {i for batch in chosen for i in batch}
    batches = {tuple(batch): whole.load(batch) for batch in chosen}
    return Data(batches, CutSet.from_cuts(cut for cut in cuts if cut.id in ids), len(tokens))


def of_noise(directory: Path, sizes: Sizes, vocab_size: int = 500) -> Data:
    """Batches of noise that swells, utterances of 3 to 9 s (at most a third of a batch), 12 tokens in 1 s."""
    rng = np.random.default_rng(0)
    longest_s = min(9.0, sizes.batch_s / 3)
    time_S = np.arange(round(longest_s * SAMPLE_RATE)) / SAMPLE_RATE
    noise_S = (0.1 * rng.standard_normal(len(time_S)) * np.abs(np.sin(9 * time_S))).astype(np.float32)
    soundfile.write(directory / "noise.wav", noise_S, SAMPLE_RATE)
    whole = Recording.from_file(directory / "noise.wav", recording_id="noise").to_cut()
    batches, cuts = {}, []
    for number in range(sizes.batches):
        lens_s = np.round(rng.uniform(longest_s / 3, longest_s, round(1.5 * sizes.batch_s / longest_s)), 2)
        row = [whole.truncate(duration=float(s)).with_id(f"{number}-{i}") for i, s in enumerate(lens_s)]
        cuts += row
        batches[tuple(cut.id for cut in row)] = _batch(row, vocab_size, rng)
    return Data(batches, CutSet.from_cuts(cuts), vocab_size)


def _batch(cuts: Sequence[Any], vocab_size: int, rng: np.random.Generator) -> Batch:
    audio = [torch.from_numpy(cut.load_audio()[0]) for cut in cuts]
    features = [torch.from_numpy(extract(samples.numpy(), SAMPLE_RATE, FEATURES)) for samples in audio]
    tokens = [torch.from_numpy(rng.integers(3, vocab_size, len(f) * 3 // 100 + 1)) for f in features]
    pad: Callable[..., torch.Tensor] = torch.nn.utils.rnn.pad_sequence
    return Batch(
        ids=[cut.id for cut in cuts],
        features_BTF=pad(features, batch_first=True),
        lens_B=torch.tensor([len(f) for f in features]),
        tokens_BU=pad(tokens, batch_first=True),
        token_lens_B=torch.tensor([len(t) for t in tokens]),
        labelled_B=torch.ones(len(cuts), dtype=torch.bool),
        texts=["ONE"] * len(cuts),
        samples_BS=pad(audio, batch_first=True),
        sample_lens_B=torch.tensor([len(a) for a in audio]),
    )


# ---------------------------------------------------------------- what is measured


@dataclass
class Spent:
    """Of steps: CPU and wall seconds, and megabytes at the worst moment above those held before it."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


def measured(work: Callable[[], object], into: Spent) -> None:
    """Run once, and add what it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    into.cpu_s.append(time.process_time() - cpu)
    into.wall_s.append(time.perf_counter() - wall)


def peak_of(work: Callable[[], object]) -> float:
    """Megabytes that a process has at most while ``work`` runs, above those before; 0 where not known."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except (AttributeError, OSError):
        return 0.0
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Bench:
    """Models of one case, and its steps."""

    def __init__(self, case: Case, sizes: Sizes, data: Data, work_dir: Path) -> None:
        self.case, self.data, self.work_dir = case, data, work_dir
        self._registry = load_plugins().registry
        self._student = sizes.student
        self.teacher = ModelTeacher(self._model(*sizes.teacher))
        mine, its = (f"encoder.{layers - 1}" for layers, _ in (sizes.student, sizes.teacher))
        places = {repr(LAST): {mine: its}, repr(LAST_TAP): its, repr([LAST_TAP]): [mine]}
        options = {key: value for key, value in case.distilling.items() if key != "name"}
        self._options: dict[str, Any] = {key: places.get(repr(v), v) for key, v in options.items()}
        loss = self._registry.get("losses", case.distilling["name"])
        config = loss.Config.model_validate(self._options)
        self.needs: list[TargetSpec] = list(loss.requires(config)) if case.teachers else []
        self.source = self._with_codebooks()

    def _with_codebooks(self) -> Teacher:
        """The teacher, with codebooks (of a few steps: their quality costs nothing) if it needs them."""
        coded = [need for need in self.needs if need.kind == "codebooks"]
        quantisers = {}
        for need in coded:
            hidden = self.teacher.targets(self.data.listed[0], [need.source]).hidden(need.tap)
            frames_MD = valid_frames(hidden.values_BTD, hidden.lens_B)
            quantisers[need.key], _ = train_quantiser(frames_MD, int(need.dim or 0), steps=2)
        return cast("Teacher", CodedTeacher(self.teacher, quantisers)) if coded else self.teacher

    def _model(self, layers: int, dim: int) -> AsrModel:
        torch.manual_seed(0)
        description = {"name": "conformer", "num_layers": layers, "dim": dim, "heads": dict(self.case.heads)}
        return build_model(
            description, input_dim=80, vocab_size=self.data.vocab_size, registry=self._registry
        )

    def stepper(self, source: TargetSource | None, *, plain: bool = False) -> Stepper:
        """The student's steps: from labels alone (``plain``), or with the loss as well.

        ``source``: targets of every teacher but the student's own average.
        """
        student = self._model(*self._student).train()
        info = model_info(student, "bench")
        terms = [self._term(self.case.plain, {}, LossSetup(info), ())]
        teachers: dict[str, TargetSource] = {}
        if not plain:
            taught = model_info(self.teacher._model, "bench")
            names = self.case.teachers
            setup = LossSetup(info, taught, {name: info if name == EMA else taught for name in names})
            terms.append(self._term(self.case.distilling["name"], self._options, setup, names))
            for name in names:
                teachers[name] = (
                    MovingAverage(0.999, self.needs) if name == EMA else cast(TargetSource, source)
                )
        objective = Objective(terms)
        options = Training(lr=1e-5, spec_augment=None)  # noise teaches nothing; it must not diverge
        optimizer = make_optimizer(student, objective.module.parameters(), options)
        workers = Workers(0, 1, torch.device("cpu"))
        if (average := teachers.get(EMA)) is not None:
            cast(MovingAverage, average).start(student)
        return Stepper(student, objective, teachers, optimizer, options, workers, 0, self.work_dir)

    def _term(self, name: str, options: Mapping[str, Any], setup: LossSetup, teachers: Sequence[str]) -> Term:
        cls = self._registry.get("losses", name)
        loss = cls(cls.Config.model_validate(dict(options)), setup)
        if getattr(cls, "all_teachers", False):
            return Term(name, 1.0, loss, all_teachers=tuple(teachers))
        return Term(name, 1.0, loss, *teachers)

    def cached(self) -> TargetCache:
        """The teacher's targets of all batches, on disk."""
        place = self.work_dir / "targets"
        return write_targets(self.data.cuts, self.data, self.source, self.needs, place, key_parts={})

    def run(self, rounds: int) -> tuple[dict[str, Spent], float]:
        """Steps by variant, and bytes of targets per hour of audio."""
        cached = self.cached()
        size = sum(path.stat().st_size for path in cached.directory.iterdir())
        steppers = {
            "plain": self.stepper(None, plain=True),
            "cached": self.stepper(cached),
            "live": self.stepper(LiveTargets(self.source, self.needs)),
        }
        spent = self._in_turn(steppers, rounds)
        longest = max(self.data.listed, key=lambda batch: batch.features_BTF.numel())
        for name, stepper in steppers.items():
            spent[name].peak_mb = peak_of(lambda s=stepper: s.run([longest], rounds + 1))  # type: ignore[misc]
        weights = sum(p.numel() * p.element_size() for p in self.teacher._model.parameters())
        spent["live"].peak_mb += weights / 2**20
        return spent, size / self.data.hours

    def run_loss(self, rounds: int) -> tuple[Spent, Spent]:
        """Steps from labels alone, and with the loss and cached targets."""
        loss = self.stepper(self.cached() if self.case.teachers else None)
        spent = self._in_turn({"plain": self.stepper(None, plain=True), "loss": loss}, rounds)
        return spent["plain"], spent["loss"]

    def _in_turn(self, steppers: Mapping[str, Stepper], rounds: int) -> dict[str, Spent]:
        """A step of each on the same batch, round by round."""
        spent = {name: Spent() for name in steppers}
        batches = self.data.listed
        for number in range(WARM_UP + rounds):
            batch = batches[number % len(batches)]
            for name, stepper in steppers.items():
                kept = spent[name] if number >= WARM_UP else Spent()
                measured(lambda s=stepper, b=batch, n=number: self._step(s, b, n + 1), kept)  # type: ignore[misc]
        return spent

    def _step(self, stepper: Stepper, batch: Batch, number: int) -> None:
        stepper.run([batch], number)
        for source in stepper.teachers.values():
            if isinstance(source, MovingAverage):
                source.update()


def ratio(of: Spent, to: Spent) -> float:
    """Median over rounds of CPU seconds over those of the other, on the same batch."""
    return statistics.median(a / b for a, b in zip(of.cpu_s, to.cpu_s, strict=True))


def hypotheses_per_hour(data: Data) -> float:
    """Bytes of ``hypotheses.jsonl`` per hour of audio, its texts being as long as the transcripts."""
    row = {
        "duration_s": 1.234567,
        "avg_log_prob": -0.123456789012345,
        "no_speech_prob": 0.001234567890123456,
        "reference": None,
    }
    size = 0
    for batch in data.listed:
        for i, text in zip(batch.ids, batch.texts, strict=True):
            size += len(json.dumps({"id": i, "text": text, "transcript": text, **row})) + 1
    return size / data.hours


# ---------------------------------------------------------------- tables


def steps_table(data: Data, sizes: Sizes, directory: Path, only: Sequence[str]) -> Iterator[str]:
    """A row for each kind of target. A step with hypotheses as labels is one without a teacher."""
    yield (
        "| targets | plain, CPU s (wall s) | cached | live | cached / plain | live / plain | "
        "peak MB: plain | cached | live | MB of targets per hour |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for number, (kind, case) in enumerate(CASES):
        if kind not in only or kind not in KINDS:
            continue
        place = directory / str(number)
        place.mkdir()
        spent, per_hour = Bench(case, sizes, data, place).run(sizes.rounds)
        times = [f"{_median(s.cpu_s)} ({_median(s.wall_s)})" for s in spent.values()]
        over = [f"{ratio(spent[name], spent['plain']):.2f}" for name in ("cached", "live")]
        peaks = [f"{s.peak_mb:.0f}" for s in spent.values()]
        yield f"| {' | '.join([case.title, *times, *over, *peaks, f'{per_hour / 1e6:.3g}'])} |"
    if LABELS in only:
        none, size = ["–"] * 3, f"{hypotheses_per_hour(data) / 1e6:.3g}"
        yield f"| {' | '.join([LABELS, *none, '1', '–', *none, size])} |"


def losses_table(data: Data, sizes: Sizes, directory: Path) -> Iterator[str]:
    """A row for each distilling loss, with cached targets."""
    yield "| loss | plain, CPU s (wall s) | with it | ratio |"
    yield "|---|--:|--:|--:|"
    for case in loss_cases():
        place = directory / case.title
        place.mkdir()
        plain, spent = Bench(case, sizes, data, place).run_loss(sizes.rounds)
        times = [f"{_median(s.cpu_s)} ({_median(s.wall_s)})" for s in (plain, spent)]
        yield f"| {' | '.join([f'`{case.title}`', *times, f'{ratio(spent, plain):.2f}'])} |"


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f}"


def teachers_table(
    data: Data, sizes: Sizes, directory: Path, paths: Mapping[str, str | None]
) -> Iterator[str]:
    """A row for each imported teacher and what it is asked for, of the first batch."""
    yield "| teacher | asked for | hours of audio per CPU hour | per hour |"
    yield "|---|---|--:|--:|"
    if importlib.util.find_spec("transformers") is None:
        yield "| none | transformers is not installed | | |"
        return
    registry, batch = load_plugins().registry, data.listed[0]
    audio_s = int(batch.lens_B.sum()) / 100
    for name in ("whisper", "hf_ctc"):
        path, what = paths[name], f"{name}, {Path(paths[name] or '').name}"
        if path is None:
            shape = sizes.whisper if name == "whisper" else sizes.wav2vec2
            save: Callable[..., Path] = save_whisper if name == "whisper" else save_wav2vec2
            path, what = str(save(directory / name, config=shape)), f"{name}, random weights"
        cls = registry.get("teachers", name)
        teacher: Teacher = cls(cls.Config.model_validate({"path": path}))
        teacher.load(torch.device("cpu"))
        for asked, speak in _asked(teacher, may_recognise=paths[name] is not None):
            spent = Spent()
            measured(lambda f=speak: f(batch), spent)  # type: ignore[misc]
            yield f"| {what} | {asked} | {audio_s / spent.cpu_s[0]:.1f} | {audio_s / spent.wall_s[0]:.1f} |"


def _asked(teacher: Teacher, may_recognise: bool) -> Iterable[tuple[str, Callable[[Batch], object]]]:
    """What to call, by what it is; random weights recognise without end, so they are not asked to."""
    specs = teacher.provides()
    for kind in ("frame_logits", "hidden", "token_logits"):
        last = [spec for spec in specs if spec.kind == kind][-1:]
        if last and (kind != "token_logits" or may_recognise):
            yield kind, lambda batch, last=last: teacher.targets(batch, last)  # type: ignore[misc]
    if may_recognise:
        yield "hypotheses", teacher.hypotheses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="work directory of a recipe: its training audio")
    parser.add_argument("--whisper", help="directory of a Whisper")
    parser.add_argument("--wav2vec2", help="directory of a wav2vec 2.0 with a CTC head")
    parser.add_argument("--rounds", type=int, help="timed steps of each variant")
    rows = [*KINDS, LABELS, LOSSES, TEACHERS]
    parser.add_argument("--only", nargs="+", choices=rows, default=rows)
    parser.add_argument("--quick", action="store_true", help="toy sizes, whose figures mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else REAL
    sizes = Sizes(**{**vars(sizes), "rounds": options.rounds or sizes.rounds})
    with tempfile.TemporaryDirectory(prefix="distill-cost-") as scratch:
        directory = Path(scratch)
        data = of_recipe(options.work, sizes) if options.work else of_noise(directory, sizes)
        num = sum(map(len, data.listed))
        print(
            f"torch {torch.__version__}, 1 thread; {num} utterances, {3600 * data.hours:.0f} s of audio in "
            f"{len(data.listed)} batches, {data.vocab_size} tokens; medians of {sizes.rounds} rounds\n"
        )
        for line in steps_table(data, sizes, directory, options.only):
            print(line, flush=True)
        print()
        for line in losses_table(data, sizes, directory) if LOSSES in options.only else ():
            print(line, flush=True)
        print()
        paths = {"whisper": options.whisper, "hf_ctc": options.wav2vec2}
        for line in teachers_table(data, sizes, directory, paths) if TEACHERS in options.only else ():
            print(line, flush=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"\n{used.ru_utime + used.ru_stime:.0f} CPU seconds in all")


if __name__ == "__main__":
    main()
