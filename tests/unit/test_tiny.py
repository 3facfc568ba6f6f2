"""The profile tiny: what the rule makes of a recipe, how plugins take part, and what stays the recipe's."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import yaml
from pydantic import Field

from kdrecipe.cli.main import main
from kdrecipe.corpus.manifests import SAMPLE_SPEAKERS, sample
from kdrecipe.errors import PluginError, RecipeError
from kdrecipe.interfaces import Options, Prepared
from kdrecipe.plugin.registry import Registry
from kdrecipe.recipe.load import load_recipe

RECIPE = """
corpus:
  name: manifests
  root: /data
  subsets:
    {few: {speakers: 11}, one: {speakers: 1}, some: {hours: 5}, rest: {except: few}, half: {fraction: 0.5}}
features: {speed_perturb: [0.9, 1.0, 1.1]}
tokens: {name: bpe, vocab_size: 500}
lm: {name: ngram, order: 2}
seeds: [4, 5, 6]
training: {epochs: 60, accumulate: 4}
systems:
  teacher:
    train:
      model: {name: conformer, num_layers: 12, ff_dim: 2048, heads: {attention: {num_layers: 6}, ctc: {}}}
      losses: [{name: attention}, {name: ctc}]
      training: {epochs: 100, lr: 1.0e-3}
      seeds: [4, 5, 6]
  kd:
    distill:
      data: few
      teachers: [teacher]
      model: {name: conformer, num_layers: 6, dim: 8, num_heads: 1, heads: {ctc: {}}}
      losses: [{name: hidden_mse, layers: {encoder.5: encoder.11}}, {name: kl}]
  small: {compress: {from: kd, steps: [{name: magnitude_prune}, {name: int8_dynamic}]}}
decode: {decoders: {beam: {name: attention_beam, beam: 10, ctc_weight: 0}, ctc: {name: ctc_greedy}}}
"""


@pytest.fixture
def load(tmp_path):
    """Loads a recipe as tiny; ``change``: values by key path, put into the recipe before."""

    def load(change=None, **options):
        data = yaml.safe_load(RECIPE)
        for path, value in (change or {}).items():
            *parents, last = path.split(".")
            node = data
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return load_recipe(tmp_path, **{"profile": "tiny", **options})

    return load


def test_the_core_shrinks(load):
    recipe = load()
    assert recipe.profiles == ()
    assert recipe.seeds == (4,)
    assert recipe.corpus.max_utterances == 48
    assert recipe.corpus.subsets == {
        "few": {"speakers": 2},
        "one": {"speakers": 1},
        "some": {"speakers": 2},
        "rest": {"except": "few"},
        "half": {"fraction": 0.5},
    }
    assert (recipe.tokens.name, recipe.tokens.vocab_size, recipe.tokens.data) == ("char", None, "few")
    assert recipe.features.speed_perturb == (1.0,)
    assert (recipe.lm.order, recipe.lm.word_order) == (2, 2)
    assert (recipe.decode.measure_max, recipe.parity.num_utterances) == (5, 5)
    assert recipe.parity.max_wer_increase == 100


def test_training_shrinks_where_it_is_written(load):
    systems = load().systems
    assert systems["teacher"].training.epochs == systems["kd"].training.epochs == 2
    assert systems["teacher"].training.lr == 1e-3
    assert systems["teacher"].training.accumulate == 1
    assert systems["teacher"].seeds == (4,)
    assert load({"training.epochs": 1}).systems["kd"].training.epochs == 1


def test_plugins_shrink_as_they_say_themselves(load):
    recipe = load()
    model = recipe.systems["teacher"].model
    assert (model["num_layers"], model["dim"], model["num_heads"], model["ff_dim"]) == (1, 16, 2, None)
    assert model["heads"]["attention"]["num_layers"] == 1
    student = recipe.systems["kd"]
    assert (student.model["dim"], student.model["num_heads"]) == (8, 1), "a bound, not a value"
    assert student.terms[0].options["layers"] == {"encoder.0": "encoder.0"}
    assert recipe.systems["small"].steps[0].options["epochs"] == 1
    assert recipe.decode.decoders["beam"].options["beam"] == 2


def test_what_the_recipe_writes_and_what_is_set_come_last(load):
    own = {"profiles.tiny": {"training": {"epochs": 1}, "tokens": {"name": "bpe", "vocab_size": 40}}}
    recipe = load(own)
    assert (recipe.training.epochs, recipe.tokens.vocab_size) == (1, 40)
    assert recipe.profiles == ("tiny",)
    assert load(own, overrides=["training.epochs=3"]).training.epochs == 3


def test_tokens_stay_where_an_imported_model_has_some(load):
    imported = {"systems.imported": {"pretrained": {"bundle": "${KDRECIPE_TEST_NOWHERE}/bundle"}}}
    assert load(imported).tokens.vocab_size == 500


def test_tokens_shrink_beside_a_teacher_that_a_plugin_imports(load):
    whisper = {"systems.whisper": {"pretrained": {"name": "whisper", "path": "${KDRECIPE_TEST_NOWHERE}"}}}
    assert load(whisper).tokens.name == "char"


def test_without_the_profile_nothing_shrinks(load):
    recipe = load(profile=None)
    assert (recipe.training.epochs, recipe.systems["kd"].model["num_layers"]) == (60, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"training": 3},
        {"systems": ["a"]},
        {"systems.kd": None, "systems.small": "nothing"},
        {"corpus.subsets": {"few": 3}},
        {"decode": {"decoders": {"beam": "ctc_greedy"}}},
        {"systems.kd.distill.losses": "kl"},
        {"seeds": "one"},
    ],
)
def test_mistakes_are_those_of_the_recipe(load, change):
    found = []
    for profile in (None, "tiny"):
        with pytest.raises(RecipeError) as caught:
            load(copy.deepcopy(change), profile=profile)
        found.append({p.what.split(",")[0] for p in caught.value.problems})
    assert found[0] & found[1], "told alike"


def test_check_tells_of_a_rule_that_does_not_fit_and_finds_no_mistake(load, tmp_path, capsys):
    load(profile=None)
    assert main(["check", str(tmp_path)]) == 0
    assert "no mistakes found, also with --profile tiny" in capsys.readouterr().out
    load({"systems.kd.distill.model.dim": 10, "systems.kd.distill.model.num_heads": 5}, profile=None)
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "--profile tiny does not work: " in said
    assert "10 is not a multiple of 2 * num_heads = 4" in said
    assert "no mistakes found\n" in said


def test_tiny_options_must_be_options():
    class Loss:
        tiny_options: ClassVar[dict] = {"siez": 1}

        class Config(Options):
            size: int = Field(default=3)

    with pytest.raises(PluginError, match="tiny_options names siez"):
        Registry().add("losses", "own", Loss, "here")


@pytest.mark.parametrize("start", ["big", "{system: big}", "{system: big, layers: {encoder: [0, 2, 3]}}"])
def test_what_starts_from_an_imported_model_keeps_its_width_and_one_layer(tmp_path, start):
    text = """
