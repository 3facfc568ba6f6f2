"""The documentation against the code: links, commands, recipes, the stage table, every option."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from kdrecipe.cli.main import cli
from kdrecipe.cli.recipe_commands import find_recipe
from kdrecipe.cli.scaffold import write_plugin
from kdrecipe.plugin.loader import Plugins, load_plugins
from kdrecipe.plugin.registry import KINDS
from kdrecipe.recipe import parsing, sections, system_sections
from kdrecipe.recipe.budget import Budget
from kdrecipe.recipe.executor import load_executor, split_overrides
from kdrecipe.recipe.load import load_recipe
from kdrecipe.recipe.sections import Named
from kdrecipe.recipe.yaml import load_yaml, parse_value
from kdrecipe.score.keep import Keep
from kdrecipe.stages import STAGES
from kdrecipe.text_form import TextForm

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").glob("*/*/README.md"),
    ]
)
ANATOMY = ROOT / "docs" / "recipe-anatomy.md"
# Written by stage 10; a link to one is sound wherever there is a recipe that makes it.
GENERATED = ("RESULTS.md", "results.json")

BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)\n```", re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def readme_block(marker: str) -> str:
    """The README's fenced block that holds ``marker``."""
    return next(m["code"] for m in BLOCK.finditer(text_of(ROOT / "README.md")) if marker in m["code"])


@cache
def plugins() -> Plugins:
    return load_plugins()


def plugins_for(recipe: Path) -> Plugins | None:
    """None: the recipe has a file of its own, and is to load it."""
    return None if recipe.with_name("plugin.py").exists() else plugins()


# ---------------------------------------------------------------- links and paths


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return kept.replace(" ", "-")


@each_page
def test_links_lead_somewhere(page):
    prose = BLOCK.sub("", text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        generated = path.name in GENERATED and (path.parent / "recipe.yaml").exists()
        assert path.exists() or generated, f"{page.name}: {target}"
        assert ROOT in path.parents, target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(path)), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target}"


@each_page
def test_files_named_in_prose_exist(page):
    prose = BLOCK.sub("", text_of(page))
    for name in re.findall(r"`((?:kdrecipe|plugins|local|tests|benchmarks|docs|recipes)/[\w./-]*\w)`", prose):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_folder_tree_of_the_readme_is_there():
    tree = readme_block("./run.sh [RECIPE]")
    room, named = ROOT, set()
    for line in tree.splitlines():
        first = line.split("  ")[0] if line[0] != " " else line.strip().split("  ")[0]
        if line[0] != " ":
            room = ROOT / first
            named.add(first.rstrip("/"))
            assert room.exists(), first
            continue
        for name in first.split(", "):
            assert (room / name).exists() or (room / f"{name}.py").exists(), f"{room.name}/{name}"
    tracked = {"run.sh", "recipes", "kdrecipe", "plugins", "local", "benchmarks", "docs", "tests"}
    assert named == tracked


