"""Starting from another model: what is taken over, and what can't be."""

from __future__ import annotations

import copy

import pytest
import torch

from kdrecipe.errors import RecipeError
from kdrecipe.model.asr import build_model
from kdrecipe.model.start import Lender, start_from
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.recipe.load import load_recipe
from kdrecipe.recipe.starting import misfits, shared_parts

PIECES = ["<blk>", "<sos/eos>", "<unk>", "▁A", "▁B", "C"]
ENCODERS = ("conformer", "transformer", "whisper_encoder")
WHISPER = {"positions": "learned", "max_positions": 9, "activation": "gelu", "tied": True}


@pytest.fixture(scope="module")
def registry():
    return load_plugins().registry


def described(encoder="transformer", num_layers=4, decoder_layers=3, *, head=None, **options):
    """A small model with the heads ``attention`` and ``ctc``."""
    attention = {"num_layers": decoder_layers, "num_heads": 2, **(head or {})}
    heads = {"attention": attention, "ctc": {}}
    return {"name": encoder, "num_layers": num_layers, "dim": 8, "num_heads": 2, "heads": heads, **options}


def built(registry, description, num_tokens=6, seed=0):
    torch.manual_seed(seed)
    return build_model(description, input_dim=80, vocab_size=num_tokens, registry=registry)


def started(registry, mine, its, layers, pieces=PIECES):
    """A model that has started from another one, its weights before, and those of the other one."""
    assert list(misfits(registry, mine, its, layers)) == []
    model, other = built(registry, mine, len(pieces), seed=1), built(registry, its)
    for value in other.state_dict().values():
        value.normal_()  # zeros and ones would hide what is not taken over
    before = copy.deepcopy(model.state_dict())
    lender = Lender(its, other.state_dict(), PIECES)
    to_fit = start_from(model, lender, shared_parts(registry, mine, its, layers), pieces)
    assert not to_fit
    return model.state_dict(), before, other.state_dict()


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("head", [{}, WHISPER], ids=["plain", "whisper"])
def test_chosen_layers_come_in_their_order_and_all_else_as_it_is(registry, encoder, head):
    mine, its = (described(encoder, *sizes, head=head) for sizes in ((3, 1), (4, 3)))
    found, before, other = started(registry, mine, its, {"encoder": [3, 0, 2], "attention": [1]})
    chosen = {"encoder.layers.": [3, 0, 2], "heads.attention.layers.": [1]}
    for name, value in found.items():
        origin = name
        for prefix, numbers in chosen.items():
            if name.startswith(prefix):
                number, rest = name[len(prefix) :].split(".", 1)
                origin = f"{prefix}{numbers[int(number)]}.{rest}"
        assert torch.equal(value, other[origin]), name
        assert not torch.equal(value, before[name]), name


def test_without_layers_a_head_of_another_size_starts_anew(registry):
    found, before, other = started(registry, described(decoder_layers=2), described(), {})
    for name, value in found.items():
        is_new = name.startswith("heads.attention.")
        assert torch.equal(value, (before if is_new else other)[name]), name


def test_options_without_weights_may_differ(registry):
    mine, its = described("whisper_encoder", dropout=0.3, pooling=2), described("whisper_encoder", pooling=1)
    found, _, other = started(registry, mine, its, {})
    assert all(torch.equal(value, other[name]) for name, value in found.items())


def test_over_other_tokens_a_head_takes_its_layers_and_the_rows_of_common_pieces(registry):
    pieces = [*PIECES[:3], "C", "▁NEW", "▁A", "X"]
    mine = described(decoder_layers=2)
    found, before, other = started(registry, mine, described(), {"attention": [0, 2]}, pieces)
    name = "heads.attention.layers.1.kv.weight"
    assert torch.equal(found[name], other["heads.attention.layers.2.kv.weight"])
    for kind in ("embedding.weight", "proj.weight", "proj.bias"):
        rows, old, there = (x[f"heads.attention.{kind}"] for x in (found, before, other))
        assert torch.equal(rows[[0, 1, 2, 3, 5]], there[[0, 1, 2, 5, 3]])
        assert torch.equal(rows[[4, 6]], old[[4, 6]])
    assert torch.equal(found["heads.ctc.proj.weight"], before["heads.ctc.proj.weight"])


