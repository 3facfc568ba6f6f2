"""int8 and pruning on small models."""

import copy

import pytest
import torch
from torch import nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.integer_layers import Int8Linear
from kdrecipe_plugins.compressors.magnitude_prune import MagnitudePrune

CONTEXT = CompressContext(calibration=lambda: [])


class Small(nn.Module):
    """The shape of a recogniser: an encoder with a norm and a convolution, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.ModuleDict(
            {
                "conv": nn.Conv1d(16, 16, 3, padding=1, groups=16),
                "norm": nn.LayerNorm(16),
                "up": nn.Linear(16, 48),
                "down": nn.Linear(48, 16, bias=False),
            }
        )
        self.heads = nn.ModuleDict({"ctc": nn.Linear(16, 10)})
        nn.init.normal_(self.encoder["norm"].bias)  # zero by default, and zeros are counted below

    def forward(self, x_BTD):
        y = self.encoder["conv"](x_BTD.transpose(1, 2)).transpose(1, 2)
        y = self.encoder["down"](self.encoder["up"](self.encoder["norm"](y)).relu())
        return self.heads["ctc"](x_BTD + y)


def features(seed: int = 0, num: int = 3) -> torch.Tensor:
    return torch.randn(num, 7, 16, generator=torch.Generator().manual_seed(seed))


def int8(model: nn.Module, **options) -> tuple[nn.Module, Int8Dynamic]:
    compressor = Int8Dynamic(Int8Dynamic.Config(**options))
    return compressor.finish(compressor.apply(model, CONTEXT)), compressor


def pruner(**options) -> MagnitudePrune:
    return MagnitudePrune(MagnitudePrune.Config(**options))


def zeros(model: nn.Module) -> dict[str, float]:
    return {n: float((p == 0).float().mean()) for n, p in model.named_parameters()}


# ---------------------------------------------------------------- int8


def test_int8_output_is_close_and_parameters_stay_as_many():
    model = Small().eval()
    expected = model(features())
    num_params = sum(p.numel() for p in model.parameters())
    compressed, compressor = int8(model)
    assert (compressed(features()) - expected).abs().max() < 0.02 * expected.abs().max()
    assert sum(p.numel() for p in compressed.parameters()) == num_params
    report = compressor.report()
    assert report["int8_layers"] == 4  # the convolution is stored in 8 bits
    assert report["int8_share"] == pytest.approx((16 * 48 * 2 + 16 * 10 + 16 * 3) / num_params)


def test_int8_weights_are_rounded_to_the_nearest_step_of_their_row():
    linear = nn.Linear(20, 6)
    with torch.no_grad():
        linear.weight[2] = 0.0
        linear.weight[3] *= 1000
    rounded = Int8Linear.from_linear(linear).to_float()
    step_O1 = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded.weight - linear.weight).abs() <= step_O1 / 2 * 1.001).all()
    assert rounded.weight[2].eq(0).all()
    assert torch.equal(rounded.bias, linear.bias)
    again = Int8Linear.from_linear(rounded)  # the same grid: what an exporter relies upon
    assert torch.equal(again.weight, Int8Linear.from_linear(linear).weight)


def test_int8_product_is_that_of_the_rounded_numbers():
    layer = Int8Linear.from_linear(nn.Linear(20, 6))
    x = features()[..., :16].repeat(1, 1, 2)[..., :20]
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = layer.to_float()((x / step).round() * step)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_int8_of_an_utterance_ignores_its_neighbours_and_padding():
    model, _ = int8(Small().eval())
    batch = features(num=3)
    loud = batch.clone()
    loud[1:] *= 100
    assert torch.equal(model(batch)[0], model(loud)[0])
    assert torch.equal(model(batch)[0], model(batch[:1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_keeps_the_type_of_its_input_and_survives_zeros(dtype):
    layer = Int8Linear.from_linear(nn.Linear(16, 5))
    assert layer(features().to(dtype)).dtype == dtype
    out = layer(torch.zeros(2, 3, 16, dtype=dtype))
    assert torch.allclose(out.float(), layer.bias.expand(2, 3, 5), atol=1e-2)


@pytest.mark.parametrize("output_layer", [True, False])
def test_int8_rebuild_takes_the_weights_as_plain_tensors(tmp_path, output_layer):
    compressed, compressor = int8(Small(seed=1).eval(), output_layer=output_layer)
    torch.save(compressed.state_dict(), tmp_path / "weights.pt")
    rebuilt = compressor.rebuild(Small(seed=2).eval())
    rebuilt.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(rebuilt(features()), compressed(features()))
    assert isinstance(rebuilt.heads["ctc"], Int8Linear) == output_layer


def test_int8_twice_is_refused_with_a_remedy():
    compressed, _ = int8(Small())
    with pytest.raises(KdrecipeError, match=r"no linear layer.*\n.*last step"):
        int8(compressed)


# ---------------------------------------------------------------- pruning


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_pruning_at_once_reaches_the_sparsity_and_spares_biases_norms_and_heads(scope):
    model = Small()
    with torch.no_grad():
        model.encoder["up"].weight *= 10  # global pruning should now prefer the others
    before = copy.deepcopy(model)
    compressor = pruner(sparsity=0.4, scope=scope, epochs=0)
    pruned = compressor.finish(compressor.apply(model, CONTEXT))
    found = zeros(pruned)
    layers = ["encoder.conv.weight", "encoder.up.weight", "encoder.down.weight"]
    assert all(share == 0.0 for name, share in found.items() if name not in layers)
    assert compressor.report()["sparsity"] == pytest.approx(0.4, abs=1e-3)
    if scope == "per_layer":
        assert [found[n] for n in layers] == pytest.approx([0.4] * 3, abs=0.02)
    else:
        assert found["encoder.up.weight"] < 0.2 < 0.6 < found["encoder.down.weight"]
    for (name, old), new in zip(before.named_parameters(), pruned.parameters(), strict=True):
        assert torch.equal(old[new != 0], new[new != 0]), name
        if name in layers and (new == 0).any():  # the largest stayed
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()
    assert pruned.state_dict().keys() == before.state_dict().keys()


def test_pruning_while_training_follows_the_cubic_and_nothing_comes_back():
    model, num_steps = Small(), 40
    compressor = pruner(sparsity=0.8, epochs=3, ramp=0.5, every=4)
    assert compressor.num_epochs == 3
    model = compressor.apply(model, CONTEXT)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weight = model.encoder["up"].weight
    gone = torch.zeros_like(weight, dtype=torch.bool)
    shares = []
    for step in range(1, num_steps + 1):
        optimiser.zero_grad()
        model(features(step)).square().mean().backward()
        optimiser.step()
        compressor.on_step(model, step, num_steps)
        assert (weight[gone] == 0).all()
        gone = weight == 0
        layers = [m.weight for m in model.encoder.values() if not isinstance(m, nn.LayerNorm)]
        shares.append(float(torch.cat([w.flatten() == 0 for w in layers]).float().mean()))
    assert shares[2] == 0.0  # before the first choice
    assert shares[7] == pytest.approx(0.8 * (1 - (1 - 8 / 20) ** 3), abs=2e-3)
    assert shares[19] == pytest.approx(0.8, abs=2e-3)
    assert shares[-1] == pytest.approx(0.8, abs=2e-3)
    assert sorted(shares) == shares


def test_pruning_resumes_from_a_state_dict_between_two_choices():
    def run(compressor, model, optimiser, steps):
        for step in steps:
            optimiser.zero_grad()
            model(features(step)).square().mean().backward()
            optimiser.step()
            compressor.on_step(model, step, 20)

    def fresh():
        compressor = pruner(sparsity=0.7, epochs=1, every=5)
        model = compressor.apply(Small(), CONTEXT)
        return compressor, model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    through = fresh()
    run(*through, range(1, 21))
    first = fresh()
    run(*first, range(1, 8))
    resumed = fresh()
    resumed[1].load_state_dict(first[1].state_dict())
    resumed[2].load_state_dict(first[2].state_dict())
    run(*resumed, range(8, 21))
    for a, b in zip(through[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_finish_prunes_an_average_of_less_sparse_weights_to_the_target():
    compressor = pruner(sparsity=0.5, epochs=1)
    model = compressor.apply(Small(), CONTEXT)
    compressor.on_step(model, 10, 10)
    mask = model.encoder["up"].prune_mask.clone()
    with torch.no_grad():  # as an average with an earlier checkpoint would
        model.encoder["up"].weight += 100.0
    model = compressor.finish(model)
    assert (model.encoder["up"].weight[~mask] == 0).all()
    assert compressor.report()["sparsity"] == pytest.approx(0.5, abs=0.15)
    assert not [name for name, _ in model.named_buffers() if "mask" in name]


def test_zeros_stay_zero_through_int8():
    compressor = pruner(sparsity=0.9, epochs=0, output_layer=True)
    pruned = compressor.finish(compressor.apply(Small(), CONTEXT))
    gone = {n: m.weight == 0 for n, m in pruned.named_modules() if type(m) is nn.Linear}
    compressed, _ = int8(pruned)
    for name, zero in gone.items():
        layer = compressed.get_submodule(name)
        assert (layer.weight[zero] == 0).all()
        assert (layer.to_float().weight[zero] == 0).all()


def test_pruning_an_int8_model_is_refused_with_a_remedy():
    compressed, _ = int8(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(KdrecipeError, match="no weights to prune"):
        pruner().apply(compressed, CONTEXT)


# ---------------------------------------------------------------- N:M


def test_two_of_four_are_left_and_they_are_the_largest():
    model = Small()
    before = model.encoder["up"].weight.detach().clone()
    compressor = pruner(pattern="2:4", epochs=0)
    pruned = compressor.finish(compressor.apply(model, CONTEXT))
    weight = pruned.encoder["up"].weight
    groups = (weight != 0).unflatten(1, (-1, 4)).sum(2)
    assert (groups == 2).all()
    kept = weight.unflatten(1, (-1, 4)).abs().sort(2).values[..., 2:]
    assert torch.equal(kept, before.unflatten(1, (-1, 4)).abs().sort(2).values[..., 2:])
    # the convolution's rows have 3 weights, and none is left over from a group of 4
    assert (pruned.encoder["conv"].weight != 0).all()
    assert compressor.config.final_sparsity == 0.5


def test_a_pattern_is_reached_step_by_step():
    compressor, model = pruner(pattern="1:4", epochs=1, ramp=0.5, every=1), Small()
    model = compressor.apply(model, CONTEXT)
    weight, left = model.encoder["up"].weight, []
    for step in range(1, 21):
        compressor.on_step(model, step, 20)
        left.append(int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()))
    assert sorted(left, reverse=True) == left
    assert left[0] == 4
    assert left[9] == left[-1] == 1
    assert set(left) == {4, 3, 2, 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pattern": "4:4"}, "prunes nothing"),
        ({"pattern": "2:4", "sparsity": 0.7}, "exclude each other"),
        ({"pattern": "half"}, "pattern"),
    ],
)
def test_patterns_that_say_nothing_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        pruner(**options)
    written = pruner(pattern="1:4").config.model_dump()
    assert pruner(**written).config == pruner(pattern="1:4").config
