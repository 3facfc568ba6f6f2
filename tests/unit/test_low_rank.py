"""Linear layers of low rank: the best on the data, of the size that was asked for."""

import pytest
import torch
from torch import nn

from kdrecipe.errors import KdrecipeError
from kdrecipe.interfaces import CompressContext
from kdrecipe.model.asr import build_model
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.compressor_checks import CompressorCase
from kdrecipe.testing.contracts import compressor_contract
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.integer_layers import Int8Linear
from kdrecipe_plugins.compressors.low_rank import LowRank, LowRankLinear, _projected, _Seen, _spectrum

REGISTRY = load_plugins().registry


def built(seed=0, name="conformer"):
    torch.manual_seed(seed)
    options = {**REGISTRY.get("architectures", name).contract_options}
    config = {"name": name, **options, "heads": {"ctc": {}}}
    return build_model(config, input_dim=20, vocab_size=9, registry=REGISTRY).eval()


def compressed(model, **options):
    case = CompressorCase(LowRank, None, input_dim=20)
    compressor = LowRank(LowRank.Config(**options))
    return compressor.finish(compressor.apply(model, case.context())), compressor


def test_the_projection_has_the_least_error_on_the_data():
    """Inputs lie near a plane away from 0: a plain SVD of the weights does far worse."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 9)
    x_NI = torch.randn(500, 3) @ torch.randn(3, 12) + 0.01 * torch.randn(500, 12) + 2.0
    seen = _Seen(500, x_NI.double().sum(0), x_NI.double().t() @ x_NI.double())
    spectrum = _spectrum(layer, seen)
    assert float(spectrum.variances_O[:3].sum() / spectrum.variances_O.sum()) > 0.999
    with torch.no_grad():
        want = layer(x_NI)
        error = float((_projected(layer, spectrum, 3)(x_NI) - want).square().sum(1).mean())
        u, s, v = torch.linalg.svd(layer.weight)
        plain = x_NI @ ((u[:, :3] * s[:3]) @ v[:3]).t() + layer.bias
        assert error < 1e-3 < float((plain - want).square().sum(1).mean())
        # what is lost is the variance of the components that are left out, and nothing of the mean
        assert error == pytest.approx(float(spectrum.variances_O[3:].sum()), rel=1e-2)
        torch.testing.assert_close(_projected(layer, spectrum, 9)(x_NI), want, atol=1e-4, rtol=1e-4)


def test_ranks_follow_the_variance_that_may_be_lost():
    variances = torch.tensor([8.0, 1.0, 0.7, 0.3])
    layer = nn.Linear(4, 4)
    spectrum = type(_spectrum(layer, _Seen(1, torch.zeros(4).double(), torch.eye(4).double())))(
        variances, torch.eye(4), torch.zeros(4)
    )
    assert [spectrum.rank(lost) for lost in (0.0, 0.02, 0.031, 0.11, 0.3, 1.0)] == [4, 4, 3, 2, 1, 1]


def test_the_share_goes_and_int8_comes_after_it():
    before = sum(p.numel() for p in built().encoder.parameters())
    model, compressor = compressed(built(), share=0.25)
    after = sum(p.numel() for p in model.encoder.parameters())
    assert 0.70 * before < after <= 0.75 * before
    report = compressor.report()
    assert (report["params"], report["removed_share"]) == (after, 1 - after / before)
    ranks = compressor.state()["ranks"]
    assert report["layers"] == len(ranks) > 3
    assert all(isinstance(model.get_submodule(name), LowRankLinear) for name in ranks)
    assert all(name.startswith("encoder.") for name in ranks)
    again = LowRank(LowRank.Config(share=0.25))
    again.load_state(compressor.state())
    rebuilt = again.rebuild(built(1))
    rebuilt.load_state_dict(model.state_dict())
    int8 = Int8Dynamic(Int8Dynamic.Config()).apply(rebuilt, None)
    assert isinstance(int8.get_submodule(next(iter(ranks))).first, Int8Linear)


@pytest.mark.parametrize("name", ["conformer", "transformer", "whisper_encoder"])
def test_contract(name):
    make = lambda seed: built(seed, name)  # noqa: E731
    contract = compressor_contract(LowRank, {"share": 0.08, "epochs": 1}, make_model=make, input_dim=20)
    assert [(r.check_id, r.reason) for r in contract.results() if not r.ok] == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"share": 0.95}, "so much can't be removed"),
        ({"parts": ["attention"]}, "the model has no heads.attention"),
    ],
)
def test_what_cannot_be_done_is_said(options, expected):
    with pytest.raises(KdrecipeError, match=expected):
        compressed(built(), **options)
    with pytest.raises(KdrecipeError, match="no calibration data"):
        LowRank(LowRank.Config()).apply(built(), CompressContext(lambda: []))
    int8 = Int8Dynamic(Int8Dynamic.Config()).apply(built(), None)
    with pytest.raises(KdrecipeError, match="before int8"):
        compressed(int8)
