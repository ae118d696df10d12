"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ernie_elastic.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """kind "wsd": warm-up, constant, then a decay over the last `decay_share` of the steps (paper: section 5 uses WSD
    with the cosine of mid-training as its decay). kind "cosine": warm-up, then cosine to min_ratio."""

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = 50
    decay_share: float = 0.4
    min_ratio: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in ("wsd", "cosine"):
            raise ConfigError(f"schedule.kind {self.kind!r} is not one of wsd, cosine")
        if not 0 <= self.decay_share <= 1 or not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule: decay_share {self.decay_share} and min_ratio {self.min_ratio} lie in 0..1")

    def factor(self, step: int, total_steps: int) -> float:
        """Multiplier of the peak learning rate at `step` of `total_steps`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        start = 0 if self.kind == "cosine" else round(total_steps * (1 - self.decay_share))
        done = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
        return warmup * (self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
