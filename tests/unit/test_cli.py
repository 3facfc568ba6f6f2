"""The command line: what it does with its arguments, what it says, and how it ends."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest

from kdrecipe.cli import scaffold
from kdrecipe.cli.main import cli, main
from kdrecipe.cli.recipe_commands import find_recipe
from kdrecipe.cli.scaffold import TEMPLATES, write_plugin
from kdrecipe.errors import DataError, KdrecipeError, ParityError, RecipeError, TrainingError
from kdrecipe.recipe.executor import LocalOptions, SlurmOptions

RECIPE = """\
corpus: {name: manifests, root: "${KDRECIPE_TEST_ROOT}", subsets: {few: {speakers: 1}}}
tokens: {name: char}
systems:
  teacher: {train: {model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
  student: {distill: {data: few, teachers: [teacher], losses: [{name: kl}],
            model: {name: conformer, num_layers: 1, dim: 16, heads: {ctc: {}}}}}
  int8: {compress: {from: student, steps: [{name: int8_dynamic}]}}
profiles: {tiny: {training: {epochs: 1}}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe toy/first below recipes/ of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDRECIPE_TEST_ROOT", raising=False)
    path = tmp_path / "recipes" / "toy" / "first" / "recipe.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def runs(monkeypatch):
    """What ``kdrecipe run`` would have run."""
    import kdrecipe.stages.run

    calls = []

    def record(recipe, first, last, **options):
        calls.append((recipe, first, last, options))

    monkeypatch.setattr(kdrecipe.stages.run, "run_recipe", record)
    return calls


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


# ---------------------------------------------------------------- start


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(recipe, given, found):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "kdrecipe.cli", "check", str(recipe)]
    # The library that runs torch's threads says itself what it was told, as soon as it is loaded.
    done = subprocess.run(
        command, env={**env, "OMP_DISPLAY_ENV": "true", **given}, capture_output=True, text=True, check=True
    )
    assert f"OMP_WAIT_POLICY = '{found}'" in done.stderr


def test_help_imports_nothing_slow():
    done = python(
        """
        import sys
        from kdrecipe.cli.main import main
        status = main(["--help"])
        slow = {"torch", "lhotse", "numpy", "onnx", "matplotlib", "sentencepiece"} & set(sys.modules)
        assert not slow, slow
        sys.exit(status)
        """
    )
    assert done.returncode == 0, done.stderr
    for command in cli.commands:
        assert f"  {command} " in done.stdout


def test_modules_of_the_command_line_import_neither_torch_nor_lhotse():
    done = python(
        """
        import sys
        import kdrecipe.artifacts, kdrecipe.cli.main, kdrecipe.recipe.yaml, kdrecipe.errors
        import kdrecipe.plugin.hookspecs, kdrecipe.jobs.plan
        import kdrecipe.interfaces, kdrecipe.plugin.loader, kdrecipe.plugin.registry, kdrecipe.recipe.load
        sys.exit(", ".join({"torch", "lhotse", "numpy"} & set(sys.modules)) or 0)
        """
    )
    assert done.returncode == 0, done.stderr


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "kdrecipe.cli", "stages"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 11
    assert lines[3].split()[:2] == ["3", "teacher"]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert "0." in capsys.readouterr().out


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RecipeError("bad", where="recipe.yaml:3", remedy="fix it"), 2),
        (DataError("bad", where="recipe.yaml:3", remedy="fix it"), 2),
        (TrainingError("bad", where="recipe.yaml:3", remedy="fix it"), 1),
        (ParityError("bad", where="recipe.yaml:3", remedy="fix it"), 1),
    ],
)
def test_errors_are_told_without_a_traceback(recipe, runs, monkeypatch, capsys, error, status):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("kdrecipe.stages.run.run_recipe", fail)
    assert main(["run", "toy/first"]) == status
    printed = capsys.readouterr()
    assert printed.err == "kdrecipe: recipe.yaml:3: bad\n    -> fix it\n"
    assert printed.out == ""


