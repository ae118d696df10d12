"""The weighted loss: local sums divided by the counts of all ranks, and weights that follow the observed losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.modeling.losses import LOSSES, MODALITIES


@dataclass(frozen=True)
class LossWeights:
    """Fixed weight of each mean loss. mtp: paper, section 1.4 (0.3 in the 8K stage, 0.1 in mid-training).

    text_length_power p: each target token of a document with n of them counts n^-p, so that a long caption does not
    drown a short answer; the logged text loss is that weighted mean. peer: InternVL 2.5 uses 0.5; 0 = every token
    counts the same.
    """

    text: float = 1.0
    image: float = 1.0
    video: float = 1.0
    audio: float = 1.0
    mtp: float = 0.3
    text_length_power: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.text_length_power <= 1.0:
            raise ConfigError(f"loss weights: text_length_power {self.text_length_power} must lie in 0..1")

    def vector(self) -> torch.Tensor:
        """float32 [5], in the order of LOSSES."""
        return torch.tensor([getattr(self, name) for name in LOSSES])


@dataclass(frozen=True)
class PosteriorWeights:
    """Weights that bring the modalities' losses to one interval: reference / EMA of the modality's own loss.

    paper: section 2.7 names a posterior-based weighting and gives no formula. ours: the observed loss is the posterior
    evidence, the reference is text, the ratio is clamped to [low, high]. decay: of the EMA, per optimizer step.
    """

    enabled: bool = True
    decay: float = 0.98
    low: float = 0.1
    high: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0 or not 0.0 < self.low <= 1.0 <= self.high:
            raise ConfigError(
                f"posterior weights: 0 <= decay {self.decay} < 1 and 0 < low {self.low} <= 1 <= high {self.high} must "
                "hold"
            )


class LossBalance:
    """The weights of a run: fixed ones times posterior ones; its EMA is part of the trainer's state."""

    def __init__(self, weights: LossWeights, posterior: PosteriorWeights) -> None:
        self.weights, self.posterior = weights, posterior
        self.ema: dict[str, float] = {}

    def vector(self) -> torch.Tensor:
        """float32 [5] for the next step, in the order of LOSSES; a modality not seen yet counts as its fixed weight."""
        vector = self.weights.vector()
        reference = self.ema.get("text")
        if self.posterior.enabled and reference is not None:
            for index, name in enumerate(MODALITIES):
                ratio = reference / max(self.ema.get(name, reference), 1e-6)
                vector[index] *= min(max(ratio, self.posterior.low), self.posterior.high)
        return vector

    def observe(self, losses: dict[str, float]) -> None:
        """Take in a step's mean losses, the same on every rank; modalities without targets are left as they are."""
        for name in MODALITIES:
            if name in losses:
                old = self.ema.get(name, losses[name])
                self.ema[name] = self.posterior.decay * old + (1.0 - self.posterior.decay) * losses[name]


def combine(
    sums: torch.Tensor,
    counts: torch.Tensor,
    weights: torch.Tensor,
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    world_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss to differentiate, global sums [5], global counts [5]) of local sums and counts float32 [5] and weights [5].

    The loss is scaled by world_size, since data parallelism averages gradients: the result is the exact mean over
    the targets of all ranks, however they are spread.
    """
    totals = all_reduce_sum(torch.cat([sums.detach(), counts]))
    global_sums, global_counts = totals[: len(LOSSES)], totals[len(LOSSES) :]
    loss = (sums * weights.to(sums) / global_counts.clamp(min=1e-6)).sum() * world_size
    return loss, global_sums, global_counts
