"""Small random models of transformers' classes, saved as real ones are: for tests of what loads them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

WHISPER_WINDOW_S = 2
MEL_BINS = 16
MAX_POSITIONS = 24
CTC_TOKENS = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "|",
    "E",
    "T",
    "O",
    "N",
    "H",
    "U",
    "R",
    "F",
    "I",
    "V",
    "X",
    "W",
    "S",
)


def save_whisper(
    directory: Path,
    *,
    languages: Sequence[str] = (),
    seed: int = 0,
    merges: Sequence[tuple[str, str]] = (),
    writes: str = "",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A Whisper that hears 2 s and writes single bytes, with tokeniser and feature extractor.

    Args:
        directory: made here, and returned.
        languages: codes of those that it knows; none: it is English-only.
        seed: of the weights.
        merges: of its byte-level BPE, the first first; their tokens follow the bytes.
        writes: letters that it writes, and spaces; empty: any byte.
        config: options of transformers' ``WhisperConfig`` in place of the small ones.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers: Any = importlib.import_module("transformers")
    letters = sorted(importlib.import_module("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    letters += [a + b for a, b in merges]
    special = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", *(languages or ("en",)))]
    special += [f"<|{name}|>" for name in ("translate", "transcribe", "startoflm", "startofprev")]
    special += ["<|nospeech|>", "<|notimestamps|>"]
    ids = {token: i for i, token in enumerate([*letters, *special])}
    tokenizer = transformers.WhisperTokenizer(
        vocab=ids, merges=list(merges), unk_token=special[0], bos_token=special[0], eos_token=special[0]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    options: dict[str, Any] = {
        "vocab_size": len(ids),
        "num_mel_bins": MEL_BINS,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_source_positions": 50 * WHISPER_WINDOW_S,
        "max_target_positions": MAX_POSITIONS,
        "init_std": 0.5,  # tokens far from ties, and different ones in different audio
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "pad_token_id": ids[special[0]],
        "bos_token_id": ids[special[0]],
        "eos_token_id": ids[special[0]],
    }
    made = transformers.WhisperConfig(**{**options, **(config or {})})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.WhisperForConditionalGeneration(made)
    unwritten = [ids[x] for x in letters if x not in {*writes, "Ġ"}] if writes else range(10)
    settings: dict[str, Any] = {
        "is_multilingual": bool(languages),
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "suppress_tokens": [*unwritten, *(ids[token] for token in special[1:])],
        "begin_suppress_tokens": [ids[letters[11]], ids[special[0]]],
        "max_length": min(MAX_POSITIONS, made.max_target_positions),
        "return_timestamps": False,
    }
    if languages:
        settings["lang_to_id"] = {f"<|{code}|>": ids[f"<|{code}|>"] for code in languages}
        settings["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")}
    model.save_pretrained(directory)
    path = directory / "generation_config.json"
    written = json.loads(path.read_text())
    written.pop("_from_model_config", None)  # transformers would not read what it does not know
    path.write_text(json.dumps({**written, **settings}))
    tokenizer.save_pretrained(directory)
    window_s = made.max_source_positions // 50
    extractor = transformers.WhisperFeatureExtractor(feature_size=made.num_mel_bins, chunk_length=window_s)
    extractor.save_pretrained(directory)
    return directory


def save_wav2vec2(
    directory: Path,
    *,
    kind: str = "Wav2Vec2",
    ctc: bool = True,
    norm: str = "group",
    tokens: Sequence[str] = CTC_TOKENS,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A model of wav2vec 2.0's family, with the strides of the real ones.

    Args:
        directory: made here, and returned.
        kind: ``Wav2Vec2``, ``Hubert``, ``WavLM``, ...
        ctc: with a CTC head and its tokens.
        norm: of the convolutions: ``group`` (depends on padding) or ``layer``.
        tokens: of the head, with those of :data:`CTC_TOKENS` that are in brackets.
        seed: of the weights.
        config: options of transformers' configuration in place of the small ones.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers: Any = importlib.import_module("transformers")
    options: dict[str, Any] = {
        "vocab_size": len(tokens),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "initializer_range": 0.5,
        "pad_token_id": tokens.index("<pad>"),
    }
    made = getattr(transformers, f"{kind}Config")(**{**options, **(config or {})})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCTC" if ctc else f"{kind}Model")(made)
    model.save_pretrained(directory)
    transformers.Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=norm == "layer"
    ).save_pretrained(directory)
    if ctc:
        (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return directory
