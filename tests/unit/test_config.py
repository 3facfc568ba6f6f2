"""Strict YAML: what PyYAML gets wrong, what is refused, and where everything stands."""

import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrecipe.errors import RecipeError
from kdrecipe.recipe.yaml import MAX_NODES, expand_env, load_yaml, parse_value


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load_text(text):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load_yaml(tmp_path / "recipe.yaml")

    return load_text


def problems(load, text):
    with pytest.raises(RecipeError) as error:
        load(text)
    return sorted(str(p) for p in error.value.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2.5E+2", 250.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+3", 3),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("~", None),
        ("null", None),
        ("", None),
        ('"1"', "1"),
        ("'true'", "true"),
        ("e3", "e3"),
        ("-.inf", -math.inf),
    ],
)
def test_scalars(load, text, value):
    found = load(f"key: {text}").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number(load):
    assert math.isnan(load("key: .nan").data["key"])


def test_duplicate_keys_are_all_told(load):
    found = problems(load, "a: 1\nb: {x: 1, x: 2}\na: 3\n")
    assert len(found) == 2
    assert found[0].startswith("recipe.yaml:2: duplicate key 'x'")
    assert found[1].startswith("recipe.yaml:3: duplicate key 'a', first given at recipe.yaml:1")


def test_tags_are_refused(load):
    found = problems(load, "a: !!python/object/apply:os.system [true]\nb: !mine x\nc: !!set {a}\n")
    assert [p.split(":")[1] for p in found] == ["1", "2", "3"]


def test_keys_must_be_text(load):
    found = problems(load, "1: a\n? [x]\n: b\ntrue: c\n")
    assert len(found) == 3
    assert 'write it as "1"' in found[0]


def test_anchors_and_merge_keys(load):
    text = "base: &b {x: 1, y: 2}\nother: &o {y: 3, z: 4}\na: *b\nm:\n  <<: [*b, *o]\n  x: 9\n"
    document = load(text)
    assert document.data["a"] == {"x": 1, "y": 2}
    assert document.data["m"] == {"x": 9, "y": 2, "z": 4}
    assert document.where(("m", "x")) == "recipe.yaml:6"
    assert document.where(("m", "z")) == "recipe.yaml:2"


def test_aliases_do_not_share_values(load):
    document = load("a: &a {x: 1}\nb: *a\n")
    document.set(("b", "x"), 2, "--set")
    assert document.data == {"a": {"x": 1}, "b": {"x": 2}}


def test_places(load):
    document = load("a:\n  b:\n    - c: 1\n    - d: 2\ne: 3\n")
    assert document.where(("a", "b", 1, "d")) == "recipe.yaml:4"
    assert document.where(("e",)) == "recipe.yaml:5"
    assert document.where(("a", "b", 1, "nothing", "here")) == "recipe.yaml:4"
    assert document.where(("nothing",)) == "recipe.yaml:1"


def test_an_alias_in_itself_is_refused(load):
    assert "part of" in problems(load, "a: &a [*a]\n")[0]
    assert problems(load, "a: &a\n  <<: *a\n")


def test_aliases_that_explode_are_refused(load):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    assert str(MAX_NODES) in problems(load, "\n".join(lines))[0]


@pytest.mark.parametrize("text", ["a: [1\nb: 2\n", "a: 1\n---\nb: 2\n", "a: 'x\n", "a: b: c\n", "*x\n"])
def test_syntax_errors_have_a_line(load, text):
    assert problems(load, text)[0].startswith("recipe.yaml:")


def test_tabs_get_a_remedy(load):
    assert "spaces" in problems(load, "a:\n\tb: 1\n")[0]


def test_top_level_must_be_a_mapping(load):
    assert "mapping" in problems(load, "- a\n")[0]
    assert load("").data == {}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(tmp_path / "bom.yaml").data == {"a": 1}


def test_set_makes_mappings_and_finds_items(load):
    document = load("a: {b: [{c: 1}, {c: 2}]}\n")
    document.set(("a", "b", 1, "c"), 3, "--set a.b.1.c=3")
    document.set(("x", "y", "z"), {"w": 1}, "--set x.y.z={w: 1}")
    assert document.data == {"a": {"b": [{"c": 1}, {"c": 3}]}, "x": {"y": {"z": {"w": 1}}}}
    assert document.where(("a", "b", 1, "c")) == "--set a.b.1.c=3"
    assert document.where(("a", "b", 0, "c")) == "recipe.yaml:1"
    assert document.where(("x", "y", "z", "w")) == "--set x.y.z={w: 1}"