def test_a_lender_of_other_features_leaves_the_input_to_be_fitted(registry):
    its = described("whisper_encoder")
    model, other = built(registry, its, seed=1), built(registry, its)
    model.norm.set_stats(torch.full((80,), -5.0), torch.full((80,), 2.0))
    state = {k: v for k, v in other.state_dict().items() if not k.startswith(("norm.", "encoder.input_map."))}
    parts = shared_parts(registry, its, its, {})
    assert start_from(model, Lender(its, state, PIECES), parts, PIECES)
    assert float(model.norm.mean_F[0]) == -5.0
    assert torch.equal(model.encoder.conv1.weight, other.encoder.conv1.weight)


def test_what_imports_no_model_of_ours_lends_nothing():
    with pytest.raises(RecipeError, match="Box can't lend its weights"):
        Lender.of_teacher(type("Box", (), {})())


def test_a_state_that_does_not_fit_names_the_weight(registry):
    its = described()
    state = {k: v for k, v in built(registry, its).state_dict().items() if k != "encoder.norm.bias"}
    state["encoder.norm.weight"] = torch.ones(9)
    with pytest.raises(RecipeError, match=r"do not fit encoder: norm.weight is \(8,\) here, \(9,\) there"):
        start_from(built(registry, its), Lender(its, state, PIECES), {"encoder": None}, PIECES)


# ---------------------------------------------------------------- in a recipe

RECIPE = """
corpus: {name: manifests, root: "."}
tokens: {name: char}
systems:
  big: {train: {losses: [{name: ctc}, {name: attention}],
    model: {name: conformer, num_layers: 4, dim: 16, heads: {ctc: {}, attention: {num_layers: 2}}}}}
  small: {train: {losses: [{name: ctc}, {name: attention}],
    model: {name: conformer, num_layers: 2, dim: 16, heads: {ctc: {}, attention: {num_layers: 1}}},
    init_from: {system: big,
      layers: LAYERS}}}
"""


def loaded(tmp_path, layers, change=("", "")):
    text = (
        RECIPE.replace("LAYERS", layers).replace(*change) if change[0] else RECIPE.replace("LAYERS", layers)
    )
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path)


def test_a_recipe_may_choose_layers(tmp_path):
    small = loaded(tmp_path, "{encoder: [0, 3], attention: [1]}").systems["small"]
    assert (small.init_from, small.needs) == ("big", ("big",))
    assert small.init_layers == {"encoder": (0, 3), "attention": (1,)}


SMALL = "num_layers: 2, dim: 16, heads"


@pytest.mark.parametrize(
    ("layers", "change", "said", "remedy"),
    [
        ("{encoder: [0, 4]}", None, "'big' has 4 layers in encoder, and no 4", "choose from 0 to 3"),
        ("{encoder: [0, 1, 2]}", None, "'big' gives 3 layers to encoder, which has 2", "num_layers: 3"),
        ("{encoder: [0, 1], attention: [2]}", None, "'big' has 2 layers in attention, and no 2", "0 to 1"),
        ("{encoder: [0, 1], ctc: [0]}", None, "no layers to choose from in ctc", "leave it out"),
        ("{encodr: [0, 1], encoder: [0, 1]}", None, "the model lacks the part 'encodr'", "mean 'encoder'?"),
        ("{encoder: [0, 1], rnnt: [0]}", None, "the model lacks the part 'rnnt'", ""),
        (
            "{encoder: [0, 1]}",
            (SMALL, "num_layers: 2, dim: 24, heads"),
            "kind in encoder (dim)",
            "same options",
        ),
        ("{encoder: [0, 1]}", (SMALL, "num_layers: 2, dim: 16, num_heads: 2, heads"), "(num_heads)", ""),
        ("{attention: [0]}", None, "'big' has another encoder (num_layers)", "or choose layers"),
        ("{encoder: []}", None, "init_from.layers.encoder: is empty", ""),
        ("{encoder: [-1, 0]}", None, "init_from.layers.encoder[0]: is -1", ""),
        ("3", None, "init_from.layers: is 3, it must be a mapping", ""),
    ],
)
def test_layers_that_do_not_fit_are_told_with_their_line(tmp_path, layers, change, said, remedy):
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, layers, change or ("", ""))
    (problem,) = caught.value.problems
    assert said in problem.what
    assert remedy in problem.remedy
    line = 10 if "init_from.layers" in problem.what else 9
    assert problem.where.endswith(f"recipe.yaml:{line}")


@pytest.mark.parametrize("value", ["[big]", "3"])
def test_what_names_no_system_is_told(tmp_path, value):
    text = RECIPE.partition("init_from")[0] + f"init_from: {value}}}}}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"must be a system's name, or \{system: <name>"):
        load_recipe(tmp_path)
