"""Recipes: what they mean, and that every mistake is found, with its line and a remedy."""

import copy
import json
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import Options, Runtime, TargetSpec
from kdrecipe.plugin.loader import Plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.recipe.sections import beyond_labels

EXAMPLE = """\
corpus: {name: an4, root: "${KDRECIPE_TEST_ROOT}", subsets: {few: {speakers: 11}, rest: {except: few}}}
features: {name: fbank, num_mel_bins: 80, speed_perturb: [0.9, 1.0, 1.1]}
tokens: {name: bpe, vocab_size: 64}
seeds: [1, 2, 3]
systems:
  teacher:  {train: {model: {name: conformer, num_layers: 12, dim: 256, heads: {ctc: {}}}}}
  scratch:  {train: {data: few, model: &small {name: conformer, num_layers: 3, dim: 64, heads: {ctc: {}}}}}
  cr_ctc:   {train: {data: few, model: *small, losses: [{name: ctc}, {name: cr_ctc, weight: 0.2}]}}
  kd:       {distill: {data: few, teachers: [teacher], model: *small,
             losses: &soft [{name: ctc, weight: 0.5}, {name: kl, weight: 0.5, temperature: 1.0}]}}
  kd_unlabelled: {distill: {data: few, unlabelled: rest, teachers: [teacher], model: *small, losses: *soft}}
  kd_int8:  {compress: {from: kd, steps: [{name: int8_dynamic}]}}
"""


class Plain:
    """A plugin without options."""

    class Config(Options):
        """None."""

    def __init__(self, config, *more):
        pass


class Head(Plain):
    target_kinds = ("frame_logits",)


class Search(Plain):
    head = "ctc"


class BeamSearch:
    head = "ctc"

    class Config(Options):
        beam: int = Field(default=4, ge=1)


class OtherSearch(Plain):
    head = "rnnt"


class Export(Plain):
    head = "ctc"
    runtime = Runtime("box", "nowhere:start", {})


class OtherExport(Export):
    head = "rnnt"


class Unmeasured(Plain):
    head = "ctc"
    runtime = None


class Encoder:
    """Taps as many as layers, each as wide as the encoder."""

    class Config(Options):
        num_layers: int = Field(default=2, ge=1)
        dim: int = 8
        style: Literal["plain", "fancy"] = "plain"

    subsampling = 4

    def __init__(self, config, input_dim):
        self.config = config
        self.output_dim = config.dim

    def taps(self):
        return {f"encoder.{i}": (None, self.config.dim) for i in range(self.config.num_layers)}


class Supervised(Plain):
    supervised = True

    def __init__(self, config, setup):
        pass


class Soft:
    class Config(Options):
        temperature: float = Field(default=1.0, gt=0)
        top_k: int | None = None

    def __init__(self, config, setup):
        pass

    @staticmethod
    def requires(config):
        return [TargetSpec("frame_logits", "ctc", top_k=config.top_k)]


class HiddenLoss:
    class Config(Options):
        tap: str = "encoder.0"
        student_tap: str = "encoder.0"

    def __init__(self, config, setup):
        if config.student_tap not in setup.student.taps:
            raise RecipeError(f"the student has no tap {config.student_tap!r}", remedy="choose another")

    @staticmethod
    def requires(config):
        return [TargetSpec("hidden", config.tap)]


class Ensemble(Soft):
    all_teachers = True


class Coded(HiddenLoss):
    @staticmethod
    def requires(config):
        return [TargetSpec("codebooks", config.tap, 4)]


class Halve:
    """A compressor that may train."""

    class Config(Options):
        epochs: int = 0

    def __init__(self, config):
        self.num_epochs = config.epochs


class Shrink(Plain):
    """A compressor whose option says how much."""

    strength = "share"
    num_epochs = 0

    class Config(Options):
        share: float = 0.5

    def __init__(self, config):
        pass


class TwoViews(Plain):
    """Neither supervised nor in need of a teacher."""

    def __init__(self, config, setup):
        pass


@pytest.fixture
def plugins():
    """Stand-ins, so that what is tested is the schema."""
    found = Plugins()
    for kind, name, cls in (
        ("architectures", "enc", Encoder),
        ("heads", "ctc", Head),
        ("heads", "rnnt", Head),
        ("losses", "ctc", Supervised),
        ("losses", "soft", Soft),
        ("losses", "hidden", HiddenLoss),
        ("losses", "all", Ensemble),
        ("losses", "coded", Coded),
        ("losses", "views", TwoViews),
        ("compressors", "halve", Halve),
        ("compressors", "shrink", Shrink),
        ("exporters", "onnx", Export),
        ("exporters", "onnx_transducer", OtherExport),
        ("exporters", "torchscript", Unmeasured),
        ("decoders", "ctc_greedy", Search),
        ("decoders", "ctc_beam", BeamSearch),
        ("decoders", "rnnt_greedy", OtherSearch),
        ("metrics", "wer", Plain),
        ("metrics", "cer", Plain),
        ("corpora", "toy", Plain),
    ):
        found.registry.add(kind, name, cls, "stand-in")
    return found


MODEL = {"name": "enc", "heads": {"ctc": {}}}


def base():
    """A sound recipe with every kind of system."""
    soft = [{"name": "ctc"}, {"name": "soft", "weight": 0.5}]
    return {
        "corpus": {"name": "toy", "subsets": {"few": {"speakers": 2}, "rest": {"except": "few"}}},
        "tokens": {"name": "char"},
        "seeds": [1, 2],
        "systems": {
            "teacher": {"train": {"model": copy.deepcopy(MODEL)}},
            "plain": {"train": {"data": "few", "model": copy.deepcopy(MODEL)}},
            "kd": {
                "distill": {
                    "data": "few",
                    "unlabelled": "rest",
                    "teachers": ["teacher"],
                    "model": copy.deepcopy(MODEL),
                    "losses": soft,
                }
            },
            "small": {"compress": {"from": "kd", "steps": [{"name": "halve"}]}},
        },
        "decode": {"compare": [["kd", "plain"]]},
        "export": [{"name": "onnx"}],
        "profiles": {"tiny": {"training": {"epochs": 1}}},
    }


def change(data, path, value):
    """``data`` with ``value`` at the dotted path; a value of ``...`` removes the key."""
    *parents, last = [int(p) if p.isdecimal() else p for p in path.split(".")]
    node = data
    for key in parents:
        node = node[key] if isinstance(key, int) else node.setdefault(key, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


@pytest.fixture
def load(tmp_path, plugins, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load_data(data, **options):
        text = data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False)
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "recipe.yaml", **{"plugins": plugins, **options})

    return load_data


def problems(load, data, **options):
    with pytest.raises(RecipeError) as error:
        load(data, **options)
    return [str(p) for p in error.value.problems]


# ---------------------------------------------------------------- meaning


