"""Static int8, int4, quantisation-aware training, and what they share."""

import copy
import math

import pytest
import torch
from torch import nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext, float_copy
from kdrecipe.testing.models import random_batch, tiny_model
from kdrecipe_plugins.compressors.calibration import Inputs, affine_range, observe, smoothing
from kdrecipe_plugins.compressors.int4 import Int4
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.int8_static import Int8Static, calibrated
from kdrecipe_plugins.compressors.integer_layers import Int4Linear, Int8Linear, StaticInt8Linear
from kdrecipe_plugins.compressors.magnitude_prune import MagnitudePrune
from kdrecipe_plugins.compressors.qat import FakeQuantLinear, Qat
from kdrecipe_plugins.compressors.stored_layers import StoredConv, StoredEmbedding, StoredLstm


def context(num: int = 2) -> CompressContext:
    return CompressContext(
        lambda: iter([random_batch((61, 48, 30), input_dim=8, seed=i) for i in range(num)])
    )


def make(cls, **options):
    return cls(cls.Config(**options))


def applied(compressor, model, given=None):
    return compressor.finish(compressor.apply(model, given or context())).eval()


def layers_of(model, kind):
    return [module for module in model.modules() if type(module) is kind]


# ---------------------------------------------------------------- numbers


def test_a_loud_frame_leaves_all_others_as_they_are():
    layer = Int8Linear.from_linear(nn.Linear(16, 5))
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    clicked = x.clone()
    clicked[:, 4] *= 1000
    before, after = layer(x), layer(clicked)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(before[:, others], after[:, others])


