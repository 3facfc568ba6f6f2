"""What runs a Whisper: transformers for everything, faster-whisper (CTranslate2) for hypotheses.

W windows, S samples, T frames, U tokens, V vocabulary, D width.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdrecipe.interfaces import SAMPLE_RATE
from kdrecipe.text import clean

from .pretrained import did_load, quiet
from .taps import tapped
from .whisper_files import WhisperFiles


@dataclass(frozen=True)
class Said:
    """What was recognised in a window.

    Args:
        text: the words.
        tokens: ids, without the prompt and the end.
        log_prob: of the tokens and the end together.
        num_scored: how many those are.
        no_speech_prob: 0 to 1.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    log_prob: float = 0.0
    num_scored: int = 0
    no_speech_prob: float = 1.0


class TransformersWhisper:
    """Weights loaded by transformers.

    Args:
        files: the model.
        device: where it runs.
    """

    def __init__(self, files: WhisperFiles, device: torch.device) -> None:
        transformers: Any = importlib.import_module("transformers")

        assert files.model is not None
        self._files = files
        self._device = device
        config = files.model.config
        where = str(files.model.dir)
        with quiet():
            model, info = transformers.WhisperForConditionalGeneration.from_pretrained(
                where, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        did_load(info["missing_keys"], files.model)
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self.num_params = sum(p.numel() for p in model.parameters())
        self._complete(model.generation_config)
        self._tokenizer = transformers.WhisperTokenizer.from_pretrained(where, local_files_only=True)
        self._extractor = transformers.WhisperFeatureExtractor(
            feature_size=config["num_mel_bins"], chunk_length=round(files.window_s)
        )
        self._encoded: Any = importlib.import_module("transformers.modeling_outputs").BaseModelOutput
        self._end = int(self._model.generation_config.eos_token_id)

    def _complete(self, generation: Any) -> None:
        """What generate() needs of prompts, which models lack that were fine-tuned with older versions."""
        ids = {piece: i for i, piece in enumerate(self._files.pieces)}
        wanted: dict[str, Any] = {
            "is_multilingual": self._files.multilingual,
            "no_timestamps_token_id": ids["<|notimestamps|>"],
        }
        if self._files.multilingual:
            wanted["lang_to_id"] = {f"<|{code}|>": ids[f"<|{code}|>"] for code in self._files.languages}
            wanted["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
        for name, value in wanted.items():
            if getattr(generation, name, None) is None:
                setattr(generation, name, value)

    def encode(self, samples: Sequence[Tensor], taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The encoder's output (W, T, D) for whole windows, and its taps."""
        features = self._extractor(
            [samples_S.numpy() for samples_S in samples],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            device=str(self._device),
        ).input_features.to(self._device)
        encoder = self._model.get_encoder()
        modules = {f"encoder.{i}": layer for i, layer in enumerate(encoder.layers)}
        for i, layer in enumerate(encoder.layers):
            modules |= {f"encoder.{i}.{x}": getattr(layer.self_attn, f"{x}_proj") for x in "qkv"}
        with tapped({**modules, "encoder.out": encoder.layer_norm}, taps) as kept:
            hidden_WTD: Tensor = encoder(features).last_hidden_state
        return hidden_WTD, kept

    def search(self, hidden_WTD: Tensor, beam: int) -> list[Said]:
        """Hypotheses by transformers' own ``generate``, without times."""
        languages = self._languages(hidden_WTD)
        several = {"language": languages, "task": "transcribe"} if self._files.multilingual else {}
        with quiet():
            rows = self._model.generate(
                encoder_outputs=self._encoded(last_hidden_state=hidden_WTD),
                num_beams=beam,
                do_sample=False,
                return_timestamps=False,
                **several,
            ).tolist()
        found = [self._without_prompt(r, lang) for r, lang in zip(rows, languages, strict=True)]
        logits_WUV, no_speech_W = self._logits(hidden_WTD, found)
        return [
            self._scored(tokens, logits_UV[: len(tokens) + 1], float(no_speech))
            for tokens, logits_UV, no_speech in zip(found, logits_WUV, no_speech_W, strict=True)
        ]

    def log_probs(self, hidden_WTD: Tensor, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-posteriors (U + 1, V) of each text's tokens and its end, each given those before it."""
        logits_WUV, _ = self._logits(hidden_WTD, texts)
        return [
            logits_UV[: len(t) + 1].log_softmax(-1) for t, logits_UV in zip(texts, logits_WUV, strict=True)
        ]

    def encode_text(self, text: str) -> list[int]:
        """Tokens as Whisper would say them, which begins each text with a space."""
        ids: list[int] = self._tokenizer.encode(" " + clean(text), add_special_tokens=False) if text else []
        return ids

    def _logits(self, hidden_WTD: Tensor, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits (W, U + 1, V) along texts, and the probability (W,) that nobody speaks."""
        prompts = [self._files.prompt(language) for language in self._languages(hidden_WTD)]
        start = len(prompts[0])
        rows = [torch.tensor([*p, *text]) for p, text in zip(prompts, texts, strict=True)]
        ids_WU = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._end).to(self._device)
        decoder = self._model.get_decoder()
        logits = self._model.proj_out(
            decoder(input_ids=ids_WU, encoder_hidden_states=hidden_WTD, use_cache=False).last_hidden_state
        )
        no_speech = self._model.generation_config.no_timestamps_token_id - 1
        return logits[:, start - 1 :], logits[:, 0].softmax(-1)[:, no_speech]

    def _languages(self, hidden_WTD: Tensor) -> list[str | None]:
        """Of each window: the one that is set, or the likeliest."""
        if self._files.language or not self._files.multilingual:
            return [self._files.language] * len(hidden_WTD)
        ids = self._model.detect_language(encoder_outputs=self._encoded(last_hidden_state=hidden_WTD))
        return [self._files.pieces[i].strip("<|>") for i in ids.tolist()]

    def _without_prompt(self, row: list[int], language: str | None) -> list[int]:
        prompt = self._files.prompt(language)
        tokens = row[len(prompt) :] if row[: len(prompt)] == prompt else row
        return tokens[: tokens.index(self._end)] if self._end in tokens else tokens

    def _scored(self, tokens: Sequence[int], logits_UV: Tensor, no_speech: float) -> Said:
        """With the log-probability among tokens that the search may say, as Whisper's authors count it."""
        config = self._model.generation_config
        logits_UV = logits_UV.clone()
        logits_UV[:, config.suppress_tokens or []] = -torch.inf
        logits_UV[:1, config.begin_suppress_tokens or []] = -torch.inf
        full = len(tokens) >= self._files.longest_text  # no room for the end: the search stopped by itself
        ids = torch.tensor([*tokens] if full else [*tokens, self._end], device=logits_UV.device)
        picked = logits_UV[: len(ids)].log_softmax(-1).gather(-1, ids[:, None])
        text = clean(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return Said(text, tuple(tokens), float(picked.sum()), len(ids), no_speech)


class FasterWhisper:
    """Weights in CTranslate2's form, run by faster-whisper's engine.

    Args:
        files: the model.
        device: where it runs.
    """

    def __init__(self, files: WhisperFiles, device: torch.device) -> None:
        package: Any = importlib.import_module("faster_whisper")
        extractor: Any = importlib.import_module("faster_whisper.feature_extractor").FeatureExtractor
        kind = "cuda" if device.type == "cuda" else "cpu"
        self._files = files
        self._whisper: Any = package.WhisperModel(
            str(files.ct2),
            device=kind,
            device_index=device.index or 0,
            cpu_threads=torch.get_num_threads(),
            local_files_only=True,
        )
        self._extractor: Any = extractor(feature_size=self._whisper.model.n_mels)

    def search(self, samples: Sequence[Tensor], beam: int) -> list[Said]:
        """Hypotheses of windows, without times."""
        ctranslate2: Any = importlib.import_module("ctranslate2")

        size = round(self._files.window_s * SAMPLE_RATE)
        padded = [np.pad(samples_S.numpy(), (0, size - len(samples_S))) for samples_S in samples]
        features = np.stack([self._extractor(samples_S, padding=0) for samples_S in padded])
        encoded = self._whisper.model.encode(ctranslate2.StorageView.from_array(features.astype(np.float32)))
        results = self._whisper.model.generate(
            encoded,
            [self._files.prompt(language) for language in self._languages(encoded, len(samples))],
            beam_size=beam,
            length_penalty=1,
            max_length=2 * self._files.longest_text,  # it takes half of that, after the prompt
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=True,
            suppress_tokens=[-1],  # those that the model lists
        )
        return [self._said(result) for result in results]

    def _languages(self, encoded: Any, num: int) -> list[str | None]:
        if self._files.language or not self._files.multilingual:
            return [self._files.language] * num
        return [likely[0][0].strip("<|>") for likely in self._whisper.model.detect_language(encoded)]

    def _said(self, result: Any) -> Said:
        tokens = result.sequences_ids[0]
        # CTranslate2 divides the sum of tokens and end by the number of tokens alone
        log_prob = result.scores[0] * len(tokens)
        text = clean(self._whisper.hf_tokenizer.decode(tokens, skip_special_tokens=True))
        return Said(text, tuple(tokens), log_prob, len(tokens) + 1, result.no_speech_prob)
