"""Code that a bundle brings runs only for those who ask for it, or have the same file themselves."""

from __future__ import annotations

import importlib.util
import json
import py_compile
import shutil
from pathlib import Path

import pytest
import soundfile

from kdrecipe.artifacts import write_atomic
from kdrecipe.cli.main import main
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.errors import PluginError, RecipeError
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.carried import carry
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.stages.run import _job_arguments, run_recipe
from kdrecipe.testing.corpus import make_corpus, speak

PLUGIN = """
from pathlib import Path
from kdrecipe import hookimpl
from kdrecipe.testing.models import TinyEncoder

Path(TRACE).write_text("")


class Own(TinyEncoder):
    pass


@hookimpl
def register_architectures(register):
    register("own_encoder", Own)
"""

RECIPE = """
corpus: {name: manifests, root: corpus}
features: {name: fbank, num_mel_bins: 80}
tokens: {name: char}
seeds: [1]
systems:
  big: {pretrained: {bundle: bundle}}
  kd: {distill: {teachers: [big], losses: [{name: hidden_mse, layers: {encoder.0: encoder.0}}],
       model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
export: [{name: onnx_ctc}]
"""


class Place:
    """A recipe that imports a bundle whose encoder is in a plugin file, which the bundle brings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, folder / "bundle"
        self.trace = folder / "ran"
        self.plugin = PLUGIN.replace("TRACE", repr(str(self.trace)))
        write_atomic(folder / "made" / "plugin.py", self.plugin)
        registry = load_plugins([folder / "made" / "plugin.py"]).registry
        tokens = Tokenizer.train(["RED TEA", "BLUE SUN"], "char", None, folder / "made")
        model = {"name": "own_encoder", "heads": {"ctc": {}}}
        meta = {
            "name": "big", "kind": "trained", "parent": None, "seed": 1, "model": model, "compression": [],
            "features": {"name": "fbank", "num_mel_bins": 80},
            "plugin_files": carry([folder / "made" / "plugin.py"], self.bundle),
        }  # fmt: skip
        built = build_model(model, input_dim=80, vocab_size=len(tokens), registry=registry)
        Bundle.save(self.bundle, built, tokens, meta)
        shutil.rmtree(folder / "made")
        self.trace.unlink()
        (folder / "recipe.yaml").write_text(RECIPE)

    def add(self, text: str) -> None:
        with open(self.folder / "recipe.yaml", "a") as file:
            file.write(text)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_a_recipe_does_not_run_the_code_of_a_bundle_that_it_imports(place):
    with pytest.raises(RecipeError) as error:
        load_recipe(place.folder)
    problem = next(p for p in error.value.problems if "brings code of its own" in p.what)
    assert problem.where.endswith("recipe.yaml:7")
    assert "plugin.py" in problem.what
    assert "--trust-plugins" in problem.remedy
    assert "plugins: {files: [...]}" in problem.remedy
    assert not place.trace.exists()


def test_with_consent_it_does(place):
    recipe = load_recipe(place.folder, trust_plugins=True)
    assert place.trace.exists()
    assert recipe.plugin_files == (place.bundle / "plugin.py",), "students' bundles bring it, too"
    layout = Layout(place.folder / "exp")
    job = build_plan(recipe, layout).jobs["big/seed1"]
    assert "--trust-plugins" in _job_arguments(recipe, layout, job)
    assert recipe.command.endswith("--trust-plugins")


def test_a_recipe_that_names_the_same_file_has_said_so(place):
    write_atomic(place.folder / "mine" / "plugin.py", place.plugin)
    place.add("plugins: {files: [mine/plugin.py]}\n")
    for trust in (False, True):  # with consent, too, it is loaded once
        recipe = load_recipe(place.folder, trust_plugins=trust)
        assert recipe.plugin_files == (place.folder / "mine" / "plugin.py",)
    run_recipe(load_recipe(place.folder), work=place.folder / "exp", job="big/seed1")
    made = place.folder / "exp" / "systems" / "big" / "seed1"
    assert (made / "plugin.py").read_text() == place.plugin


def test_a_table_that_was_made_with_consent_asks_again(place, capsys):
    (place.folder / "corpus").mkdir()
    made = "# Results of x\n\n## How this was made\n\n```sh\nkdrecipe run x --trust-plugins\n```\n"
    (place.folder / "RESULTS.md").write_text(made)
    assert main(["regenerate", str(place.folder), "--dry-run"]) == 2
    assert "--trust-plugins" in capsys.readouterr().err
    assert not place.trace.exists()
    assert main(["regenerate", str(place.folder), "--dry-run", "--trust-plugins"]) == 0
    assert capsys.readouterr().out.split() == ["kdrecipe", "run", str(place.folder), "--trust-plugins"]


def test_another_file_of_the_same_name_is_not_the_same_file(place):
    write_atomic(place.folder / "plugin.py", "x = 1\n")
    place.add("plugins: {files: [plugin.py]}\n")
    with pytest.raises(RecipeError, match="brings code of its own"):
        load_recipe(place.folder)
    assert not place.trace.exists()


def test_a_description_without_a_list_brings_no_code(place):
    meta = json.loads((place.bundle / "bundle.json").read_text())
    del meta["plugin_files"]
    (place.bundle / "bundle.json").write_text(json.dumps(meta))
    assert Bundle.load(place.bundle).plugin_files == {}


def change_plugin(place):
    with open(place.bundle / "plugin.py", "a") as file:
        file.write("\n# more\n")


def list_evil(place):
    write_atomic(place.folder / "evil.py", place.plugin)
    meta = json.loads((place.bundle / "bundle.json").read_text())
    (place.bundle / "bundle.json").write_text(json.dumps({**meta, "plugin_files": ["../evil.py"]}))


@pytest.mark.parametrize(
    ("change", "message"), [(change_plugin, "changed after"), (list_evil, "not the plain name")]
)
def test_what_was_changed_by_hand_never_runs(place, change, message, capsys, tmp_path):
    change(place)
    with pytest.raises(RecipeError, match=message):
        load_recipe(place.folder, trust_plugins=True)
    soundfile.write(tmp_path / "a.wav", speak("RED"), 16000)
    for command in ("transcribe", "bench"):
        assert main([command, str(place.bundle), str(tmp_path / "a.wav"), "--trust-plugins"]) == 2
        assert message in capsys.readouterr().err
    assert not place.trace.exists()


def test_a_bundle_that_changes_after_the_check_is_not_imported(place):
    recipe = load_recipe(place.folder, trust_plugins=True)
    with open(place.bundle / "plugin.py", "a") as file:
        file.write("\nx = 1\n")
    meta = json.loads((place.bundle / "bundle.json").read_text())
    shutil.move(place.bundle / "plugin.py", place.folder / "new.py")
    meta["plugin_files"] = carry([place.folder / "new.py"], place.bundle)
    (place.bundle / "bundle.json").write_text(json.dumps(meta))
    with pytest.raises(PluginError, match=r"does not run unasked: new\.py"):
        run_recipe(recipe, work=place.folder / "exp", job="big/seed1")


def test_only_the_code_that_one_can_read_runs(place, tmp_path):
    """Python takes a compiled copy beside a file for the file, whatever is in it, if the copy says so."""
    other = tmp_path / "other.py"
    other.write_text(place.plugin + f"\nPath({str(tmp_path / 'evil')!r}).write_text('')\n")
    compiled = importlib.util.cache_from_source(str(place.bundle / "plugin.py"))
    py_compile.compile(
        str(other), compiled, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert load_recipe(place.folder, trust_plugins=True).plugin_files
    assert place.trace.exists()
    assert not (tmp_path / "evil").exists()


def test_transcribe_and_bench_ask_first(place, capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", speak("RED"), 16000)
    for command in ("transcribe", "bench"):
        assert main([command, str(place.bundle), str(tmp_path / "a.wav")]) == 2
        said = capsys.readouterr().err
        assert "brings code of its own" in said
        assert "--trust-plugins" in said
        assert not place.trace.exists()
    assert main(["transcribe", str(place.bundle), str(tmp_path / "a.wav"), "--trust-plugins"]) == 0
    assert place.trace.exists()


def test_commands_for_the_device_ask_first(place, capsys, tmp_path):
    for arguments in (
        ["demo", str(place.bundle)],
        ["sensitivity", str(place.bundle), "--data", str(tmp_path)],
    ):
        assert main(arguments) == 2
        assert "brings code of its own" in capsys.readouterr().err
        assert not place.trace.exists()


def test_only_what_belongs_to_a_bundle_is_imported(place):
    (place.bundle / "secret").symlink_to("/etc/hostname")
    recipe = load_recipe(place.folder, trust_plugins=True)
    run_recipe(recipe, work=place.folder / "exp", job="big/seed1")
    made = place.folder / "exp" / "systems" / "big" / "seed1"
    names = {"bundle.json", "weights.pt", "tokens.txt", "spm.model", "plugin.py", "stamp.json"}
    assert {path.name for path in made.iterdir()} == names


COMPRESSOR = """
from kdrecipe import hookimpl
from kdrecipe.interfaces import Options