def test_static_products_are_those_of_the_rounded_numbers():
    torch.manual_seed(0)
    linear, rows = nn.Linear(20, 6), torch.randn(400, 20) * 2 + 1
    layer = calibrated(linear, Inputs(rows.abs().amax(0), rows), smooth=0.0, clip=False)
    scale, zero = layer.input_scale, layer.input_zero.float()
    assert float(scale) == pytest.approx(float(rows.max() - rows.min()) / 255)
    assert abs(float(-zero * scale - rows.min())) <= float(scale) / 2
    x = rows[:7] * 1.5  # some of it beyond the range: cut off there
    rounded = (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
    assert torch.allclose(layer(x), layer.to_float()(rounded), atol=1e-4)
    assert (layer(rows) - linear(rows)).abs().max() < 0.05 * linear(rows).abs().max()


def test_ranges_are_cut_where_that_rounds_the_rest_better():
    rows = torch.cat([torch.linspace(-1, 1, 1_000_000), torch.tensor([3.0])])[:, None]
    full, _ = affine_range(rows, clip=False)
    cut, zero = affine_range(rows, clip=True)
    assert float(full) == pytest.approx(4 / 255)
    assert float(cut) < 0.7 * float(full)
    assert float(-zero.float() * cut) == pytest.approx(-1, abs=0.02), "the other end is as it was"
    scale, zero = affine_range(torch.rand(50, 2) + 3, clip=False)  # 0 is always within
    assert (int(zero), float(scale)) == (0, pytest.approx(4 / 255, rel=0.02))


def test_smoothing_takes_outlier_channels_over_into_the_weights():
    """Golden: with strength 0.5 both sides have the same range, up to a common factor."""
    torch.manual_seed(0)
    linear, rows = nn.Linear(8, 4, bias=False), torch.randn(300, 8)
    rows[:, 3] *= 50
    inputs = Inputs(rows.abs().amax(0), rows)
    smooth_I = smoothing(inputs, linear.weight, 0.5)
    ratio_I = (inputs.largest_I / smooth_I) / (linear.weight.abs().amax(0) * smooth_I)
    assert torch.allclose(ratio_I, ratio_I[0].expand(8), rtol=1e-4)
    assert smooth_I.log().mean() == pytest.approx(0, abs=1e-5)

    def error(smooth):
        layer = calibrated(linear, inputs, smooth=smooth, clip=False)
        assert torch.allclose(layer.to_float().weight, linear.weight, atol=0.05)
        return float((layer(rows) - linear(rows)).square().mean())

    assert error(0.5) < 0.3 * error(0.0)


def test_four_bits_in_groups():
    linear = nn.Linear(40, 3)
    with torch.no_grad():
        linear.weight[0] = torch.arange(40.0) - 20
        linear.weight[1] = 0.0
    layer = Int4Linear.from_linear(linear, group=16)
    assert layer.scale_OG.shape == (3, 3)
    assert layer.weight.abs().max() == 7
    assert layer.weight[1].eq(0).all()
    weight = layer.to_float().weight
    for group in (slice(0, 16), slice(16, 32), slice(32, 40)):
        step = linear.weight[:, group].abs().amax(1, keepdim=True) / 7
        assert ((weight - linear.weight)[:, group].abs() <= 1.5 * step).all()
        off = (weight - linear.weight)[:, group].square().sum(1)
        plain = (linear.weight[:, group] / step).round().clamp(-7, 7) * step
        assert (off <= (plain.nan_to_num() - linear.weight[:, group]).square().sum(1) + 1e-9).all()
    x = torch.randn(5, 40)
    assert torch.allclose(layer(x), layer.to_float()(x), atol=1e-6)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(6, 8, 3, padding=1, groups=2),
        nn.Conv2d(1, 4, 3, stride=2, bias=False),
        nn.Embedding(9, 6),
        nn.LSTM(6, 5, batch_first=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_layers_that_are_stored_in_8_bits_compute_what_their_floats_do(module):
    cls = {nn.Embedding: StoredEmbedding, nn.LSTM: StoredLstm}.get(type(module), StoredConv)
    stored = cls.from_float(module)
    x = {nn.Embedding: torch.tensor([[1, 8, 0]]), nn.Conv2d: torch.randn(2, 1, 7, 7)}.get(
        type(module), torch.randn(2, 6, 6)
    )
    got, rounded, exact = stored(x), stored.to_float()(x), module(x)
    if isinstance(exact, tuple):
        assert torch.allclose(got[1][0], rounded[1][0], atol=1e-6)
        got, rounded, exact = got[0], rounded[0], exact[0]
    assert torch.allclose(got, rounded, atol=1e-6)
    assert 0 < (got - exact).abs().max() < 0.03 * exact.abs().max()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (stored, module)]
    assert sizes[0] == sizes[1]
    empty = cls.like(module)
    empty.load_state_dict(stored.state_dict())
    again = empty(x)
    assert torch.equal(again[0] if isinstance(again, tuple) else again, got)


# ---------------------------------------------------------------- calibration


def test_calibration_never_looks_at_padding_and_leaves_the_model_as_it_was():
    model = tiny_model(0).train()
    batch = random_batch((61, 30), input_dim=8, seed=1)
    loud = copy.deepcopy(batch)
    loud.features_BTF[1, 30:] = 1e6
    seen = [
        observe(model, ["encoder.front"], CompressContext(lambda b=b: [b]), "x")["encoder.front"]
        for b in (batch, loud)
    ]
    assert torch.equal(seen[0].largest_I, seen[1].largest_I)
    assert torch.equal(seen[0].rows_NI, seen[1].rows_NI)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("cls", [Int8Static, Qat])
def test_calibration_without_utterances_is_refused(cls):
    options = {"format": "int8_static"} if cls is Qat else {}
    with pytest.raises(KdrecipeError, match=r"no utterance to calibrate on.*\n.*split dev"):
        make(cls, **options).apply(tiny_model(0), context(0))


def test_layers_that_calibration_does_not_reach_have_scales_per_frame():
    model = tiny_model(0)
    model.heads["unused"] = nn.Linear(4, 4)
    model.heads["unused"].forward = None
    forward = type(model).forward

    class Without(type(model)):
        def forward(self, *given, **more):
            kept = self.heads.pop("unused")
            try:
                return forward(self, *given, **more)
            finally:
                self.heads["unused"] = kept

    model.__class__ = Without
    compressor = make(Int8Static)
    compressor.apply(model, context())
    assert type(model.heads["unused"]) is Int8Linear
    assert compressor.report()["not_calibrated"] == 1
    assert compressor.state()["layers"]["heads.unused"] == "int8"


# ---------------------------------------------------------------- which layers


def test_layers_can_be_chosen_one_by_one():
    model = applied(
        make(Int8Dynamic, layers={"encoder.front": "int4", "heads.*": "float"}, group=16), tiny_model(0)
    )
    assert [type(m) for m in (model.encoder.front, model.encoder.layers[0][0])] == [Int4Linear, Int8Linear]
    assert type(model.heads["ctc"].proj) is nn.Linear
    assert model.encoder.front.group == 16
    static = applied(make(Int8Static, layers={"*.front": "int8", "*": "float"}), tiny_model(0))
    assert len(layers_of(static, StaticInt8Linear)) == 1


def test_a_pattern_that_fits_no_layer_names_those_that_there_are():
    with pytest.raises(KdrecipeError, match=r"no layer is called 'encoder.frnt'\n.*encoder\.front"):
        applied(make(Int8Dynamic, layers={"encoder.frnt": "float"}), tiny_model(0))


@pytest.mark.parametrize("cls", [Int8Dynamic, Int8Static, Int4, Qat])
def test_quantising_twice_is_refused(cls):
    model = applied(make(Int8Dynamic), tiny_model(0))
    with pytest.raises(KdrecipeError, match=r"quantised already\n.*once, as the last step"):
        make(cls).apply(model, context())


def test_reports_count_bytes():
    model = tiny_model(0)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.randn(64, 64))
            module.in_features = module.out_features = 64
            module.bias = None
    for cls, bits, scales in ((Int8Dynamic, 8, 64), (Int4, 4, 64 * 2)):
        compressor = make(cls)
        compressor.apply(copy.deepcopy(model), context())
        wanted = 64 * 64 * 4 / (64 * 64 * bits / 8 + scales * 4)
        assert compressor.report()["times_smaller"] == pytest.approx(wanted)