corpus: {name: manifests, root: "."}
tokens: {name: char}
systems:
  big: {pretrained: {name: whisper, path: "${NOWHERE}"}}
  cut:
    train:
      model: {name: whisper_encoder, num_layers: 3, dim: 384, num_heads: 6, heads: {attention: {}, ctc: {}}}
      init_from: START
"""
    (tmp_path / "recipe.yaml").write_text(text.replace("START", start), encoding="utf-8")
    cut = load_recipe(tmp_path, profile="tiny").systems["cut"]
    assert cut.init_layers == {"encoder": (0,)}
    assert (cut.model["dim"], cut.model["num_heads"], cut.model["num_layers"]) == (384, 6, 1)
    assert cut.model["heads"]["attention"]["num_layers"] == 1, "a head that is not taken over shrinks as ever"
    assert cut.model["heads"]["attention"]["num_heads"] == 2


# ---------------------------------------------------------------- a sample of a corpus


def prepared(num_speakers, each):
    from lhotse.audio import RecordingSet
    from lhotse.supervision import SupervisionSegment, SupervisionSet
    from lhotse.testing.dummies import dummy_recording

    ids = [(s, f"s{s:02d}-{u:02d}", s * each + u) for s in range(num_speakers) for u in range(each)]
    recordings = {number: dummy_recording(number) for _, _, number in ids}
    sups = [
        SupervisionSegment(i, recordings[n].id, 0.0, 1.0, text="A", speaker=f"s{s:02d}") for s, i, n in ids
    ]
    splits = {
        "train": (RecordingSet.from_recordings(recordings.values()), SupervisionSet.from_segments(sups))
    }
    return Prepared(splits, [], ["a note"])


def test_a_sample_has_several_speakers_and_their_recordings_only():
    found = sample(prepared(20, 10), 13)
    recordings, supervisions = found.splits["train"]
    assert len(list(supervisions)) == len(list(recordings)) == 13
    counts = {s.speaker: 0 for s in supervisions}
    for s in supervisions:
        counts[s.speaker] += 1
    assert len(counts) == SAMPLE_SPEAKERS
    assert set(counts.values()) == {2, 3}
    assert [s.id for s in supervisions] == [s.id for s in sample(prepared(20, 10), 13).splits["train"][1]]
    assert found.notes == ["a note", "a sample: at most 13 utterances of each split"]


def test_a_small_corpus_is_its_own_sample():
    assert len(list(sample(prepared(3, 2), 48).splits["train"][1])) == 6
