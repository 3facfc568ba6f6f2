"""Every plugin that we ship keeps its contract, under options that matter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kdrecipe.model.asr import AsrModel, FeatureNorm
from kdrecipe.model.heads.ctc import CtcHead, CtcLoss
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.contracts import (
    CompressorContract,
    Contract,
    LossContract,
    compressor_contract,
    loss_contract,
    test_plugin,
)
from kdrecipe_plugins.architectures.conformer import Conformer
from kdrecipe_plugins.architectures.transformer import Transformer
from kdrecipe_plugins.architectures.whisper_encoder import WhisperEncoder
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic
from kdrecipe_plugins.compressors.magnitude_prune import MagnitudePrune
from kdrecipe_plugins.losses.cr_ctc import CrCtc
from kdrecipe_plugins.losses.kl import KlLoss

PLUGINS = load_plugins()
KINDS = ("architectures", "losses", "compressors", "corpora", "decoders", "metrics")
SHIPPED = [(kind, name) for kind in KINDS for name in PLUGINS.registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED, ids=[f"{k}-{n}" for k, n in SHIPPED])
def test_as_the_command_line_checks_it(kind, name):
    if name == "voice_commands" and importlib.util.find_spec("espeakng_loader") is None:
        pytest.skip("espeakng-loader is not installed: pip install 'kdrecipe[espeak]'")
    results = test_plugin(PLUGINS.registry, kind, name)
    assert [(r.check_id, r.reason) for r in results if not r.ok] == []
    assert any(r.status == "passed" for r in results)


def losses() -> dict[str, Contract]:
    return {
        "ctc": loss_contract(CtcLoss),
        "cr_ctc": loss_contract(CrCtc),
        "kl": loss_contract(KlLoss),
        "kl-hot": loss_contract(KlLoss, {"temperature": 3.0}),
        "kl-drop": loss_contract(KlLoss, {"blank": "drop"}),
        "kl-select": loss_contract(KlLoss, {"blank": "select", "neighbours": 2}),
        "kl-weight": loss_contract(KlLoss, {"blank": "weight"}),
        "kl-reverse": loss_contract(KlLoss, {"direction": "reverse", "temperature": 2.0}),
        "kl-top-2": loss_contract(KlLoss, {"top_k": 2}),
    }


LOSSES = [(name, check) for name, contract in losses().items() for check in contract.bound()]


@pytest.mark.parametrize("check", [c for _, c in LOSSES], ids=[f"{n}-{c.check_id}" for n, c in LOSSES])
def test_losses(check):
    check()


class TestKlAsAClass(LossContract):
    plugin = KlLoss
    options = {"temperature": 2.0, "blank": "drop"}


class TestInt8AsAClass(CompressorContract):
    plugin = Int8Dynamic


def real_model(architecture):
    """Makes a small real recogniser for a seed."""

    def make(seed):
        torch.manual_seed(seed)
        encoder = architecture(architecture.Config(**architecture.contract_options), 20)
        head = CtcHead(CtcHead.Config(), encoder.output_dim, 9)
        return AsrModel(encoder, {"ctc": head}, FeatureNorm(20))

    return make


@pytest.mark.parametrize("architecture", [Conformer, Transformer, WhisperEncoder])
@pytest.mark.parametrize(
    ("compressor", "options"),
    [(Int8Dynamic, {}), (MagnitudePrune, {"sparsity": 0.6}), (MagnitudePrune, {"epochs": 0})],
)
def test_compressors_on_real_models(architecture, compressor, options):
    contract = compressor_contract(compressor, options, make_model=real_model(architecture), input_dim=20)
    assert [(r.check_id, r.reason) for r in contract.results() if not r.ok] == []