# ---------------------------------------------------------------- training with rounding


@pytest.mark.parametrize("kind", ["int8", "int8_static", "int4"])
def test_rounding_layers_say_what_their_integers_will(kind):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 6), torch.randn(30, 40)
    fake = FakeQuantLinear(linear, kind, 16, *(affine_range(x, clip=True) if kind == "int8_static" else ()))
    expected = fake(x)
    assert torch.allclose(fake.integer()(x), expected, atol=1e-4)
    assert (expected - linear(x)).abs().max() > 1e-4
    given = x.clone().requires_grad_()
    fake(given).square().sum().backward()
    plain = x.clone().requires_grad_()
    linear.weight.grad = None
    slope = 2 * expected.detach()
    (linear(plain) * slope).sum().backward()
    # straight through: as the plain layer's, but with rounded numbers and nothing beyond the range
    inside = given.grad != 0
    assert inside.float().mean() > 0.9
    error = (given.grad - plain.grad)[inside].abs().max()
    assert error < 0.2 * plain.grad.abs().max()


def test_training_with_rounding_beats_rounding_after_training():
    """A network of 4 bits learns to say what the float network says."""
    torch.manual_seed(0)
    x = torch.randn(512, 32) @ torch.randn(32, 32) / math.sqrt(32)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    target = net(x).detach()
    trained, after = copy.deepcopy(net), copy.deepcopy(net)
    for i in (0, 2):
        trained[i], after[i] = FakeQuantLinear(trained[i], "int4", 32), Int4Linear.from_linear(after[i])
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.03, momentum=0.9)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.03 * (1 - step / 300)
        loss = (trained(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for i in (0, 2):
        trained[i] = trained[i].integer()
    errors = [float((m(x) - target).square().mean()) for m in (trained, after)]
    assert errors[0] < 0.85 * errors[1]


def test_what_was_pruned_stays_pruned_through_training_and_rounding():
    model = tiny_model(0)
    model = applied(make(MagnitudePrune, sparsity=0.5, epochs=0), model)
    before = {name: p.eq(0) for name, p in model.named_parameters() if p.dim() > 1 and p.eq(0).any()}
    compressor = make(Qat, epochs=1)
    compressor.apply(model, context())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    compressor.on_step(model, 1, 1)
    found = dict(compressor.finish(model).named_parameters())
    assert before
    for name, zeros in before.items():
        assert found[name][zeros].eq(0).all(), name


def test_float_copies_of_mixed_models_have_no_integers_left():
    model = applied(make(Int8Static, layers={"encoder.front": "int4"}, group=16), tiny_model(0))
    floats = float_copy(model)
    assert all(p.is_floating_point() for p in floats.parameters())
    batch = random_batch((61,), input_dim=8)
    got, want = (m(batch.features_BTF, batch.lens_B).logits["ctc"] for m in (floats, model))
    assert (got - want).abs().max() < 0.1 * want.abs().max()
