"""Tokens and normalisation of a student: from what its recipe lets it see, and what the report says of it."""

from __future__ import annotations

import gzip
import json
import textwrap

import pytest

from kdrecipe.artifacts import write_json
from kdrecipe.data.features import load_cuts, load_norm
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.recipe.load import load_recipe
from kdrecipe.stages.layout import Layout
from kdrecipe.stages.plan import build_plan
from kdrecipe.stages.report import _learnt_from
from kdrecipe.stages.run import run_recipe
from kdrecipe.stages.session import Session
from kdrecipe.testing.corpus import make_corpus

RECIPE = """
corpus:
  name: manifests
  root: corpus
  subsets: {few: {utterances: 1}, some: {utterances: 2}, rest: {except: few}}
features: {num_mel_bins: 20, speed_perturb: [0.9, 1.0]}
tokens: {name: char}
systems:
  teacher: {train: {model: &model {name: conformer, num_layers: 1, dim: 16, num_heads: 2, heads: {ctc: {}}}}}
  scratch: {train: {data: few, model: *model}}
  kd: {distill: {data: few, unlabelled: some, teachers: [teacher], model: *model, losses: [{name: kl}]}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that runs the recipe up to the tokens, with some values overridden: recipe and layout."""
    directory = tmp_path_factory.mktemp("recipe")
    make_corpus(directory / "corpus", num_speakers=3, utterances_per_speaker=3)
    (directory / "recipe.yaml").write_text(textwrap.dedent(RECIPE), encoding="utf-8")

    def make(*overrides):
        recipe = load_recipe(directory, overrides=overrides)
        run_recipe(recipe, last=2, jobs=1, work=directory / "exp")
        return recipe, Layout(directory / "exp")

    return make


def characters(layout, ids=None):
    path = layout.manifests / "train_supervisions.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    return set("".join(row["text"] for row in rows if ids is None or row["id"] in ids)) - {" "}


def test_the_tokens_are_those_of_the_labelled_part(made, capsys):
    recipe, layout = made()
    few = json.loads((layout.features / "subsets.json").read_text())["few"]
    assert {*Tokenizer.load(layout.tokens).pieces[3:]} - {"▁"} == characters(layout, few)
    assert characters(layout, few) < characters(layout)
    assert "tokens, from 1 transcripts" in capsys.readouterr().out
    note = "the tokens are learnt from the transcripts of the subset few"
    assert list(_learnt_from(recipe, layout)) == [note]


def test_the_report_is_made_again_when_a_note_changes(made):
    """Of the corpus, its subsets or its tokens: they stand in the report, whatever else they change."""
    recipe, layout = made()
    assert {"prepare", "features", "tokens"} <= set(build_plan(recipe, layout).jobs["report"].needs)


def test_all_transcripts_are_taken_only_if_the_recipe_says_so_and_the_report_tells(made):
    recipe, layout = made("tokens.data=all")
    assert {*Tokenizer.load(layout.tokens).pieces[3:]} - {"▁"} == characters(layout)
    note = "the tokens are learnt from all training transcripts, more than the labels of scratch, kd"
    assert list(_learnt_from(recipe, layout)) == [note]


def test_the_language_model_is_told_of_too(made, tmp_path):
    recipe, _ = made("lm={data: some}")
    write_json(tmp_path / "features" / "subsets.json", {"few": ["a"], "some": ["a", "b"], "rest": ["b", "c"]})
    tokens, lm = _learnt_from(recipe, Layout(tmp_path))
    assert tokens.endswith("few")
    assert lm.endswith("some, more than the labels of scratch, kd")


def test_normalisation_is_of_the_audio_that_a_system_hears(made):
    recipe, layout = made()
    heard = {name: Session(recipe, layout, recipe.systems[name], 1).heard for name in recipe.systems}
    plain = {cut.id for cut in load_cuts(layout.features, "train") if "_sp" not in cut.id}
    assert heard["teacher"] is None
    assert len(heard["scratch"] & plain) == 1
    assert len(heard["kd"] & plain) == 2
    means = [load_norm(layout.features, ids)[0].tolist() for ids in heard.values()]
    assert means[0] != means[1] != means[2] != means[0]
