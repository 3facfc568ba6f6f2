"""From a recipe to training data, targets and devices: who sees which utterances, and where."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from kdrecipe.artifacts import read_json, write_json
from kdrecipe.corpus.gather import Utterance, gather
from kdrecipe.corpus.manifests import finish
from kdrecipe.data.features import compute_features
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import DataError, RecipeError
from kdrecipe.jobs.plan import Plan
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.model.start import Lender
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import System, Tokens, Training, load_recipe
from kdrecipe.stages import codebooks as stage_4_codebooks
from kdrecipe.stages import session as session_module
from kdrecipe.stages import targets as stage_4
from kdrecipe.stages import tokens as stage_2
from kdrecipe.stages import train as stages_3_5
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.stages.session import Session
from kdrecipe.targets.shards import Shards
from kdrecipe.testing.corpus import make_corpus
from kdrecipe.train.distribution import Workers, local_device
from kdrecipe_local.manifests import Manifests
from kdrecipe_plugins.architectures.conformer import Conformer
from kdrecipe_plugins.architectures.whisper_features import log_mel

MODEL = {"name": "conformer", "num_layers": 1, "dim": 8, "num_heads": 2, "heads": {"ctc": {}}}
SUBSETS = {"few": {"utterances": 2}, "more": {"utterances": 4}, "rest": {"except": "few"}}
FEW = "{data: few, teachers: [teacher], model: *small, losses: &soft [{name: ctc}, {name: kl}]}"
RECIPE = """
corpus:
  {name: manifests, root: ".", subsets: {few: {utterances: 2}, more: {utterances: 4}, rest: {except: few}}}
features: {num_mel_bins: 16, speed_perturb: [0.9, 1.0]}
tokens: {name: char, data: all}
seeds: [1]
training: {epochs: 1, precision: fp32}
systems:
  teacher: {train: {model: &small {name: conformer, num_layers: 1, dim: 8, num_heads: 2, heads: {ctc: {}}}}}
