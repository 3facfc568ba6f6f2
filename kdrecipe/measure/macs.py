"""Multiply-accumulates: what a model computes per second of audio, whatever the machine.

Counted where torch does the work, so layers of plugins count, too: matrix products, convolutions,
attention and LSTMs, in floating point and in integers. What is done value by value (norms, activations, the
search itself) is not counted; it is a few percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdrecipe.interfaces import BLANK_ID, Batch

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    from kdrecipe.interfaces import ModelOutput
    from kdrecipe.model.asr import AsrModel

AUDIO_S = 10.0
"""Length of the utterance that is counted: attention costs more per second, the longer an utterance is."""
TOKENS_PER_S = 4.0
"""That a search finds, of heads that compute something for each token."""
FRAMES_PER_S = 100


def macs_per_second(
    model: AsrModel, features: Mapping[str, Any], *, audio_s: float = AUDIO_S, head: str | None = None
) -> float:
    """Multiply-accumulates per second of audio, encoder and search.

    Args:
        model: of a bundle; its mode and device stay as they are.
        features: the bundle's ``meta["features"]``.
        audio_s: length of the utterance.
        head: that is searched; None: the first. Of others nothing is counted. ``ctc`` speaks for each frame,
            ``rnnt`` for each frame and token, ``attention`` for each token, of which there are
            :data:`TOKENS_PER_S`.
    """
    import torch

    device = next(model.parameters()).device
    num_frames, num_tokens = round(audio_s * FRAMES_PER_S), round(audio_s * TOKENS_PER_S)
    features_BTF = torch.zeros(1, num_frames, int(features["num_mel_bins"]), device=device)
    lens_B = torch.tensor([num_frames], device=device)
    batch = Batch(
        ids=[""],
        features_BTF=features_BTF,
        lens_B=lens_B,
        tokens_BU=torch.full((1, num_tokens), BLANK_ID + 1, device=device),
        token_lens_B=torch.tensor([num_tokens], device=device),
        labelled_B=torch.ones(1, dtype=torch.bool, device=device),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _counter() as counter:
            out = model.encode(features_BTF, lens_B)
            name = head or next(iter(model.heads), "")
            if name:
                _search(model.heads[name], out, batch)
    finally:
        model.train(was_training)
    return float(counter.get_total_flops()) / 2 / audio_s


def _search(head: nn.Module, out: ModelOutput, batch: Batch) -> None:
    """What a search of ``head`` computes, given the tokens that it finds."""
    if not hasattr(head, "join"):
        head(out.hidden_BTD, out.lens_B, batch)
        return
    transducer: Any = head
    frames_TJ = transducer.encode(out.hidden_BTD)[0]
    side_UJ = transducer.predict(transducer.start(batch.tokens_BU.shape[1]))
    transducer.join(frames_TJ, side_UJ[:1])  # once per frame, and once more after each token
    transducer.join(side_UJ, side_UJ)


def _counter() -> FlopCounterMode:
    """torch's own, which lacks what only CPUs and integers have."""
    from torch import ops
    from torch.utils.flop_counter import FlopCounterMode

    aten = ops.aten
    known = {
        aten._int_mm: _product,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_fused_attention_overrideable: _attention,
        aten.mkldnn_rnn_layer: _lstm_layer,
        aten._cudnn_rnn: _cudnn_lstm,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


# Each gets the shapes of an operation's arguments and gives twice the multiply-accumulates.


def _product(a: Any, b: Any, *rest: Any, **more: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _attention(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
    (num, heads, queries, dim), keys = q, k[2]
    return int(2 * num * heads * queries * keys * (dim + v[3]))


def _lstm_layer(x: Any, input_weight: Any, recurrent_weight: Any, *rest: Any, **more: Any) -> int:
    return int(2 * x[0] * x[1] * input_weight[0] * (input_weight[1] + recurrent_weight[1]))


def _cudnn_lstm(x: Any, weights: Any, *rest: Any, **more: Any) -> int:
    return int(2 * x[0] * x[1] * sum(w[0] * w[1] for w in weights if len(w) == 2))