def test_the_generated_blocks_are_those_of_the_recipes_and_their_results():
    """The headline's figures and the table of recipes; the remedy is in the message."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "fill_readme.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- commands


LAUNCHER = r" --(nproc|nnodes|rdzv|max-restarts)[ =]\S+"  # run.sh's own options, for torchrun


def commands(page: Path) -> list[list[str]]:
    """Every ``kdrecipe ...`` and ``./run.sh ...`` in code, as words after ``kdrecipe``."""
    found = []
    for line in code_lines(text_of(page)):
        line = re.sub(r"\s+#.*$", "", line).strip().rstrip(";")
        line = re.sub(r"^(?:srun )?(?:[A-Z_]+=\S+ )*", "", line)
        if re.match(r"kdrecipe \w", line):
            found.append(shlex.split(line)[1:])
        elif line.startswith("./run.sh "):
            line = re.sub(LAUNCHER, "", line)
            found.append(["run", *shlex.split(line)[1:]])
    return found


def code_lines(text: str) -> list[str]:
    blocks = [m for m in BLOCK.finditer(text) if m["language"] in ("", "sh", "bash")]
    inline = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    return [line for m in blocks for line in m["code"].splitlines()] + inline


@each_page
def test_commands_parse(page):
    for words in commands(page):
        assert words[0] in cli.commands, f"{page.name}: no command {words[0]}"
        if len(words) > 1:  # else it is only mentioned
            parse(words, page)


def parse(words: list[str], page: Path) -> None:
    """Let click take the words apart, down to the command that they name; nothing is run."""
    command: click.Command = cli
    context = click.Context(cli, info_name="kdrecipe")
    rest = [w for w in words if w not in ("--help", "--version")]
    while isinstance(command, click.Group) and rest:
        found = command.get_command(context, rest[0])
        assert found is not None, f"{page.name}: no command {rest[0]!r} in {' '.join(words)!r}"
        context, command, rest = click.Context(found, context, rest[0]), found, rest[1:]
    if isinstance(command, click.Group):
        return
    try:
        command.make_context(command.name, list(rest), parent=context.parent)
    except click.UsageError as error:
        pytest.fail(f"{page.name}: {' '.join(words)!r}: {error.format_message()}")


def test_recipes_in_commands_exist_and_take_the_overrides():
    named = {tuple(words) for page in PAGES for words in commands(page) if words[0] in ("run", "check")}
    recipes = [words for words in named if len(words) > 1 and re.fullmatch(r"\w+/\w+", words[1])]
    assert recipes
    for words in recipes:
        overrides = [value for option, value in pairwise(words) if option == "--set"]
        of_recipe, of_executor = split_overrides(overrides)
        load_recipe(path := find_recipe(words[1]), overrides=of_recipe, plugins=plugins_for(path))
        names = [value for option, value in pairwise(words) if option == "--executor" and "." not in value]
        for name in names:
            load_executor(name, of_executor)


def test_profiles_in_commands_exist():
    for page in PAGES:
        here = page.parent / "recipe.yaml"
        recipe = here if here.exists() else ROOT / "recipes/voice_commands/ctc_kd/recipe.yaml"
        pairs = [pair for words in commands(page) for pair in pairwise(words)]
        used = {name for option, name in pairs if option == "--profile" and name.islower()}
        if used:  # a name in capitals stands for any
            assert used <= {"tiny", *load_yaml(recipe).data.get("profiles", {})}, page.name


def test_the_commands_of_the_core_are_all_in_the_readme():
    shown = {words[0] for words in commands(ROOT / "README.md")}
    assert shown == set(cli.commands)


# ---------------------------------------------------------------- recipes and code


@each_page
def test_complete_recipes_are_sound(page, tmp_path):
    for match in BLOCK.finditer(text_of(page)):
        code = match["code"] + "\n"
        if match["mark"] == "file: plugin.py":
            (tmp_path / "plugin.py").write_text(code, encoding="utf-8")
        elif match["language"] == "yaml" and all(f"\n{key}:" in f"\n{code}" for key in parsing.EXAMPLES):
            (tmp_path / "recipe.yaml").write_text(code, encoding="utf-8")
            load_recipe(tmp_path / "recipe.yaml")


RECIPES = sorted((ROOT / "recipes").glob("*/*/recipe.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: "/".join(p.parts[-3:-1]))
def test_a_recipe_s_readme_tells_of_every_system(path):
    text = text_of(path.with_name("README.md"))
    systems = load_recipe(path, plugins=plugins_for(path)).systems
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \| .* \|$", text, re.MULTILINE))
    assert list(rows) == list(systems), path
    for name, what in rows.items():
        if size := re.search(r"(\d+) layers of width (\d+)", what):
            model = systems[name].model
            assert [model["num_layers"], model["dim"]] == [int(size[1]), int(size[2])], name


def test_the_readme_s_loss_keeps_the_contract(tmp_path):
    from kdrecipe.testing.contracts import test_plugin as run_contract

    code = readme_block("@hookimpl")
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 15, "the README promises fifteen lines"
    (tmp_path / "plugin.py").write_text(code + "\n", encoding="utf-8")
    loaded = load_plugins([tmp_path / "plugin.py"])
    results = run_contract(loaded.registry, "losses", "brier")
    assert results
    assert all(result.ok for result in results), [r for r in results if not r.ok]


def statements(code: str) -> int:
    """How many there are, docstrings not counted."""
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in found)


def test_the_scaffold_s_loss_is_as_short_as_the_readme_s(tmp_path):
    path = write_plugin("mine", "loss", tmp_path)
    assert statements(text_of(path / "kdrecipe_mine.py")) <= statements(readme_block("@hookimpl"))


def test_the_loss_beside_the_recipe_has_twenty_lines_and_keeps_the_contract():
    from kdrecipe.testing.contracts import test_plugin as run_contract

    recipe = ROOT / "recipes" / "voice_commands" / "losses"
    assert len(text_of(recipe / "plugin.py").splitlines()) <= 20
    loaded = load_recipe(recipe)
    rows = [system for system in loaded.systems.values() if "symmetric_kl" in {t.name for t in system.terms}]
    assert [system.name for system in rows] == ["symmetric_kl"]
    results = run_contract(loaded.plugins.registry, "losses", "symmetric_kl")
    assert results
    assert all(result.ok for result in results), [r for r in results if not r.ok]


def test_every_distilling_loss_has_a_row_in_the_ablation_or_its_readme_says_why_not():
    recipe = ROOT / "recipes" / "voice_commands" / "losses"
    rows = {term.name for system in load_recipe(recipe).systems.values() for term in system.terms}
    registry = plugins().registry
    known = [name for name in registry.names("losses") if registry.problem("losses", name) is None]
    distilling = {n for n in known if not getattr(registry.get("losses", n), "supervised", False)}
    without = set(re.findall(r"^- `(\w+)` has no row", text_of(recipe / "README.md"), re.MULTILINE))
    assert distilling - rows == without


def test_the_teacher_of_the_hooks_keeps_the_contract(tmp_path):
    import torch

    from kdrecipe.testing.contracts import test_plugin as run_contract

    blocks = BLOCK.finditer(text_of(ROOT / "docs" / "hooks.md"))
    code = next(block["code"] for block in blocks if block["mark"] == "test: teacher")
    assert len([line for line in code.splitlines() if line]) <= 40, "a teacher of a stranger's is 40 lines"
    (tmp_path / "plugin.py").write_text(code + "\n", encoding="utf-8")
    torch.manual_seed(0)
    strided = torch.nn.Conv1d(1, 4, 320, stride=320)

    class House(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.strided = strided

        def forward(self, samples_BS: torch.Tensor) -> torch.Tensor:
            missing = max(0, 320 - samples_BS.shape[1])
            padded_BS = torch.nn.functional.pad(samples_BS, (0, missing))
            return 50 * self.strided(padded_BS[:, None]).transpose(1, 2)

    torch.jit.script(House()).save(tmp_path / "model.pt")
    (tmp_path / "model.json").write_text('["", "a", "b", " "]')
    registry = load_plugins([tmp_path / "plugin.py"]).registry
    results = run_contract(registry, "teachers", "house_model", {"path": str(tmp_path / "model.pt")})
    assert [(r.check_id, r.reason) for r in results if r.status != "passed"] == []


@each_page
def test_python_compiles(page):
    for match in BLOCK.finditer(text_of(page)):
        if match["language"] == "python":
            compile(match["code"], str(page), "exec")


def test_the_snippet_calls_sherpa_onnx_as_it_is():
    import sherpa_onnx

    snippet = readme_block("import sherpa_onnx")
    parameters = inspect.signature(sherpa_onnx.OfflineRecognizer.from_zipformer_ctc).parameters
    for name in re.findall(r"(\w+)=", snippet.split("from_zipformer_ctc(")[1].split(")")[0]):
        assert name in parameters


def test_the_stage_table_is_the_code_s():
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.*) \|$", text_of(ROOT / "README.md"), re.MULTILINE)
    assert [(verb, purpose) for _, verb, purpose in rows] == list(STAGES)
    assert [int(number) for number, _, _ in rows] == list(range(len(STAGES)))


# ---------------------------------------------------------------- every loss


def loss_rows() -> list[list[str]]:
    """Cells of the tables of all losses: name, needs, formula, paper."""
    guide = text_of(ROOT / "docs" / "which-loss.md").split("## All losses")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `\w+` \|.*\|$", guide, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_guide_has_a_row_for_every_loss():
    registry = plugins().registry
    shipped = [n for n in registry.names("losses") if registry.source("losses", n).package == "kdrecipe"]
    assert sorted(row[0].strip("`") for row in loss_rows()) == sorted(shipped)


@pytest.mark.parametrize("row", loss_rows(), ids=lambda row: row[0].strip("`"))
def test_needs_and_papers_of_the_guide_are_the_loss_s(row):
    name, needs, formula, paper = row
    cls = plugins().registry.get("losses", name.strip("`"))
    config = cls.Config(**getattr(cls, "contract_options", {}))
    kinds = {spec.kind for spec in cls.requires(config)}
    if "head" in cls.Config.model_fields:
        kinds.add("token_logits")
    assert set(re.findall(r"`(\w+)`", needs)) == kinds
    assert ("all classes" in needs) == getattr(cls, "all_classes", False)
    assert ("labels" in needs) == getattr(cls, "supervised", False)
    assert formula
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    for number in re.findall(r"abs/([\d.]+)\)", paper):
        assert number in (inspect.getdoc(cls) or "") + module, f"{name} does not say that it is from {number}"


# ---------------------------------------------------------------- every option


def tables() -> dict[str, dict[str, str]]:
    """What docs/recipe-anatomy.md says: model or plugin -> option -> default as written.

    ``A + B`` has the rows of B, which stands above, and then its own.
    """
    found: dict[str, dict[str, str]] = {}
    pending: list[str] = []
    has_rows = False
    for line in text_of(ANATOMY).splitlines():
        if mark := re.fullmatch(r"<!-- (?:options|keys): (\S+)(?: \+ (\S+))? -->", line):
            assert mark[1] not in found, f"{mark[1]} is there twice"
            pending = [mark[1]] if not pending or has_rows else [*pending, mark[1]]
            has_rows = False
            found[mark[1]] = dict(found[mark[2]]) if mark[2] else {}
        elif row := re.fullmatch(r"\| `(\w+)` \| (.*?) \| .+ \|", line):
            has_rows = True
            for name in pending:
                found[name][row[1]] = row[2].strip("`")
        elif line and not line.startswith("|"):
            pending = []
    return found


MODELS: list[type[BaseModel]] = [
    sections.Corpus,
    system_sections.TrainSection,
    system_sections.InitFrom,
    system_sections.DistillSection,
    system_sections.CompressSection,
    system_sections.PretrainedSection,
    system_sections.UnlabelledSection,
    system_sections.TermSection,
    sections.Lm,
    sections.Decode,
    sections.Subset,
    sections.Features,
    sections.Tokens,
    sections.Ema,
    sections.Training,
    sections.SpecAugment,
    sections.Augment,
    sections.TargetOptions,
    sections.Parity,
    sections.Claim,
    TextForm,
    Keep,
    Budget,
]


def shipped() -> dict[str, type[BaseModel]]:
    """Everything that has options, by the name that the page uses."""
    registry = plugins().registry
    found = {f"{model.__module__}.{model.__name__}": model for model in MODELS}
    for kind in KINDS:
        for name in registry.names(kind) if kind != "commands" else ():
            if registry.source(kind, name).package == "kdrecipe":
                found[f"{kind}/{name}"] = registry.get(kind, name).Config
    return found


def as_written(default: Any) -> Any:
    """A default as the page has it."""
    if isinstance(default, BaseModel):
        return default.model_dump()
    if isinstance(default, Named):
        return {"name": default.name, **default.options}
    if isinstance(default, dict):
        return {key: as_written(value) for key, value in default.items()}
    return tuple(map(as_written, default)) if isinstance(default, tuple) else default


def test_the_page_has_a_table_for_everything_and_nothing_else():
    assert set(tables()) - {"top"} == set(shipped())


@pytest.mark.parametrize("name", sorted(shipped()))
def test_options_and_defaults_are_the_code_s(name):
    model, written = shipped()[name], tables()[name]
    fields = {key: field for key, field in model.model_fields.items() if not field.exclude}
    assert list(written) == [field.alias or key for key, field in fields.items()]
    for key, field in fields.items():
        text = written[field.alias or key]
        if field.is_required():
            assert text == "required", key
            continue
        default = field.get_default(call_default_factory=True)
        default = as_written(default)
        value = parse_value(text, "the page")
        assert (tuple(value) if isinstance(default, tuple) else value) == default, key


def test_the_keys_at_the_top_are_the_code_s(tmp_path):
    written = tables()["top"]
    assert list(written) == list(parsing.TOP_KEYS)
    assert {key for key, default in written.items() if default == "required"} == set(parsing.EXAMPLES)
    exports = [{"name": name} for name in parsing.DEFAULT_EXPORTS]
    assert parse_value(written["export"], "the page") == exports
    assert parse_value(written["seeds"], "the page") == [1]


def test_no_section_of_the_recipe_is_forgotten_here():
    """A new section of options must be added to MODELS, and so to the page."""
    known = {model.__name__ for model in MODELS}
    defined = {
        name
        for module in (parsing, sections)
        for name, thing in vars(module).items()
        if isinstance(thing, type) and issubclass(thing, BaseModel) and thing.__module__ == module.__name__
    }
    assert defined - known == {"_SeedList"}