@pytest.mark.parametrize("path", [("a", "b", 2), ("a", "b", "c"), ("a", "b", 0, "c", "d")])
def test_set_refuses_what_is_not_there(load, path):
    with pytest.raises(RecipeError):
        load("a: {b: [{c: 1}]}\n").set(path, 0, "--set")


def test_set_suggests_the_item_with_that_name(load):
    document = load("losses: [{name: ctc}, {name: hidden_mse}]\n")
    with pytest.raises(RecipeError, match="'hidden_mse' is number 1"):
        document.set(("losses", "hiden_mse", "weight"), 0, "--set")


def test_an_item_is_named_by_its_number_or_its_name(load):
    document = load("losses: [{name: ctc}, {name: kl}, {name: kl}, {name: '0'}]\n")
    assert document.path_of(["losses", "ctc", "weight"]) == ("losses", 0, "weight")
    assert document.path_of(["losses", "2", "weight"]) == ("losses", 2, "weight")
    assert document.path_of(["losses", "0", "weight"]) == ("losses", 3, "weight")
    with pytest.raises(RecipeError, match="'kl' is number 1 and 2"):
        document.set(document.path_of(["losses", "kl", "weight"]), 0, "--set")


def test_a_copied_part_keeps_its_lines(load):
    document = load("a:\n  x: {y: 1}\nb: {}\n")
    copied = document.copied(("a", "x"), ("b", "z"))
    copied.set(("b", "z", "y"), 2, "here")
    assert (document.data, copied.data["b"]) == ({"a": {"x": {"y": 1}}, "b": {}}, {"z": {"y": 2}})
    assert copied.where(("b", "z")) == "recipe.yaml:2"
    assert (copied.where(("b", "z", "y")), document.where(("a", "x", "y"))) == ("here", "recipe.yaml:2")


def test_merged_replaces_lists_and_keeps_the_rest(load):
    document = load("a: {x: 1, l: [1, 2]}\nb: 5\np:\n  t:\n    a: {l: [9], y: null}\n    c: {d: 1}\n")
    merged = document.merged(("p", "t"))
    assert merged.data["a"] == {"x": 1, "l": [9], "y": None}
    assert merged.data["b"] == 5
    assert merged.data["c"] == {"d": 1}
    assert document.data["a"]["l"] == [1, 2], "the original must not change"
    assert merged.where(("a", "l", 0)) == "recipe.yaml:5"
    assert merged.where(("a", "x")) == "recipe.yaml:1"
    assert merged.where(("c", "d")) == "recipe.yaml:6"


def test_environment():
    env = {"ROOT": "/data", "EMPTY": ""}
    assert expand_env("${ROOT}/an4", "here", env) == "/data/an4"
    assert expand_env("$ROOT ${NOT:-/other}", "here", env) == "$ROOT /other"
    assert expand_env("${NOT:-}x", "here", env) == "x"
    with pytest.raises(RecipeError, match="here: the environment variable NOT is not set") as error:
        expand_env("${NOT}/${EMPTY}", "here", env)
    assert len(error.value.problems) == 2


def test_parse_value():
    assert parse_value("1e-3", "--set") == 1e-3
    assert parse_value("[1, {a: no}]", "--set") == [1, {"a": "no"}]
    assert parse_value("", "--set") is None
    with pytest.raises(RecipeError, match="--set x=\\[: not valid YAML"):
        parse_value("[", "--set x=[")


def test_integers_end_with_64_bits():
    for value in (2**63 - 1, -(2**63)):
        assert parse_value(str(value), "--set") == value
    for value in (2**63, -(2**63) - 1):
        with pytest.raises(RecipeError, match="is beyond 64 bits"):
            parse_value(str(value), "--set")


# PyYAML writes the text 0e0 without quotes, since its own floats have a dot; here, as in YAML 1.2, it is one
TEXT = st.text("abc é:#-'\"\n01e").filter(lambda text: not re.fullmatch(r"-?[01]+e-?[01]+", text))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_what_pyyaml_writes_is_read_the_same(value):
    assert parse_value(yaml.safe_dump(value, allow_unicode=True), "--set") == value
