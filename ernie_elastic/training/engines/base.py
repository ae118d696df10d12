"""What every engine shares: the model with its loss as one module, the result of a micro-batch, the interface."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.expert_parallel import ExpertShard
from ernie_elastic.modeling.losses import modality_sums
from ernie_elastic.modeling.sequence_parallel import SequenceShard
from ernie_elastic.schema import PackedBatch, RouterOutput, SubModelSpec
from ernie_elastic.training.accumulation import Specs
from ernie_elastic.training.losses import combine
from ernie_elastic.training.ranks import all_reduce_sum


@dataclass
class MicroResult:
    """Outcome of one micro-batch: loss sums and counts over all ranks, float32 [5]; this rank's routing."""

    sums: torch.Tensor
    counts: torch.Tensor
    routing: list[RouterOutput]
    layers: tuple[int, ...]


class LossModule(nn.Module):
    """Model plus loss, as one module that an engine can wrap."""

    def __init__(
        self,
        model: ErnieElasticForCausalLM,
        world_size: int,
        shard: SequenceShard | None = None,
        text_length_power: float = 0.0,
        expert_shard: ExpertShard | None = None,
    ) -> None:
        super().__init__()
        self.model, self.expert_shard = model, expert_shard
        self.world_size, self.shard, self.text_length_power = world_size, shard, text_length_power

    def forward(
        self, batch: PackedBatch, spec: SubModelSpec, weights: torch.Tensor
    ) -> tuple[torch.Tensor, MicroResult]:
        """The scalar loss to differentiate, and what to log; batch holds tensors [B, T], weights float32 [5]."""
        output = self.model.forward_packed(batch, submodel=spec, shard=self.shard, expert_shard=self.expert_shard)
        sums, counts = modality_sums(output, batch, self.text_length_power)
        loss, sums, counts = combine(sums, counts, weights, all_reduce_sum, self.world_size)
        if output.router_loss is not None:
            loss = loss + output.router_loss
        if not torch.isfinite(sums).all():
            loss = loss * float("nan")  # else a gradient that happens to be finite would be applied, on some ranks only
        return loss, MicroResult(sums, counts, output.routing, output.layers)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Engine(ABC):
    """What the loop needs of an engine."""

    model: ErnieElasticForCausalLM
    device: torch.device

    @abstractmethod
    def train_step(
        self, batches: list[PackedBatch], spec: Specs, lr: float, weights: torch.Tensor | None = None
    ) -> tuple[list[MicroResult], float]:
        """One optimizer step over the micro-batches; returns their results and the gradient norm before clipping.

        spec: one for all of them, or one for each. Their number may differ from step to step.

        A step whose loss or gradient is not finite is not applied on any rank; its norm is inf or NaN. weights float32
        [5]: of the losses, in the order of LOSSES (default: the configuration's fixed ones).
        """

    @abstractmethod
    def save_state(self, directory: Path) -> None:
        """Write parameters (fp32 masters) and optimizer state; every rank calls it."""

    @abstractmethod
    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote; every rank calls it.

        Raises CheckpointError for the state of another engine, or of another number of ranks while
        `training.resume_other_world_size` is off.
        """

    @abstractmethod
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The model's whole state on rank 0: tensors of their full shapes [...], names as in `model.state_dict()`.

        Every rank calls it; the others get an empty dictionary.
        """

    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters of the whole model, wherever they lie."""
