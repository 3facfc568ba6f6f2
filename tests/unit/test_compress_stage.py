"""Stage 6: what compressors are given, what they train with, and what a bundle keeps of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kdrecipe.artifacts import write_json
from kdrecipe.corpus.manifests import finish
from kdrecipe.data.features import compute_features
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import KdrecipeError
from kdrecipe.measure.budget import cost_of, meet
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages import compress as stage_6
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.testing.corpus import make_corpus
from kdrecipe_local.manifests import Manifests
from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc

SUBSETS = {"few": {"utterances": 2}, "rest": {"except": "few"}}
RECIPE = """
corpus: {name: manifests, root: ".", subsets: {few: {utterances: 2}, rest: {except: few}}}
features: {num_mel_bins: 16, speed_perturb: [1.0]}
tokens: {name: char, data: all}
seeds: [1]
targets: {mode: live}
training: {epochs: 1, precision: fp32, batch_duration_s: 5}
plugins: {files: [plugin.py]}
export: [{name: onnx_ctc}]
systems:
  teacher: {train: {model: &small {name: conformer, num_layers: 1, dim: 8, num_heads: 2, heads: {ctc: {}}}}}
  scratch:
    train: {data: few, model: {name: conformer, num_layers: 1, dim: 24, num_heads: 2, heads: {ctc: {}}}}
"""
PLAIN = "{from: scratch, steps: [{name: probe}]}"
PLUGIN = '''
import torch

from kdrecipe import hookimpl
from kdrecipe.interfaces import Options


class Probe:
    """Reports what its context gives; trains for an epoch if asked."""

    class Config(Options):
        epochs: int = 0

    def __init__(self, config):
        self.num_epochs = config.epochs
        self.found = {}

    def apply(self, model, context):
        weight = model.heads["ctc"].proj.weight
        total, count = 0.0, 0
        for batch in context.gradients(model):
            total, count = total + float(weight.grad.norm()), count + 1
        assert weight.grad is None
        self.found = {"gradient": total / count, "batches": count, "dev": context.evaluate(model)}
        assert context.device == str(weight.device)
        model.pushed = torch.nn.Parameter(torch.zeros(1))
        return model

    def penalty(self, model, step, num_steps):
        return -model.pushed.sum()

    def on_step(self, model, step, num_steps):
        self.found["steps"] = step

    def finish(self, model):
        self.found["pushed"] = float(model.pushed.detach())
        del model.pushed
        return model

    def rebuild(self, model):
        return model

    def report(self):
        return self.found


@hookimpl
def register_compressors(register):
    register("probe", Probe)
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Features, tokens and two bundles, as the stages before would have left them."""
    root = tmp_path_factory.mktemp("made")
    layout, registry = Layout(root), load_plugins().registry
    corpus = make_corpus(root / "corpus", num_speakers=4, utterances_per_speaker=3)
    config = {"name": "fbank", "num_mel_bins": 16, "speed_perturb": [1.0]}
    finish(Manifests(Manifests.Config()).prepare(corpus, root), layout.manifests, "stop")
    compute_features(layout.manifests, layout.features, config, subsets=SUBSETS)
    texts = [chr(ord("A") + i) for i in range(26)] + ["A B"]
    tokens = Tokenizer.train(texts, "char", None, layout.tokens)
    write_json(layout.tokens / "left_out.json", [])
    for seed, name in enumerate(("teacher", "scratch")):
        torch.manual_seed(seed)
        described = recipe_with(root / "recipe").systems[name].model
        model = build_model(described, input_dim=16, vocab_size=len(tokens), registry=registry)
        meta = {"name": name, "kind": "trained", "model": described, "features": config, "compression": []}
        Bundle.save(layout.system(name, 1), model, tokens, {**meta, "plugin_files": {}})
    return SimpleNamespace(layout=layout, tokens=tokens)


def recipe_with(directory, **systems):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    lines = [f"  {name}: {{compress: {text}}}\n" for name, text in systems.items()]
    (directory / "recipe.yaml").write_text(RECIPE + "".join(lines), encoding="utf-8")
    return load_recipe(directory)


