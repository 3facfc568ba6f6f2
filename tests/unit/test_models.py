"""Encoders, the assembled model, and taps."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdrecipe.errors import PluginError, RecipeError
from kdrecipe.interfaces import Tap
from kdrecipe.layers import MASKED, Dropout, attend
from kdrecipe.model.asr import AsrModel, FeatureNorm, build_model, model_info
from kdrecipe.model.heads.attention import AttentionHead, AttentionHeadOptions
from kdrecipe.model.heads.ctc import CtcHead
from kdrecipe.model.taps import capture
from kdrecipe.testing.models import random_batch
from kdrecipe_plugins.architectures import conformer, transformer
from kdrecipe_plugins.architectures.conformer import Conformer
from kdrecipe_plugins.architectures.layers import ConvFront, RotaryPositions, SelfAttention
from kdrecipe_plugins.architectures.transformer import Transformer

BINS, VOCAB = 80, 12
ENCODERS = {"conformer": Conformer, "transformer": Transformer}


class TinyRegistry:
    """What build_model asks of a registry."""

    def get(self, kind: str, name: str) -> Any:
        return {"architectures": ENCODERS, "heads": {"ctc": CtcHead}}[kind][name]


def tiny(name: str = "conformer", dropout: float = 0.0, **options: Any) -> AsrModel:
    """Two layers of width 16."""
    torch.manual_seed(0)
    config = {"name": name, "num_layers": 2, "dim": 16, "num_heads": 2, "front_channels": 4}
    config |= {"dropout": dropout, "heads": {"ctc": {}}, **options}
    model = build_model(config, input_dim=BINS, vocab_size=VOCAB, registry=TinyRegistry())  # type: ignore[arg-type]
    model.norm.set_stats(torch.linspace(-8, -4, BINS), torch.linspace(1, 3, BINS))
    return model


def features(num_utterances: int, num_frames: int, seed: int = 0) -> Tensor:
    """Noise around the mean that ``tiny`` subtracts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_utterances, num_frames, BINS, generator=generator) * 2 - 6


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def model(request: pytest.FixtureRequest) -> AsrModel:
    return tiny(request.param).eval()