def test_the_example_of_the_readme_is_sound(tmp_path):
    (tmp_path / "recipe.yaml").write_text(EXAMPLE, encoding="utf-8")
    recipe = load_recipe(tmp_path)
    assert recipe.teaching() == ["teacher"]
    assert recipe.build_order() == ["teacher", "scratch", "cr_ctc", "kd", "kd_unlabelled", "kd_int8"]
    assert recipe.systems["kd"].model["heads"] == {"ctc": {"dropout": 0.0, "rank": None}}


def test_systems(load):
    recipe = load(base())
    systems = recipe.systems
    assert {n: s.kind for n, s in systems.items()} == {
        "teacher": "trained",
        "plain": "trained",
        "kd": "distilled",
        "small": "compressed",
    }
    assert systems["kd"].teachers == ("teacher",)
    assert [(t.name, t.weight, t.teacher) for t in systems["kd"].terms] == [
        ("ctc", 1.0, None),
        ("soft", 0.5, None),
    ]
    assert systems["kd"].terms[1].options == {"temperature": 1.0, "top_k": None}
    assert systems["plain"].terms[0].name == "ctc", "the default objective"
    assert systems["plain"].model == {
        "name": "enc",
        "num_layers": 2,
        "dim": 8,
        "style": "plain",
        "heads": {"ctc": {}},
    }
    assert systems["small"].parent == "kd"
    assert systems["small"].steps[0].name == "halve"
    assert recipe.objective_of("small") is systems["kd"]
    assert recipe.corpus.subsets == {"few": {"speakers": 2}, "rest": {"except": "few"}}
    assert recipe.export[0].name == "onnx"
    assert [m.name for m in recipe.decode.metrics] == ["wer", "cer"]


def test_a_teacher_needs_one_seed(load):
    recipe = load(base())
    assert recipe.systems["teacher"].seeds == (1,)
    assert recipe.systems["kd"].seeds == recipe.systems["small"].seeds == (1, 2)
    assert recipe.seed_of("teacher", 2) == 1
    assert recipe.seed_of("kd", 2) == 2
    recipe = load(change(base(), "systems.teacher.train.seeds", [2, 1]))
    assert recipe.systems["teacher"].seeds == (2, 1)
    assert recipe.seed_of("teacher", 2) == 2


def test_a_compressed_system_has_its_parents_seeds(load):
    recipe = load(change(base(), "systems.kd.distill.seeds", [7]))
    assert recipe.systems["small"].seeds == (7,)


def test_a_compressed_system_learns_as_its_parent_but_for_what_it_names(load):
    data = change(base(), "tokens.data", "all")
    change(data, "systems.small.compress.data", "rest")
    change(data, "systems.small.compress.unlabelled", "few")
    small = {"from": "plain", "steps": [{"name": "halve"}], "teachers": ["kd"], "losses": [{"name": "soft"}]}
    data["systems"]["taught"] = {"compress": small}
    data["systems"]["smaller"] = {"compress": {"from": "taught", "steps": [{"name": "halve"}]}}
    recipe = load(data)
    small, taught = recipe.systems["small"], recipe.systems["taught"]
    assert (small.data, small.unlabelled, small.teachers) == ("rest", "few", ("teacher",))
    assert small.terms == recipe.systems["kd"].terms
    assert (taught.data, taught.unlabelled, taught.teachers) == ("few", None, ("kd",))
    assert [term.name for term in taught.terms] == ["soft"]
    assert recipe.objective_of("smaller") is taught
    assert recipe.teaching() == ["teacher"]
    assert not recipe.caches("kd", taught), "its targets come after stage 4"
    order = recipe.build_order()
    assert order.index("kd") < order.index("taught") < order.index("smaller")


def test_its_parent_may_teach_a_compressed_system_with_the_same_seed(load):
    data = base()
    losses = {"losses": [{"name": "soft"}], "steps": [{"name": "halve"}]}
    data["systems"]["own"] = {"compress": {"from": "plain", "teachers": ["plain"], **losses}}
    data["systems"]["chain"] = {"compress": {"from": "own", "teachers": ["own"], **losses}}
    recipe = load(data)
    assert recipe.systems["plain"].seeds == recipe.systems["chain"].seeds == (1, 2)
    assert recipe.teaching() == ["teacher", "plain"]
    assert not recipe.caches("own", recipe.systems["chain"])


def test_the_budget_decides_what_is_not_written(load):
    data = change(base(), "systems.small.compress.budget", {"params": 1e6})
    steps = [{"name": "halve"}, {"name": "shrink"}, {"name": "shrink", "share": 0.2}]
    system = load(change(data, "systems.small.compress.steps", steps)).systems["small"]
    assert system.free_steps == (1,)
    assert (system.budget.measure, system.budget.limit) == ("params", 1e6)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("budget", {"params": 1e6, "rtf": 1}, "give one of size_mb, params, macs_per_s, rtf"),
        ("budget", {}, "give one of"),
        ("budget", {"size_mb": 0}, "budget.size_mb: is 0, should be greater than 0"),
        ("budget", {"params": 1e6}, "no step is free to meet the budget"),
        ("losses", [{"name": "soft", "teacher": "plain"}], "'plain' is not among its teachers"),
        ("teachers", ["nobody"], "unknown system 'nobody'"),
        ("data", "nothing", "unknown subset 'nothing'"),
        ("losses", [{"name": "hidden", "tap": "encoder.7"}], "the teacher 'teacher' lacks it"),
        ("unlabelled", {"subset": "rest", "labels": "small"}, "'small' is not among its teachers"),
    ],
)
def test_what_a_compressed_system_names_is_checked(load, key, value, expected):
    found = "\n".join(problems(load, change(base(), f"systems.small.compress.{key}", value)))
    assert expected in found, found


def test_training_settings_are_inherited(load):
    data = change(base(), "training", {"epochs": 9, "lr": 1e-3, "spec_augment": {"freq_width": 5}})
    change(data, "systems.kd.distill.training", {"epochs": 4, "spec_augment": {"time_width": 7}})
    change(data, "systems.small.compress.training", {"lr": 1e-4})
    systems = load(data).systems
    assert systems["plain"].training.epochs == 9
    assert (systems["kd"].training.epochs, systems["kd"].training.lr) == (4, 1e-3)
    assert systems["kd"].training.spec_augment.freq_width == 5
    assert systems["kd"].training.spec_augment.time_width == 7
    assert (systems["small"].training.epochs, systems["small"].training.lr) == (4, 1e-4)
    change(data, "systems.kd.distill.training", {"spec_augment": None})
    assert load(data).systems["kd"].training.spec_augment is None