def compressed(made, directory, text):
    """The bundle that stage 6 makes of ``compress: text``."""
    recipe = recipe_with(directory / "recipe", small=text)
    stage_6.run(recipe, made.layout, recipe.systems["small"], 1, directory / "out")
    return Bundle.load(directory / "out", recipe.plugins.registry)


def report(bundle, step=0):
    return bundle.meta["compression"][step]["report"]


def test_gradients_are_those_of_the_systems_own_losses(made, tmp_path):
    alone = report(compressed(made, tmp_path / "a", "{from: teacher, steps: [{name: probe}]}"))
    assert alone["gradient"] > 0.01
    assert alone["batches"] > 1
    assert alone["dev"] == pytest.approx(1.0, abs=0.5)
    # it is its own teacher: what they say is the same, and nothing pulls
    kl = "teachers: [teacher], losses: [{name: kl}], steps: [{name: probe}]"
    assert report(compressed(made, tmp_path / "b", f"{{from: teacher, {kl}}}"))["gradient"] < 1e-4
    assert report(compressed(made, tmp_path / "c", f"{{from: scratch, {kl}}}"))["gradient"] > 1e-2
    few = report(compressed(made, tmp_path / "d", "{from: scratch, steps: [{name: probe}]}"))
    assert few["batches"] < alone["batches"], "two utterances are fewer than all"


def test_it_trains_with_what_it_names_and_else_with_its_parents(made, tmp_path):
    text = "{from: scratch, data: rest, teachers: [teacher], losses: [{name: ctc}, {name: kl, weight: 2}], "
    bundle = compressed(made, tmp_path, text + "steps: [{name: probe, epochs: 1}, {name: int8_dynamic}]}")
    assert report(bundle)["pushed"] > 0, "its penalty is part of the loss"
    assert report(bundle)["steps"] == bundle.meta["training"]["steps"] > 0
    log = (tmp_path / "out" / "train" / "step0" / "log.jsonl").read_text()
    assert '"kl' in log
    assert bundle.number_formats == {"int8"}


def test_gates_learn_in_the_one_loop(made, tmp_path):
    step = "{name: hard_concrete, share: 0.4, epochs: 2, multiple_of: 1, kinds: [units, width]}"
    bundle = compressed(made, tmp_path, f"{{from: scratch, steps: [{step}]}}")
    assert report(bundle)["pruned_share"] == pytest.approx(0.4, abs=0.02)
    assert bundle.model.encoder.output_dim < 24
    assert bundle.meta["training"]["steps"] > 0


def test_the_plan_has_what_it_learns_from(made, tmp_path):
    text = "{from: scratch, teachers: [teacher], losses: [{name: kl}], steps: [{name: probe}], "
    recipe = recipe_with(tmp_path, small=text + "targets: {mode: cached}}", plain=PLAIN)
    plan = build_plan(recipe, Layout(tmp_path / "exp"))
    assert {"scratch/seed1", "teacher/seed1", "targets/teacher/seed1"} <= set(plan.jobs["small/seed1"].needs)
    assert not {"teacher/seed1", "targets/teacher/seed1"} & set(plan.jobs["plain/seed1"].needs)
    inputs = plan.jobs["small/seed1"].inputs
    assert inputs["training"]["teachers"] == ["teacher"]
    assert inputs["training"]["data"] == "few"
    assert plan.jobs["targets/teacher/seed1"].inputs["parts"] == [("few", None)]