@given(
    lens=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    extra=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_valid_frames_do_not_depend_on_padding(
    model: AsrModel, lens: list[int], extra: int, seed: int
) -> None:
    """Alone or in a batch, whatever lies in the padding: the same output on valid frames."""
    x = features(len(lens), max(lens) + extra, seed)
    for i, n in enumerate(lens):
        x[i, n:] = 1e4
    with torch.no_grad():
        out = model(x, torch.tensor(lens))
        for i, n in enumerate(lens):
            alone = model(x[i : i + 1, :n], torch.tensor([n]))
            frames = int(out.lens_B[i])
            assert frames == int(alone.lens_B[0]) == alone.hidden_BTD.shape[1]
            torch.testing.assert_close(out.hidden_BTD[i, :frames], alone.hidden_BTD[0], atol=2e-5, rtol=1e-4)


def test_gradients_do_not_depend_on_padding(model: AsrModel) -> None:
    def gradient(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        out = model(x, torch.tensor([37]))
        out.hidden_BTD[:, : int(out.lens_B[0])].square().sum().backward()
        assert x.grad is not None
        return x.grad

    alone, padded = features(1, 37), torch.full((1, 50, BINS), 7.0)
    padded[:, :37] = alone
    in_batch = gradient(padded)
    torch.testing.assert_close(in_batch[:, :37], gradient(alone), atol=1e-5, rtol=1e-3)
    assert not in_batch[:, 37:].any()


@given(num_frames=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_lens_and_output_len_agree(model: AsrModel, num_frames: int) -> None:
    lens = torch.tensor([num_frames, max(1, num_frames // 2)])
    with torch.no_grad():
        out = model(features(2, num_frames), lens)
    expected = [model.encoder.output_len(int(n)) for n in lens]  # type: ignore[operator]
    assert out.lens_B.tolist() == expected
    assert out.lens_B.dtype == torch.int64
    assert out.hidden_BTD.shape[1] == expected[0] == -(-num_frames // 4)


def test_utterance_without_frames_stays_finite(model: AsrModel) -> None:
    out = model(features(2, 20), torch.tensor([20, 0]))
    assert out.lens_B.tolist() == [5, 0]
    assert out.hidden_BTD.isfinite().all()


def test_every_output_frame_sees_the_last_feature_frame() -> None:
    """Nothing at the end is cut off, whatever the remainder of the length by 4."""
    front = ConvFront(BINS, 16, 4, 0.0)
    for n in (5, 6, 7, 8):
        x = features(1, n)
        changed = x.clone()
        changed[:, -1] += 1.0
        before, _ = front(x, torch.tensor([n]))
        after, _ = front(changed, torch.tensor([n]))
        assert (before[0, -1] != after[0, -1]).any()


def test_taps_are_captured_only_when_asked(model: AsrModel) -> None:
    x, lens = features(2, 30), torch.tensor([30, 22])
    declared = model.encoder.taps()  # type: ignore[operator]
    layers = [name for name in declared if name[-1] not in "qkv"]
    assert layers == ["front", "encoder.0", "encoder.1"]
    assert len(declared) == 9
    assert model(x, lens).taps == {}
    out = model(x, lens, taps=["encoder.1", "front"])
    assert {k: tuple(v.shape) for k, v in out.taps.items()} == {"encoder.1": (2, 8, 16), "front": (2, 8, 16)}
    assert all(v.requires_grad for v in out.taps.values())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("architecture", ["conformer", "transformer"])
def test_attention_can_be_made_of_queries_keys_and_values(architecture: str) -> None:
    model = tiny(architecture).eval()
    lens = torch.tensor([30, 22])
    seen: list[Tensor] = []
    attention = model.encoder.layers[0].attention  # type: ignore[index,union-attr]
    attention.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = model(features(2, 30), lens, taps=["encoder.0.q", "encoder.0.k", "encoder.0.v"])
    heads, length = attention.num_heads, int(out.lens_B[1])
    q, k, v = (out.taps[f"encoder.0.{x}"][1, :length].unflatten(-1, (heads, -1)) for x in "qkv")
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    found = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
    torch.testing.assert_close(found, seen[0][1, :length], atol=1e-5, rtol=1e-4)


def test_a_decoders_taps_go_by_tokens() -> None:
    torch.manual_seed(0)
    head = AttentionHead(AttentionHeadOptions(num_layers=2, num_heads=2), 16, 9)
    model = AsrModel(tiny("transformer").encoder, {"attention": head}, FeatureNorm(BINS)).eval()
    batch = random_batch([30, 22], input_dim=BINS, vocab_size=9, num_tokens=[4, 2])
    names = ["encoder.1", "attention.1", *(f"attention.0.{x}" for x in "qkv")]
    out = model(batch.features_BTF, batch.lens_B, taps=names, batch=batch)
    assert {out.taps[n].shape[1] for n in names[1:]} == {5}  # the end of the sentence is one more
    assert out.taps["encoder.1"].shape[1] == 8
    torch.testing.assert_close(head.output(out.taps["attention.1"]), out.logits["attention"])
    info = model_info(model, "x")
    assert info.token_taps["attention.0.q"] == 16
    assert "attention.0.q" not in info.taps
    with pytest.raises(RecipeError, match=r"no tap 'attention\.0\.x'"):
        model(batch.features_BTF, batch.lens_B, taps=["attention.0.x"], batch=batch)


def test_last_tap_of_conformer_is_its_output() -> None:
    model = tiny("conformer").eval()
    out = model(features(1, 30), torch.tensor([30]), taps=["encoder.1"])
    assert torch.equal(out.taps["encoder.1"], out.hidden_BTD)


def test_unknown_tap_is_an_error_with_a_suggestion(model: AsrModel) -> None:
    with pytest.raises(RecipeError, match=r"encoder\.11.*\n.*did you mean 'encoder\.1'"):
        model(features(1, 9), torch.tensor([9]), taps=["encoder.0", "encoder.11"])
    assert not any(m._forward_hooks for m in model.modules())


def test_tap_of_another_shape_than_declared_is_an_error() -> None:
    layer = nn.Linear(4, 5)
    with (
        pytest.raises(PluginError, match=r"'mid'.*\(B, T, 4\).*\(2, 3, 5\)"),
        capture({"mid": Tap(layer, 4)}, ["mid"]),
    ):
        layer(torch.zeros(2, 3, 4))


def test_bf16_agrees_with_fp32(model: AsrModel) -> None:
    x, lens = features(3, 40), torch.tensor([40, 33, 9])
    with torch.no_grad():
        exact = model(x, lens)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, lens)
    for i, n in enumerate(exact.lens_B):
        error = (rough.hidden_BTD[i, :n].float() - exact.hidden_BTD[i, :n]).abs()
        assert error.max() < 0.15
        assert error.mean() < 0.02
    assert not torch.equal(rough.hidden_BTD.float(), exact.hidden_BTD)


def test_bf16_gradients_point_where_fp32_gradients_do(model: AsrModel) -> None:
    def gradients(bf16: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(features(3, 40), torch.tensor([40, 33, 9]))
        out.logits["ctc"].float().log_softmax(-1)[..., 0].sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.cosine_similarity(gradients(True), gradients(False), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_attention_equals_fused(dtype: torch.dtype) -> None:
    """The products used in bf16 give what torch's fused attention gives, to bf16's precision."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, dtype=dtype) for _ in range(3))
    bias = torch.zeros(2, 1, 1, 7, dtype=dtype)
    bias[1, ..., 4:] = MASKED
    exact = attend(q, k, v, bias)
    rough = attend(*(y.bfloat16() for y in (q, k, v, bias)))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.to(dtype), exact, atol=0.03, rtol=0.03)


def test_attention_scores_depend_on_distance_only() -> None:
    """Rotary positions: shifting queries and keys together changes nothing."""
    torch.manual_seed(0)
    attention, positions = SelfAttention(16, 2), RotaryPositions(16, 2)
    x = torch.randn(1, 10, 16)
    cos, sin = positions(torch.zeros(1, 15, 16))
    mask = torch.ones(1, 10, dtype=torch.bool)
    early = attention(x, mask, (cos[:10], sin[:10]))
    late = attention(x, mask, (cos[5:], sin[5:]))
    torch.testing.assert_close(early, late, atol=1e-5, rtol=1e-4)
    still = attention(x, mask, (torch.ones_like(cos[:10]), torch.zeros_like(sin[:10])))
    assert (still - early).abs().max() > 1e-3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dropout = Dropout(p)
    y = dropout(torch.ones(400, 250, dtype=dtype)).float()
    dropped = float((y == 0).float().mean())
    assert abs(dropped - p) < 0.005
    assert abs(float(y.mean()) - 1) < 0.03
    # every place alike: the bytes of a random word are equally good
    by_place = (y.flatten().view(-1, 8) == 0).float().mean(0)
    assert (by_place - dropped).abs().max() < 0.02


def test_dropout_is_off_in_eval_differs_between_calls_and_repeats_with_the_seed() -> None:
    dropout, x = Dropout(0.3), torch.randn(33)
    assert torch.equal(dropout.eval()(x), x)
    dropout.train()
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_dropout_gradient_is_zero_where_values_were_dropped() -> None:
    torch.manual_seed(0)
    x = torch.ones(5, 7, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # x is ones: both are the scaled mask


def test_features_are_normalised_by_the_statistics() -> None:
    mean, std = np.array([1.0, 2.0]), np.array([2.0, 0.0])
    norm = FeatureNorm.from_stats(mean, std)
    out = norm(torch.tensor([[[3.0, 2.0]]]))
    assert out.tolist() == [[[1.0, 0.0]]]  # a bin that never varies does not divide by zero
    assert set(norm.state_dict()) == {"mean_F", "std_F"}
    assert not list(norm.parameters())


def test_build_model_reports_all_wrong_options_at_once() -> None:
    config = {"name": "conformer", "num_layer": 3, "dropout": 2.0, "heads": {"ctc": {"drop": 1}}}
    with pytest.raises(RecipeError) as caught:
        build_model(config, input_dim=BINS, vocab_size=VOCAB, registry=TinyRegistry())  # type: ignore[arg-type]
    text = str(caught.value)
    assert "num_layer" in text
    assert "dropout" in text
    assert "head ctc: drop" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "num_heads": 4}, "multiple of 2"),
        ({"kernel_size": 8}, "must be odd"),
        ({"ff_dim": 0}, "ff_dim"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny("conformer", **options)


def test_model_info_and_size() -> None:
    model = tiny("conformer")
    info = model_info(model, "abc")
    assert (info.vocab_id, info.vocab_size, info.frame_shift_s, info.heads) == (
        "abc",
        VOCAB,
        0.04,
        {"ctc": ("frame_logits", "hypotheses")},
    )
    layers = [f"encoder.{i}{x}" for i in range(2) for x in ("", ".q", ".k", ".v")]
    assert info.taps == dict.fromkeys(["front", *layers], 16)
    assert {s.key for s in info.provides()} == {"frame_logits:ctc", "hypotheses:ctc"} | {
        f"hidden:{t}" for t in info.taps
    }
    assert model.num_params == sum(p.numel() for p in model.parameters())


def test_front_end_does_not_dominate_a_small_model() -> None:
    model = tiny("conformer", num_layers=3, dim=64, num_heads=4, front_channels=32)
    assert model.num_params < 400_000
    assert sum(p.numel() for p in model.encoder.front.parameters()) < 0.2 * model.num_params  # type: ignore[union-attr]


def test_state_dict_makes_the_same_model(model: AsrModel) -> None:
    name = "conformer" if isinstance(model.encoder, Conformer) else "transformer"
    other = tiny(name).eval()
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(model.state_dict())
    x, lens = features(1, 21), torch.tensor([21])
    assert torch.equal(model(x, lens).logits["ctc"], other(x, lens).logits["ctc"])


def test_all_weights_get_gradients() -> None:
    for name in ENCODERS:
        model = tiny(name, dropout=0.1).train()
        model(features(2, 30), torch.tensor([30, 20])).logits["ctc"].square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


class LogProbs(nn.Module):
    """The graph that exports carry."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(features_BTF, lens_B)
        return out.logits["ctc"].log_softmax(-1), out.lens_B


SHAPES = [(1, 23, [23]), (3, 61, [61, 40, 1]), (2, 100, [99, 100])]


def assert_same(got: Any, expected: tuple[Tensor, Tensor]) -> None:
    assert np.asarray(got[1]).tolist() == expected[1].tolist()
    for i, n in enumerate(expected[1].tolist()):
        np.testing.assert_allclose(np.asarray(got[0])[i, :n], expected[0][i, :n].numpy(), atol=2e-4)


def test_onnx_export_takes_any_batch_and_length(model: AsrModel) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    graph, buffer = LogProbs(model), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (features(2, 50), torch.tensor([50, 31])),
            buffer,
            dynamo=False,  # the other exporter takes any shape as well, and half a minute
            input_names=["x", "x_lens"],
            output_names=["y", "y_lens"],
            opset_version=17,
            dynamic_axes={"x": {0: "B", 1: "T"}, "x_lens": {0: "B"}, "y": {0: "B", 1: "S"}},
        )
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[2] == VOCAB  # runtimes read the vocabulary's size off it
    for b, t, lens in SHAPES:
        x, x_lens = features(b, t, seed=t), torch.tensor(lens)
        with torch.no_grad():
            expected = graph(x, x_lens)
        assert_same(session.run(None, {"x": x.numpy(), "x_lens": x_lens.numpy()}), expected)


def test_torchscript_takes_any_batch_and_length(model: AsrModel) -> None:
    graph, buffer = LogProbs(model), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(graph, (features(2, 50), torch.tensor([50, 31]))), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        for b, t, lens in SHAPES:
            x, x_lens = features(b, t, seed=t), torch.tensor(lens)
            assert_same(loaded(x, x_lens), graph(x, x_lens))


def test_modules_register_their_architectures() -> None:
    offered: dict[str, type] = {}
    for module in (conformer, transformer):
        module.register_architectures(offered.__setitem__)
    assert offered == ENCODERS
