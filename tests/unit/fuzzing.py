"""What ``test_fuzz.py`` tries: plain values in the wrong places of recipes, manifests and command lines.

The base recipe writes out every key. A try replaces one or two values by any of eight kinds, asks
``check``, and where that passes goes on to ``run``: dry, or on a tiny corpus up to the tokens.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from kdrecipe.cli.main import main
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.yaml import parse_value
from kdrecipe.testing.corpus import make_corpus

MAX_LINES = 60  # one screen, generously
APART_EACH = 40  # every so many calls one is in a process of its own, as users start it

RECIPE = """
corpus:
  name: manifests
  root: ROOT
  on_error: stop
  max_utterances: 4
  splits: {train: train, dev: dev, test: test}
  recordings: "{part}_recordings.jsonl.gz"
  supervisions: "{part}_supervisions.jsonl.gz"
  resample: false
  subsets: {few: {speakers: 1}, some: {utterances: 2}, half: {fraction: 0.5}, rest: {except: few},
    short: {hours: 0.0001}, listed: {listed_in: ids.txt}}
features: {name: fbank, num_mel_bins: 80, speed_perturb: [0.9, 1.0]}
tokens: {name: char, vocab_size: 30, data: all}
lm: {name: ngram, order: 3, word_order: 2, data: all, text: null}
seeds: [1]
training: {epochs: 2, batch_duration_s: 10, optimizer: adamw, lr: 0.001, warmup_steps: 10, schedule: linear,
  flat: 0.05, cooldown: 0.25, flat_start: 0, weight_decay: 0.01, betas: [0.9, 0.98], grad_clip: 5.0,
  average: true, precision: fp32, accumulate: 1, spec_augment: {num_freq_masks: 2, freq_width: 27,
  num_time_masks: 10, time_width: 100, max_time_fraction: 0.15, start_below: 0.5}, log_every: 20,
  checkpoint_every_s: 600, dev_every: 1}
targets: {mode: cached, top_k: 5}
systems:
  teacher:
    train: {model: {name: conformer, num_layers: 1, dim: 16, num_heads: 2, ff_dim: 32, kernel_size: 5,
      dropout: 0.1, front_channels: 8, heads: {ctc: {dropout: 0.1}}}, data: null,
      losses: [{name: ctc, weight: 1.0, start_below: null}], training: {epochs: 1}, seeds: [1],
      init_from: null}
  both:
    train: {model: {name: transformer, num_layers: 1, dim: 16, num_heads: 2, heads: {attention:
      {num_layers: 1, dim: 16, num_heads: 2, ff_dim: 16, dropout: 0.1}, ctc: {}}},
      losses: [{name: attention, label_smoothing: 0.1}, {name: ctc, weight: 0.3}]}
  rnnt:
    train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {rnnt: {predictor: stateless,
      context_size: 2, predictor_dim: 16, joiner_dim: 16, dropout: 0.1}}}, losses: [{name: rnnt, range: 5,
      simple_scale: 0.5, lm_scale: 0.25, am_scale: 0.0, full: false}]}
  kd:
    distill: {teachers: [teacher], data: few, unlabelled: rest, model: &small {name: conformer, num_layers: 1,
      dim: 16, heads: {ctc: {}}}, losses: [{name: ctc, weight: 0.5}, {name: kl, weight: 0.5, teacher: teacher,
      temperature: 1.0, blank: keep, blank_threshold: 0.5, neighbours: 1, direction: forward, top_k: 5}]}
  hid:
    distill: {teachers: [teacher], model: *small, losses: [{name: cr_ctc, weight: 0.2}, {name: hidden_mse,
      layers: {encoder.0: encoder.0}, normalise: false}]}
  pruned: {compress: {from: kd, steps: [{name: magnitude_prune, sparsity: 0.5, scope: global, epochs: 1,
    ramp: 0.7, every: 10, output_layer: false}, {name: int8_dynamic, output_layer: true}],
    training: {epochs: 1}}}
decode:
  splits: [test]
  decoders: {greedy: {name: ctc_greedy}, beam: {name: ctc_prefix_beam, beam: 2, num_tokens_per_frame: 4,
    lm_weight: 0.0, length_bonus: 0.0}, att: {name: attention_beam, beam: 2, ctc_weight: 0.3, lm_weight: 0.0,
    length_bonus: 0.0, max_len_ratio: 1.0}, rnnt: {name: rnnt_beam, beam: 2, lm_weight: 0.0,
    length_bonus: 0.0}}
  metrics: [{name: wer, lowercase: false, remove_punctuation: false}, {name: cer}]
  compare: [[kd, teacher]]
  measure_max: 2
