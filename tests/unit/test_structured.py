"""Structured pruning: which units go, how much is left, and that bundles of it load and export."""

import copy

import pytest
import torch

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, Part, UnitGroup
from kdrecipe.model.asr import build_model
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.structure import ENCODER, Sizes, layers_of, unit_groups
from kdrecipe.testing.compressor_checks import CompressorCase, _loss
from kdrecipe.testing.contracts import compressor_contract
from kdrecipe_plugins.compressors.choosing import fitting
from kdrecipe_plugins.compressors.scores import layer_influence, unit_scores
from kdrecipe_plugins.compressors.structured_prune import StructuredPrune

REGISTRY = load_plugins().registry
ALL = ["heads", "units", "channels", "width"]


def built(name="conformer", seed=0, heads=None, **options):
    torch.manual_seed(seed)
    cls = REGISTRY.get("architectures", name)
    config = {"name": name, **cls.contract_options, **options, "heads": heads or {"ctc": {}}}
    return build_model(config, input_dim=20, vocab_size=9, registry=REGISTRY).eval()


def context(**more):
    case = CompressorCase(StructuredPrune, None, input_dim=20)
    return CompressContext(case.context().calibration, gradients=case.gradients, **more)


def pruned(model, **options):
    compressor = StructuredPrune(StructuredPrune.Config(**{"epochs": 0, "multiple_of": 1, **options}))
    return compressor.finish(compressor.apply(model, context())), compressor


def params(model):
    return sum(p.numel() for p in model.encoder.parameters())


@pytest.mark.parametrize("score", ["magnitude", "activation", "taylor"])
@pytest.mark.parametrize("scope", ["per_group", "global"])
def test_the_share_of_the_encoder_goes(score, scope):
    before = params(built())
    model, compressor = pruned(built(), share=0.5, score=score, scope=scope)
    assert 0.48 * before < params(model) <= 0.5 * before + 1
    report = compressor.report()
    assert report["params"] == params(model)
    assert report["pruned_share"] == 1 - params(model) / before
    if scope == "per_group":
        assert report["units_kept"] == pytest.approx(report["channels_kept"], abs=0.1)
    groups = {group.name: group.size for group in unit_groups(model)}
    assert compressor.state()["units"].items() <= groups.items()


@pytest.mark.parametrize("name", ["conformer", "transformer", "bilstm", "cnn"])
def test_width_goes_too(name):
    model, compressor = pruned(built(name), share=0.6, kinds=ALL)
    assert params(model) <= 0.4 * params(built(name)) + 1
    assert model.encoder.output_dim < 16
    assert compressor.report()["width_kept"] < 0.9


def test_units_that_nobody_hears_go_first():
    """A unit whose reading weights are small goes by magnitude, one that never speaks by activation."""
    model = built("transformer", num_layers=1)
    ff = model.encoder.layers[0].ff
    with torch.no_grad():
        ff[4].weight.copy_(torch.ones_like(ff[4].weight))
        ff[4].weight[:, 5] = 0.1
        ff[1].weight[7], ff[1].bias[7] = 0.0, 0.0
    group = next(g for g in unit_groups(model) if g.kind == "units")
    [magnitude] = unit_scores(model, [group], "magnitude", context())
    assert magnitude.argmin() == 5
    assert magnitude[5] == pytest.approx(0.01 * 64 / 63.01)
    [activation] = unit_scores(model, [group], "activation", context())
    assert activation.argmin() == 7
    assert activation[7] == 0


def test_taylor_is_the_change_of_the_loss_when_a_unit_is_scaled_down_a_little():
    model = built("transformer", num_layers=1)
    groups = [group for group in unit_groups(model) if group.kind in ("heads", "units")]
    found = unit_scores(model, groups, "taylor", context())
    step, case = 1e-3, CompressorCase(StructuredPrune, None, input_dim=20)
    for group, worth in zip(groups, found, strict=True):
        reader = next(part for part in group.parts if part.side == "in")
        width = reader.blocks[0]
        for unit in (0, group.size - 1):
            changes = []
            for seed in (1, 2):
                before = float(_loss(model, case.batch(seed)).detach())
                other = copy.deepcopy(model)
                with torch.no_grad():
                    other.get_submodule(reader.layer).weight[:, unit * width : (unit + 1) * width] *= 1 - step
                changes.append((float(_loss(other, case.batch(seed)).detach()) - before) / step)
            expected = sum(change**2 for change in changes) / 2
            assert float(worth[unit]) == pytest.approx(expected, rel=0.1, abs=1e-7)


