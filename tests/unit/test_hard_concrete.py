"""Learned gates: a closed one is as good as a cut, and the Lagrangian leads to the target size."""

import copy

import pytest
import torch

from kdrecipe.errors import KdrecipeError
from kdrecipe.model.asr import build_model
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.compressor_checks import CompressorCase
from kdrecipe.testing.contracts import compressor_contract
from kdrecipe_plugins.compressors.hard_concrete import SPEED, Gates, HardConcrete

REGISTRY = load_plugins().registry
ALL = ["heads", "units", "channels", "width"]
CASE = CompressorCase(HardConcrete, None, input_dim=20)


def built(name="conformer", seed=0, heads=None):
    torch.manual_seed(seed)
    options = REGISTRY.get("architectures", name).contract_options
    config = {"name": name, **options, "heads": heads or {"ctc": {}}}
    return build_model(config, input_dim=20, vocab_size=9, registry=REGISTRY).eval()


def gated(model, **options):
    compressor = HardConcrete(HardConcrete.Config(**{"multiple_of": 1, **options}))
    return compressor.apply(model, CASE.context()), compressor


def params(model):
    return sum(p.numel() for p in model.encoder.parameters())


@pytest.mark.parametrize("name", ["conformer", "transformer", "whisper_encoder", "cnn", "bilstm"])
def test_closed_gates_are_as_good_as_cuts(name):
    kinds = ["heads", "units"] if name == "whisper_encoder" else ALL
    model, compressor = gated(built(name), share=0.3, kinds=kinds)
    gates = model.unit_gates
    keep = [torch.randperm(len(theta))[: max(1, len(theta) // 2)].sort().values for theta in gates.thetas]
    gates.decide(keep)
    want = CASE.output(model).logits["ctc"]
    small = compressor.finish(model)
    assert not [n for n, _ in small.named_parameters() if "gates" in n]
    got = CASE.output(small).logits["ctc"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert params(small) < params(built(name))


def test_open_gates_change_little_and_draw_anew_while_they_learn():
    plain = built()
    model, _ = gated(copy.deepcopy(plain), kinds=ALL)
    want, got = (CASE.output(m).logits["ctc"] for m in (plain, model))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    model.train()
    model.encoder.eval()  # no dropout
    batch = CASE.batch()
    one, two = (model(batch.features_BTF, batch.lens_B).logits["ctc"] for _ in range(2))
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    one = model(batch.features_BTF, batch.lens_B).logits["ctc"]
    torch.manual_seed(3)
    assert torch.equal(one, model(batch.features_BTF, batch.lens_B).logits["ctc"])


def test_expected_number_of_open_gates_is_that_of_many_draws():
    torch.manual_seed(0)
    gates = Gates([torch.ones(4)]).train()
    with torch.no_grad():
        gates.thetas[0].copy_(torch.tensor([-2.0, 0.0, 1.0, 2.0]) / SPEED)
        counts = 0.0
        for _ in range(2000):
            gates.draw()
            assert float(gates.now[0].min()) >= 0
            assert float(gates.now[0].max()) <= 1
            counts += float((gates.now[0] > 0).sum())
    assert float(gates.expected(0).detach()) == pytest.approx(counts / 2000, rel=0.03)


@pytest.mark.parametrize(("num_steps", "lr"), [(400, 5e-3), (120, 2e-3)], ids=["long", "short"])
def test_the_lagrangian_leads_to_the_target_and_the_rest_is_as_asked_for(num_steps, lr):
    torch.manual_seed(0)
    model, compressor = gated(built(), share=0.5, ramp=0.9)
    before, gates = params(built()), model.unit_gates
    optimiser = torch.optim.Adam(gates.parameters(), lr=lr)
    for step in range(1, num_steps + 1):
        optimiser.zero_grad()
        penalty = compressor.penalty(model, step, num_steps)
        if penalty.requires_grad:
            penalty.backward()
            optimiser.step()
        if step == round(0.9 * num_steps):
            sizes = compressor._sizes([gates.expected(i) for i in range(len(gates.thetas))])
            assert float(sizes.detach()) / before == pytest.approx(0.5, abs=0.05)
        compressor.on_step(model, step, num_steps)
    assert bool(gates.decided)
    small = compressor.finish(model)
    assert 0.48 * before < params(small) <= 0.5 * before + 1
    assert compressor.report()["params"] == params(small)


CASES = [
    ("conformer", {"share": 0.4, "kinds": ALL}),
    ("transformer", {"share": 0.3}),
    ("cnn", {"kinds": ALL}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_contract(name, options):
    make = lambda seed: built(name, seed)  # noqa: E731
    contract = compressor_contract(HardConcrete, {"multiple_of": 1, **options}, make_model=make, input_dim=20)
    assert [(r.check_id, r.reason) for r in contract.results() if not r.ok] == []


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("conformer", {"kinds": ["heads"], "share": 0.9}, "so much can't be cut"),
        ("bilstm", {"kinds": ["units"]}, "finds no units to gate"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_training(name, options, expected):
    with pytest.raises(KdrecipeError, match=expected):
        gated(built(name), **options)