def test_a_distilled_system_may_teach(load):
    data = base()
    data["systems"]["grandchild"] = {"distill": {**data["systems"]["kd"]["distill"], "teachers": ["kd"]}}
    recipe = load(data)
    assert recipe.teaching() == ["teacher"]
    assert recipe.build_order() == ["teacher", "plain", "kd", "grandchild", "small"]
    kd, grandchild = recipe.systems["kd"], recipe.systems["grandchild"]
    assert recipe.caches("teacher", kd)
    assert not recipe.caches("kd", grandchild), "its targets come after stage 4"
    live = load(change(data, "targets.mode", "live"))
    assert not live.caches("teacher", live.systems["kd"])


def test_build_order_does_not_hang_on_the_order_of_the_file(load):
    data = base()
    data["systems"] = dict(reversed(data["systems"].items()))
    data["systems"]["smaller"] = {"compress": {"from": "small", "steps": [{"name": "halve"}]}}
    order = load(data).build_order()
    assert order.index("teacher") < order.index("kd") < order.index("small") < order.index("smaller")


def test_what_a_teacher_starts_from_is_built_before_it(load):
    data = change(base(), "systems.teacher.train.init_from", "plain")
    change(data, "systems.plain.train.seeds", [1])
    assert load(data).teaching() == ["plain", "teacher"]


def test_pretrained(load, tmp_path, monkeypatch):
    data = change(base(), "systems.teacher", {"pretrained": {"bundle": "${KDRECIPE_TEST_BUNDLE}/big"}})
    recipe = load(data)
    assert recipe.teaching() == ["teacher"]
    assert recipe.systems["teacher"].seeds == (1,)
    assert recipe.objective_of("teacher") is None
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: the environment variable KDRECIPE_TEST_BUNDLE"):
        _ = recipe.systems["teacher"].bundle
    monkeypatch.setenv("KDRECIPE_TEST_BUNDLE", "models")
    assert recipe.systems["teacher"].bundle == tmp_path / "models" / "big"


def test_corpus_root_is_looked_up_when_used(load, tmp_path, monkeypatch):
    recipe = load(change(base(), "corpus.root", "${KDRECIPE_TEST_ROOT}"))
    with pytest.raises(RecipeError, match="KDRECIPE_TEST_ROOT is not set"):
        _ = recipe.corpus.root
    monkeypatch.setenv("KDRECIPE_TEST_ROOT", "/data/toy")
    assert recipe.corpus.root == Path("/data/toy")
    assert load(base()).corpus.root is None


def test_top_k_of_the_targets_is_the_losses_default(load):
    data = change(base(), "targets.top_k", 4)
    assert load(data).systems["kd"].terms[1].options["top_k"] == 4
    change(data, "systems.kd.distill.losses.1.top_k", 2)
    assert load(data).systems["kd"].terms[1].options["top_k"] == 2


def test_name_and_command(load, tmp_path):
    recipe = load(base(), profile="tiny", overrides=["training.lr=0.1"])
    assert recipe.name == tmp_path.name
    assert recipe.command == f"kdrecipe run {tmp_path.name} --profile tiny --set training.lr=0.1"
    assert str(tmp_path.parent) not in recipe.command
    folder = tmp_path / "recipes" / "toy" / "first"
    folder.mkdir(parents=True)
    (tmp_path / "recipe.yaml").rename(folder / "recipe.yaml")
    assert load_recipe(folder, plugins=recipe.plugins).name == "toy/first"


# ---------------------------------------------------------------- what tokens and language models may see


def test_tokens_are_learnt_from_what_every_system_has_labels_of(load):
    recipe = load(change(base(), "lm", {"name": "ngram"}))
    assert (recipe.tokens.data, recipe.lm.data) == ("few", "few")
    everything = base()
    for path in ("plain.train.data", "kd.distill.data", "kd.distill.unlabelled"):
        change(everything, f"systems.{path}", None)
    assert load(everything).tokens.data is None


@pytest.mark.parametrize(("data", "expected"), [("all", None), ("rest", "rest")])
def test_a_recipe_may_say_what_they_are_learnt_from(load, data, expected):
    recipe = load(change(change(base(), "tokens.data", data), "lm", {"data": data}))
    assert (recipe.tokens.data, recipe.lm.data) == (expected, expected)


def test_labels_of_different_subsets_need_a_word_from_the_recipe(load):
    data = change(base(), "systems.plain.train.data", "rest")
    [found] = problems(load, data)
    assert "systems have labels of different subsets (rest, few), and all share the tokens" in found
    assert "data: all" in found
    assert len(problems(load, change(copy.deepcopy(data), "lm", {"name": "ngram"}))) == 2
    assert load(change(data, "tokens.data", "few")).tokens.data == "few"
    [absent] = problems(load, change(data, "lm", {"text": "lm.txt"}))
    assert "there is no file" in absent


def test_whose_labels_do_not_cover_what_was_learnt_from(load):
    systems = load(base()).systems
    subsets = {"few": {"a"}, "rest": {"b", "c"}}
    assert beyond_labels(systems, None, subsets) == ["plain", "kd"]
    assert beyond_labels(systems, "rest", subsets) == ["plain", "kd"]
    assert beyond_labels(systems, "few", subsets) == []


# ---------------------------------------------------------------- profiles and overrides


def test_profile_and_overrides(load):
    recipe = load(base(), profile="tiny")
    assert recipe.training.epochs == 1
    assert recipe.profile == "tiny"
    recipe = load(
        base(), profile="tiny", overrides=["training.epochs=3", "systems.kd.distill.losses.1.weight=1e-1"]
    )
    assert recipe.training.epochs == 3
    assert recipe.systems["kd"].terms[1].weight == 0.1
    by_name = load(base(), overrides=["systems.kd.distill.losses.soft.weight=0.2"])
    assert by_name.systems["kd"].terms[1].weight == 0.2
    assert load(base(), overrides=["systems.small=null", "seeds=[5]"]).seeds == (5,)


def test_a_profile_may_leave_systems_out(load):
    data = change(base(), "profiles.tiny.systems", {"small": None})
    assert "small" not in load(data, profile="tiny").systems
    assert "small" in load(data).systems


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainig.epochs=1", "did you mean 'training'?"),
        ("training.epoch=1", "did you mean 'epochs'?"),
        ("training.epochs=many", "should be a valid integer"),
        ("systems.kdd.distill.data=few", "did you mean 'kd'?"),
        ("systems.kd.distil.data=few", "did you mean 'distill'?"),
        ("systems.kd.distill.losses.5.weight=1", "it has 2 item(s)"),
        ("systems.kd.distill.losses.soff.weight=1", "'soft' is number 1"),
        ("training", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("training..epochs=1", "not of the form key=value"),
        ("seeds=[1", "not valid YAML"),
        ("corpus.subsets.fw.speakers=3", "did you mean 'few'?"),
        ("seeds.first=1", "is a list"),
        ("tokens.name.x=1", "it has no 'x' in it"),
    ],
)
def test_wrong_overrides(load, override, expected):
    found = problems(load, base(), overrides=[override])
    assert found[0].startswith(f"--set {override}: ")
    assert expected in found[0]


