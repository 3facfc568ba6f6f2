"""wav2vec 2.0 and its kin by transformers: what ``hf_ctc`` and ``hf_encoder`` share.

B utterances, S samples, T frames, V vocabulary, D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from kdrecipe.errors import RecipeError
from kdrecipe.frames import frame_mask
from kdrecipe.interfaces import SAMPLE_RATE, Batch, Hidden, Located, Options, TargetSpec

from .pretrained import Pretrained, did_load, find_pretrained, need_transformers, quiet
from .taps import tapped
from .windows import audio_of

MASKED = frozenset({"wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"})
"""Model types that hear nothing of masked samples, if their convolutions are normed layer by layer."""

UNMASKED = frozenset({"data2vec-audio", "wav2vec2-conformer"})
"""Model types whose convolutions over frames hear padding, whatever the mask."""

OUT = "encoder.out"


class SpeechEncoderOptions(Options):
    """Options of both teachers.

    Args:
        path: a directory as ``save_pretrained`` writes it, or a name on Hugging Face's hub
            (``facebook/wav2vec2-base-960h``).
    """

    path: Annotated[str, Located]


class SpeechEncoder:
    """A convolutional front end on samples and a Transformer, maybe with a CTC head.

    What both teachers are, except for what they give: :class:`kdrecipe.interfaces.Teacher`.

    Args:
        config: where the model is.
        who: the teacher, for messages.
        ctc: whether the CTC head is wanted.

    Raises:
        RecipeError: it is not there, incomplete, or another kind of model.
        MissingExtra: transformers is not installed.
    """

    Config: ClassVar[type[Options]] = SpeechEncoderOptions
    input: ClassVar[Literal["features", "audio"]] = "audio"

    def __init__(self, config: SpeechEncoderOptions, who: str, *, ctc: bool) -> None:
        self.found: Pretrained = find_pretrained(config.path)
        self.files: Sequence[Path] = self.found.files
        self._ctc = ctc
        described, where = self.found.config, str(self.found.dir)
        kind = described.get("model_type")
        if kind not in MASKED | UNMASKED:
            raise RecipeError(
                f"a model of type {kind!r}, which {who} does not know",
                where=where,
                remedy="use the teacher whisper"
                if kind == "whisper"
                else f"it knows {', '.join(sorted(MASKED | UNMASKED))}",
            )
        if described.get("add_adapter"):
            raise RecipeError(
                "the model has an adapter that makes its frames longer, which is not supported",
                where=where,
                remedy="use a model with add_adapter: false",
            )
        self.found.require_weights()
        heads = described.get("architectures") or ()
        if ctc and heads and not any(name.endswith("ForCTC") for name in heads):
            raise RecipeError(
                f"the model has no CTC head: it is a {', '.join(heads)}",
                where=where,
                remedy="use a model that was fine-tuned to recognise speech, or the teacher hf_encoder",
            )
        extractor = self.found.extractor()
        if (rate := extractor.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
            raise RecipeError(
                f"the model hears audio of {rate} Hz, recipes have {SAMPLE_RATE}",
                where=where,
                remedy=f"use a model for {SAMPLE_RATE} Hz",
            )
        need_transformers(who)
        self._normalise = bool(extractor.get("do_normalize", True))
        self._masks = (
            kind in MASKED
            and described.get("feat_extract_norm", "group") == "layer"
            and bool(extractor.get("return_attention_mask"))
        )
        self._has_parts = kind != "wav2vec2-conformer"  # whose positions enter between keys and scores
        self._kernels: Sequence[int] = described.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2))
        self._strides: Sequence[int] = described.get("conv_stride", (5, 2, 2, 2, 2, 2, 2))
        self.frame_shift_s: float = prod(self._strides) / SAMPLE_RATE
        self._width = int(described.get("hidden_size", 768))
        self._num_classes = int(described.get("vocab_size", 32))
        self._num_layers = int(described.get("num_hidden_layers", 12))
        self.num_params: int | None = None
        self._model: Any = None

    def hidden_specs(self) -> list[TargetSpec]:
        """``encoder.N``, the output of block N, ``encoder.N.q``, ``.k`` and ``.v`` of its attention, and
        ``encoder.out``, what the encoder as a whole gives."""
        parts = ("", ".q", ".k", ".v") if self._has_parts else ("",)
        taps = [*(f"encoder.{i}{x}" for i in range(self._num_layers) for x in parts), OUT]
        return [TargetSpec("hidden", tap, self._width, self.frame_shift_s) for tap in taps]

    def load(self, device: torch.device) -> None:
        """Read the weights, all in float32."""
        transformers: Any = importlib.import_module("transformers")

        kind = transformers.AutoModelForCTC if self._ctc else transformers.AutoModel
        with quiet():
            self._model, info = kind.from_pretrained(
                str(self.found.dir), dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        did_load(info["missing_keys"], self.found)
        self._model.to(device).eval().requires_grad_(False)
        self.num_params = sum(p.numel() for p in self._model.parameters())

    def num_frames(self, num_samples: int) -> int:
        """Frames that fit into the audio: those of each convolution, without padding."""
        for kernel, stride in zip(self._kernels, self._strides, strict=True):
            num_samples = max(0, (num_samples - kernel) // stride + 1)
        return num_samples

    @torch.no_grad()
    def run(self, batch: Batch, taps: Sequence[str]) -> tuple[Tensor | None, dict[str, Hidden], Tensor]:
        """CTC logits (B, T, V) if wanted, hidden states of ``taps``, and frames (B,), on the batch's device.

        A model whose answers depend on the padding hears utterances of equal length together only.
        """
        assert self._model is not None, "load() comes first"
        samples_BS, sample_lens_B = audio_of(batch)
        lens = [self.num_frames(length) for length in sample_lens_B.tolist()]
        lens_B = torch.tensor(lens, device=batch.lens_B.device)
        widths = {**dict.fromkeys(taps, self._width), **({"logits": self._num_classes} if self._ctc else {})}
        shape = (len(batch), int(lens_B.max()))
        values = {name: torch.zeros(*shape, width, device=lens_B.device) for name, width in widths.items()}
        for rows in self._groups(sample_lens_B, lens_B):
            found = self._run(samples_BS[rows], sample_lens_B[rows], taps)
            for name, x_BTD in found.items():
                mask_BT1 = frame_mask(lens_B[rows], x_BTD.shape[1])[..., None]
                values[name][rows, : x_BTD.shape[1]] = x_BTD.to(lens_B.device).masked_fill(~mask_BT1, 0.0)
        return values.get("logits"), {tap: Hidden(values[tap], lens_B) for tap in taps}, lens_B

    def _groups(self, sample_lens_B: Tensor, lens_B: Tensor) -> list[list[int]]:
        """Rows that are heard together; those without a frame are not heard at all."""
        rows = [i for i, n in enumerate(lens_B.tolist()) if n]
        if self._masks:
            return [rows] if rows else []
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(int(sample_lens_B[row]), []).append(row)
        return list(groups.values())

    def _run(self, samples_BS: Tensor, sample_lens_B: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        device = self._model.device
        longest = int(sample_lens_B.max())
        mask_BS = frame_mask(sample_lens_B, longest).to(device)
        samples_BS = samples_BS[:, :longest].to(device)
        if self._normalise:
            samples_BS = normalised(samples_BS, mask_BS)
        encoder = getattr(self._model, self._model.base_model_prefix, self._model).encoder
        modules = {OUT: encoder, **{f"encoder.{i}": layer for i, layer in enumerate(encoder.layers)}}
        for i, layer in enumerate(encoder.layers if self._has_parts else ()):
            modules |= {f"encoder.{i}.{x}": getattr(layer.attention, f"{x}_proj") for x in "qkv"}
        mask = {"attention_mask": mask_BS.long()} if self._masks else {}
        with torch.autocast(device.type, enabled=False), tapped(modules, taps) as kept:
            out = self._model(input_values=samples_BS, **mask)
        return {**kept, "logits": out.logits} if self._ctc else kept


def normalised(samples_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Samples of mean 0 and variance 1 in each utterance, counting valid ones only; 0 elsewhere."""
    lens_B1 = mask_BS.sum(-1, keepdim=True).clamp(min=1)
    centred_BS = (samples_BS - (samples_BS * mask_BS).sum(-1, keepdim=True) / lens_B1) * mask_BS
    return centred_BS / (centred_BS.square().sum(-1, keepdim=True) / lens_B1 + 1e-7).sqrt()
