"""The weighted loss of the four modalities: local sums divided by the counts of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ernie_elastic.modeling.losses import MODALITIES


@dataclass(frozen=True)
class LossWeights:
    """Weight of each modality's mean loss. ours: bits count more, since a mean over bits hides rare hard ones."""

    text: float = 1.0
    image: float = 4.0
    video: float = 4.0
    audio: float = 1.0


def combine(
    sums: torch.Tensor,
    counts: torch.Tensor,
    weights: LossWeights,
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    world_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss to differentiate, global sums [4], global counts [4]).

    The loss is scaled by world_size, since data parallelism averages gradients: the result is the exact mean over
    the targets of all ranks, however they are spread.
    """
    totals = all_reduce_sum(torch.cat([sums.detach(), counts]))
    global_sums, global_counts = totals[:4], totals[4:]
    scale = torch.tensor([getattr(weights, name) for name in MODALITIES], device=sums.device)
    loss = (sums * scale / global_counts.clamp(min=1e-6)).sum() * world_size
    return loss, global_sums, global_counts