def test_unknown_profile(load):
    [found] = problems(load, base(), profile="tyni")
    assert found.startswith("--profile tyni: ")
    assert "did you mean 'tiny'?" in found


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    # path, value, text that the problem must have, remedy (or part of it)
    ("corpus", ..., "corpus is missing", "for example corpus:"),
    ("tokens", ..., "tokens is missing", "for example"),
    ("systems", ..., "systems is missing", "for example"),
    ("systems", {}, "at least one system", ""),
    ("systems", {"a": None}, "at least one system", ""),
    ("sytems", {}, "sytems: unknown key", "did you mean 'systems'?"),
    ("corpus.name", "toi", "unknown corpus 'toi'", "did you mean 'toy'?"),
    ("corpus.name", 3, "name is 3, it must be text", "known: toy"),
    ("corpus.rot", "/x", "corpus.rot: unknown key", "did you mean 'root'?"),
    ("corpus.subsets.all", {"speakers": 1}, "means the whole training split", "rename it"),
    ("tokens.data", "fw", "unknown subset 'fw'", "did you mean 'few'?"),
    ("corpus.on_error", "ignore", "should be 'stop' or 'skip'", ""),
    ("corpus.subsets.few", {"speakers": 0}, "corpus.subsets.few.speakers: is 0", ""),
    ("corpus.subsets.few", {"speakers": 1, "hours": 1}, "exactly one rule", ""),
    ("corpus.subsets.few", {}, "exactly one rule", ""),
    ("corpus.subsets.few", {"speaker": 1}, "unknown key", "did you mean 'speakers'?"),
    ("corpus.subsets.few", {"fraction": 1.5}, "less than 1", ""),
    ("corpus.subsets.rest", {"except": "fw"}, "unknown subset 'fw'", "did you mean 'few'?"),
    ("corpus.subsets.few", {"except": "rest"}, "needs itself: few -> rest -> few", ""),
    ("corpus.subsets.a/b", {"speakers": 1}, "letters, digits", ""),
    ("features.num_mel_bins", "many", "should be a valid integer", ""),
    ("features.speed_perturb", [1.0, 1.0], "the same speed twice", ""),
    ("seeds", [10**400], "beyond 64 bits", ""),
    ("tokens", {"name": "bpe"}, "bpe needs a vocab_size", ""),
    ("tokens.name", "bpee", "should be 'bpe'", ""),
    ("seeds", [], "seeds: is empty", ""),
    ("seeds", [1, 1], "the same seed twice", "each seed"),
    ("seeds", [-1], "greater than or equal to 0", ""),
    ("training.lr", float("nan"), "training.lr: is nan", ""),
    ("training.lr", float("inf"), "training.lr: is inf", ""),
    ("training.epochs", 0, "training.epochs: is 0", ""),
    ("training.warmup_steps", -1, "greater than or equal to 0", ""),
    ("training.cooldown", 0, "greater than 0", ""),
    ("training.optimizer", "adam", "should be 'muon' or 'adamw'", ""),
    ("training.schedule", "cosin", "should be 'wsd', 'cosine'", ""),
    ("training.spec_augment", {"freq_widht": 1}, "freq_widht: unknown key", "did you mean 'freq_width'?"),
    ("training", [1], "training: is [1], it must be a mapping", ""),
    ("targets.view", "masked", "view: masked goes with mode: live", ""),
    ("systems.kd.distill.targets", {"view": "masked"}, "view: masked goes with mode: live", ""),
    ("systems.kd.distill.targets", {"mod": "live"}, "mod: unknown key", "did you mean 'mode'?"),
    ("targets.mode", "cache", "should be 'cached' or 'live'", ""),
    ("parity.slak", 1, "parity.slak: unknown key", "did you mean 'slack'?"),
    ("decode.decoder", {"name": "ctc_greedy"}, "decode.decoder: unknown key", "did you mean 'decoders'?"),
    ("decode.decoders", {}, "decode.decoders: is empty", ""),
    ("decode.decoders", {"name": "ctc_greedy"}, "labels of your own", "ctc_greedy: {name: ctc_greedy}"),
    ("decode.decoders.a", "ctc_greedy", "decoders.a: is 'ctc_greedy', it must", "write {name: ctc_greedy}"),
    ("decode.decoders.a", {"name": "ctc_gredy"}, "unknown decoder", "did you mean 'ctc_greedy'?"),
    ("decode.decoders.a", {"name": "ctc_beam", "bem": 3}, "a.bem: unknown key", "did you mean 'beam'?"),
    ("decode.decoders.a", {"name": "ctc_beam", "beam": 0}, "decode.decoders.a.beam: is 0", ""),
    ("decode.decoders.a/b", {"name": "ctc_beam"}, "letters, digits", ""),
    ("decode.decoders.a", None, "no decoder in decode.decoders searches the head 'ctc'", "ctc_greedy"),
    ("decode.decoders.a", {"name": "rnnt_greedy"}, "searches the head 'rnnt', which no system has", "remove"),
    ("decode.metrics", [{"name": "wr"}], "decode.metrics[0].name: unknown metric", "did you mean 'wer'?"),
    ("decode.splits", [], "decode.splits: is empty", ""),
    ("decode.compare", [["kd", "plian"]], "decode.compare[0]: unknown system", "did you mean 'plain'?"),
    ("export", {"name": "onnx"}, "it must be a list", "write [{name: onnx_ctc}]"),
    ("export.0.name", "onx", "unknown exporter 'onx'", "did you mean 'onnx'?"),
    ("export", [{"name": "onnx"}, {"name": "onnx"}], "listed twice", ""),
    ("export", [{"name": "torchscript"}], "the head 'ctc' of systems 'teacher', 'plain'", "{name: onnx}"),
    ("export", [], "measured on an export", "add {name: onnx}"),
    ("claims", {"text": "x"}, "it must be a list", "write [{text:"),
    ("claims", [{"txt": "x"}], "claims[0].txt: unknown key", "did you mean 'text'?"),
    ("claims", [{"system": "kd"}], "claims[0]: text is missing", ""),
    ("claims", [{"text": "x", "system": "kd"}], "needs a figure and its value", ""),
    ("claims", [{"text": "x", "figure": "wer"}], "figure and value go together", ""),
    ("claims", [{"text": "x", "system": "kd", "figure": "wr", "value": 1}], "should be 'wer'", ""),
    ("claims", [{"text": "x", "system": "kd", "figure": "size_ratio", "value": 1}], "names the system", ""),
    ("claims", [{"text": "x", "figure": "wer", "value": 1, "of": "kd"}], "taken of another system", ""),
    ("claims", [{"text": "x", "figure": "size_ratio", "value": 1, "split": "a"}], "only a wer is of a", ""),
    ("claims", [{"text": "x", "system": "absent", "figure": "wer", "value": 1}], "", None),  # not measured
    ("claims", [{"text": "no figure at all"}], "", None),
    ("profiles", {"tiny": 3}, "mapping of mappings", ""),
    ("plugins", {"file": ["x.py"]}, "must be a mapping with files", "write plugins: {files: [plugin.py]}"),
    ("plugins", {"files": ["absent.py"]}, "there is no file 'absent.py'", ""),
    ("systems.a b", {"train": {"model": MODEL}}, "letters, digits", ""),
    ("systems.kd", "distill", "systems.kd: is 'distill'", "give it one of train, distill"),
    ("systems.kd", {"distil": {}}, "unknown kind of system", "did you mean 'distill'?"),
    ("systems.plain.distill", {}, "is both train and distill", "make two systems of it"),
    ("systems.plain.train", None, "model is missing", ""),
    ("systems.plain.train.modle", {}, "modle: unknown key", "did you mean 'model'?"),
    ("systems.plain.train.seeds", [], "seeds: is empty", ""),
    ("systems.plain.train.seeds", [3, 3], "the same seed twice", ""),
    ("systems.plain.train.data", "fw", "unknown subset 'fw'", "did you mean 'few'?"),
    ("systems.plain.train.init_from", "plian", "unknown system 'plian'", "did you mean 'plain'?"),
    ("systems.plain.train.init_from", "plain", "needs itself: plain -> plain", "break the circle"),
    ("systems.plain.train.init_from", "small", "too late to lend its weights", "compressed from"),
    ("systems.plain.train.training.epoch", 3, "epoch: unknown key", "did you mean 'epochs'?"),
    ("systems.plain.train.model.name", "enk", "unknown architecture 'enk'", "did you mean 'enc'?"),
    ("systems.plain.train.model.num_layer", 1, "num_layer: unknown key", "did you mean 'num_layers'?"),
    ("systems.plain.train.model.style", "odd", "should be 'plain' or 'fancy'", ""),
    ("systems.plain.train.model.heads", ..., "heads is missing", "heads: {ctc: {}}"),
    ("systems.plain.train.model.heads", {"ct": {}}, "unknown head 'ct'", "did you mean 'ctc'?"),
    ("systems.plain.train.model.heads.ctc", {"x": 1}, "heads.ctc.x: unknown key", ""),
    ("systems.plain.train.losses", [], "losses: is empty", ""),
    ("systems.plain.train.losses", ["ctc"], "losses[0]: is 'ctc'", "write {name: ctc}"),
    ("systems.plain.train.losses", [{"name": "soft"}], "'soft' needs a teacher", "make it distill:"),
    ("systems.plain.train.losses", [{"name": "ctc", "weight": 0}], "all weights are 0", ""),
    ("systems.kd.distill.losses.1.weight", -0.5, "losses[1].weight: is -0.5", ""),
    ("systems.kd.distill.losses.1.weight", float("inf"), "losses[1].weight: is inf", ""),
    ("systems.kd.distill.losses.1.temprature", 2, "temprature: unknown key", "did you mean 'temperature'?"),
    ("systems.kd.distill.losses.1.wieght", 2, "wieght: unknown key", "did you mean 'weight'?"),
    ("systems.kd.distill.losses.1.temperature", 0, "greater than 0", ""),
    ("systems.kd.distill.losses.1.teacher", "kd", "'kd' is not among its teachers", "known: teacher"),
    ("systems.kd.distill.losses.0.teacher", "teacher", "learns nothing from a teacher", "remove it"),
    ("systems.kd.distill.losses.1", {"name": "all", "teacher": "teacher"}, "all teachers of its", "remove"),
    (
        "systems.kd.distill.losses",
        [{"name": "soft"}] * 2,
        "losses[1]: a second term 'soft:ctc'",
        "other heads",
    ),
    ("systems.plain.train.losses", [{"name": "ctc"}] * 2, "losses[1]: a second term 'ctc'", "one of both"),
    (
        "systems.kd.distill.losses",
        [{"name": "ctc"}, {"name": "views"}],
        "no loss learns",
        "all, coded",
    ),
    ("systems.kd.distill.losses", [{"name": "ctc"}], "unlabelled: all losses need labels", ""),
    ("systems.kd.distill.teachers", [], "teachers: is empty", ""),
    ("systems.kd.distill.teachers", ["techer"], "unknown system 'techer'", "did you mean 'teacher'?"),
    ("systems.kd.distill.teachers", ["kd"], "needs itself: kd -> kd", "break the circle"),
    ("systems.kd.distill.teachers", ["small"], "too late to teach", "compressed from"),
    ("systems.kd.distill.teachers", ["teacher", "teacher"], "listed twice", ""),
    ("systems.kd.distill.teachers", ["teacher", "ema"], "'soft' would learn noise from ema", "init_from"),
    ("systems.kd.distill.ema", {"decay": 0.9}, "ema has options, but is no teacher", ""),
    ("systems.ema", {"train": {"model": MODEL}}, "student's own moving average", "rename it"),
    ("systems.kd.distill.unlabelled", "few", "'few' is labelled data already", "different subsets"),
    ("systems.kd.distill.data", ..., "all of the training split is labelled", "different subsets"),
    ("systems.kd.distill.seeds", [1, 9], "", None),  # sound: a teacher with one seed serves all
    ("systems.teacher.train.seeds", [1, 9], "has seeds [1, 2], but 'teacher'", "give 'teacher' the same"),
    ("systems.small.compress.from", "kdd", "unknown system 'kdd'", "did you mean 'kd'?"),
    ("systems.small.compress.from", "small", "needs itself: small -> small", ""),
    ("systems.small.compress.from", ..., "from is missing", ""),
    ("systems.small.compress.steps", [], "steps: is empty", ""),
    ("systems.small.compress.steps.0.name", "halv", "unknown compressor", "did you mean 'halve'?"),
    ("systems.small.compress.steps.0.x", 1, "steps[0].x: unknown key", ""),
    ("systems.teacher", {"pretrained": {}}, "bundle is missing", ""),
]


