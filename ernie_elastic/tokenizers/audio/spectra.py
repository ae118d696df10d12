"""Short-time spectra of whole 80 ms steps, and waves back from magnitudes alone.

Contract: frame t of a wave covers samples centred on (t + 1/2) * hop, so a wave of n whole hops has n frames and any
whole number of steps a whole number of frames; phases are referenced to the middle of the frame. Everything is
deterministic: phases start from the peaks of each frame (single-pass inversion), then a few momentum Griffin-Lim
rounds make neighbouring frames agree. ours: the whole module (the report names no vocoder).

Shape letters: N waves, L samples, T frames, K frequency bins.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ernie_elastic.errors import ConfigError

MOMENTUM = 0.99  # ours: the usual value of accelerated Griffin-Lim
SMALL = 1e-8


class Spectrum(torch.nn.Module):
    """A Hann-window transform of `window` samples every `hop` samples; window >= 2 * hop, both even."""

    hann_W: torch.Tensor

    def __init__(self, window: int, hop: int) -> None:
        super().__init__()
        if window % 2 or hop % 2 or window < 2 * hop:
            raise ConfigError(
                f"spectrum: window {window} and hop {hop} must be even, the window at least twice the hop"
            )
        self.window, self.hop = window, hop
        self.register_buffer("hann_W", torch.hann_window(window), persistent=False)

    @property
    def num_bins(self) -> int:
        """K, from 0 Hz to half the sample rate."""
        return self.window // 2 + 1

    @property
    def margin(self) -> int:
        """Zeros added on either side of a wave, so that its first and last hop have a whole frame."""
        return (self.window - self.hop) // 2

    def forward(self, wave_NL: torch.Tensor) -> torch.Tensor:
        """complex64 [N, T, K] of float32 waves [N, L], L = T * hop."""
        frames_NTW = F.pad(wave_NL, (self.margin, self.margin)).unfold(1, self.window, self.hop) * self.hann_W
        return torch.fft.rfft(torch.roll(frames_NTW, -(self.window // 2), dims=2))

    def inverse(self, spectrum_NTK: torch.Tensor) -> torch.Tensor:
        """float32 waves [N, T * hop] whose transform is nearest to `spectrum_NTK` (weighted overlap-add)."""
        num_frames = spectrum_NTK.shape[1]
        frames_NTW = torch.fft.irfft(spectrum_NTK, n=self.window)
        frames_NTW = torch.roll(frames_NTW, self.window // 2, dims=2) * self.hann_W
        weights_1TW = self.hann_W.square().expand(1, num_frames, self.window)
        wave = self._overlap(frames_NTW) / self._overlap(weights_1TW).clamp(min=1e-3)
        return wave[:, self.margin : wave.shape[1] - self.margin]

    def _overlap(self, frames_NTW: torch.Tensor) -> torch.Tensor:
        length = self.hop * (frames_NTW.shape[1] - 1) + self.window
        columns = frames_NTW.transpose(1, 2)
        return F.fold(columns, (1, length), (1, self.window), stride=(1, self.hop))[:, 0, 0]

    def wave_from_magnitude(self, magnitude_NTK: torch.Tensor, rounds: int) -> torch.Tensor:
        """float32 waves [N, T * hop] of magnitudes float32 [N, T, K]; `rounds` of Griffin-Lim after the first guess."""
        spectrum = torch.polar(magnitude_NTK, self.first_phase(magnitude_NTK))
        before = None
        for _ in range(rounds):
            found = self(self.inverse(spectrum))
            pushed = found if before is None else found + MOMENTUM * (found - before)
            before = found
            spectrum = magnitude_NTK * pushed / (pushed.abs() + SMALL)
        return self.inverse(spectrum)

    def first_phase(self, magnitude_NTK: torch.Tensor) -> torch.Tensor:
        """Phases float32 [N, T, K]: each bin turns with the frequency of the nearest peak of its frame.

        background: single-pass spectrogram inversion; a parabola through the log magnitudes gives a peak's frequency.
        """
        num_waves, _, num_bins = magnitude_NTK.shape
        bins_K = torch.arange(num_bins, device=magnitude_NTK.device)
        phase_NK = magnitude_NTK.new_zeros(num_waves, num_bins)
        phases = []
        for magnitude_NK in magnitude_NTK.unbind(dim=1):
            nearest_NK = _nearest_peak(magnitude_NK, bins_K)
            log_NK = (magnitude_NK + 1e-6).log()
            low, top, high = (log_NK.gather(1, nearest_NK + shift) for shift in (-1, 0, 1))
            offset_NK = (0.5 * (low - high) / (low - 2 * top + high).clamp(max=-1e-6)).clamp(-0.5, 0.5)
            turn_NK = 2 * math.pi * self.hop / self.window * (nearest_NK + offset_NK)
            phase_NK = torch.remainder(phase_NK.gather(1, nearest_NK) + turn_NK, 2 * math.pi)
            phases.append(phase_NK)
        return torch.stack(phases, dim=1)


def _nearest_peak(magnitude_NK: torch.Tensor, bins_K: torch.Tensor) -> torch.Tensor:
    """int64 [N, K]: index of the local maximum nearest to each bin, inside 1..K-2."""
    num_bins = len(bins_K)
    peak = torch.zeros_like(magnitude_NK, dtype=torch.bool)
    inner = magnitude_NK[:, 1:-1]
    peak[:, 1:-1] = (inner > magnitude_NK[:, :-2]) & (inner >= magnitude_NK[:, 2:])
    far = 4 * num_bins
    left = torch.where(peak, bins_K, -far).cummax(dim=1).values
    right = torch.where(peak, bins_K, far).flip(1).cummin(dim=1).values.flip(1)
    return torch.where(bins_K - left <= right - bins_K, left, right).clamp(1, num_bins - 2)
