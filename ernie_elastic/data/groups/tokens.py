"""One tokenised segment of a document. Letters: F frames, H/W pixels, h/w latent grid, D bits, S steps, Q levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ernie_elastic.errors import DataError
from ernie_elastic.tokenizers.quantizers import ScaleCodes


@dataclass(frozen=True)
class Tokens:
    """One tokenised segment; one of the last five fields is set, for understanding both pixels and latents.

    ids int32 [n]; pixels uint8 [F, H, W, 3] (understanding); latents float16 [F, h, w, D] (generation, and
    the frozen CNN features of understanding);
    codes int16 [S, Q]; scale_codes: bits that are decided already, such as a picture that the model drew. Sounds may
    also carry features float [S, F] (the audio tokenizer's before quantisation) and a speaker embedding float32 [size].
    """

    kind: str
    role: str
    ids: np.ndarray | None = None
    pixels: np.ndarray | None = None
    latents: np.ndarray | None = None
    codes: np.ndarray | None = None
    scale_codes: ScaleCodes | None = None
    features: np.ndarray | None = None
    speaker: np.ndarray | None = None

    def __len__(self) -> int:
        """Text tokens, frames or audio steps."""
        if self.scale_codes is not None:
            return len(self.scale_codes.total)
        return len(self.array())

    def array(self) -> np.ndarray:
        """Whichever array is set."""
        for value in (self.ids, self.pixels, self.latents, self.codes):
            if value is not None:
                return value
        raise DataError(f"segment of kind {self.kind!r} holds no data")