@pytest.mark.parametrize(
    ("path", "value", "what", "remedy"), MISTAKES, ids=[f"{m[0]}={m[1]}"[:60] for m in MISTAKES]
)
def test_each_mistake_is_found(load, path, value, what, remedy):
    data = change(base(), path, value)
    if remedy is None:
        load(data)
        return
    found = problems(load, data)
    hits = [p for p in found if what in p]
    assert hits, found
    assert remedy in hits[0]
    assert hits[0].startswith("recipe.yaml:"), "every problem has its line"


def test_the_unbroken_recipe_is_sound(load):
    load(base())


def test_lines_are_those_of_the_file(load):
    data = base()
    change(data, "systems.kd.distill.losses.1.temprature", 2)
    [found] = problems(load, data)
    line = int(found.split(":")[1])
    text = yaml.safe_dump(data, sort_keys=False).splitlines()[line - 1]
    assert text.strip() == "temprature: 2"


def test_all_mistakes_at_once(load):
    data = base()
    for path, value in (
        ("corpus.name", "toi"),
        ("training.epochs", 0),
        ("systems.teacher.train.model.name", "enk"),
        ("systems.kd.distill.losses.1.temprature", 2),
        ("systems.kd.distill.teachers", ["techer"]),
        ("systems.plain.train.data", "fw"),
        ("decode.compare", [["kd", "nobody"]]),
    ):
        change(data, path, value)
    found = problems(load, data, overrides=["nothing.here=1"], profile="none")
    assert len(found) == 9
    places = [int(p.split(":")[1]) for p in found if p.startswith("recipe.yaml:")]
    assert places == sorted(places)