"""


@pytest.fixture(scope="module")
def registry():
    return load_plugins().registry


@pytest.fixture(scope="module")
def made(tmp_path_factory, registry):
    """Features, tokens and the teacher of :data:`RECIPE`, as the stages before would have left them."""
    root = tmp_path_factory.mktemp("made")
    layout = Layout(root)
    corpus = make_corpus(root / "corpus", num_speakers=4, utterances_per_speaker=3)
    config = {"name": "fbank", "num_mel_bins": 16, "speed_perturb": [0.9, 1.0]}
    finish(Manifests(Manifests.Config()).prepare(corpus, root), layout.manifests, "stop")
    compute_features(layout.manifests, layout.features, config, subsets=SUBSETS)
    texts = [chr(ord("A") + i) for i in range(26)] + ["A B"]
    tokens = Tokenizer.train(texts, "char", None, layout.tokens)
    write_json(layout.tokens / "left_out.json", [])
    described = recipe_with(root / "recipe").systems["teacher"].model
    model = build_model(described, input_dim=16, vocab_size=len(tokens), registry=registry)
    meta = {"name": "teacher", "kind": "trained", "model": described, "features": config, "compression": []}
    Bundle.save(layout.system("teacher", 1), model, tokens, {**meta, "plugin_files": {}})
    return SimpleNamespace(layout=layout, tokens=tokens)


def recipe_with(directory, *systems):
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"  s{i}: {{distill: {text}}}\n" for i, text in enumerate(systems)]
    (directory / "recipe.yaml").write_text(RECIPE + "".join(lines), encoding="utf-8")
    return load_recipe(directory)


def cached(recipe, made, out):
    """Ids of the utterances of which stage 4 writes targets."""
    stage_4.run(recipe, made.layout, "teacher", 1, out)
    return set(Shards(out))


def subset(made, *names):
    found = read_json(made.layout.features / "subsets.json")
    return {cut for name in names for cut in found[name]}


# ---------------------------------------------------------------- who sees what


def test_targets_are_those_of_the_utterances_that_students_see(made, tmp_path):
    few = cached(recipe_with(tmp_path, FEW), made, tmp_path / "few")
    assert set(few) == subset(made, "few")
    assert {cut.endswith("_sp0.9") for cut in few} == {True, False}  # perturbed copies, too
    assert len(few) == 4
    more = FEW.replace("few", "more").replace("&soft [{name: ctc}, {name: kl}]", "*soft")
    assert set(cached(recipe_with(tmp_path, FEW, more), made, tmp_path / "more")) == subset(made, "more")
    unlabelled = FEW.replace("data: few", "data: few, unlabelled: rest")
    everything = set(cached(recipe_with(tmp_path, unlabelled), made, tmp_path / "rest"))
    assert everything == subset(made, "few", "rest") > subset(made, "more")


def test_cuts_too_short_for_their_text_have_targets_only_where_it_is_not_used(made, tmp_path):
    layout = Layout(tmp_path / "made")
    layout.root.mkdir()
    for name in ("features", "systems"):
        (layout.root / name).symlink_to(made.layout.root / name)
    made.tokens.save(layout.tokens)
    short = sorted(subset(made, "few"))[0]
    write_json(layout.tokens / "left_out.json", [short])
    copy = SimpleNamespace(layout=layout)
    assert set(cached(recipe_with(tmp_path, FEW), copy, tmp_path / "a")) == subset(made, "few") - {short}
    unlabelled = FEW.replace("data: few", "data: rest, unlabelled: few")
    assert short in cached(recipe_with(tmp_path, unlabelled), copy, tmp_path / "b")


def test_a_student_with_more_data_makes_the_targets_again(tmp_path):
    def inputs(*systems):
        recipe, plan = recipe_with(tmp_path, *systems), build_plan
        return plan(recipe, Layout(tmp_path)).jobs["targets/teacher/seed1"].inputs

    soft = FEW.replace("&soft [{name: ctc}, {name: kl}]", "*soft")
    assert inputs(FEW) == inputs(FEW, soft)
    assert inputs(FEW) != inputs(FEW, soft.replace("few", "more"))
    assert inputs(FEW) != inputs(FEW, soft.replace("data: few, ", ""))


def test_a_student_finds_its_targets_and_no_others(made, tmp_path):
    recipe = recipe_with(tmp_path, FEW, FEW.replace("few", "more").replace("&soft", "&other"))
    few = recipe_with(tmp_path / "few", FEW)
    layout = Layout(tmp_path / "made")
    layout.root.mkdir()
    for name in ("features", "tokens", "systems"):
        (layout.root / name).symlink_to(made.layout.root / name)
    stage_4.run(few, layout, "teacher", 1, layout.targets("teacher", 1))
    session = Session(recipe, layout, recipe.systems["s0"], 1)
    made_student = session.new_model()
    source, batches = (
        session.teachers(torch.device("cpu"), made_student)["teacher"],
        session.batches(recipe.training),
    )
    assert set(batches.ids) == subset(made, "few")
    for ids in batches.epoch(0):
        source.targets(batches.load(ids))
    with pytest.raises(DataError, match="no cached targets for this cut"):
        Session(recipe, layout, recipe.systems["s1"], 1).teachers(torch.device("cpu"), made_student)


def test_a_student_learns_from_its_own_average_and_a_teacher(made, tmp_path):
    losses = "[{name: ctc}, {name: kl}, {name: askd, steps: 3}]"
    recipe = recipe_with(
        tmp_path,
        "{data: few, teachers: [ema], init_from: teacher, model: *small, losses: [{name: kl}]}",
        f"{{data: few, teachers: [teacher, ema], init_from: teacher, model: *small, losses: {losses}}}",
    )
    jobs = build_plan(recipe, Layout(tmp_path)).jobs
    assert jobs["s0/seed1"].needs == ("features", "tokens", "teacher/seed1")
    assert "targets/teacher/seed1" in jobs["s1/seed1"].needs
    live = load_recipe(tmp_path, overrides=["targets.mode=live"])
    alone, both = (live.systems[name] for name in ("s0", "s1"))
    for system, names in ((alone, ["kl"]), (both, ["ctc", "kl@teacher", "kl@ema", "askd"])):
        session = Session(live, made.layout, system, 1)
        model = session.new_model()
        result = session.run(model, tmp_path / system.name, live.training)
        assert result.steps == 1
        entry = json.loads((tmp_path / system.name / "log.jsonl").read_text().splitlines()[0])
        assert list(entry["terms"]) == names


def test_codebooks_are_trained_before_the_targets_and_belong_to_their_teacher(made, tmp_path):
    losses = "[{name: ctc}, {name: mvq, layer: encoder.0, num_codebooks: 2}]"
    recipe = recipe_with(tmp_path, f"{{data: few, teachers: [teacher], model: *small, losses: {losses}}}")
    layout = Layout(tmp_path / "made")
    layout.root.mkdir()
    for name in ("features", "tokens", "systems"):
        (layout.root / name).symlink_to(made.layout.root / name)
    jobs = build_plan(recipe, layout).jobs
    codebooks, targets = jobs["codebooks/teacher/seed1"], jobs["targets/teacher/seed1"]
    assert (codebooks.stage, targets.stage) == (4, 4)
    assert "codebooks/teacher/seed1" in targets.needs
    assert "codebooks/teacher/seed1" in jobs["s0/seed1"].needs
    stage_4_codebooks.run(recipe, layout, "teacher", 1, 2, codebooks.out)
    targets.run(targets.out)
    shards = Shards(targets.out)
    arrays = shards.arrays(next(iter(shards)), "codebooks:encoder.0x2/")
    assert arrays["codes"].dtype == np.uint8
    session = Session(recipe, layout, recipe.systems["s0"], 1)
    result = session.run(session.new_model(), tmp_path / "s0", recipe.training)
    assert result.steps == 1
    record = read_json(codebooks.out / "codebooks.json")
    write_json(codebooks.out / "codebooks.json", {**record, "teacher": "another"})
    with pytest.raises(RecipeError, match="codebooks are of another teacher than 'teacher'"):
        Session(recipe, layout, recipe.systems["s0"], 1).opened  # noqa: B018  (a cached property)


# ---------------------------------------------------------------- devices


def test_live_teachers_are_on_the_processs_own_gpu(made, tmp_path, monkeypatch):
    recipe = recipe_with(tmp_path, FEW)
    live = load_recipe(tmp_path, overrides=["targets.mode=live"])
    session = Session(live, made.layout, live.systems["s0"], 1)
    moved = []

    def to(self, device=None, **layout):
        if device is not None:
            moved.append(str(device))
        return self

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: moved.append(str(device)))
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(session_module, "train", lambda *_, device=None, **__: moved.append(str(device)))
    student = build_model(MODEL, input_dim=16, vocab_size=len(made.tokens), registry=recipe.plugins.registry)
    session.run(student, tmp_path, live.training)
    assert moved == ["cuda:3", "cuda:3"]
    assert Workers.from_environment().device == local_device() == torch.device("cuda:3")
    assert moved[2:] == ["cuda:3"]


# ---------------------------------------------------------------- lengths


class Wide(Conformer):
    """Subsamples by what its options say: by 4, and half of that again."""

    class Config(Conformer.Config):
        wide: bool = False

    def __init__(self, config, input_dim):
        super().__init__(config, input_dim)
        if config.wide:
            self.subsampling = 8

    def output_len(self, num_frames):
        return -(-num_frames // self.subsampling)


def test_lengths_are_held_against_the_encoders_as_built(tmp_path, registry, monkeypatch):
    for name, length in (("a", 6400), ("b", 6560)):  # 40 and 41 feature frames
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(length, np.int16), 16000)
    listed = [
        Utterance("a", tmp_path / "a.wav", "ABCDE", "s"),
        Utterance("b", tmp_path / "b.wav", "ABCDE", "s"),
    ]
    recordings, supervisions, _ = gather(listed)
    layout = Layout(tmp_path)
    layout.features.mkdir()
    layout.manifests.mkdir()
    write_json(layout.features / "subsets.json", {})
    supervisions.to_file(layout.manifests / "train_supervisions.jsonl.gz")
    CutSet.from_manifests(recordings, supervisions).to_file(layout.features / "train.jsonl.gz")
    models = [{**MODEL, "name": "wide", "wide": wide} for wide in (False, True)]
    plugins = load_plugins()
    plugins.registry.add("architectures", "wide", Wide, "stand-in")

    def recipe(*models):
        return SimpleNamespace(
            systems={
                str(i): System(str(i), "trained", (1,), Training(), model=m) for i, m in enumerate(models)
            },
            plugins=plugins,
            features=SimpleNamespace(num_mel_bins=16),
            tokens=Tokens(name="char"),
            corpus=SimpleNamespace(on_error="skip"),
        )

    def left_out(*models):
        stage_2.run(recipe(*models), layout, layout.tokens)
        return {cut.partition("-")[0] for cut in read_json(layout.tokens / "left_out.json")}

    def inputs(*models):
        plan = Plan()
        plan.jobs |= {name: SimpleNamespace(name=name) for name in ("prepare", "features")}
        stage_2.add_jobs(plan, recipe(*models), layout)
        return plan.jobs["tokens"].inputs

    assert left_out(models[0]) == set()
    assert left_out(models[1]) == {"a"}  # 5 frames for 5 letters and a mark ahead; 41 give 6
    assert left_out(*models) == {"a"}
    assert inputs(models[0]) == inputs(models[0], {**models[0], "dim": 16}) != inputs(*models)
    before = inputs(models[0])
    monkeypatch.setattr(Wide, "output_len", lambda self, num_frames: num_frames // self.subsampling)
    assert inputs(models[0]) != before, "the same subsampling, another rounding"


# ---------------------------------------------------------------- imported teachers


def test_a_bundle_of_other_tokens_is_refused_when_it_is_imported(made, tmp_path):
    recipe = recipe_with(tmp_path, FEW)
    bundle = made.layout.system("teacher", 1)
    text = recipe.path.read_text(encoding="utf-8").replace(
        "teacher: {train: {model: &small", "big: {train: {model: &small"
    )
    text = text.replace("  s0:", f"  teacher: {{pretrained: {{bundle: {bundle}}}}}\n  s0:")
    recipe.path.write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path)
    plan = build_plan(recipe, made.layout)
    assert plan.jobs["teacher/seed1"].needs == ("tokens",)
    plan.jobs["teacher/seed1"].run(tmp_path / "imported")
    assert Bundle.load(tmp_path / "imported").meta["kind"] == "pretrained"
    other = Layout(tmp_path / "other")
    Tokenizer.train(["XYZ"], "char", None, other.tokens)
    with pytest.raises(RecipeError, match=r"tokens .* are not those that the recipe makes") as error:
        build_plan(recipe, other).jobs["teacher/seed1"].run(tmp_path / "refused")
    line = next(i for i, x in enumerate(text.splitlines(), start=1) if "pretrained" in x)
    assert error.value.problems[0].where.endswith(f"recipe.yaml:{line}")
    assert not (tmp_path / "refused").exists()


def test_a_bundle_that_is_searched_with_the_language_model_needs_the_recipes_tokens(made, tmp_path):
    pytest.importorskip("kenlm")
    recipe = recipe_with(tmp_path, FEW.replace("{name: kl}", "{name: hidden_mse, layers: {front: front}}"))
    text = recipe.path.read_text(encoding="utf-8").replace(
        "teacher: {train: {model: &small", "big: {train: {model: &small"
    )
    bundle = made.layout.system("teacher", 1)
    text = text.replace("  s0:", f"  teacher: {{pretrained: {{bundle: {bundle}}}}}\n  s0:")
    recipe.path.write_text(text, encoding="utf-8")
    assert build_plan(load_recipe(tmp_path), made.layout).jobs["teacher/seed1"].needs == ()
    text += "lm: {name: ngram}\ndecode: {decoders: {beam: {name: ctc_prefix_beam, lm_weight: 0.3}}}\n"
    recipe.path.write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path)
    other = Layout(tmp_path / "other")
    Tokenizer.train(["XYZ"], "char", None, other.tokens)
    job = build_plan(recipe, other).jobs["teacher/seed1"]
    assert job.needs == ("tokens",)
    with pytest.raises(RecipeError, match=r"and a search has a language model over them"):
        job.run(tmp_path / "refused")


class Stop(Exception):
    """Training would begin now."""


@pytest.fixture
def at_start(monkeypatch):
    """Models as they are when their training would begin."""
    seen = []

    def stop(self, model, *_):
        seen.append(model)
        raise Stop

    monkeypatch.setattr(Session, "run", stop)
    return seen


def test_heads_over_other_tokens_start_anew(made, tmp_path, at_start):
    recipe = recipe_with(tmp_path)
    student = recipe.systems["teacher"]
    layout = Layout(tmp_path / "made")
    layout.root.mkdir()
    for name in ("features", "systems"):
        (layout.root / name).symlink_to(made.layout.root / name)
    other = Tokenizer.train(["XYZ"], "char", None, layout.tokens)
    write_json(layout.tokens / "left_out.json", [])
    with pytest.raises(Stop):
        stages_3_5.run(recipe, layout, replace(student, init_from="teacher"), 1, tmp_path / "out")
    parent = Bundle.load(made.layout.system("teacher", 1)).model
    assert at_start[0].heads["ctc"].vocab_size == len(other) != parent.heads["ctc"].vocab_size
    for mine, its in zip(at_start[0].encoder.parameters(), parent.encoder.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_student_starts_from_chosen_layers(made, tmp_path, at_start):
    recipe = recipe_with(tmp_path)
    student = replace(recipe.systems["teacher"], init_from="teacher", init_layers={"encoder": (0, 0)})
    student = replace(student, model={**student.model, "num_layers": 2})
    with pytest.raises(Stop):
        stages_3_5.run(recipe, made.layout, student, 1, tmp_path / "out")
    parent = Bundle.load(made.layout.system("teacher", 1)).model
    for layer in at_start[0].encoder.layers:
        assert torch.equal(layer.ff1[1].weight, parent.encoder.layers[0].ff1[1].weight)
    wrong = replace(student, init_layers={"encoder": (0, 1)})
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: init_from: 'teacher' has 1 layers in encoder"):
        stages_3_5.run(recipe, made.layout, wrong, 1, tmp_path / "out")


def test_a_student_of_an_imported_model_has_its_input_fitted(made, tmp_path, at_start, monkeypatch, capsys):
    recipe, registry = recipe_with(tmp_path), load_plugins().registry
    described = {"name": "whisper_encoder", "num_layers": 2, "dim": 8, "num_heads": 2, "heads": {"ctc": {}}}
    other = build_model(described, input_dim=16, vocab_size=5, registry=registry)
    own = ("norm.", "encoder.input_map.")
    state = {k: v for k, v in other.state_dict().items() if not k.startswith(own)}
    teacher = SimpleNamespace(as_model=lambda: (described, state, []))
    monkeypatch.setattr(stages_3_5, "lender", lambda *_: Lender.of_teacher(teacher))
    student = replace(recipe.systems["teacher"], init_from="x", init_layers={"encoder": (1,)})
    student = replace(student, model={**described, "num_layers": 1, "pooling": 2})
    with pytest.raises(Stop):
        stages_3_5.run(recipe, made.layout, student, 1, tmp_path / "out")
    model = at_start[0]
    assert torch.equal(model.encoder.layers[0].qkv.weight, other.encoder.layers[1].qkv.weight)
    features_TF, samples_S = Session(recipe, made.layout, student, 1).heard_audio(1.0, model.norm)[0]
    with torch.no_grad():
        heard_MT = model.encoder._log_mel(features_TF[None], torch.tensor([len(features_TF)]))[0]
    heard_TM = heard_MT.t()[: len(features_TF)]
    want_TM = log_mel(samples_S, 80)
    assert float((heard_TM - want_TM).square().mean()) < 0.5 * float(want_TM.var())
    assert "teacher: features mapped to those of x" in capsys.readouterr().out
