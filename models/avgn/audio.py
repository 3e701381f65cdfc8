"""From sound to spectrograms: the ``mel`` front end of this project and AdaMML's ``stft256``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def mel_filters(bins: int, bands: int, sample_rate: int, f_min: float, f_max: float) -> Tensor:
    """(bins, bands) HTK mel triangles of height 1 over ``bins`` frequencies from 0 to half the sample rate."""
    frequencies = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)
    low, high = (2595 * math.log10(1 + f / 700) for f in (f_min, f_max))
    corners = 700 * (10 ** (torch.linspace(low, high, bands + 2, dtype=torch.float64) / 2595) - 1)
    rising = (frequencies[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies[:, None]) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


class _FrontEnd(nn.Module):
    """Short-time spectra; ``sample_rate`` (Hz) and ``clip_seconds`` tell the datamodule what to cut."""

    def __init__(self, sample_rate: int, clip_seconds: float, n_fft: int, win_length: int, hop_length: int, pad_mode: str):
        super().__init__()
        self.sample_rate, self.clip_seconds = sample_rate, clip_seconds
        self.n_fft, self.hop_length, self.pad_mode = n_fft, hop_length, pad_mode
        self.register_buffer("window", torch.hann_window(win_length, periodic=True), persistent=False)

    def _power(self, wave: Tensor) -> Tensor:
        """|X|^2 (..., bins, frames) of sound (..., n), float32 whatever the precision of the run."""
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.stft(
                wave.float().flatten(0, -2),
                self.n_fft,
                self.hop_length,
                len(self.window),
                self.window.float(),
                center=True,
                pad_mode=self.pad_mode,
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
        return power.unflatten(0, wave.shape[:-1])


class LogMel(_FrontEnd):
    """Log-mel spectrograms (..., bands, frames), normalised by scalar statistics kept in the checkpoint (0 and 1 until set).

    Args:
        sample_rate: Hz.
        clip_seconds: length of a snippet's sound.
        n_fft: length of the Fourier transform, samples.
        win_length: length of the window, samples.
        hop_length: distance of windows, samples.
        bands: number of mel filters.
        f_min: lowest frequency of the filters, Hz.
        f_max: highest frequency of the filters, Hz.
        frames: the first that many are kept; null keeps all.
        eps: added to the power before the natural logarithm.
    """

    def __init__(
        self,
        sample_rate: int = 16000,
        clip_seconds: float = 1.28,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        bands: int = 64,
        f_min: float = 0.0,
        f_max: float = 8000.0,
        frames: int | None = 128,
        eps: float = 1e-6,
        pad_mode: str = "reflect",
    ):
        super().__init__(sample_rate, clip_seconds, n_fft, win_length, hop_length, pad_mode)
        self.frames, self.eps = frames, eps
        self.register_buffer("filters", mel_filters(n_fft // 2 + 1, bands, sample_rate, f_min, f_max), persistent=False)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def log_mel(self, wave: Tensor) -> Tensor:
        """Without the normalisation."""
        power = self._power(wave)[..., : self.frames]
        return (self.filters.T.float() @ power + self.eps).log()

    def forward(self, wave: Tensor) -> Tensor:
        return (self.log_mel(wave) - self.mean) / self.std

    @torch.no_grad()
    def measure(self, wave: Tensor) -> None:
        """Take mean and deviation from these sounds (N, n)."""
        values = self.log_mel(wave)
        self.mean.copy_(values.mean())
        self.std.copy_(values.std())


class LogSTFT(_FrontEnd):
    """AdaMML's linear log spectrograms (..., n_fft//2 + 1, frames), not normalised."""

    def __init__(
        self,
        sample_rate: int = 24000,
        clip_seconds: float = 1.28,
        n_fft: int = 511,
        win_length: int = 240,
        hop_length: int = 120,
        eps: float = 1e-6,
        pad_mode: str = "constant",
    ):
        super().__init__(sample_rate, clip_seconds, n_fft, win_length, hop_length, pad_mode)
        self.eps = eps

    def forward(self, wave: Tensor) -> Tensor:
        return (self._power(wave) + self.eps).log()