def test_a_broken_system_is_not_also_unknown(load):
    found = problems(load, change(base(), "systems.teacher.train.model.name", "enk"))
    assert len(found) == 1


def test_several_teachers(load):
    data = base()
    data["systems"]["second"] = {"train": {"model": copy.deepcopy(MODEL)}}
    change(data, "systems.kd.distill.teachers", ["teacher", "second"])
    assert load(data).systems["kd"].terms[1].teacher is None
    change(data, "systems.kd.distill.losses.1.teacher", "second")
    [found] = problems(load, data)
    assert "no loss learns from teacher" in found
    data["systems"]["kd"]["distill"]["losses"].append({"name": "soft", "teacher": "teacher"})
    load(data)


# ---------------------------------------------------------------- heads, decoders, exports


def two_heads():
    """The sound recipe with a transducer before CTC in some of its systems, and the default exports."""
    data = base()
    for path in ("systems.plain.train.model.heads", "systems.kd.distill.model.heads"):
        change(data, path, {"rnnt": {}, "ctc": {}})
    del data["export"]
    return data


def test_decoders_of_a_recipe_that_names_none(load):
    recipe = load(base())
    assert {x: d.name for x, d in recipe.decode.decoders.items()} == {
        "ctc_greedy": "ctc_greedy",
        "rnnt_greedy": "rnnt_greedy",
    }, "of the default ones, those that are installed"
    assert list(recipe.searches_of("kd")) == ["ctc_greedy"]


def test_the_main_search_is_the_first_of_the_first_head(load, plugins):
    data = two_heads()
    searches = {
        "beam": {"name": "ctc_beam"},
        "plain": {"name": "ctc_greedy"},
        "rnnt": {"name": "rnnt_greedy"},
    }
    plugins.registry.add("exporters", "onnx_ctc", Export, "stand-in")
    recipe = load(change(data, "decode.decoders", searches))
    assert recipe.heads_of("kd") == ("rnnt", "ctc")
    assert recipe.heads_of("small") == ("rnnt", "ctc"), "a compressed system has its parent's"
    assert list(recipe.searches_of("kd")) == list(recipe.searches_of("small")) == ["rnnt", "beam", "plain"]
    assert list(recipe.searches_of("teacher")) == ["beam", "plain"]
    assert recipe.searches_of("kd")["beam"].options == {"beam": 4}


def test_exports_of_a_recipe_that_names_none_suit_its_systems(load, plugins):
    plugins.registry.add("exporters", "onnx_ctc", Export, "stand-in")
    data = base()
    del data["export"]
    assert [e.name for e in load(data).export] == ["onnx_ctc", "torchscript"]
    assert [e.name for e in load(two_heads()).export] == ["onnx_ctc", "onnx_transducer", "torchscript"]


def test_a_head_that_nothing_searches_or_measures(load, plugins):
    plugins.registry.add("exporters", "onnx_ctc", Export, "stand-in")
    data = change(two_heads(), "decode.decoders", {"greedy": {"name": "ctc_greedy"}})
    change(data, "export", [{"name": "onnx_ctc"}])
    search, export = sorted(problems(load, data))
    assert "decode.decoders: no decoder in decode.decoders searches the head 'rnnt' of systems" in search
    assert "'plain', 'kd', 'small'" in search
    assert "add one of rnnt_greedy" in search
    assert "none of those listed is of the head 'rnnt'" in export
    assert "add {name: onnx_transducer}" in export


def test_a_decoder_that_reads_a_head_which_a_system_lacks(load, plugins):
    class Joint(plugins.registry.get("decoders", "rnnt_greedy")):
        @staticmethod
        def beside(config):
            return ["ctc", "attention"]

    plugins.registry.add("exporters", "onnx_ctc", Export, "stand-in")
    plugins.registry.add("decoders", "joint", Joint, "stand-in")
    data = change(two_heads(), "decode.decoders", {"a": {"name": "ctc_greedy"}, "b": {"name": "joint"}})
    found = problems(load, data)
    assert len(found) == 3, "one for each of plain, kd and small"
    assert all(
        "decode.decoders.b: 'joint' with these options also reads the head 'attention'" in f for f in found
    )
    assert all("add attention: {} to the model's heads" in f for f in found)


def test_a_decoder_that_could_not_be_read_is_told_once(load):
    [found] = problems(load, change(base(), "decode.decoders", {"a": {"name": "ctc_gredy"}}))
    assert "unknown decoder" in found
    [found] = problems(load, change(base(), "export", [{"name": "onx"}]))
    assert "unknown exporter" in found


def test_a_label_that_is_not_there_can_not_be_changed(load):
    data = change(base(), "decode.decoders", {"beam": {"name": "ctc_beam"}})
    assert (
        load(data, overrides=["decode.decoders.beam.beam=9"]).searches_of("kd")["beam"].options["beam"] == 9
    )
    [found] = problems(load, data, overrides=["decode.decoders.bean.beam=9"])
    assert "there is no decode.decoders.bean" in found
    assert "did you mean 'beam'?" in found


def test_heads_of_a_pretrained_bundle(load, tmp_path):
    data = change(base(), "systems.teacher", {"pretrained": {"bundle": "big"}})
    change(data, "systems.quantised", {"compress": {"from": "teacher", "steps": [{"name": "halve"}]}})
    change(data, "decode.decoders", {"a": {"name": "ctc_greedy"}, "b": {"name": "rnnt_greedy"}})
    recipe = load(data)  # b may be the bundle's
    assert recipe.heads_of("quantised") is None
    assert list(recipe.searches_of("teacher")) == ["a", "b"]
    (tmp_path / "big").mkdir()
    bundle = '{"format": 2, "model": {"name": "enc", "num_layers": 3, "heads": {"rnnt": {}, "ctc": {}}}}'
    (tmp_path / "big" / "bundle.json").write_text(bundle, encoding="utf-8")
    [found] = problems(load, data)
    assert "head 'rnnt' of systems 'teacher', 'quantised'" in found, "nothing measures it"
    recipe = load(change(data, "export", [{"name": "onnx"}, {"name": "onnx_transducer"}]))
    assert recipe.heads_of("quantised") == ("rnnt", "ctc")
    assert list(recipe.searches_of("teacher")) == ["b", "a"]


