"""What Whisper hears: its log-mel filter bank (Radford et al. 2022, arXiv 2212.04356), in torch.

S samples, T frames, M mel bins.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SAMPLE_RATE = 16000
WINDOW = 30 * SAMPLE_RATE
"""Whisper hears so many samples at a time; shorter audio is followed by silence."""
RANGE = 2.0
"""Values are at most so far below the largest of their window: 80 dB."""
_HOP, _FFT = 160, 400


def log_mel(samples_S: Tensor, num_mels: int) -> Tensor:
    """(T, M) log-mel values of audio at 16 kHz in [-1, 1], T = S / 160 rounded; windows of 30 s in a row.

    Frame t is centred at sample 160 t.
    """
    num_frames = (len(samples_S) + _HOP // 2) // _HOP
    parts = samples_S.split(WINDOW) if len(samples_S) else (samples_S,)
    return torch.cat([_of_window(part, num_mels) for part in parts])[:num_frames]


def _of_window(samples_S: Tensor, num_mels: int) -> Tensor:
    padded = torch.nn.functional.pad(samples_S.float(), (0, WINDOW - len(samples_S)))
    spectrum = torch.stft(padded, _FFT, _HOP, window=torch.hann_window(_FFT), return_complex=True)
    power_TF = spectrum[:, :-1].abs().square().t()
    log_TM = (power_TF @ _filters(num_mels)).clamp(min=1e-10).log10()
    return (log_TM.clamp(min=float(log_TM.max()) - 4 * RANGE) + 4) / 4


@functools.lru_cache
def _filters(num_mels: int) -> Tensor:
    """(F, M) triangles of equal area, from 0 to 8000 Hz on Slaney's mel scale."""
    from torchaudio.functional import melscale_fbanks

    filters: Tensor = melscale_fbanks(
        _FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, num_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return filters