export: [{name: onnx_ctc, variants: [fp32, int8]}, {name: onnx_transducer},
  {name: onnx_attention}, {name: torchscript}]
parity: {max_log_prob_diff: 0.001, max_kl: 0.05,
  max_token_error: {int8: 0.1}, max_token_error_runtime: 0.02, max_wer_increase: 1.0,
  max_deletion_increase: 1.0, slack: 3, num_utterances: 2}
claims: [{text: small, system: kd, figure: wer, value: 6.5, split: test, on: here, source: me},
  {text: half, system: kd, figure: params_ratio, value: 0.5, of: teacher}]
plugins: {files: [plugin.py]}
profiles: {quick: {training: {epochs: 1}}}
"""

PLUGIN = '''
from kdrecipe import hookimpl
from kdrecipe.interfaces import Options


class Words:
    """Counts words."""

    class Config(Options):
        """Options."""

        scale: float = 1.0

    def __init__(self, config):
        self.config = config

    def errors(self, reference, hypothesis):
        return 0, 1


@hookimpl
def register_metrics(register):
    register("words", Words)
'''

# ---------------------------------------------------------------- values

NAMES = ("", "test", "train", "nope", "teacher", "kd", "all", "few", "ctc", "auto", "1", "1e-3", "true",
    "../x", "/", "a/b", ".", "${NOT_SET}", "${HOME}", "~", "~nobody/x", "\0", "\n", "\u2028", "\ud800",
    "x" * 300, "é", "{part}", "{", "%s", "\ufeff", "-", "--help", "null", "char", "bpe", "live")  # fmt: skip
TEXTS = st.one_of(st.sampled_from(NAMES), st.text(max_size=12))
INTS = st.one_of(
    st.integers(-3, 40), st.sampled_from([0, -1, 10**6, 2**31, 2**63 - 1, 2**64, -(2**63), 10**30, 10**400])
)
FLOATS = st.one_of(
    st.floats(-2, 2), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, -0.0, 0.5])
)
SCALARS = st.one_of(st.none(), st.booleans(), INTS, FLOATS, TEXTS)
LISTS = st.lists(SCALARS, max_size=3)
MAPPINGS = st.dictionaries(TEXTS, st.one_of(SCALARS, LISTS), max_size=3)
VALUES = st.one_of(
    st.none(), st.booleans(), INTS, FLOATS, TEXTS, LISTS, MAPPINGS, st.lists(MAPPINGS, max_size=2)
)
"""Null, truth, whole numbers of any size, other numbers, text, lists, mappings, lists of mappings."""


def key_paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key path within ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from key_paths(value, (*path, key))


BASE: dict[str, Any] = parse_value(RECIPE, "the base recipe")
PATHS = list(key_paths(BASE))
EARLY = [path for path in PATHS if path[0] in ("corpus", "features", "tokens", "lm")]


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set the value at ``path``, unless another change took that place away."""
    for key in path[:-1]:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return
    with contextlib.suppress(IndexError, TypeError):
        node[path[-1]] = value


