"""Sound to residual codes and back: what every audio tokenizer can do.

Contract: `encode` gives int64 codes [S, Q] of S = ceil(samples / step) steps; `decode` gives a wave of S whole steps.
Both are deterministic. `AudioTokenizer.load` reads every architecture: `spectral` (seconds on a CPU), `seanet`, and
Transformers' Mimi, EnCodec and DAC (`adapters`). paper: section 2.5.

Shape letters: N waves, L samples, S steps, Q levels, V codes of a level, C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ernie_elastic.errors import DataError
from ernie_elastic.tokenizers.saved import SavedModule, load_saved

Wave = np.ndarray | torch.Tensor

ARCHITECTURES = {
    "spectral": "ernie_elastic.tokenizers.audio.spectral:SpectralAudioTokenizer",
    "seanet": "ernie_elastic.tokenizers.audio.seanet:SeanetAudioTokenizer",
    "mimi": "ernie_elastic.tokenizers.audio.adapters:MimiTokenizer",
    "encodec": "ernie_elastic.tokenizers.audio.adapters:EncodecTokenizer",
    "dac": "ernie_elastic.tokenizers.audio.adapters:DacTokenizer",
}


class AudioTokenizer(SavedModule):
    """Residual codes of sound. A subclass has `config`, `encode_with_components` and `decode_batch`.

    config: a frozen dataclass with sample_rate (Hz), step_samples (samples of one step of codes), num_levels (Q),
    codebook_size (V) and num_components (C, width of the features before quantisation).
    """

    @property
    def num_levels(self) -> int:
        """Q, codes of one step."""
        return self.config.num_levels

    @property
    def codebook_size(self) -> int:
        """V, values that a code may have."""
        return self.config.codebook_size

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(iter(self.state_dict().values())).device

    def encode_with_components(self, waves: Sequence[Wave]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes int64 [S, Q] of each wave float [L], and the features float32 [S, C] before quantisation."""
        raise NotImplementedError

    def decode_batch(self, codes: Sequence[torch.Tensor | np.ndarray]) -> list[torch.Tensor]:
        """Waves float32 [S * step_samples] of codes int64 [S, Q'], Q' <= Q levels, coarse first."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, wave: Wave) -> torch.Tensor:
        """int64 codes [S, Q] of a float32 mono wave [L] at the config's sample rate, padded to whole steps."""
        return self.encode_batch([wave])[0]

    @torch.no_grad()
    def encode_batch(self, waves: Sequence[Wave]) -> list[torch.Tensor]:
        """`encode` of many waves of any lengths: a list of int64 [S, Q]."""
        return [codes_SQ for codes_SQ, _ in self.encode_with_components(waves)]

    @torch.no_grad()
    def decode(self, codes_SQ: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 wave [S * step_samples] in [-1, 1] of codes int64 [S, Q']; Q' <= Q levels, coarse first.

        Raises DataError when the codes are empty, have another shape or lie outside 0..V-1.
        """
        return self.decode_batch([codes_SQ])[0]

    def check_wave(self, wave: Wave) -> torch.Tensor:
        """The wave as float32 [L] on this device. Raises DataError when it is empty, not mono or not finite."""
        wave_L = torch.as_tensor(wave, dtype=torch.float32, device=self.device)
        if wave_L.dim() != 1 or not len(wave_L):
            raise DataError(f"audio tokenizer: a wave has shape {list(wave_L.shape)}; expected mono [L] with L >= 1")
        if not bool(torch.isfinite(wave_L).all()):
            raise DataError("audio tokenizer: a wave has values that are not finite")
        return wave_L

    def check_codes(self, codes: torch.Tensor | np.ndarray) -> torch.Tensor:
        """The codes as int64 [S, Q'] on this device. Raises DataError for another shape or a value outside 0..V-1."""
        codes_SQ = torch.as_tensor(codes, device=self.device).long()
        if codes_SQ.dim() != 2 or not len(codes_SQ) or not 1 <= codes_SQ.shape[1] <= self.num_levels:
            raise DataError(
                f"audio tokenizer: codes have shape {list(codes_SQ.shape)}; expected [steps >= 1, 1..{self.num_levels}]"
            )
        low, high = int(codes_SQ.min()), int(codes_SQ.max())
        if low < 0 or high >= self.codebook_size:
            raise DataError(f"audio tokenizer: codes {low}..{high} lie outside 0..{self.codebook_size - 1}")
        return codes_SQ

    @staticmethod
    def load(directory: Path | str) -> AudioTokenizer:
        """Read what `save` of any architecture wrote. Raises CheckpointError when a file is missing or damaged."""
        return load_saved(directory, "audio", "spectral", ARCHITECTURES)
