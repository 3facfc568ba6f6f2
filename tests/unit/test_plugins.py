"""Plugins: how they are found, what happens to broken ones, and every hook called for real."""

import hashlib
import importlib
import re
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

import kdrecipe
from kdrecipe import hookimpl
from kdrecipe.errors import PluginError
from kdrecipe.interfaces import Options
from kdrecipe.plugin import hookspecs
from kdrecipe.plugin import loader as plugins_module
from kdrecipe.plugin.loader import CORE_COMMANDS, Plugins, load_plugins
from kdrecipe.plugin.registry import KINDS, Registry, Source
from kdrecipe.plugin.source_code import code_hash

ROOT = Path(__file__).parents[2]
HOOKS = [name for name, thing in vars(hookspecs).items() if hasattr(thing, "kdrecipe_spec")]
BUILT_IN_LOSSES = ["attention", "ctc", "rnnt"]  # those of the heads: no plugin's

HEADER = """\
from kdrecipe import hookimpl
from kdrecipe.interfaces import Options

class Plain:
    class Config(Options):
        scale: float = 1.0
    def __init__(self, *args): pass
"""


class Plain:
    class Config(Options):
        size: int = 1


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module that can be imported by name; gone again after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write_module(name, text, header=HEADER):
        path = tmp_path / f"{name}.py"
        path.write_text(header + textwrap.dedent(text), encoding="utf-8")
        return path

    yield write_module
    for name in set(sys.modules) - before:
        if name.startswith(("plug_", "kdrecipe_file_")):
            del sys.modules[name]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that just these entry points are installed: name -> module."""

    def pretend(points):
        found = [EntryPoint(name, value, "kdrecipe") for name, value in points]
        monkeypatch.setattr(plugins_module, "available", lambda: found)

    return pretend


def loss_text(name):
    return f"""
    @hookimpl
    def register_losses(register):
        register({name!r}, Plain)
    """


# ---------------------------------------------------------------- loading


def test_everything_shipped_loads():
    plugins = load_plugins(env={})
    assert plugins.broken == {}
    registry = plugins.registry
    assert "conformer" in registry.names("architectures")
    assert {"ctc", "kl"} <= set(registry.names("losses"))
    assert registry.source("losses", "kl").name == "kl"
    assert registry.source("losses", "ctc").name == "kdrecipe.model.heads.ctc"


def test_a_new_file_in_a_folder_is_a_plugin(tmp_path, monkeypatch):
    """In the folder of a shipped package: no line elsewhere, nothing to install again."""
    folder = tmp_path / "plug_shipped" / "losses"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "fresh.py").write_text(HEADER + textwrap.dedent(loss_text("fresh")))
    (folder / "helper.py").write_text("from kdrecipe import hookimpl  # used elsewhere\nraise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins_module, "SHIPPED", ("plug_shipped", "plug_absent"))
    monkeypatch.setattr(plugins_module, "entry_points", lambda group: [])
    plugins = load_plugins(env={})
    assert plugins.broken == {}
    assert plugins.registry.source("losses", "fresh").package == "kdrecipe"
    assert plugins.registry.names("losses") == sorted([*BUILT_IN_LOSSES, "fresh"])
    del sys.modules["plug_shipped.losses.fresh"]


def test_every_folder_of_the_packages_is_in_the_wheel():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    listed = re.findall(
        r"^    (kdrecipe[\w.]*)$", text.partition("packages =")[2].partition("package_dir")[0], re.M
    )
    folders = {"kdrecipe": "kdrecipe", "kdrecipe_plugins": "plugins", "kdrecipe_local": "local"}
    there = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(listed) == there


def test_names_that_moved_warn_and_go_on_working():
    for old, new in {"frames": "kdrecipe.frames", "problems": "kdrecipe.corpus.problems"}.items():
        sys.modules.pop(f"kdrecipe.data.{old}", None)
        with pytest.warns(DeprecationWarning, match=f"import {new}"):
            moved = importlib.import_module(f"kdrecipe.data.{old}")
        now = importlib.import_module(new)
        names = [n for n in vars(now) if not n.startswith("_")]
        assert names
        assert all(getattr(moved, n) is getattr(now, n) for n in names)


def test_one_broken_plugin_does_not_stop_the_others(write, installed):
    write("plug_bad", "import nothing_like_this")
    write("plug_exit", "raise SystemExit(3)")
    write("plug_good", loss_text("good"))
    installed([("abad", "plug_bad"), ("bexit", "plug_exit"), ("cgone", "plug_gone"), ("dgood", "plug_good")])
    plugins = load_plugins(env={})
    assert plugins.registry.names("losses") == sorted([*BUILT_IN_LOSSES, "good"])
    assert set(plugins.broken) == {"abad", "bexit", "cgone"}
    assert "nothing_like_this" in plugins.broken["abad"]
    assert "plug_bad.py:8" in plugins.broken["abad"]


def test_a_broken_plugin_is_fatal_to_whoever_names_it(write, installed):
    write("plug_bad", "import nothing_like_this")
    installed([("bad", "plug_bad")])
    registry = load_plugins(env={}).registry
    with pytest.raises(PluginError, match=r"unknown loss 'bad': the plugin 'bad' could not be loaded.*this"):
        registry.get("losses", "bad")
    with pytest.raises(PluginError, match=r"could not be loaded: bad"):
        registry.get("losses", "other")
    registry.get("losses", "ctc")


def test_a_plugin_that_fails_midway_leaves_nothing(write, installed):
    write(
        "plug_half",
        """
        @hookimpl
        def register_losses(register):
            register("first", Plain)
            register("second", object)

        @hookimpl
        def check_recipe(recipe):
            raise AssertionError("a plugin that failed must not be asked")
        """,
    )
    installed([("half", "plug_half")])
    plugins = load_plugins(env={})
    assert "no nested Config" in plugins.broken["half"]
    assert plugins.registry.names("losses") == BUILT_IN_LOSSES
    assert plugins.pm.get_plugin("half") is None
    assert plugins.pm.hook.check_recipe(recipe=None) == []


def test_an_unknown_hook_is_an_error(write, installed):
    write("plug_typo", "@hookimpl\ndef register_loses(register): pass\n")
    write("plug_good", loss_text("good"))
    installed([("a_typo", "plug_typo"), ("b_good", "plug_good")])
    plugins = load_plugins(env={})
    assert plugins.broken["a_typo"] == "unknown hook 'register_loses': did you mean 'register_losses'?"
    assert "good" in plugins.registry.names("losses")


def test_an_unknown_argument_is_an_error(write, installed):
    write("plug_argument", "@hookimpl\ndef check_recipe(recipe, colour): pass\n")
    installed([("argument", "plug_argument")])
    assert "colour" in load_plugins(env={}).broken["argument"]


def test_an_argument_with_a_default_is_refused(write, installed):
    write("plug_default", "@hookimpl\ndef train_metrics(step=0): return {}\n")
    installed([("default", "plug_default")])
    reason = load_plugins(env={}).broken["default"]
    assert "'step' has a default and would never be passed" in reason


def test_a_duplicate_names_both_and_belongs_to_neither(write, installed):
    write("plug_one", loss_text("same"))
    write("plug_two", loss_text("same"))
    installed([("one", "plug_one"), ("two", "plug_two")])
    plugins = load_plugins(env={})
    with pytest.raises(PluginError, match=r"'same' is registered by .*plug_one\.py and .*plug_two\.py"):
        plugins.registry.get("losses", "same")
    assert "registered by" in plugins.broken["two"]
    assert len(plugins.registry.conflicts()) == 1
    plugins.registry.get("losses", "ctc")


def test_no_plugin_may_replace_the_cores_own(write, installed):
    write("plug_ctc", loss_text("ctc"))
    installed([("mine", "plug_ctc")])
    with pytest.raises(PluginError, match=r"kdrecipe\.model\.heads\.ctc.* and .*plug_ctc"):
        load_plugins(env={}).registry.get("losses", "ctc")


def test_two_packages_with_the_same_entry_point_name(write, installed):
    write("plug_one", loss_text("one"))
    write("plug_two", loss_text("two"))
    installed([("same", "plug_one"), ("same", "plug_two"), ("same", "plug_one")])
    plugins = load_plugins(env={})
    assert plugins.broken == {}
    assert {"one", "two"} <= set(plugins.registry.names("losses"))


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("one", ["one"]), (" one , two,", ["one", "two"]), ("", []), (None, ["one", "two"])],
)
def test_kdrecipe_plugins_restricts(write, installed, wanted, expected):
    write("plug_one", loss_text("one"))
    write("plug_two", loss_text("two"))
    installed([("one", "plug_one"), ("two", "plug_two")])
    env = {} if wanted is None else {"KDRECIPE_PLUGINS": wanted}
    registry = load_plugins(env=env).registry
    assert registry.names("losses") == sorted([*BUILT_IN_LOSSES, *expected])
    if wanted == "one":
        with pytest.raises(PluginError, match="KDRECIPE_PLUGINS leaves out: two"):
            registry.get("losses", "two")


def test_kdrecipe_plugins_with_an_unknown_name(installed):
    installed([("conformer", "plug_none")])
    with pytest.raises(PluginError, match=r"called 'conformr'[\s\S]*did you mean 'conformer'"):
        load_plugins(env={"KDRECIPE_PLUGINS": "conformr"})


def test_trace_prints_hook_calls(write, installed, capsys):
    write("plug_one", loss_text("one") + "\n    @hookimpl\n    def check_recipe(recipe): return ['x']\n")
    installed([("one", "plug_one")])
    plugins = load_plugins(env={"KDRECIPE_TRACE": "1"})
    plugins.pm.hook.check_recipe(recipe=None)
    printed = capsys.readouterr().err
    assert "hook register_losses(register) -> one" in printed
    assert "hook check_recipe(recipe) -> one" in printed
    assert "hook check_recipe = [['x']]" in printed
    load_plugins(env={"KDRECIPE_TRACE": "0"})
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- local files


def test_a_file_with_dataclasses_and_postponed_annotations(write):
    header = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + HEADER
    path = write(
        "plugin",
        """
        @dataclass
        class Held:
            values: list[int]
            other: Held | None = None

        class Own(Plain):
            class Config(Options):
                held: str = Held([1]).values.__repr__()

        @hookimpl
        def register_losses(register):
            register("own", Own)
        """,
        header,
    )
    plugins = load_plugins([path], env={"KDRECIPE_PLUGINS": ""})
    cls = plugins.registry.get("losses", "own")
    assert "." not in cls.__module__
    assert sys.modules[cls.__module__].Own is cls
    import pickle

    assert pickle.loads(pickle.dumps(cls)) is cls


def test_two_files_of_the_same_name(write, tmp_path):
    one = write("plugin", loss_text("one"))
    (tmp_path / "other").mkdir()
    two = tmp_path / "other" / "plugin.py"
    two.write_text(HEADER + textwrap.dedent(loss_text("two")), encoding="utf-8")
    plugins = load_plugins([one, two], env={"KDRECIPE_PLUGINS": ""})
    assert {"one", "two"} <= set(plugins.registry.names("losses"))


def test_a_file_that_changed_is_read_anew(write):
    load_plugins([write("plugin", loss_text("one"))], env={"KDRECIPE_PLUGINS": ""})
    plugins = load_plugins([write("plugin", loss_text("two"))], env={"KDRECIPE_PLUGINS": ""})
    assert plugins.registry.names("losses") == sorted([*BUILT_IN_LOSSES, "two"])


def test_a_broken_file_is_an_error_for_whoever_names_it(write, tmp_path):
    path = write("plugin", "1 +\n")
    before = set(sys.modules)
    with pytest.raises(PluginError) as error:
        load_plugins([path, tmp_path / "absent.py"], env={"KDRECIPE_PLUGINS": ""})
    assert len(error.value.problems) == 2
    assert "SyntaxError" in str(error.value)
    assert "no such plugin file" in str(error.value)
    assert not [name for name in set(sys.modules) - before if name.startswith("kdrecipe_file_")]


# ---------------------------------------------------------------- registry


@pytest.mark.parametrize("name", ["", "Big", "9lives", "a b", "a.b", None, "a-b"])
def test_names_are_checked(name):
    with pytest.raises(PluginError, match="can't name a loss"):
        Registry().add("losses", name, Plain, "test")


@pytest.mark.parametrize(
    ("kind", "key"),
    [("losses", "weight"), ("losses", "teacher"), ("architectures", "heads"), ("metrics", "name")],
)
def test_options_may_not_hide_the_recipes_keys(kind, key):
    class Clash:
        Config = type("Config", (Options,), {"__annotations__": {key: str}, key: ""})

    with pytest.raises(PluginError, match=f"can't be called '{key}'"):
        Registry().add(kind, "clash", Clash, "test")


def test_an_exporter_says_what_its_runtime_is_not_only_its_name():
    class Named(Plain):
        runtime = "sherpa-onnx ctc"

    with pytest.raises(PluginError, match=r"its runtime is 'sherpa-onnx ctc'\n.*interfaces\.Runtime"):
        Registry().add("exporters", "mine", Named, "test")


def test_config():
    registry = Registry()
    registry.add("losses", "plain", Plain, "test")
    assert registry.config("losses", "plain", {"size": 2}).size == 2
    with pytest.raises(PluginError, match="loss 'plain': size"):
        registry.config("losses", "plain", {"size": "big"})
    with pytest.raises(PluginError, match="did you mean 'plain'"):
        registry.config("losses", "plian")
    with pytest.raises(PluginError, match="did you mean 'losses'"):
        registry.add("loses", "plain", Plain, "test")


def test_fingerprint_of_a_file_is_that_of_its_code(tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text('"""Text."""\n\n\ndef f(x):\n    """Text."""\n    return x + 1  # more\n')
    first = code_hash(path)
    path.write_text("def f(x):\n    return (x +\n            1)\n")
    assert code_hash(path) == first, "text and layout do not count"
    path.write_text("def f(x):\n    return x + 2\n")
    assert code_hash(path) != first
    registry = Registry()
    registry.add("losses", "plain", Plain, Source("plugin.py", path=path))
    before = registry.fingerprint("losses", "plain")
    path.write_text("def f(x):\n    return x + 3\n")
    assert registry.fingerprint("losses", "plain") != before


def test_fingerprint_of_a_folder_is_that_of_all_its_files(tmp_path):
    (tmp_path / "__init__.py").write_text("from more import f\n")
    (tmp_path / "more.py").write_text("f = 1\n")
    source = Source("plugin", path=tmp_path / "__init__.py")
    before = source.fingerprint()
    (tmp_path / "more.py").write_text("f = 2\n")
    assert source.fingerprint() != before


def test_fingerprint_of_a_package_has_its_version():
    registry = Registry()
    registry.add("losses", "one", Plain, Source("one", "package", "1.0"))
    registry.add("losses", "two", Plain, Source("two", "package", "2.0"))
    assert registry.fingerprint("losses", "one") == "package 1.0"
    assert registry.fingerprint("losses", "two") == "package 2.0"
    shipped = load_plugins(env={"KDRECIPE_PLUGINS": "kl"}).registry
    assert shipped.fingerprint("losses", "kl").startswith(f"kdrecipe {kdrecipe.__version__} ")


# ---------------------------------------------------------------- every hook, called


def register_hook_works(kind):
    plugins = Plugins()

    class Plugin:
        pass

    @hookimpl
    def hook(self, register):
        register("plain", Plain)

    setattr(Plugin, f"register_{kind}", hook)
    plugins.load("test", Source("test"), Plugin)
    assert plugins.broken == {}
    assert plugins.registry.get(kind, "plain") is Plain
    assert str(plugins.registry.source(kind, "plain")) == "test"
    assert plugins.hooks_of("test") == [f"register_{kind}"]


def test_hook_register_architectures():
    register_hook_works("architectures")


def test_hook_register_heads():
    register_hook_works("heads")


def test_hook_register_losses():
    register_hook_works("losses")


def test_hook_register_teachers():
    register_hook_works("teachers")


def test_hook_register_compressors():
    register_hook_works("compressors")


def test_hook_register_exporters():
    register_hook_works("exporters")


def test_hook_register_decoders():
    register_hook_works("decoders")


def test_hook_register_metrics():
    register_hook_works("metrics")


def test_hook_register_corpora():
    register_hook_works("corpora")


def test_hook_register_commands():
    plugins = Plugins()

    class Plugin:
        @hookimpl
        def register_commands(self, cli):
            @cli.command()
            def say_hello():
                click.echo("hello")

    class Thief:
        @hookimpl
        def register_commands(self, cli):
            cli.add_command(click.Command("run"))

    plugins.load("test", Source("test"), Plugin)
    plugins.load("thief", Source("thief"), Thief)
    assert plugins.registry.get("commands", "say-hello").name == "say-hello"
    assert "command 'run' is registered by" in plugins.broken["thief"]


def test_hook_check_recipe():
    plugins = Plugins()

    class Plugin:
        @hookimpl
        def check_recipe(self, recipe):
            return [f"{recipe} is wrong"]

    plugins.load("one", Source("one"), Plugin)
    plugins.load("two", Source("two"), Plugin)
    assert plugins.pm.hook.check_recipe(recipe="it") == [["it is wrong"]] * 2


def test_hook_build_optimizer():
    plugins = Plugins()
    assert plugins.pm.hook.build_optimizer(params=[], config=None) is None

    class Declines:
        @hookimpl
        def build_optimizer(self):
            return None

    class Builds:
        @hookimpl
        def build_optimizer(self, params, config):
            return (params, config)

    plugins.load("builds", Source("builds"), Builds)
    plugins.load("declines", Source("declines"), Declines)
    assert plugins.pm.hook.build_optimizer(params=[1], config=2) == ([1], 2)


def test_hook_train_metrics():
    plugins = Plugins()

    class Plugin:
        @hookimpl
        def train_metrics(self, step, teacher):
            return {"double_step": 2 * step, "teachers": len(teacher)}

    plugins.load("test", Source("test"), Plugin)
    found = plugins.pm.hook.train_metrics(step=4, student=None, teacher={"big": None}, batch=None)
    assert found == [{"double_step": 8, "teachers": 1}]


def test_hook_report_sections():
    plugins = Plugins()

    class Plugin:
        @hookimpl
        def report_sections(self, results):
            return [("Rows", str(len(results)))]

    plugins.load("test", Source("test"), Plugin)
    assert plugins.pm.hook.report_sections(recipe=None, results={"a": 1}) == [[("Rows", "1")]]


# ---------------------------------------------------------------- documents and tests keep up


def test_the_hooks_are_those_of_version_1():
    around = {"check_recipe", "build_optimizer", "train_metrics", "report_sections"}
    assert set(HOOKS) == {f"register_{kind}" for kind in KINDS} | around
    assert hookspecs.HOOKS_VERSION == 1


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook):
    function = getattr(hookspecs, hook)
    arguments = ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert f"### `{hook}({arguments})`" in text.splitlines()
    assert function.__doc__


def test_no_heading_without_a_hook():
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### `(\w+)\(", text, flags=re.MULTILINE)) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook):
    assert f"test_hook_{hook}" in globals()


def test_examples_in_the_hooks_document_load():
    text = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) >= 5
    for example in examples:
        names = {"hookimpl": hookimpl, "MyLoss": Plain, "click": click, "Problem": PluginError}
        exec(compile(example, "docs/hooks.md", "exec"), names)
        functions = {n: f for n, f in names.items() if hasattr(f, "kdrecipe_impl")}
        plugins = Plugins()
        plugins.load("example", Source("example"), lambda functions=functions: SimpleNamespace(**functions))
        assert plugins.broken == {}


def test_core_commands_are_the_command_lines():
    from kdrecipe.cli.main import cli

    assert set(cli.commands) == set(CORE_COMMANDS)


def test_source_names_are_stable():
    path = Path("plugin.py")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    assert plugins_module._flat_name(path) == f"kdrecipe_file_plugin_{digest}"