def test_gradients_of_a_bundle_without_losses_are_refused(made, tmp_path):
    bundle = made.layout.system("teacher", 1)
    pretrained = f"big: {{pretrained: {{bundle: {bundle}}}}}"
    text = RECIPE[: RECIPE.index("scratch:")] + pretrained + "\n"
    text += "  small: {compress: {from: big, steps: [{name: probe}]}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    recipe = load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text.replace("name: probe", "name: structured_prune, epochs: 0"))
    with pytest.raises(KdrecipeError, match="score: taylor needs losses"):
        load_recipe(tmp_path)
    system = recipe.systems["small"]
    layout = SimpleNamespace(**{n: getattr(made.layout, n) for n in ("features", "tokens")})
    layout.system = lambda name, seed: bundle
    with pytest.raises(KdrecipeError, match="without losses"):
        stage_6.run(recipe, layout, system, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- budgets

PRUNE = "{name: structured_prune, epochs: 0, multiple_of: 1, kinds: [units, channels, width]}"


@pytest.mark.parametrize(
    ("measure", "share", "steps"),
    [
        ("params", 0.6, PRUNE),
        ("size_mb", 0.25, PRUNE + ", {name: int8_dynamic}"),
        ("macs_per_s", 0.5, PRUNE),
    ],
)
def test_a_budget_is_met_from_0_to_2_percent_below(made, tmp_path, measure, share, steps):
    registry = recipe_with(tmp_path / "other", small=PLAIN).plugins.registry
    exporter = OnnxCtc(OnnxCtc.Config())
    parent = Bundle.load(made.layout.system("scratch", 1), registry)
    limit = share * cost_of(parent, measure, exporter)
    text = f"{{from: scratch, budget: {{{measure}: {limit}}}, steps: [{steps}]}}"
    bundle = compressed(made, tmp_path, text)
    cost = cost_of(bundle, measure, exporter)
    assert 0.98 * limit <= cost <= limit, "as it lies on disk"
    found = bundle.meta["budget"]
    assert found["measure"] == measure
    assert found["value"] == pytest.approx(cost)
    assert bundle.meta["compression"][0]["options"]["share"] == pytest.approx(found["strength"], abs=1e-6)


def test_a_budget_of_time_is_measured_in_the_runtime(made, tmp_path, monkeypatch):
    rtfs = []

    def measured(exporter, directory, variant, utterances):
        rtfs.append((directory / exporter.files[variant]["model"]).stat().st_size / 1e7)
        assert len(utterances) > 1
        return SimpleNamespace(rtf_median=rtfs[-1])

    monkeypatch.setattr("kdrecipe.measure.runtime.measure_export", measured)
    with pytest.raises(KdrecipeError, match="without compression, below the budget of 1"):
        compressed(made, tmp_path / "a", f"{{from: scratch, budget: {{rtf: 1}}, steps: [{PRUNE}]}}")
    limit = 0.7 * rtfs[0]
    bundle = compressed(
        made, tmp_path / "b", f"{{from: scratch, budget: {{rtf: {limit}}}, steps: [{PRUNE}]}}"
    )
    assert 0.98 * limit <= bundle.meta["budget"]["value"] <= limit


def test_a_budget_that_cannot_be_met_says_the_nearest(made, tmp_path):
    text = "{from: scratch, budget: {params: 2000}, steps: [{name: structured_prune, epochs: 0}]}"
    with pytest.raises(KdrecipeError) as error:
        compressed(made, tmp_path, text)
    said = str(error.value)
    assert "the budget of params 2,000 can't be met: the nearest is" in said
    assert "add width to kinds" in said
    assert "recipe.yaml:" in said
    assert not (tmp_path / "out").exists()


def test_bisection_finds_the_least_strength_and_names_both_neighbours():
    smooth = meet(lambda s: 100 * (1 - s), 37.0, "params")
    assert 0.998 * 37 <= smooth.value <= 37
    assert smooth.strength == pytest.approx(0.63, abs=1e-2)
    assert smooth.trials <= 16
    with pytest.raises(KdrecipeError, match="the nearest are 30 and 40"):
        meet(lambda s: 10.0 * round(10 * (1 - s)), 37.0, "params")
    assert meet(lambda s: 36.9, 37.0, "params").strength == 0

    def fragile(strength):
        if strength > 0.5:
            raise KdrecipeError("no more", remedy="lower at_least")
        return 100 * (1 - strength)

    assert meet(fragile, 60.0, "params").value <= 60
    with pytest.raises(KdrecipeError, match=r"the nearest is 50[\s\S]*no more; lower at_least"):
        meet(fragile, 40.0, "params")
