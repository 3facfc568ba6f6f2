"""Tiny recognisers of the tone corpus, trained here, as bundles on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kdrecipe.corpus.audio import Utterance
from kdrecipe.data.features import extract
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.interfaces import Batch, CompressContext, Targets
from kdrecipe.model.asr import FeatureNorm, build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.model.heads.attention import AttentionLoss
from kdrecipe.model.heads.rnnt import RnntLoss
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.corpus import WORDS, speak
from kdrecipe_plugins.compressors.int8_dynamic import Int8Dynamic

FEATURES = {"name": "fbank", "num_mel_bins": 80}
MODEL = {"name": "conformer", "num_layers": 1, "dim": 48, "dropout": 0.0, "heads": {"ctc": {}}}
ALL_HEADS = {
    "rnnt": {"predictor_dim": 32, "joiner_dim": 48, "dropout": 0.0},
    "attention": {"num_layers": 2, "ff_dim": 96, "dropout": 0.0},
    "ctc": {},
}


@dataclass
class Trained:
    """Bundles, and what to try them on.

    Args:
        bundle: float weights.
        int8: the same, quantised.
        utterances: some that it was not trained on.
    """

    bundle: Bundle
    int8: Bundle
    utterances: list[Utterance]


def spoken(num: int, seed: int) -> list[Utterance]:
    rng = np.random.default_rng(seed)
    utterances = []
    for number in range(num):
        text = " ".join(rng.choice(WORDS.split(), size=rng.integers(1, 5)))
        samples_S = 0.3 * speak(text, pitch=rng.uniform(0.97, 1.03), tempo=rng.uniform(0.9, 1.1))
        samples_S = samples_S + 0.01 * rng.standard_normal(len(samples_S))
        utterances.append(Utterance(f"u{number}", samples_S.astype(np.float32), text))
    return utterances


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """A model with a CTC head."""
    return train(tmp_path_factory.mktemp("bundles"), MODEL)


@pytest.fixture(scope="session")
def all_heads(tmp_path_factory) -> Trained:
    """A model with the heads ``rnnt``, ``attention`` and ``ctc``."""
    return train(tmp_path_factory.mktemp("bundles_of_all_heads"), {**MODEL, "heads": ALL_HEADS})


def train(directory: Path, description: dict, num_epochs: int = 26) -> Trained:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train = spoken(48, seed=1)
    tokens = Tokenizer.train([u.text for u in train], "bpe", 48, directory / "tokens")
    features = [torch.from_numpy(extract(u.samples_S, 16000, FEATURES)) for u in train]
    registry = load_plugins().registry
    model = build_model(description, input_dim=80, vocab_size=len(tokens), registry=registry)
    frames = torch.cat(features)
    model.norm = FeatureNorm.from_stats(frames.mean(0), frames.std(0))
    _fit(model, features, [tokens.encode(u.text) for u in train], num_epochs)
    meta = {
        "name": "tiny", "kind": "trained", "parent": None, "seed": 0, "model": description,
        "features": FEATURES, "compression": [], "plugin_files": {},
    }  # fmt: skip
    Bundle.save(directory / "float", model, tokens, meta)
    compressor = Int8Dynamic(Int8Dynamic.Config())
    quantised = compressor.finish(compressor.apply(model, CompressContext(lambda: [])))
    step = {"name": "int8_dynamic", "options": {}, "report": compressor.report(), "state": compressor.state()}
    Bundle.save(directory / "int8", quantised, tokens, {**meta, "name": "tiny_int8", "compression": [step]})
    return Trained(
        Bundle.load(directory / "float", registry),
        Bundle.load(directory / "int8", registry),
        spoken(12, seed=2),
    )


def _fit(model, features, tokens, num_epochs: int) -> None:
    """A few seconds of all heads' losses: enough to read most words."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    num_steps = num_epochs * 6
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, num_steps)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(features)).view(-1, 8).tolist():
            loss = _loss(model, [features[i] for i in rows], [torch.tensor(tokens[i]) for i in rows])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            schedule.step()
    model.eval()


def _loss(model, features, labels) -> torch.Tensor:
    pad = torch.nn.utils.rnn.pad_sequence
    lens_B, token_lens_B = (torch.tensor([len(x) for x in xs]) for xs in (features, labels))
    batch = Batch(
        ids=[str(i) for i in range(len(labels))],
        features_BTF=pad(features, batch_first=True),
        lens_B=lens_B,
        tokens_BU=pad(labels, batch_first=True),
        token_lens_B=token_lens_B,
        labelled_B=torch.ones(len(labels), dtype=torch.bool),
    )
    out = model(batch.features_BTF, batch.lens_B, batch=batch)
    loss = torch.nn.functional.ctc_loss(
        out.logits["ctc"].log_softmax(-1).transpose(0, 1),
        torch.cat(labels),
        out.lens_B,
        token_lens_B,
        zero_infinity=True,
    )
    for name, cls in {"rnnt": RnntLoss, "attention": AttentionLoss}.items():
        if name in model.heads:
            found = cls(cls.Config())(out, Targets(), batch)
            loss = loss + found.total / found.count
    return loss


@pytest.fixture(scope="session")
def exports(trained, tmp_path_factory) -> Path:
    """``onnx_ctc`` of both bundles, in ``float`` and ``int8``."""
    from kdrecipe_plugins.exporters.onnx_ctc import OnnxCtc

    return _exported(OnnxCtc, trained, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def transducers(all_heads, tmp_path_factory) -> Path:
    """``onnx_transducer`` of both bundles, in ``float`` and ``int8``."""
    from kdrecipe_plugins.exporters.onnx_transducer import OnnxTransducer

    return _exported(OnnxTransducer, all_heads, tmp_path_factory.mktemp("transducers"))


@pytest.fixture(scope="session")
def attentions(all_heads, tmp_path_factory) -> Path:
    """``onnx_attention`` of both bundles, in ``float`` and ``int8``."""
    from kdrecipe_plugins.exporters.onnx_attention import OnnxAttention

    return _exported(OnnxAttention, all_heads, tmp_path_factory.mktemp("attentions"))


@pytest.fixture(scope="session")
def sherpa_attentions(all_heads, tmp_path_factory) -> Path:
    """``sherpa_attention`` of both bundles, in ``float`` and ``int8``."""
    from kdrecipe_plugins.exporters.sherpa_attention import SherpaAttention

    return _exported(SherpaAttention, all_heads, tmp_path_factory.mktemp("sherpa_attentions"))


def _exported(cls, trained: Trained, directory: Path) -> Path:
    exporter = cls(cls.Config())
    exporter.export(trained.bundle, directory / "float")
    exporter.export(trained.int8, directory / "int8")
    return directory