class _Dumper(yaml.SafeDumper):
    """Without aliases, and with text that YAML can't hold written as the escapes that it can."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml(value: Any) -> str:
    """``value`` as YAML; JSON is YAML, save that numbers like 1e999 and NaN have other names."""
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=False, width=10**6, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


# ---------------------------------------------------------------- tries


@dataclass
class Tally:
    """What was tried."""

    tries: Counter[str] = field(default_factory=Counter)
    passed_check: int = 0
    calls: int = 0
    apart: int = 0

    @property
    def total(self) -> int:
        return sum(self.tries.values())


@dataclass
class World:
    """A tiny corpus and a place to try things in; each try begins from the same files."""

    home: Path
    tally: Tally = field(default_factory=Tally)
    lines: dict[str, list[Any]] = field(default_factory=dict)
    description: Any = None  # of the bundle
    files: list[str] = field(default_factory=list)  # broken ones, and their folders

    @classmethod
    def make(cls, home: Path) -> World:
        make_corpus(home / "corpus", num_speakers=4, utterances_per_speaker=2)
        world = cls(home)
        for file in sorted((home / "corpus").glob("*.jsonl.gz")):
            with gzip.open(file, "rt") as stream:
                world.lines[file.name] = [json.loads(line) for line in stream]
        (home / "corpus" / "ids.txt").write_text("spk00-0000 RED\nspk01-0001\n")
        (home / "recipe").mkdir()
        (home / "recipe" / "plugin.py").write_text(PLUGIN)
        world.write_recipe(world.base())
        write_broken(home / "files")
        world.files = [str(path) for path in sorted((home / "files").rglob("*"))]
        world.description = write_bundle(home / "bundle").meta
        return world

    def base(self) -> dict[str, Any]:
        """A copy of the base recipe."""
        recipe: dict[str, Any] = copy.deepcopy(BASE)
        recipe["corpus"]["root"] = str(self.home / "corpus")
        return recipe

    def write_recipe(self, recipe: Any) -> None:
        """Write the recipe's file."""
        text = recipe if isinstance(recipe, bytes) else as_yaml(recipe).encode("utf-8", "surrogatepass")
        (self.home / "recipe" / "recipe.yaml").write_bytes(text)

    @contextlib.contextmanager
    def other_lines(self, name: str) -> Iterator[list[Any]]:
        """Lines of a manifest, to be changed; the next try has the old ones again."""
        for file, lines in self.lines.items():
            rows = copy.deepcopy(lines)
            if file == name:
                yield rows
            with gzip.open(self.home / "corpus" / file, "wt") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows))

    def check_and_run(self, kind: str, *options: str, stages: bool = False) -> None:
        """``check``; where it passes, a dry run, or the first three stages."""
        self.tally.tries[kind] += 1
        where = str(self.home / "recipe")
        if self.call("check", where, *options) != 0:
            return
        self.tally.passed_check += 1
        work = ["--work", str(self.home / "work")]
        if stages:
            shutil.rmtree(self.home / "work", ignore_errors=True)
            self.call("run", where, *options, *work, "--stop-stage", "2", "--jobs", "1")
        else:
            self.call("run", where, *options, *work, "--dry-run")

    def import_and_transcribe(self, description: Any) -> None:
        """``check`` and stage 5 of a recipe that imports the bundle described so, and ``transcribe``."""
        self.tally.tries["bundles"] += 1
        (self.home / "bundle" / "bundle.json").write_text(json.dumps(description))
        recipe = self.base()
        recipe["systems"]["big"] = {"pretrained": {"bundle": str(self.home / "bundle")}}
        self.write_recipe(recipe)
        where = str(self.home / "recipe")
        if self.call("check", where) == 0:
            self.tally.passed_check += 1
        self.call("run", where, "--work", str(self.home / "imported"), "--job", "big/seed1")
        self.call("transcribe", str(self.home / "bundle"), self.wav)

    @property
    def wav(self) -> str:
        """An utterance."""
        return str(min((self.home / "corpus" / "audio").iterdir()))

    def call(self, *arguments: str) -> int:
        """The command line in this process, or now and then in another.

        Raises:
            AssertionError: a traceback, more than a screen, or a failure without a word.
        """
        self.tally.calls += 1
        if self.tally.calls % APART_EACH == 1 and "\0" not in "".join(arguments):
            self.tally.apart += 1
            return self._call_apart(*arguments)
        out, err = io.StringIO(), io.StringIO()
        said = ""
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(arguments))
            except Exception:
                said = traceback.format_exc()
                status = 1
        assert not said, f"{arguments}\n{said}"
        _judge(arguments, status, err.getvalue())
        return status

    def _call_apart(self, *arguments: str) -> int:
        command = [sys.executable, "-m", "kdrecipe.cli"]
        command += [argument.encode("utf-8", "surrogateescape") for argument in arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, env=env, timeout=300)
        _judge(arguments, done.returncode, done.stderr.decode("utf-8", "replace"))
        return done.returncode


def _words(*options: str) -> st.SearchStrategy[str]:
    """An argument: one of ``options``, or anything that a shell could pass."""
    anything = st.one_of(TEXTS, INTS.map(str), FLOATS.map(str))
    return st.one_of(st.sampled_from(options), anything.filter(_can_be_passed)) if options else anything


def _can_be_passed(text: str) -> bool:
    return "\0" not in text and text.isprintable()


