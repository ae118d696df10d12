"""The small audio tokenizer: 80 ms steps, spectra, a few code books, level 0 coarse.

Contract: `encode` gives int64 codes [S, Q] of S = ceil(samples / step) steps; `decode` gives a wave of S whole steps.
Both are deterministic, alone or in a batch. A step is described by its compressed short-time magnitudes, projected
on `num_components` directions; residual code books quantise the projection; phases are found anew at decoding
(`spectra`). Code 0 of every level is the zero vector: silence, or nothing to add; digital silence decodes to itself.
paper: section 2.5 (12.5 Hz, residual vector quantisation). ours: fixed spectra and k-means code books
in place of a trained neural codec, which two CPU cores cannot train in half a minute.

Shape letters: N waves, L samples, S steps, Q levels, V codes of a level, F spectral features of a step,
C components, T frames, K frequency bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ernie_elastic.errors import ConfigError
from ernie_elastic.tokenizers.audio.base import AudioTokenizer, Wave
from ernie_elastic.tokenizers.audio.spectra import Spectrum
from ernie_elastic.tokenizers.quantizers import rvq_decode, rvq_encode

BATCH_STEPS = 2048  # steps that are transformed at once; bounds the memory of a long list of waves


@dataclass(frozen=True)
class SpectralAudioTokenizerConfig:
    """Sizes of the audio tokenizer.

    sample_rate: Hz. step_samples: samples of one step (1280 = 80 ms). window, hop: samples of the short-time
    transform; hop divides step_samples. compression: exponent on magnitudes. num_components: C, directions kept.
    num_levels: Q, code books. codebook_size: V, codes of each. phase_rounds: Griffin-Lim rounds at decoding.
    """

    sample_rate: int = 16000
    step_samples: int = 1280
    window: int = 512
    hop: int = 128
    compression: float = 0.5
    num_components: int = 128
    num_levels: int = 3
    codebook_size: int = 64
    phase_rounds: int = 8

    def __post_init__(self) -> None:
        if self.step_samples % self.hop:
            raise ConfigError(f"audio tokenizer: hop {self.hop} does not divide step_samples {self.step_samples}")
        for name in ("num_components", "num_levels", "codebook_size", "sample_rate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"audio tokenizer: {name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.compression <= 1:
            raise ConfigError(f"audio tokenizer: compression {self.compression} must lie in (0, 1]")

    @property
    def frames_per_step(self) -> int:
        """Short-time frames of one step."""
        return self.step_samples // self.hop

    @property
    def num_features(self) -> int:
        """F, spectral features of one step."""
        return self.frames_per_step * (self.window // 2 + 1)


class SpectralAudioTokenizer(AudioTokenizer):
    """Residual codes of sound. Its buffers are set by `training.tokenizer_audio_spectral` or `load`."""

    architecture = "spectral"
    config_class = SpectralAudioTokenizerConfig
    config: SpectralAudioTokenizerConfig
    basis_FC: torch.Tensor
    codebooks_QVC: torch.Tensor

    def __init__(self, config: SpectralAudioTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.spectrum = Spectrum(config.window, config.hop)
        self.register_buffer("basis_FC", torch.zeros(config.num_features, config.num_components))
        shape = (config.num_levels, config.codebook_size, config.num_components)
        self.register_buffer("codebooks_QVC", torch.zeros(shape))

    def features(self, waves: Sequence[Wave]) -> list[torch.Tensor]:
        """Compressed magnitudes float32 [S, F] of each wave float [L]; waves are padded with zeros to whole steps.

        Raises DataError for a wave that is empty, not mono or not finite.
        """
        padded = [self._padded(wave) for wave in waves]
        found: list[torch.Tensor] = [torch.empty(0)] * len(padded)
        for indices in self._batches([len(wave) for wave in padded], self.config.step_samples):
            batch_NL = torch.stack([padded[index] for index in indices])
            compressed = self.spectrum(batch_NL).abs().pow(self.config.compression)
            steps_NSF = compressed.reshape(len(indices), -1, self.config.num_features)
            for index, steps_SF in zip(indices, steps_NSF, strict=True):
                found[index] = steps_SF
        return found

    def project(self, features_SF: torch.Tensor) -> torch.Tensor:
        """Features [S, F] as components float32 [S, C], which the code books quantise."""
        return features_SF @ self.basis_FC

    def unproject(self, components_SC: torch.Tensor) -> torch.Tensor:
        """Components [S, C] as compressed magnitudes float32 [S, F], none negative."""
        return (components_SC @ self.basis_FC.T).clamp(min=0.0)

    @torch.no_grad()
    def encode_with_components(self, waves: Sequence[Wave]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes int64 [S, Q] of each wave, and the components float32 [S, C] before quantisation."""
        if not waves:
            return []
        features = self.features(waves)
        lengths = [len(steps) for steps in features]
        components_SC = self.project(torch.cat(features))
        codes_SQ = rvq_encode(components_SC, self.codebooks_QVC)
        return list(zip(codes_SQ.split(lengths), components_SC.split(lengths), strict=True))

    @torch.no_grad()
    def decode_batch(self, codes: Sequence[torch.Tensor | np.ndarray]) -> list[torch.Tensor]:
        """`decode` of many code sequences of any lengths: a list of float32 [S * step_samples]."""
        checked = [self.check_codes(item) for item in codes]
        found: list[torch.Tensor] = [torch.empty(0)] * len(checked)
        keys = [len(item) * (self.num_levels + 1) + item.shape[1] for item in checked]
        for indices in self._batches(keys, self.num_levels + 1):
            batch_NSQ = torch.stack([checked[index] for index in indices])
            waves_NL = self._waves(batch_NSQ)
            for index, wave_L in zip(indices, waves_NL, strict=True):
                found[index] = wave_L
        return found

    def _waves(self, codes_NSQ: torch.Tensor) -> torch.Tensor:
        levels = codes_NSQ.shape[2]
        components = rvq_decode(codes_NSQ.flatten(0, 1), self.codebooks_QVC[:levels])
        magnitude = self.unproject(components).pow(1.0 / self.config.compression)
        magnitude_NTK = magnitude.reshape(len(codes_NSQ), -1, self.spectrum.num_bins)
        return self.spectrum.wave_from_magnitude(magnitude_NTK, self.config.phase_rounds).clamp(-1.0, 1.0)

    def _padded(self, wave: Wave) -> torch.Tensor:
        wave_L = self.check_wave(wave)
        return nn.functional.pad(wave_L, (0, -len(wave_L) % self.config.step_samples))

    @staticmethod
    def _batches(lengths: Sequence[int], unit: int) -> list[list[int]]:
        """Indices of equal lengths together, at most BATCH_STEPS steps of `unit` at once."""
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            groups.setdefault(length, []).append(index)
        batches = []
        for length, members in groups.items():
            size = max(1, BATCH_STEPS // max(1, length // unit))
            batches += [members[start : start + size] for start in range(0, len(members), size)]
        return batches
