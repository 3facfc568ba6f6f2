"""Multiply-accumulates per second of audio, against counts by hand."""

import pytest
import torch

from kdrecipe.measure.macs import macs_per_second
from kdrecipe.model.asr import AsrModel, FeatureNorm, build_model
from kdrecipe.model.heads.ctc import CtcHead
from kdrecipe.plugin.loader import load_plugins
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic

FEATURES = {"num_mel_bins": 8}
REGISTRY = load_plugins().registry


class Stacked(torch.nn.Module):
    """Four frames in a row, one linear layer, one convolution over time, each channel for itself."""

    output_dim, subsampling = 16, 4

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 16)
        self.conv = torch.nn.Conv1d(16, 16, 3, padding=1, groups=16)

    def forward(self, features_BTF, lens_B):
        x = self.linear(features_BTF.unflatten(1, (-1, 4)).flatten(2))
        return self.conv(x.transpose(1, 2)).transpose(1, 2), lens_B // 4


def stacked():
    return AsrModel(Stacked(), {"ctc": CtcHead(CtcHead.Config(), 16, 5)}, FeatureNorm(8))


def built(name, heads, **options):
    cls = REGISTRY.get("architectures", name)
    config = {"name": name, **cls.contract_options, **options, "heads": heads}
    return build_model(config, input_dim=8, vocab_size=6, registry=REGISTRY)


def test_products_and_convolutions_are_counted_by_the_second():
    per_frame = 32 * 16 + 16 * 3 + 16 * 5
    assert macs_per_second(stacked(), FEATURES) == 25 * per_frame


def test_int8_counts_as_its_parent():
    model = stacked().eval()
    before = macs_per_second(model, FEATURES)
    int8 = Int8Dynamic(Int8Dynamic.Config()).apply(model, None)
    assert macs_per_second(int8, FEATURES) == before


def test_attention_grows_with_the_utterance_and_layers_add_up():
    one, two = (built("transformer", {"ctc": {}}, num_layers=n) for n in (1, 2))
    short, long = (macs_per_second(one, FEATURES, audio_s=s) for s in (10, 20))
    # scores and values: 250 frames more, at 25 per second; the front end rounds
    assert long - short == pytest.approx(2 * 16 * 250 * 25, rel=1e-3)
    layer = macs_per_second(two, FEATURES) - macs_per_second(one, FEATURES)
    assert layer == pytest.approx(25 * (4 * 16 * 16 + 2 * 16 * 64 + 2 * 16 * 250))


def test_lstms_are_counted():
    one, two = (built("bilstm", {"ctc": {}}, num_layers=n) for n in (1, 2))
    assert macs_per_second(two, FEATURES) - macs_per_second(one, FEATURES) == 25 * 2 * 4 * 8 * (16 + 8)


@pytest.mark.parametrize("head", ["attention", "rnnt"])
def test_heads_that_need_a_text_get_one(head):
    model = built("cnn", {head: {}, "ctc": {}})
    with_search = macs_per_second(model, FEATURES)
    assert with_search > macs_per_second(model, FEATURES, head="ctc") + 1000
    model.train()
    macs_per_second(model, FEATURES)
    assert model.training