def test_a_bundle_of_another_format_is_told(load, tmp_path):
    data = change(base(), "systems.teacher", {"pretrained": {"bundle": "big"}})
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "bundle.json").write_text('{"format": 1, "plugin_files": []}', encoding="utf-8")
    [found] = problems(load, data)
    assert "bundle format 1; this version reads format 2" in found
    assert found.startswith("recipe.yaml:")


def test_claims(load):
    claim = {"text": "6.5 %", "system": "kd", "figure": "wer", "value": 6.5, "on": "LibriSpeech test-clean"}
    [found] = load(change(base(), "claims", [claim])).claims
    assert (found.text, found.system, found.value, found.split, found.source) == (
        "6.5 %",
        "kd",
        6.5,
        None,
        None,
    )
    assert load(base()).claims == ()


# ---------------------------------------------------------------- teachers that do not fit


def test_a_tap_that_the_teacher_lacks(load):
    data = change(base(), "systems.kd.distill.losses.1", {"name": "hidden", "tap": "encoder.5"})
    [found] = problems(load, data)
    assert "needs hidden:encoder.5, the teacher 'teacher' lacks it" in found
    change(data, "systems.teacher.train.model.num_layers", 6)
    load(data)


def test_the_students_own_average_teaches_after_a_warm_start(load):
    data = change(base(), "systems.kd.distill.teachers", ["teacher", "ema"])
    change(data, "systems.kd.distill.init_from", "plain")
    change(data, "systems.kd.distill.ema", {"decay": 0.99})
    system = load(data).systems["kd"]
    assert (system.teachers, system.all_teachers, system.ema.decay) == (
        ("teacher",),
        ("teacher", "ema"),
        0.99,
    )
    change(data, "systems.kd.distill.init_from", ...)
    change(data, "systems.kd.distill.losses.1.start_below", 0.5)
    load(data)
    change(data, "systems.kd.distill.losses.1.start_below", ...)
    change(data, "systems.kd.distill.losses.1.teacher", "teacher")
    [found] = problems(load, data)
    assert "no loss learns from ema" in found
    change(data, "systems.kd.distill.losses", [{"name": "ctc"}, {"name": "soft", "teacher": "ema"}])
    change(data, "systems.kd.distill.teachers", ["ema"])
    change(data, "systems.kd.distill.init_from", "plain")
    assert load(data).systems["kd"].teachers == ()


def test_a_system_may_have_targets_of_its_own(load):
    data = change(base(), "systems.kd.distill.targets", {"mode": "live", "view": "masked", "top_k": 3})
    recipe = load(data)
    kd = recipe.systems["kd"]
    assert (kd.targets.mode, kd.targets.view, recipe.targets.mode) == ("live", "masked", "cached")
    assert kd.terms[1].options["top_k"] == 3
    assert not recipe.caches("teacher", kd)
    change(data, "systems.kd.distill.training", {"spec_augment": None})
    [found] = problems(load, data)
    assert "the student's input is not masked" in found


def test_codebooks_are_of_teachers_of_stage_3(load):
    data = change(base(), "systems.kd.distill.losses.1", {"name": "coded"})
    load(data)
    change(data, "systems.kd.distill.losses.1.tap", "encoder.9")
    [found] = problems(load, data)
    assert "'coded' needs hidden:encoder.9, the teacher 'teacher' lacks it" in found
    change(data, "systems.kd.distill.losses.1", {"name": "coded"})
    second = copy.deepcopy(data["systems"]["kd"])
    change(data, "systems.second", second)
    change(data, "systems.second.distill.teachers", ["kd"])
    [found] = problems(load, data)
    assert "'coded' needs codebooks, which stage 4 trains, and 'kd' comes after it" in found


def test_the_average_has_the_students_own_taps(load):
    data = change(base(), "systems.kd.distill.teachers", ["ema"])
    change(data, "systems.kd.distill.init_from", "plain")
    change(data, "systems.kd.distill.losses.1", {"name": "hidden", "tap": "encoder.9"})
    [found] = problems(load, data)
    assert "needs hidden:encoder.9, the teacher 'ema' lacks it" in found


def test_a_loss_may_refuse_the_pair(load):
    data = change(base(), "systems.kd.distill.losses.1", {"name": "hidden", "student_tap": "encoder.7"})
    [found] = problems(load, data)
    assert "the student has no tap 'encoder.7'" in found
    assert "choose another" in found


def test_a_plugin_that_cannot_be_built_is_a_problem(load, plugins):
    class Faulty(Encoder):
        def __init__(self, config, input_dim):
            raise IndexError("no such layer")

    class Odd(TwoViews):
        def __init__(self, config, setup):
            raise IndexError("no such view")

    plugins.registry.add("architectures", "faulty", Faulty, "stand-in")
    plugins.registry.add("losses", "odd", Odd, "stand-in")
    data = change(base(), "systems.teacher.train.model.name", "faulty")
    change(data, "systems.plain.train.losses", [{"name": "odd"}])
    found = problems(load, data)
    assert len(found) == 2
    assert "'faulty' can't be built: IndexError: no such layer (at " in found[0]
    assert "'odd' can't be built: IndexError: no such view (at " in found[1]


def test_a_pretrained_teacher_is_looked_into(load, tmp_path):
    data = change(base(), "systems.teacher", {"pretrained": {"bundle": "big"}})
    change(data, "systems.kd.distill.losses.1", {"name": "hidden", "tap": "encoder.5"})
    load(data)  # not there yet: stage 3 will see
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "bundle.json").write_text(
        '{"format": 2, "model": {"name": "enc", "num_layers": 3, "heads": {"ctc": {}}}}', encoding="utf-8"
    )
    [found] = problems(load, data)
    assert "needs hidden:encoder.5" in found
    assert "known" in found or "did you mean" in found


def pretrained(directory, pieces=("<blk>", "<sos/eos>", "<unk>", "▁", "A"), **meta):
    """Recipe data whose teacher is a bundle, of which there is what a check reads."""
    (directory / "big").mkdir(exist_ok=True)
    found = {
        "format": 2,
        "model": MODEL,
        "features": {"name": "fbank", "num_mel_bins": 80},
        "vocab_id": "abc",
        **meta,
    }
    (directory / "big" / "bundle.json").write_text(json.dumps(found), encoding="utf-8")
    listed = "".join(f"{piece} {i}\n" for i, piece in enumerate(pieces))
    (directory / "big" / "tokens.txt").write_text(listed, encoding="utf-8")
    return change(base(), "systems.teacher", {"pretrained": {"bundle": "big"}})