class Halve:
    num_epochs = 0

    class Config(Options):
        "No options."

    def __init__(self, config):
        pass

    def apply(self, model, context):
        return model

    def on_step(self, model, step, num_steps):
        pass

    def finish(self, model):
        return model

    def rebuild(self, model):
        return model

    def report(self):
        return {"share": 0.5}


@hookimpl
def register_compressors(register):
    register("halve", Halve)
"""

COMPRESSED = """
corpus: {name: manifests, root: corpus}
features: {num_mel_bins: 20}
tokens: {name: char}
training: {epochs: 1, precision: fp32}
plugins: {files: [plugin.py]}
systems:
  big: {train: {model: {name: conformer, num_layers: 1, dim: 16, num_heads: 2, heads: {ctc: {}}}}}
  small: {compress: {from: big, steps: [{name: halve}]}}
export: [{name: onnx_ctc}]
"""


def test_a_compressor_that_is_changed_after_its_parent_was_trained_is_brought_once(tmp_path):
    make_corpus(tmp_path / "corpus", num_speakers=4, utterances_per_speaker=2)
    (tmp_path / "recipe.yaml").write_text(COMPRESSED)
    for text in (COMPRESSOR, COMPRESSOR.replace("0.5", "0.25")):
        (tmp_path / "plugin.py").write_text(text)
        run_recipe(load_recipe(tmp_path), 0, 6, jobs=1, work=tmp_path / "exp")
    bundle = Bundle.load(tmp_path / "exp/systems/small/seed1", trust_plugins=True)
    assert bundle.meta["compression"][0]["report"] == {"share": 0.25}
    assert [path.read_text() for path in bundle.plugin_files] == [text]
    assert bundle.model is not None
