"""Pictures and clips to multi-scale bits and back: what every visual tokenizer can do.

Contract: `encode` gives latents, `quantizer.encode` their bits, `decode` pixels of the accumulated bits of any number
of scales; all deterministic, a picture's latents a function of that picture alone. A picture is a clip of one frame.
`VisualTokenizer.load` reads every architecture: `patch` (minutes on a CPU) and `conv`, each in the file of its name.
paper: section 2.2 (bit-wise quantisation over scales, one tokenizer for pictures and videos).

Shape letters: N pictures, F frames, H/W pixels of a side, f latent frames, h/w latent grid, D bits (and latent width).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ernie_elastic.errors import DataError
from ernie_elastic.tokenizers.quantizers import MultiScaleBits
from ernie_elastic.tokenizers.saved import SavedModule, load_saved

ARCHITECTURES = {
    "patch": "ernie_elastic.tokenizers.visual.patch:PatchVisualTokenizer",
    "conv": "ernie_elastic.tokenizers.visual.conv:ConvVisualTokenizer",
}


class VisualTokenizer(SavedModule):
    """Codes RGB pictures and clips as bits. A subclass has `config`, `quantizer`, `encode` and `decode`.

    config: a frozen dataclass with image_size (pixels of a side of the square picture), num_bits (D), grid (cells of a
    side of its latents), scales, amplitudes and bits_per_picture. quantizer: `MultiScaleBits` of the square picture.
    """

    quantizer: MultiScaleBits

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.parameters()).device

    def encode(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 latents [N, h, w, D] of uint8 pixels [N, H, W, 3], each picture by itself."""
        raise NotImplementedError

    def decode(self, feature_NhwD: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, H, W, 3] of accumulated bits float32 [N, h, w, D], each picture by itself."""
        raise NotImplementedError

    @property
    def frames_alone(self) -> bool:
        """True when `encode_video` codes each frame as a picture of its own."""
        return True

    def latent_frames(self, num_frames: int) -> int:
        """f, latent frames of a clip of F frames. Raises DataError for a count that the tokenizer cannot code."""
        if num_frames < 1:
            raise DataError(f"visual tokenizer: a clip has {num_frames} frames; it needs at least 1")
        return num_frames

    def encode_video(self, pixels_FHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """float32 latents [f, h, w, D] of one clip uint8 [F, H, W, 3]; here every frame is coded by itself."""
        return self.encode(pixels_FHW3)

    def decode_video(self, feature_fhwD: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
        """uint8 clip [F, H, W, 3] of accumulated bits [f, h, w, D]; num_frames keeps the first F frames."""
        frames_FHW3 = self.decode(feature_fhwD)
        return frames_FHW3 if num_frames is None else frames_FHW3[:num_frames]

    def reconstruct(self, pixels_NHW3: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 pixels [N, H, W, 3] after encoding, quantising and decoding."""
        return self.decode(self.quantizer.encode(self.encode(pixels_NHW3)).total)

    @staticmethod
    def load(directory: Path | str) -> VisualTokenizer:
        """Read what `save` of any architecture wrote. Raises CheckpointError when a file is missing or damaged."""
        return load_saved(directory, "visual", "patch", ARCHITECTURES)