def test_global_takes_the_least_of_all_groups_and_leaves_a_floor():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(1, 4, bias=False), torch.nn.Linear(1, 4, bias=False)

    model = torch.nn.ModuleDict({ENCODER: Plain()})
    groups = [UnitGroup(x, "units", 4, (Part(f"{ENCODER}.{x}", "out"),)) for x in "ab"]
    sizes = Sizes(model, groups, [ENCODER])
    scores = [torch.tensor([4.0, 3, 2, 1]), torch.tensor([9.0, 8, 7, 6])]
    keep = fitting(groups, scores, sizes, 5, [1, 1], scope="global")
    assert [k.tolist() for k in keep] == [[0], [0, 1, 2, 3]]
    keep = fitting(groups, scores, sizes, 4, [1, 1], scope="global")
    assert [k.tolist() for k in keep] == [[0], [0, 1, 2]]
    keep = fitting(groups, scores, sizes, 4, [1, 1], scope="per_group")
    assert [k.tolist() for k in keep] == [[0, 1], [0, 1]]
    with pytest.raises(KdrecipeError, match="62% of what is there can go"):
        fitting(groups, scores, sizes, 2, [2, 1], scope="global")


def test_what_is_left_is_a_multiple():
    model, _ = pruned(built(), share=0.4, kinds=ALL, multiple_of=4)
    for group in unit_groups(model):
        whole = next(g.size for g in unit_groups(built()) if g.name == group.name)
        assert group.kind == "heads" or group.size % 4 == 0 or group.size == whole
    assert params(model) <= 0.6 * params(built()) + 1


def test_layers_that_change_least_go_first():
    model = built(num_layers=3)
    with torch.no_grad():  # the second layer passes on what it hears
        for parameter in layers_of(model)[1].parameters():
            parameter.zero_()
    transformer = built("transformer", num_layers=3)
    with torch.no_grad():
        layers_of(transformer)[1].attention.out.weight.zero_()
        layers_of(transformer)[1].ff[4].weight.zero_()
        layers_of(transformer)[1].attention.out.bias.zero_()
        layers_of(transformer)[1].ff[4].bias.zero_()
    assert layer_influence(transformer, context())[1] == pytest.approx(0.0, abs=1e-6)
    before = copy.deepcopy(transformer)
    small, compressor = pruned(transformer, drop_layers=1, kinds=[])
    assert compressor.report()["layers_kept"] == 2
    batch = CompressorCase(StructuredPrune, None, input_dim=20).batch()
    with torch.no_grad():
        got, want = (m(batch.features_BTF, batch.lens_B).logits["ctc"] for m in (small, before))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kinds": ["heads"], "share": 0.9}, r"so much can't be cut[\s\S]*add width"),
        ({"kinds": []}, "finds no kinds to cut"),
        ({"drop_layers": 2}, "the encoder has 2 layers"),
        ({"parts": ["attention"]}, "no head 'attention'"),
    ],
)
def test_what_cannot_be_done_is_said(options, expected):
    with pytest.raises(KdrecipeError, match=expected):
        pruned(built(), **options)


CASES = [
    ("conformer", {"share": 0.4, "kinds": ALL}),
    ("conformer", {"share": 0.6, "drop_layers": 1, "scope": "global"}),
    ("transformer", {"share": 0.3, "score": "taylor"}),
    ("whisper_encoder", {"share": 0.3}),
    ("bilstm", {"share": 0.3, "kinds": ALL}),
    ("cnn", {"share": 0.5, "kinds": ALL, "epochs": 0}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_contract(name, options):
    make = lambda seed: built(name, seed)  # noqa: E731
    contract = compressor_contract(
        StructuredPrune, {"multiple_of": 1, **options}, make_model=make, input_dim=20
    )
    assert [(r.check_id, r.reason) for r in contract.results() if not r.ok] == []


@pytest.mark.parametrize("head", ["attention", "rnnt"])
def test_heads_are_pruned_with_their_encoder(head):
    heads = {"attention": {"num_layers": 2, "num_heads": 2}} if head == "attention" else {"rnnt": {}}
    make = lambda seed=0: built(seed=seed, heads={**heads, "ctc": {}})  # noqa: E731
    model, compressor = pruned(make(), parts=[ENCODER, head], share=0.4)
    before = sum(p.numel() for m in (make().encoder, make().heads[head]) for p in m.parameters())
    assert compressor.report()["params"] <= 0.6 * before + 1
    again = StructuredPrune(StructuredPrune.Config(parts=[ENCODER, head]))
    again.load_state(compressor.state())
    again.rebuild(make(1)).load_state_dict(model.state_dict())
