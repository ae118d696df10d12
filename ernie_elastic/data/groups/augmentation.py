"""What training does to a document when it is loaded: history flips, dropped frames, dropped conditions.

All of it depends on the generator of the drawn row alone, so a resumed run makes the same documents.
Letters: F frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ernie_elastic.errors import ConfigError


@dataclass(frozen=True)
class Flips:
    """History bit flips: each scale draws a rate, each bit flips with it. paper: section 2.4 (self-correction).

    max_rate: rates of the first frame lie in [min_rate, max_rate]; peer value 0.3 for photographs, ours smaller for
    tiny pictures. frame_growth moves both ends per frame, and inherit_error starts the first scale of a frame from the
    rate at which the frame before ended (VideoAR: time-dependent flips, cross-frame error inheritance; 0.01 there).
    """

    max_rate: float = 0.1
    min_rate: float = 0.0
    frame_growth: float = 0.01
    inherit_error: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_rate <= self.max_rate <= 0.5 or self.frame_growth < 0:
            raise ConfigError(
                f"flips: 0 <= min_rate {self.min_rate} <= max_rate {self.max_rate} <= 0.5 and frame_growth "
                f"{self.frame_growth} >= 0 must hold"
            )

    def rates(self, num_frames: int, num_scales: int, generator: torch.Generator) -> torch.Tensor:
        """float32 [F, num_scales], at most 0.5: beyond it a flipped bit would tell again what the true one was."""
        rates = torch.rand((num_frames, num_scales), generator=generator)
        previous = 0.0
        for frame in range(num_frames):
            low = self.min_rate + self.frame_growth * frame
            high = self.max_rate + self.frame_growth * frame
            start = min(max(low, previous), high) if frame and self.inherit_error else low
            rates[frame, 0] = start + rates[frame, 0] * (high - start)
            rates[frame, 1:] = low + rates[frame, 1:] * (high - low)
            previous = float(rates[frame, -1])
        return rates.clamp(max=0.5)


@dataclass(frozen=True)
class Augmentation:
    """Switches of one training stage. frame_drop: share of the frames of a generated clip that later frames may not
    look back to (paper: section 2.4, random masking of historical frames; peer proposal 0.1). condition_dropout: share
    of the documents with a drawn picture or clip whose input text is left out, so that guidance has an unconditional
    side (paper: silent; ours 0.1). speaker_dropout: share of the speaker embeddings that are left out (ours). A share
    of 0 draws nothing. active_bits: only the first so many bits of the visual code are in use, None = all.
    """

    flips: Flips | None = field(default_factory=Flips)
    frame_drop: float = 0.0
    condition_dropout: float = 0.0
    speaker_dropout: float = 0.1
    active_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("frame_drop", "condition_dropout", "speaker_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"augmentation: {name} {getattr(self, name)} must lie in 0..1")


def happens(share: float, generator: torch.Generator | None) -> bool:
    """True with probability `share`; a share of 0 draws nothing from the generator."""
    if share <= 0.0 or generator is None:
        return False
    return float(torch.rand((), generator=generator)) < share