def test_many_problems_fit_one_screen(recipe, capsys):
    recipe.write_text(RECIPE + "".join(f"wrong{i}: 1\n" for i in range(60)), encoding="utf-8")
    assert main(["check", str(recipe)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("kdrecipe: 60 problems\n")
    assert len(printed.splitlines()) < 50
    assert "... and 40 more" in printed


def test_a_bug_keeps_its_traceback(recipe, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("kdrecipe.stages.run.run_recipe", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run", "toy/first"])


def test_interruption(recipe, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdrecipe.stages.run.run_recipe", interrupt)
    assert main(["run", "toy/first"]) == 130
    assert capsys.readouterr().err.strip() == "kdrecipe: interrupted; the same command resumes from here"


def test_a_reader_that_has_left():
    done = subprocess.run(
        f"{sys.executable} -m kdrecipe.cli stages | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""


def test_usage_errors(recipe, capsys):
    for arguments in (
        ["run", "--stage", "12"],
        ["run", "--jobs", "0"],
        ["run", "--nothing"],
        ["plugins", "x"],
    ):
        assert main(arguments) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert main(["run", "toy/first", "--stage", "distil"]) == 2
    assert "did you mean 'distill'" in capsys.readouterr().err
    assert main(["run", "toy/first", "--stage", "5", "--stop-stage", "3"]) == 2
    assert "comes after" in capsys.readouterr().err


def test_an_unknown_command(capsys, monkeypatch):
    monkeypatch.setenv("KDRECIPE_PLUGINS", "")
    assert main(["chek"]) == 2
    assert "did you mean 'check'?" in capsys.readouterr().err


def test_a_plugins_command(capsys, monkeypatch):
    from kdrecipe.plugin.loader import Plugins

    loaded = Plugins()
    loaded.registry.add("commands", "greet", click.Command("greet", callback=lambda: click.echo("hi")), "x")
    monkeypatch.setattr("kdrecipe.plugin.loader.load_plugins", lambda *a: loaded)
    assert main(["greet"]) == 0
    assert capsys.readouterr().out == "hi\n"


# ---------------------------------------------------------------- run and check


def test_run_passes_everything_on(recipe, runs, tmp_path):
    options = ["--dry-run", "--force", "--jobs", "2", "--work", str(tmp_path / "w"), "--job", "one"]
    arguments = ["--stage", "teacher", "--stop-stage", "5", "--set", "seeds=[4]", "--profile", "tiny"]
    options += ["--executor", "slurm", "--set", "executor.gpus=1"]
    assert main(["run", "toy/first", *arguments, *options]) == 0
    [(loaded, first, last, given)] = runs
    assert (first, last) == (3, 5)
    assert given.pop("program") == (sys.executable, "-m", "kdrecipe.cli")
    assert (given.pop("tried"), given.pop("team"), given.pop("executor")) == (
        None,
        None,
        SlurmOptions(gpus=1),
    )
    assert given == {"dry_run": True, "force": True, "jobs": 2, "work": tmp_path / "w", "job": "one"}
    assert loaded.seeds == (4,)
    assert loaded.training.epochs == 1
    assert (loaded.profile, loaded.overrides) == ("tiny", ("seeds=[4]",))


def test_run_defaults(recipe, runs, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    assert main(["run"]) == 0
    [(loaded, first, last, given)] = runs
    assert (first, last) == (0, 10)
    assert given.pop("program")
    assert (given.pop("tried"), given.pop("team"), given.pop("executor")) == (None, None, LocalOptions())
    assert given == {"dry_run": False, "force": False, "jobs": None, "work": None, "job": None}
    assert loaded.name == "toy/first"


def test_check(recipe, capsys):
    assert main(["check", "toy/first"]) == 0
    printed = capsys.readouterr().out
    assert "toy/first: no mistakes found, also with --profile tiny" in printed
    assert "KDRECIPE_TEST_ROOT is not set" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["teacher", "trained", "stage", "3,", "seeds", "1"] in rows
    assert ["int8", "compressed", "stage", "6,", "seeds", "1", "from", "student"] in rows


def test_check_looks_at_every_profile(recipe, capsys):
    recipe.write_text(RECIPE.replace("epochs: 1", "epoch: 1"), encoding="utf-8")
    assert main(["check", "toy/first"]) == 2
    assert "profile tiny: training.epoch: unknown key" in capsys.readouterr().err


def test_find_recipe(recipe, monkeypatch):
    assert find_recipe("toy/first").resolve() == recipe
    assert find_recipe("recipes/toy/first").resolve() == recipe
    assert find_recipe(str(recipe)) == recipe
    assert find_recipe("toy/first/").resolve() == recipe
    with pytest.raises(RecipeError, match=r"no recipe 'toy/frist'[\s\S]*did you mean 'toy/first'"):
        find_recipe("toy/frist")
    with pytest.raises(RecipeError, match=r"no recipe\.yaml in this directory"):
        find_recipe(".")
    with pytest.raises(RecipeError, match=r"no recipe\.yaml in 'recipes'"):
        find_recipe("recipes")
    monkeypatch.chdir(recipe.parent)
    assert find_recipe(".").resolve() == recipe


def test_transcribe_and_bench_pass_on(tmp_path, monkeypatch):
    import kdrecipe.cli.bench
    import kdrecipe.cli.transcribe

    calls = []
    monkeypatch.setattr(kdrecipe.cli.transcribe, "transcribe", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(kdrecipe.cli.bench, "bench", lambda *a, **k: calls.append((a, k)))
    assert main(["transcribe", "bundle", "a.wav", "b.wav", "--variant", "int8"]) == 0
    assert main(["bench", "bundle"]) == 0
    options = {"decoder": None, "variant": "int8", "channel": None, "longest_s": 30.0, "trust_plugins": False}
    assert calls == [
        ((Path("bundle"), (Path("a.wav"), Path("b.wav"))), options),
        (("bundle", ()), {"data": None, "split": "test", "most": None, "out": None, "trust_plugins": False}),
    ]
    assert main(["transcribe", "bundle"]) == 2


# ---------------------------------------------------------------- plugins


@pytest.fixture
def plugin_file(tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(
        textwrap.dedent(
            """
            from typing import Literal
            from kdrecipe import hookimpl
            from kdrecipe.interfaces import Options

            class Own:
                '''Counts something.'''

                class Config(Options):
                    '''Options of own.

                    Args:
                        scale: of it.
                    '''

                    scale: float = 1.5
                    mode: Literal["a", "b"]

                def __init__(self, config):
                    pass

                def errors(self, reference, hypothesis):
                    return 0, 1

            @hookimpl
            def register_metrics(register):
                register("own", Own)
            """
        ),
        encoding="utf-8",
    )
    return path


def test_plugins_list(plugin_file, capsys):
    assert main(["plugins", "list", "--file", str(plugin_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["metrics", "own", str(plugin_file)] in [line.split() for line in lines]
    assert any(line.startswith("losses         kl") for line in lines)
    assert main(["plugins", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["plugins"]["losses"]["kl"].startswith("kdrecipe ")
    assert listed["hooks"]["kl"] == ["register_losses"]
    assert listed["broken"] == {}


def test_plugins_show(plugin_file, capsys):
    assert main(["plugins", "show", "own", "--file", str(plugin_file)]) == 0
    printed = capsys.readouterr().out
    assert "Counts something." in printed
    assert "scale: float (default 1.5)" in printed
    assert "mode: 'a' | 'b' (required)" in printed
    assert "scale: of it." in printed
    assert main(["plugins", "show", "kll"]) == 2
    assert "did you mean 'kl'?" in capsys.readouterr().err


def test_plugins_show_explains_options_that_are_shared_too(capsys):
    assert main(["plugins", "show", "jsd"]) == 0
    printed = capsys.readouterr().out
    for option in (
        "share: w, of the student",
        "top_k: classes kept",
        "temperature: T",
        "head: whose posteriors",
    ):
        assert option in printed


def test_plugins_show_with_a_name_of_several_kinds(capsys):
    assert main(["plugins", "show", "ctc"]) == 0
    printed = capsys.readouterr().out
    assert "head ctc: " in printed
    assert "loss ctc: " in printed
    assert main(["plugins", "show", "ctc", "--kind", "loss"]) == 0
    assert "head ctc: " not in capsys.readouterr().out


def test_plugins_doctor(monkeypatch, capsys):
    assert main(["plugins", "doctor"]) == 0
    assert ", 0 not" in capsys.readouterr().out
    from kdrecipe.plugin import loader as plugins_module

    def broken(files=()):
        loaded = plugins_module.Plugins()
        loaded.load("bad", plugins_module.Source("bad"), lambda: 1 / 0)
        return loaded

    monkeypatch.setattr(plugins_module, "load_plugins", broken)
    assert main(["plugins", "doctor"]) == 1
    assert "bad: could not be loaded: ZeroDivisionError" in capsys.readouterr().out


def test_plugins_test(plugin_file, capsys):
    assert main(["plugins", "test", "wer"]) == 0
    assert " checks, 0 failed" in capsys.readouterr().out
    text = plugin_file.read_text(encoding="utf-8").replace('Literal["a", "b"]', 'Literal["a", "b"] = "a"')
    plugin_file.write_text(text, encoding="utf-8")
    assert main(["plugins", "test", "own", "--file", str(plugin_file)]) == 1
    printed = capsys.readouterr().out
    assert "  failed " in printed
    assert "demanded: " in printed


# ---------------------------------------------------------------- new plugin


def test_templates_and_kinds_agree():
    folders = {p.name for p in scaffold.TEMPLATES_DIR.iterdir() if (p / "tests").is_dir()}
    assert folders == set(TEMPLATES)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A package of every kind."""
    parent = tmp_path_factory.mktemp("packages")
    return {kind: write_plugin(f"my_{kind}", kind, parent) for kind in TEMPLATES}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_new_package_is_complete(packages, kind):
    path = packages[kind]
    assert (path / f"kdrecipe_my_{kind}.py").exists()
    assert "@" not in (path / "README.md").read_text(encoding="utf-8")
    project = (path / "pyproject.toml").read_text(encoding="utf-8")
    assert f'my_{kind} = "kdrecipe_my_{kind}"' in project
    assert f'name = "kdrecipe-my-{kind}"' in project
    assert path.stat().st_mode & 0o777 == 0o755
    assert not [p.name for p in path.parent.iterdir() if p.name.startswith(".")]


def test_the_contract_tests_of_new_packages_pass(packages):
    # One process for all, importing torch once; a package's own settings put its module on the path.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages.values())), "OMP_NUM_THREADS": "1"}
    tests = [str(path / "tests" / "test_contract.py") for path in packages.values()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=packages["loss"].parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_new_package_registers(packages, kind):
    from kdrecipe.plugin.loader import load_plugins

    plugins = load_plugins([packages[kind] / f"kdrecipe_my_{kind}.py"], env={"KDRECIPE_PLUGINS": ""})
    found = [k for k in plugins.registry._entries if f"my_{kind}" in plugins.registry.names(k)]
    assert len(found) == 1


@pytest.mark.parametrize("name", ["my-loss", "Mine", "9", "", "class", "a/b", ".."])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(KdrecipeError, match="can't name a plugin"):
        write_plugin(name, "loss", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["new", "plugin", "mine", "--dir", str(tmp_path)]) == 2
    assert "exists already, nothing was written" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []
    assert main(["new", "plugin", "kl", "--dir", str(tmp_path)]) == 2
    assert "installed already" in capsys.readouterr().err
    assert main(["new", "plugin", "other", "--dir", str(tmp_path / "absent")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(scaffold, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_plugin("mine", "loss", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_new_plugin_says_what_comes_next(tmp_path, capsys):
    assert main(["new", "plugin", "mine", "--kind", "metric", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"pip install -e {tmp_path / 'mine'}" in printed
    assert main(["new", "plugin", "mine", "--kind", "nothing"]) == 2
