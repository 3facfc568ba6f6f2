"""Units that are cut out of heads, whole layers, and what can't be cut."""

import copy

import pytest
import torch

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import Part, taps_of
from kdrecipe.model.asr import build_model
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.structure import Sizes, cut, drop_layers, layers_of, positions, unit_groups
from kdrecipe.testing.models import random_batch
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic

REGISTRY = load_plugins().registry
ATTENTION = {"num_layers": 2, "num_heads": 2}
HEADS = {
    "attention": {"attention": ATTENTION},
    "tied": {"attention": {**ATTENTION, "tied": True, "positions": "learned", "activation": "gelu"}},
    "rnnt": {"rnnt": {"predictor_dim": 6, "joiner_dim": 10}},
    "lstm": {"rnnt": {"predictor": "lstm", "predictor_dim": 6, "joiner_dim": 10}},
}
BATCH = random_batch((61, 48), input_dim=20, vocab_size=9, num_tokens=(4, 2))


def built(heads, name="conformer", seed=0):
    torch.manual_seed(seed)
    config = {"name": name, **REGISTRY.get("architectures", name).contract_options, "heads": heads}
    return build_model(config, input_dim=20, vocab_size=9, registry=REGISTRY).eval()


def said(model):
    """All numbers that the heads give along a text, and what they find without it."""
    with torch.no_grad():
        out = model(BATCH.features_BTF, BATCH.lens_B, batch=BATCH)
        lattices = [x for lattice in out.lattices.values() for x in (lattice.am_BTV, lattice.lm_BPV)]
        joined = [x.join(x.encoder_BTJ[:, :, None], x.predictor_BPJ[:, None]) for x in out.lattices.values()]
        return [*out.logits.values(), *lattices, *joined], model.greedy(out)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_units_of_a_head_that_change_places_change_nothing(heads):
    model = built({**heads, "ctc": {}})
    want, tokens = said(model)
    groups = unit_groups(model, ["encoder", next(iter(heads))])
    assert any(group.name.startswith("heads.") for group in groups)
    for group in groups:
        cut(model, group, torch.randperm(group.size))
    got, again = said(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert again == tokens


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_half_the_units_of_a_head_is_what_was_counted_and_still_searches(heads):
    model = built({**heads, "ctc": {}})
    parts = ["encoder", next(iter(heads))]
    groups = unit_groups(model, parts)
    sizes = Sizes(model, groups, ["encoder", f"heads.{parts[1]}"])
    kept = [max(1, group.size // 2) for group in groups]
    shapes = [x.shape for x in said(model)[0]]
    for group, number in zip(groups, kept, strict=True):
        cut(model, group, torch.arange(number))
    left = [model.encoder, model.heads[parts[1]]]
    assert sum(p.numel() for x in left for p in x.parameters()) == sizes(kept)
    assert [x.shape for x in said(model)[0]] == shapes


@pytest.mark.parametrize("name", ["conformer", "transformer", "whisper_encoder"])
def test_heads_and_units_that_nobody_reads_may_go(name):
    model = built({"ctc": {}}, name)
    groups = [group for group in unit_groups(model) if group.kind in ("heads", "units")]
    assert {group.kind for group in groups} == {"heads", "units"}
    keep = {group.name: torch.arange(group.size)[1::2] for group in groups}
    with torch.no_grad():
        for group in groups:
            reader = next(part for part in group.parts if part.side == "in")
            gone = positions(reader, group.size, torch.arange(group.size)[::2])
            model.get_submodule(reader.layer).weight[:, gone] = 0.0
    want = said(model)[0][0]
    for group in groups:
        cut(model, group, keep[group.name])
    torch.testing.assert_close(said(model)[0][0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conformer", "transformer", "whisper_encoder", "bilstm", "cnn"])
def test_taps_tell_the_widths_that_are_left(name):
    model = built({"ctc": {}}, name)
    for number, group in enumerate(unit_groups(model)):
        cut(model, group, torch.arange(max(1, group.size // 2 - number % 3)))
    names = list(taps_of(model.encoder, {}))
    with torch.no_grad():
        out = model(BATCH.features_BTF, BATCH.lens_B, taps=names)  # refuses other widths than declared
    assert set(out.taps) == set(names)
    assert {tap.dim for tap in taps_of(model.encoder, {}).values()} != {16}


def test_layers_are_left_out():
    model = built({"ctc": {}})
    other = copy.deepcopy(model)
    drop_layers(model, [1])
    assert len(layers_of(model)) == 1
    assert len(unit_groups(model)) < len(unit_groups(other))
    for one, two in zip(layers_of(model)[0].parameters(), layers_of(other)[1].parameters(), strict=True):
        assert torch.equal(one, two)
    said(model)


def test_positions_follow_the_blocks():
    part = Part("qkv", "out", (2, 1))
    assert positions(part, 3, torch.tensor([0, 2])).tolist() == [0, 1, 4, 5, 6, 8]


def test_what_cannot_be_cut_is_refused_by_name():
    model = built({"ctc": {}})
    with pytest.raises(KdrecipeError, match="no head 'attention'"):
        unit_groups(model, ["encoder", "attention"])
    with pytest.raises(KdrecipeError, match=r"CtcHead does not say what may be cut out"):
        unit_groups(model, ["ctc"])
    model = Int8Dynamic(Int8Dynamic.Config()).apply(model, None)
    with pytest.raises(KdrecipeError, match=r"StoredConv can't be cut"):
        Sizes(model, unit_groups(model), ["encoder"])
