"""Tiny random models in files, what they hear, and teachers made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdrecipe.data.features import extract
from kdrecipe.data.tokens import Tokenizer
from kdrecipe.interfaces import Batch
from kdrecipe.model.asr import build_model
from kdrecipe.model.bundle import Bundle
from kdrecipe.plugin.loader import load_plugins
from kdrecipe.testing.corpus import speak

CPU = torch.device("cpu")
FEATURES = {"name": "fbank", "num_mel_bins": 80}
LETTERS = ["|", "A", "B", "<blk>"]  # the blank is not the first
LOGITS = "frame_logits:ctc"


def spoken(*texts: str) -> list[np.ndarray]:
    return [(0.3 * speak(text)).astype(np.float32) for text in texts]


AUDIO = spoken("ONE TWO THREE", "FOUR", "FIVE SIX")


def batch_of(audio: list[np.ndarray], num_padding: int = 0) -> Batch:
    """A batch without labels; features beyond the end are noise, samples zeros."""
    features = [torch.from_numpy(extract(samples_S, 16000, FEATURES)) for samples_S in audio]
    lens, sizes = [len(x) for x in features], [len(x) for x in audio]
    features_BTF = torch.randn(len(audio), max(lens) + num_padding, 80)
    samples_BS = torch.zeros(len(audio), max(sizes) + 160 * num_padding)
    for row, (features_TF, samples_S) in enumerate(zip(features, audio, strict=True)):
        features_BTF[row, : lens[row]] = features_TF
        samples_BS[row, : sizes[row]] = torch.from_numpy(samples_S)
    none = torch.zeros(len(audio), dtype=torch.int64)
    ids = [f"u{i}" for i in range(len(audio))]
    return Batch(
        ids, features_BTF, torch.tensor(lens), none[:, None], none, none.bool(),
        samples_BS=samples_BS, sample_lens_B=torch.tensor(sizes),
    )  # fmt: skip


def loaded(teacher):
    teacher.load(CPU)
    return teacher


def make(cls, options: dict):
    return cls(cls.Config.model_validate(options))


def exported(exporter, heads: dict, tokens: Tokenizer, directory: Path) -> tuple[Bundle, Path]:
    torch.manual_seed(0)
    registry = load_plugins().registry
    model = {"name": "conformer", "num_layers": 1, "dim": 16, "heads": heads}
    built = build_model(model, input_dim=80, vocab_size=len(tokens), registry=registry).eval()
    meta = {
        "name": "tiny", "kind": "trained", "parent": None, "seed": 0, "model": model,
        "features": FEATURES, "compression": [], "plugin_files": {},
    }  # fmt: skip
    Bundle.save(directory / "bundle", built, tokens, meta)
    bundle = Bundle.load(directory / "bundle", registry)
    exporter(exporter.Config()).export(bundle, directory / "export")
    return bundle, directory / "export"


class Toy(nn.Module):
    """Audio to a frame every 0.02 s: logits of four tokens, and three hidden values, which see all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 320, stride=320)
        self.output = nn.Linear(3, 4)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.conv(samples.unsqueeze(1)).transpose(1, 2)
        hidden = hidden - hidden.mean(1, keepdim=True)
        return 20 * self.output(hidden), hidden


class Narrow(nn.Module):
    """Features to a quarter of the frames, of which the front end drops some, as a Zipformer's does."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv1d(80, 8, 5), nn.ReLU(), nn.Conv1d(8, vocab_size, 5, stride=2))

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        found = self.convs(x.transpose(1, 2)).transpose(1, 2)[:, ::2].log_softmax(-1)
        return found, ((x_lens - 7) // 2 + 1) // 2


def to_onnx(module: nn.Module, example: tuple, path: Path, inputs: list[str], outputs: list[str]) -> None:
    axes = {
        name: {0: "N", 1: "T"} if name not in ("x_lens", "lens") else {0: "N"} for name in inputs + outputs
    }
    torch.onnx.export(
        module.eval(), example, str(path), input_names=inputs, output_names=outputs,
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


def toy_options(path: Path, logits: str | int = 0, hidden: str | int = 1, **more) -> dict:
    outputs = {
        "frame_logits": {"name": logits, "frame_shift_s": 0.02},
        "hidden": {"middle": {"name": hidden, "dim": 3, "frame_shift_s": 0.02}},
    }
    return {"path": str(path), "input": "audio", "outputs": outputs, **more}


W2V = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(8, 10, 5), (8, 8, 8), (8, 8, 8)],
    "extractor_conv_bias": False, "encoder_embed_dim": 16, "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 3, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2,
    "encoder_num_heads": 2, "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 16,
    "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0, "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
}  # fmt: skip


def w2v_options(folder: Path, **more) -> dict:
    path, tokens = str(folder / "model.pt"), str(folder / "tokens.txt")
    return {"model": "wav2vec2_model", "path": path, "tokens": tokens, "options": W2V, **more}
