"""A Whisper directory of Hugging Face's (``config.json``, ``model.safetensors``) as a model of kdrecipe's.

V tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from kdrecipe.data.byte_bpe import piece
from kdrecipe.errors import RecipeError
from kdrecipe.interfaces import SOS_EOS_ID

NUM_SPECIAL = 3
"""Tokens before Whisper's: the blank, start and end of a sentence, the unknown one."""
SPECIAL = ("<blk>", "<sos/eos>", "<unk>")

_FEED_FORWARD = {"ff.0": "final_layer_norm", "ff.1": "fc1", "ff.4": "fc2"}
_ENCODER = {"norm_attention": "self_attn_layer_norm", "out": "self_attn.out_proj", **_FEED_FORWARD}
_DECODER = {
    "norm_self": "self_attn_layer_norm",
    "out_self": "self_attn.out_proj",
    "norm_cross": "encoder_attn_layer_norm",
    "q": "encoder_attn.q_proj",
    "out_cross": "encoder_attn.out_proj",
    **_FEED_FORWARD,
}
"""Module of a layer here -> there."""


def description(directory: Path) -> dict[str, Any]:
    """What a recipe writes as ``model:`` for all of it: ``whisper_encoder`` with the head ``attention``.

    Raises:
        RecipeError: ``config.json`` is missing, damaged, or not of a Whisper.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        dim = int(config["d_model"])
        return {
            "name": "whisper_encoder",
            "num_layers": config["encoder_layers"],
            "dim": dim,
            "num_heads": config["encoder_attention_heads"],
            "ff_dim": _unless_default(config["encoder_ffn_dim"], dim),
            "num_mels": config["num_mel_bins"],
            "pooling": 1,
            "heads": {
                "attention": {
                    "num_layers": config["decoder_layers"],
                    "num_heads": config["decoder_attention_heads"],
                    "ff_dim": _unless_default(config["decoder_ffn_dim"], dim),
                    "activation": "gelu",
                    "positions": "learned",
                    "max_positions": config["max_target_positions"],
                    "tied": True,
                }
            },
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"it does not describe a Whisper ({type(error).__name__}: {error})",
            where=str(path),
            remedy="give a directory that transformers' WhisperForConditionalGeneration has saved",
        ) from error


def _unless_default(ff_dim: int, dim: int) -> int | None:
    return None if ff_dim == 4 * dim else ff_dim


def state_dict(directory: Path) -> dict[str, Tensor]:
    """The weights in the names of the model that :func:`description` gives, float32.

    Without the input's map, which depends on the features. Token ``i`` of Whisper is ``i + 3`` here, after
    the three that every list of kdrecipe's begins with. A sentence starts with ``<|startoftranscript|>``
    alone: what else Whisper is told before a text (language, task, no times), training makes up for.

    Args:
        directory: with ``config.json`` and ``model.safetensors``.

    Raises:
        RecipeError: the weights are missing, damaged or not of this model.
    """
    model, path = description(directory), directory / "model.safetensors"
    try:
        from safetensors.torch import load_file

        found = load_file(path)
        prefix = "" if "encoder.conv1.weight" in found else "model."
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        special = {"start": config["decoder_start_token_id"], "end": config["eos_token_id"]}
        return _renamed(lambda name: found[prefix + name].float(), model, **special)
    except ImportError as error:
        raise RecipeError(
            "reading Whisper's weights needs safetensors", where=str(path), remedy="pip install safetensors"
        ) from error
    except KeyError as error:
        raise RecipeError(
            f"{error} is not in it, nor in config.json",
            where=str(path),
            remedy="give both as they were saved",
        ) from error
    except Exception as error:  # safetensors has types of its own
        raise RecipeError(
            f"the weights can't be read ({type(error).__name__}: {error})",
            where=str(path),
            remedy="give a directory that transformers' WhisperForConditionalGeneration has saved",
        ) from error


def _renamed(get: Callable[[str], Tensor], model: dict[str, Any], start: int, end: int) -> dict[str, Tensor]:
    """All weights, by their new names; tokens ``start`` and ``end`` of Whisper become ``<sos/eos>``."""
    import torch

    state: dict[str, Tensor] = {}

    def take(here: str, there: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{here}.{kind}"] = get(f"{there}.{kind}")

    def join(here: str, there: str, maps: str) -> None:
        """Several maps of one input as one; Whisper's keys have no bias."""
        weights = [get(f"{there}.{m}_proj.weight") for m in maps]
        state[f"{here}.weight"] = torch.cat(weights)
        biases = [
            w.new_zeros(len(w)) if m == "k" else get(f"{there}.{m}_proj.bias")
            for m, w in zip(maps, weights, strict=True)
        ]
        state[f"{here}.bias"] = torch.cat(biases)

    for conv in ("conv1", "conv2"):
        take(f"encoder.{conv}", f"encoder.{conv}")
    take("encoder.norm", "encoder.layer_norm")
    for i in range(model["num_layers"]):
        here = there = f"encoder.layers.{i}"
        join(f"{here}.qkv", f"{there}.self_attn", "qkv")
        for mine, its in _ENCODER.items():
            take(f"{here}.{mine}", f"{there}.{its}")
    head = "heads.attention"
    take(f"{head}.norm", "decoder.layer_norm")
    for i in range(model["heads"]["attention"]["num_layers"]):
        here, there = f"{head}.layers.{i}", f"decoder.layers.{i}"
        join(f"{here}.qkv", f"{there}.self_attn", "qkv")
        join(f"{here}.kv", f"{there}.encoder_attn", "kv")
        for mine, its in _DECODER.items():
            take(f"{here}.{mine}", f"{there}.{its}")
    embedding_VD = get("decoder.embed_tokens.weight")
    special = embedding_VD.mean(0).repeat(NUM_SPECIAL, 1)
    special[SOS_EOS_ID] = embedding_VD[start]
    state[f"{head}.embedding.weight"] = torch.cat([special, embedding_VD])
    state[f"{head}.end_D"] = embedding_VD[end].clone()
    state[f"{head}.positions.weight"] = get("decoder.embed_positions.weight")
    return state


def pieces(directory: Path) -> list[str]:
    """The tokens by their number in :func:`state_dict`, named as in a list of tokens trimmed from them.

    Raises:
        RecipeError: ``tokenizer.json`` is missing or damaged.
    """
    path = directory / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        by_id = {number: symbol for symbol, number in content["model"]["vocab"].items()}
        by_id |= {token["id"]: token["content"] for token in content.get("added_tokens", ())}
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        # the model has more than the tokeniser: timestamps are not always listed
        names = [by_id.get(number, f"<{number}>") for number in range(config["vocab_size"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"it does not hold a tokeniser ({type(error).__name__}: {error})", where=str(path)
        ) from error
    return [*SPECIAL, *map(piece, names)]
