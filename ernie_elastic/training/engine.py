"""The engines behind one interface: DeepSpeed (the only place that imports it) and plain torch.

Both take a step over micro-batches of (PackedBatch, SubModelSpec), average gradients over ranks, clip, and step.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.losses import modality_sums
from ernie_elastic.modeling.sequence_parallel import SequenceShard
from ernie_elastic.schema import PackedBatch, RouterOutput, SubModelSpec
from ernie_elastic.training.accumulation import Specs, accumulate_over, specs_of
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.losses import combine
from ernie_elastic.training.muon import MuonAdamW, is_matrix_of_the_stack
from ernie_elastic.training.ranks import all_reduce_sum, barrier, device, rank, start_group, world_size

STATE_TAG = "state"


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
    ) -> None:
        super().__init__()
        self.model = model
        self.world_size, self.shard, self.text_length_power = world_size, shard, text_length_power

    def forward(
        self, batch: PackedBatch, spec: SubModelSpec, weights: torch.Tensor
    ) -> tuple[torch.Tensor, MicroResult]:
        """The scalar loss to differentiate, and what to log; batch holds tensors [B, T], weights float32 [5]."""
        output = self.model.forward_packed(batch, submodel=spec, shard=self.shard)
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


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Groups by optimizer and weight decay; "scale" times the scheduled learning rate is a group's own.

    Weight decay is on matrices only; norms, biases and embeddings are left alone (ours: the field's habit).
    """
    muon_scale = training.muon_learning_rate / training.learning_rate
    groups: dict[str, dict[str, Any]] = {
        "gate_up": {"muon": True, "split": 2, "scale": muon_scale, "weight_decay": training.weight_decay},
        "muon": {"muon": True, "scale": muon_scale, "weight_decay": training.weight_decay},
        "decay": {"scale": 1.0, "weight_decay": training.weight_decay},
        "plain": {"scale": 1.0, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "embed" not in name and "position" not in name
        kind = "decay" if matrix else "plain"
        if training.optimizer == "muon" and is_matrix_of_the_stack(name, parameter):
            kind = "gate_up" if "gate_up" in name else "muon"
        members[kind].append(parameter)
    return [{"params": members[name], **group} for name, group in groups.items() if members[name]]


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for what is no matrix of the stack."""
    groups, betas = parameter_groups(model, training), (training.beta1, training.beta2)
    if training.optimizer == "muon":
        return MuonAdamW(groups, betas)
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, foreach=True)


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Give every group its share of the scheduled learning rate."""
    for group in groups:
        group["lr"] = lr * group["scale"]


def deepspeed_config(training: TrainingConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; a pure function. Clipping is always named, since its default is not 0."""
    groups = ranks // training.sequence_parallel
    if groups * training.sequence_parallel != ranks:
        raise ConfigError(f"training: {ranks} ranks are no multiple of sequence_parallel {training.sequence_parallel}")
    micro_rows = training.rows_per_step // (groups * training.micro_batches)
    if micro_rows < 1 or micro_rows * groups * training.micro_batches != training.rows_per_step:
        raise ConfigError(
            f"training: rows_per_step {training.rows_per_step} is no multiple of {groups} ranks that read data x "
            f"{training.micro_batches} micro-batches; change --training.rows-per-step"
        )
    return {
        # DeepSpeed counts every rank; the ranks of a sequence group share their rows.
        "train_batch_size": micro_rows * training.micro_batches * ranks,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": training.micro_batches,
        "gradient_clipping": training.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": training.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


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
        """Read what `save_state` wrote; every rank calls it."""


class TorchEngine(Engine):
    """Plain torch: gradients are averaged in one flat all-reduce, every rank steps."""

    def __init__(self, model: ErnieElasticForCausalLM, training: TrainingConfig) -> None:
        ranks = world_size()
        deepspeed_config(training, ranks)  # the same check of the batch sizes
        start_group(training.step_limit_s)
        self.device = device()
        self.model = model.train()
        nn.Module.to(self.model, self.device)
        self.module = LossModule(self.model, ranks, None, training.loss_weights.text_length_power)
        self.training, self.ranks = training, ranks
        self.optimizer = make_optimizer(model, training)

    def train_step(
        self, batches: list[PackedBatch], spec: Specs, lr: float, weights: torch.Tensor | None = None
    ) -> tuple[list[MicroResult], float]:
        results = []
        weights = self.training.loss_weights.vector() if weights is None else weights
        for batch, part in zip(batches, specs_of(spec, len(batches)), strict=True):
            loss, result = self.module(batch.to(self.device), part, weights)
            (loss / len(batches)).backward()
            results.append(result)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in parameters]) / self.ranks
            dist.all_reduce(flat)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
        norm = nn.utils.clip_grad_norm_(parameters, self.training.gradient_clip or float("inf"))
        set_learning_rate(self.optimizer.param_groups, lr)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return results, float(norm)

    def save_state(self, directory: Path) -> None:
        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, directory / "torch_engine.pt")
        barrier()

    def load_state(self, directory: Path) -> None:
        path = directory / "torch_engine.pt"
        if not path.exists():
            raise CheckpointError(f"{directory} was not written by the torch engine; pass --training.engine deepspeed")
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine(Engine):
    """DeepSpeed under ZeRO 0 to 2 with torch's AdamW, or under stage 0 with Muon."""

    def __init__(self, model: ErnieElasticForCausalLM, training: TrainingConfig) -> None:
        deepspeed = _import_deepspeed()
        ranks = world_size()
        config = deepspeed_config(training, ranks)
        if not dist.is_initialized():
            _default_launcher_environment()
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            deepspeed.init_distributed(
                dist_backend=backend, timeout=timedelta(seconds=training.step_limit_s), verbose=False
            )
        shard, power = sequence_shard(training.sequence_parallel), training.loss_weights.text_length_power
        module = LossModule(model, ranks, shard, power)
        optimizer = make_optimizer(model, training)
        self.engine, self.optimizer, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.engine.train()
        self.device, self.model, self.training = self.engine.device, model, training

    def train_step(
        self, batches: list[PackedBatch], spec: Specs, lr: float, weights: torch.Tensor | None = None
    ) -> tuple[list[MicroResult], float]:
        results = []
        weights = self.training.loss_weights.vector() if weights is None else weights
        set_learning_rate(self.engine.optimizer.param_groups, lr)
        norm, parts = 0.0, specs_of(spec, len(batches))
        accumulate_over(self.engine, len(batches))
        for number, batch in enumerate(batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            loss, result = self.engine(batch.to(self.device), parts[number - 1], weights)
            self.engine.backward(loss)
            if number == len(batches) and not self.engine.zero_optimization():
                # Stage 0 clips in step() and keeps no norm; its gradients are averaged over the ranks by now.
                norm = float(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
            # The other stages leave such a step out themselves.
            unfit = number == len(batches) and not math.isfinite(norm)
            with _without_step(self.engine.optimizer) if unfit else contextlib.nullcontext():
                self.engine.step()
            results.append(result)
        return results, norm if norm else float(self.engine.get_global_grad_norm() or 0.0)

    def save_state(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag=STATE_TAG)
        barrier()

    def load_state(self, directory: Path) -> None:
        if not (directory / STATE_TAG).is_dir():
            raise CheckpointError(f"{directory} was not written by the deepspeed engine; pass --training.engine torch")
        path, _ = self.engine.load_checkpoint(str(directory), tag=STATE_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed could not read {directory / STATE_TAG}; resume from another step")


@contextlib.contextmanager
def _without_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """DeepSpeed's step counts and clears gradients as ever; the optimizer does nothing, not even weight decay."""
    step = optimizer.step
    optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]


def sequence_shard(size: int) -> SequenceShard | None:
    """This rank's place in its group of `size` neighbouring ranks, exchanging through DeepSpeed-Ulysses' all-to-all;
    None for a size of 1. Every rank makes every group, as torch.distributed wants it."""
    if size == 1:
        return None
    from deepspeed.sequence.layer import _SeqAllToAll

    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world_size(), size)]
    group = groups[rank() // size]

    def all_to_all(x: torch.Tensor, scatter: int, gather: int) -> torch.Tensor:
        return _SeqAllToAll.apply(group, x, scatter, gather, 0)

    return SequenceShard(rank() % size, size, all_to_all)


def make_engine(model: ErnieElasticForCausalLM, training: TrainingConfig) -> Engine:
    """The engine that the configuration names; raises ConfigError when DeepSpeed is asked for and missing."""
    return TorchEngine(model, training) if training.engine == "torch" else DeepSpeedEngine(model, training)


def _default_launcher_environment() -> None:
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29511"),
    ):
        os.environ.setdefault(name, value)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"training: DeepSpeed cannot be imported ({error}); install it or pass --training.engine torch"
        ) from error
    # Its shared-memory all-reduce is compiled at start (36 s, needs a compiler); gloo serves a CPU as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