def _options(*known: str) -> st.SearchStrategy[str]:
    values = TEXTS.filter(_can_be_passed)
    return st.one_of(
        st.sampled_from(["--dry-run"]), st.builds("{}={}".format, st.sampled_from(known), values)
    )


def _run(world: World) -> list[st.SearchStrategy[str]]:
    known = ("--stage", "--stop-stage", "--set", "--profile", "--jobs")
    place = _words(str(world.home / "recipe"), str(world.home), str(world.home / "corpus" / "ids.txt"))
    return [st.just("run"), place, st.just("--dry-run"), _options(*known), _options(*known)]


def _check(world: World) -> list[st.SearchStrategy[str]]:
    return [st.just("check"), _words(str(world.home / "recipe"), "-"), _options("--set", "--profile")]


def _files(world: World, *more: str) -> st.SearchStrategy[str]:
    """Files of every kind but the right one, and the folders they are in."""
    return _words(*world.files, str(world.home / "corpus" / "audio"), "/dev/null", *more)


def _transcribe(world: World) -> list[st.SearchStrategy[str]]:
    more = _options("--variant", "--decoder")
    return [st.just("transcribe"), _files(world), _files(world, world.wav), more]


def _bench(world: World) -> list[st.SearchStrategy[str]]:
    return [st.just("bench"), _files(world), _files(world)]


def _compare(world: World) -> list[st.SearchStrategy[str]]:
    return [st.just("compare"), _files(world), _files(world), _options("--data", "--split")]


def _sensitivity(world: World) -> list[st.SearchStrategy[str]]:
    return [st.just("sensitivity"), _files(world), st.just("--data"), _files(world)]


def _plugins(world: World) -> list[st.SearchStrategy[str]]:
    verbs = st.sampled_from(["list", "show", "doctor", "test", "nope"])
    named = _words("wer", "cer", "nope")
    return [st.just("plugins"), verbs, named, st.just("--file"), _files(world)]


def _regenerate(world: World) -> list[st.SearchStrategy[str]]:
    return [st.just("regenerate"), _files(world, str(world.home / "recipe")), st.just("--dry-run")]


def _new(world: World) -> list[st.SearchStrategy[str]]:
    return [st.just("new"), st.just("plugin"), _words("mine"), st.just("--dir"), _files(world)]


COMMANDS = (_run, _check, _transcribe, _bench, _compare, _sensitivity, _plugins, _regenerate, _new)


def write_bundle(folder: Path) -> Bundle:
    """A sound bundle of an untrained model."""
    tokens = Tokenizer.train(["RED TEA", "BLUE SUN"], "char", None, folder)
    described = {"name": "conformer", "num_layers": 1, "dim": 16, "heads": {"ctc": {}}}
    meta = {"name": "big", "kind": "trained", "parent": None, "seed": 1, "model": described}
    meta |= {"compression": [], "features": {"name": "fbank", "num_mel_bins": 80}, "plugin_files": {}}
    registry = load_plugins().registry
    model = build_model(described, input_dim=80, vocab_size=len(tokens), registry=registry)
    return Bundle.save(folder, model, tokens, meta)


BROKEN = {
    "empty": b"",
    "noise": bytes(range(256)) * 8,
    "text": b"one line\n",
    "list": b"[1, 2",
    "mapping": b'{"format": 2}',
    "format": b'{"format": 2, "model": 5, "features": [], "weights_sha256": null, "vocab_id": "x"}',
}
NAMED = ("bundle.json", "weights.pt", "model.onnx", "model.pt", "tokens.txt", "spm.model", "recipe.yaml",
    "a.py", "a.wav", "RESULTS.md")  # fmt: skip


def write_broken(folder: Path) -> None:
    """Folders with files of the names that commands look for, and whatever within."""
    for kind, content in BROKEN.items():
        (folder / kind).mkdir(parents=True)
        for name in NAMED:
            (folder / kind / name).write_bytes(content)
    for name in NAMED:
        (folder / "folders" / name).mkdir(parents=True)
    (folder / "nothing").mkdir()


def _judge(arguments: tuple[str, ...], status: int, err: str) -> None:
    assert "Traceback" not in err, f"{arguments}\n{err}"
    assert status in (0, 1, 2), f"{arguments}\n{status} {err}"
    assert len(err.splitlines()) <= MAX_LINES, f"{arguments}\n{err}"
    assert status == 0 or err.strip(), f"{arguments}: failed without a word"
