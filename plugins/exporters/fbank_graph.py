"""Lhotse's log-mel filter bank as a graph of plain operators: raw audio goes in, features come out.

For runtimes that hand over samples. The spectrum of a frame comes from two small products and the factors
between them (Cooley and Tukey 1965), not from an FFT operator, which few runtimes have.

S samples, T frames, N = N1 N2 = 512 points of the transform, F mel bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdrecipe.data.features import make_extractor

N1, N2 = 16, 32
BLOCK = 20  # mel bands whose frequencies lie in one matrix: one for all bands would be mostly zeros
K2 = 17  # rows of the second product that hold the 257 frequencies up to half the sampling rate


class FbankGraph(nn.Module):
    """(1, S) samples in [-1, 1] at 16 kHz to (1, T, F), T = S / 160 rounded; less than 400 are followed by 0.

    Args:
        num_mel_bins: F.
    """

    window_N: Tensor
    first: Tensor
    between: Tensor
    second: Tensor

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        config = make_extractor({"name": "fbank", "num_mel_bins": num_mel_bins})
        layers = config.extractor
        self.size, self.hop = layers.wav2win._length, layers.wav2win._shift
        self.preemphasis = layers.preemph_coeff
        self.floor = float(layers._eps)
        assert layers.fft_length == N1 * N2
        self.register_buffer("window_N", layers.wav2win._window.detach().clone())
        self.starts: list[int] = []
        for number, filters_Kf in enumerate(layers._fb.detach().split(BLOCK, dim=1)):
            heard_K = filters_Kf.sum(1).nonzero()[:, 0]
            self.starts.append(int(heard_K[0]))
            self.register_buffer(f"bands{number}", filters_Kf[heard_K[0] : heard_K[-1] + 1].clone())
        self.register_buffer("first", _waves(N1, N1))
        self.register_buffer("between", _waves(N1, N2, N1 * N2))
        self.register_buffer("second", _waves(N2, K2))

    def forward(self, samples: Tensor) -> tuple[Tensor]:
        frames_TN = self._frames(samples[0])
        frames_TN = frames_TN - frames_TN.mean(1, keepdim=True)
        before_TN = torch.cat([frames_TN[:, :1], frames_TN[:, :-1]], dim=1)
        frames_TN = (frames_TN - self.preemphasis * before_TN) * self.window_N
        power_TK = self._power(nn.functional.pad(frames_TN, (0, N1 * N2 - self.size)))
        bands = [self.get_buffer(f"bands{number}") for number in range(len(self.starts))]
        parts = [power_TK[:, k : k + len(x)] @ x for k, x in zip(self.starts, bands, strict=True)]
        return (torch.cat(parts, dim=1).clamp(min=self.floor).log()[None],)

    def _frames(self, samples_S: Tensor) -> Tensor:
        """(T, 400); what is missing before and after the audio is mirrored."""
        present = torch._shape_as_tensor(samples_S)[0]
        heard = present.clamp(min=self.size)
        padded = torch.cat([samples_S, samples_S.new_zeros(self.size)])
        num_frames = torch.div(heard + self.hop // 2, self.hop, rounding_mode="floor")
        numbers_T = torch.arange(num_frames)  # type: ignore[call-overload]
        starts_T1 = numbers_T[:, None] * self.hop - (self.size - self.hop) // 2
        at_TN = starts_T1 + torch.arange(self.size)
        at_TN = torch.where(at_TN < 0, -1 - at_TN, at_TN)
        return padded[torch.where(at_TN >= heard, 2 * heard - 1 - at_TN, at_TN)]

    def _power(self, frames_TN: Tensor) -> Tensor:
        """(T, 272) squared magnitudes at frequencies 0, 1, ... of 512 points.

        Sample 32 a + b, frequency c + 16 d: sum over a with ``first``, times ``between``, sum over b with
        ``second``.
        """
        x_Tba = frames_TN.unflatten(1, (N1, N2)).transpose(1, 2)
        real_Tbc, imag_Tbc = x_Tba @ self.first[0], x_Tba @ self.first[1]
        cos_bc, sin_bc = self.between.transpose(1, 2)
        real_Tcb = (real_Tbc * cos_bc - imag_Tbc * sin_bc).transpose(1, 2)
        imag_Tcb = (real_Tbc * sin_bc + imag_Tbc * cos_bc).transpose(1, 2)
        cos_bd, sin_bd = self.second
        real_Tcd, imag_Tcd = real_Tcb @ cos_bd - imag_Tcb @ sin_bd, real_Tcb @ sin_bd + imag_Tcb @ cos_bd
        power_Tcd: Tensor = real_Tcd.square() + imag_Tcd.square()
        return power_Tcd.transpose(1, 2).flatten(1)


def _waves(rows: int, columns: int, period: int | None = None) -> Tensor:
    """(2, rows, columns) cosine and sine of -2 pi row column / period, which is ``rows`` by default."""
    products = torch.arange(rows, dtype=torch.float64)[:, None] * torch.arange(columns)
    angles = -2 * math.pi * products / (period or rows)
    return torch.stack([angles.cos(), angles.sin()]).float()
