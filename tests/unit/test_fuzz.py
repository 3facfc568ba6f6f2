"""Plain values in the wrong places: an error of one screen, never a traceback.

A few in each run of the suite; ``tests/fuzz.sh`` tries 2,000.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator

import pytest
from fuzzing import COMMANDS, EARLY, PATHS, VALUES, World, as_yaml, key_paths, put
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TRIES = int(os.environ.get("KDRECIPE_FUZZ", "60"))
ALWAYS_THE_SAME = "KDRECIPE_FUZZ" not in os.environ  # the suite must not fail by chance
KINDS = 5


def tries(share: float = 1 / KINDS):
    """So many of all tries; a failure is shrunk to the smallest that fails."""
    return settings(
        max_examples=max(5, round(share * TRIES)),
        deadline=None,
        database=None,
        derandomize=ALWAYS_THE_SAME,
        print_blob=not ALWAYS_THE_SAME,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    start = time.monotonic()
    world = World.make(tmp_path_factory.mktemp("fuzz"))
    yield world
    tally = world.tally
    with open(os.environ.get("KDRECIPE_FUZZ_LOG", os.devnull), "a") as log:
        log.write(f"{tally.total} tries {dict(tally.tries)}, {tally.passed_check} passed check, ")
        log.write(f"{tally.apart} in processes of their own, no traceback, ")
        log.write(f"{time.monotonic() - start:.0f} s\n")


def test_the_base_is_sound(world):
    world.write_recipe(world.base())
    assert world.call("check", str(world.home / "recipe")) == 0


@tries()
@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=2))
def test_recipes(world, changes):
    recipe = world.base()
    for path, value in changes:
        put(recipe, path, value)
    world.write_recipe(recipe)
    world.check_and_run("recipes")


@tries()
@given(st.sampled_from(EARLY), VALUES)
def test_the_first_stages(world, path, value):
    recipe = world.base()
    put(recipe, path, value)
    world.write_recipe(recipe)
    world.check_and_run("first stages", stages=True)


@tries()
@given(st.sampled_from(PATHS), VALUES)
def test_overrides(world, path, value):
    world.write_recipe(world.base())
    world.check_and_run("--set", "--set", f"{'.'.join(map(str, path))}={as_yaml(value)}")


@tries()
@given(st.data())
def test_manifests(world, data):
    world.write_recipe(world.base())
    name = data.draw(st.sampled_from(sorted(world.lines)))
    with world.other_lines(name) as rows:
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        put(row, data.draw(st.sampled_from(list(key_paths(row)))), data.draw(VALUES))
    world.check_and_run("manifests", stages=True)


@tries(share=0.1)
@given(st.data())
def test_bundles(world, data):
    description = copy.deepcopy(world.description)
    path = data.draw(st.sampled_from([p for p in key_paths(description) if p != ("weights_sha256",)]))
    put(description, path, data.draw(VALUES))
    world.import_and_transcribe(description)


@tries(share=0.1)
@given(st.sampled_from(COMMANDS), st.data())
def test_command_lines(world, command, data):
    world.write_recipe(world.base())
    world.tally.tries["command lines"] += 1
    world.call(*(data.draw(word) for word in command(world)))


@pytest.mark.parametrize("name", ["empty", "noise", "list", "format", "folders", "absent"])
def test_files_of_every_kind_but_the_right_one(world, name):
    world.write_recipe(world.base())
    folder = world.home / "files" / name
    for model in (str(folder), str(folder / "model.onnx")):
        assert world.call("transcribe", model, world.wav) == 2
        assert world.call("bench", model) == 2
    assert world.call("check", str(folder)) == 2
    if name != "empty":  # which is a plugin that registers nothing
        assert world.call("plugins", "test", "wer", "--file", str(folder / "a.py")) == 2
    recipe = world.base()
    recipe["systems"]["big"] = {"pretrained": {"bundle": str(folder)}}
    world.write_recipe(recipe)
    where = ["run", str(world.home / "recipe"), "--work", str(world.home / "imported")]
    assert world.call(*where, "--job", "big/seed1") == 2