def line_of(directory, text):
    lines = (directory / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    return f"recipe.yaml:{1 + next(i for i, line in enumerate(lines) if text in line)}"


def test_a_bundle_of_other_features_is_found(load, tmp_path):
    data = pretrained(tmp_path, features={"name": "fbank", "num_mel_bins": 40, "speed_perturb": [0.9, 1.0]})
    [found] = problems(load, data)
    assert found.startswith(line_of(tmp_path, "bundle: big"))
    assert "systems.teacher.pretrained.bundle: the bundle was trained on other features" in found
    assert "num_mel_bins 40, not 80" in found
    assert "set features: {num_mel_bins: 40}" in found
    load(change(data, "features", {"num_mel_bins": 40}))  # speed is a matter of training


@pytest.mark.parametrize(
    ("tokens", "pieces", "message"),
    [
        ({"name": "char"}, ["▁THE", "A"], "has 5 tokens such as '▁THE', the recipe has characters"),
        ({"name": "char", "vocab_size": 5}, ["A", "B", "C"], "has 6 tokens, the recipe 5 at most"),
        ({"name": "bpe", "vocab_size": 64}, ["▁THE", "A"], "has 5 tokens, the recipe 64 (bpe)"),
    ],
)
def test_a_bundle_of_another_vocabulary_is_found(load, tmp_path, tokens, pieces, message):
    data = pretrained(tmp_path, ["<blk>", "<sos/eos>", "<unk>", *pieces])
    change(data, "tokens", tokens)
    [found] = problems(load, data)
    assert found.startswith(line_of(tmp_path, "name: soft"))
    assert f"'soft' compares tokens, and 'teacher' {message}" in found
    assert "hidden_mse" in found
    change(data, "systems.kd.distill.losses.1", {"name": "hidden"})
    load(data)  # hidden states are not about tokens


def test_a_bundle_whose_tokens_may_be_the_recipes_passes(load, tmp_path):
    load(pretrained(tmp_path))
    load(change(pretrained(tmp_path), "tokens", {"name": "unigram", "vocab_size": 5}))


def test_a_bundle_of_another_vocabulary_can_not_be_searched_with_the_language_model(load, plugins, tmp_path):
    class Fused(Search):
        class Config(Options):
            lm_weight: float = 0.0

    plugins.registry.add("decoders", "fused", Fused, "stand-in")
    data = pretrained(tmp_path, ["<blk>", "<sos/eos>", "<unk>", "▁THE", "A"])
    change(data, "tokens", {"name": "char"})
    change(data, "systems.kd.distill.losses.1", {"name": "hidden"})
    change(data, "lm", {"name": "ngram"})
    change(data, "decode.decoders", {"fused": {"name": "fused", "lm_weight": 0.3}})
    [found] = problems(load, data)
    assert found.startswith(line_of(tmp_path, "lm_weight"))
    assert "the language model is over the recipe's tokens, and 'teacher' has 5 tokens such as" in found
    load(change(data, "decode.decoders.fused.lm_weight", 0))


def test_training_under_compression_needs_an_objective(load, tmp_path):
    data = pretrained(tmp_path)
    change(data, "systems.pruned", {"compress": {"from": "teacher", "steps": [{"name": "halve"}]}})
    twice = {"compress": {"from": "pruned", "steps": [{"name": "halve"}, {"epochs": 3, "name": "halve"}]}}
    change(data, "systems.twice", twice)
    [found] = problems(load, data)
    assert found.startswith(line_of(tmp_path, "epochs: 3"))
    assert "steps[1]: 'halve' trains for 3 epochs, but 'teacher' is pretrained" in found
    assert "epochs: 0" in found
    change(data, "systems.pruned.compress.from", "kd")  # has losses to train by
    load(data)


def test_a_compressor_that_cannot_be_built_is_a_problem(load, plugins, tmp_path):
    class Odd(Halve):
        def __init__(self, config):
            raise IndexError("no such layer")

    plugins.registry.add("compressors", "odd", Odd, "stand-in")
    data = pretrained(tmp_path)
    change(data, "systems.pruned", {"compress": {"from": "teacher", "steps": [{"name": "odd"}]}})
    [found] = problems(load, data)
    assert "'odd' can't be built: IndexError: no such layer" in found


def test_frames_that_do_not_fall_together_are_found(load, plugins):
    class Option(Encoder):
        class Config(Encoder.Config):
            factor: int = 4

        def __init__(self, config, input_dim):
            super().__init__(config, input_dim)
            self.subsampling = config.factor

    plugins.registry.add("architectures", "option", Option, "stand-in")
    data = base()
    change(data, "systems.teacher.train.model", {"name": "option", "factor": 8, "heads": {"ctc": {}}})
    [found] = problems(load, data)
    assert "'soft' can't learn from 'teacher'" in found
    assert "needs frame_shift_s 0.04, the teacher's is 0.08" in found
    assert "need equal subsampling" in found


def test_random_state_is_left_alone(load):
    import torch

    before = torch.random.get_rng_state()
    load(base())
    assert torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------- plugins


def test_a_plugin_file_of_the_recipe(load, tmp_path):
    (tmp_path / "plugin.py").write_text(
        "from kdrecipe import hookimpl\n"
        "from kdrecipe.errors import Problem\n"
        "from kdrecipe.interfaces import Options\n"
        "class Own:\n"
        "    supervised = True\n"
        "    class Config(Options):\n"
        "        scale: float = 1.0\n"
        "    def __init__(self, config, setup): pass\n"
        "@hookimpl\n"
        "def register_losses(register):\n"
        "    register('own', Own)\n"
        "@hookimpl\n"
        "def check_recipe(recipe):\n"
        "    where = recipe.document.where(('systems', 'student'))\n"
        "    return [Problem('no', where, 'yes'), 'text'] if recipe.seeds == (4,) else []\n",
        encoding="utf-8",
    )
    text = """\
corpus: {name: manifests}
tokens: {name: char}
plugins: {files: [plugin.py]}
systems:
  student: {train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: }},
            losses: [{name: own, scale: 2}]}}
"""
    recipe = load(text, plugins=None)
    assert recipe.systems["student"].terms[0].options == {"scale": 2.0}
    assert recipe.plugin_files == (tmp_path / "plugin.py",)
    assert problems(load, text, plugins=None, overrides=["seeds=[4]"]) == [
        "recipe.yaml:5: no\n    -> yes",
        "text",
    ]
    (tmp_path / "plugin.py").write_text("import nothing_like_this\n", encoding="utf-8")
    found = problems(load, text, plugins=None)
    assert any("nothing_like_this" in p and "plugin.py" in p for p in found)
    assert any("unknown loss 'own'" in p for p in found)


def test_check_recipe_may_answer_nothing(load, plugins):
    from kdrecipe import hookimpl

    class Silent:
        @hookimpl
        def check_recipe(self, recipe):
            return None

    plugins.pm.register(Silent())
    load(base())
