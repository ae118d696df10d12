"""The plain torch engine, for machines without DeepSpeed and as what the other one is compared with."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from ernie_elastic.errors import CheckpointError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.schema import PackedBatch
from ernie_elastic.training.accumulation import Specs, specs_of
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.base import Engine, LossModule, MicroResult
from ernie_elastic.training.engines.deepspeed_json import deepspeed_config
from ernie_elastic.training.engines.expert_parallel import ExpertParallel
from ernie_elastic.training.engines.masters import Masters, keep_masters
from ernie_elastic.training.engines.optimizers import make_optimizer, set_learning_rate
from ernie_elastic.training.engines.state import saved_ranks, write_table
from ernie_elastic.training.ranks import barrier, device, rank, start_group, world_size

STATE_FILE = "torch_engine.pt"


class TorchEngine(Engine):
    """Plain torch: gradients are averaged in one flat all-reduce, every rank steps the same masters."""

    def __init__(self, model: ErnieElasticForCausalLM, training: TrainingConfig) -> None:
        ranks = world_size()
        deepspeed_config(training, ranks)  # the same check of the batch sizes
        start_group(training.step_limit_s)
        self.device = device()
        self.model = model.train()
        nn.Module.to(self.model, self.device)
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self.experts = ExpertParallel(model, training, self.device) if training.expert_parallel > 1 else None
        expert_shard = self.experts.shard if self.experts is not None else None
        self.module = LossModule(self.model, ranks, None, training.loss_weights.text_length_power, expert_shard)
        self.training, self.ranks = training, ranks
        self.optimizer = make_optimizer(model, training)
        self.masters = keep_masters(model, torch.bfloat16) if training.precision == "bf16" else Masters(())

    @override
    def train_step(
        self, batches: list[PackedBatch], spec: Specs, lr: float, weights: torch.Tensor | None = None
    ) -> tuple[list[MicroResult], float]:
        results = []
        weights = self.training.loss_weights.vector() if weights is None else weights
        for batch, part in zip(batches, specs_of(spec, len(batches)), strict=True):
            loss, result = self.module(batch.to(self.device), part, weights)
            (loss / len(batches)).backward()
            self.masters.collect()
            if self.experts is not None:
                self.experts.collect()
            results.append(result)
        norm = self._apply(lr)
        self.masters.publish()
        self.optimizer.zero_grad(set_to_none=True)
        if self.experts is not None:
            self.experts.clear()
        return results, norm

    def _apply(self, lr: float) -> float:
        """Average the gradients, clip and step; returns the norm before clipping."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in parameters]) / self.ranks
            dist.all_reduce(flat)
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))
        clip = self.training.gradient_clip
        set_learning_rate(self.optimizer.param_groups, lr)
        if self.experts is None:
            norm = nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
            if torch.isfinite(norm):
                self.optimizer.step()
            return float(norm)
        dense = nn.utils.get_total_norm([p.grad for p in parameters])
        total = float(self.experts.total_norm(dense))
        if math.isfinite(total):
            nn.utils.clip_grads_with_norm_(parameters, clip or float("inf"), torch.tensor(total))
            self.optimizer.step()
            self.experts.step(lr, total, clip)
        return total

    @override
    def save_state(self, directory: Path) -> None:
        if rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            state = {"model": self._state(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, directory / STATE_FILE)
        barrier()
        write_table(directory, self.training)
        if self.experts is not None:
            self.experts.save(directory)
        barrier()

    @override
    def load_state(self, directory: Path) -> None:
        saved_ranks(directory, self.training)  # any number of ranks reads the same file
        path = directory / STATE_FILE
        if not path.exists():
            raise CheckpointError(f"{path} is missing; resume from another step")
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, tensor in self._state().items():
            tensor.copy_(state["model"][name])
        self.masters.publish()
        # Which form of the optimizer runs is a matter of this machine, not of the one that wrote the state.
        names = ("foreach", "fused")
        forms = [{name: group[name] for name in names if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, form in zip(self.optimizer.param_groups, forms, strict=True):
            group.update(form)
        if self.experts is not None:
            self.experts.load(directory)

    def _state(self) -> dict[str, torch.Tensor]:
        """Masters and buffers under the model's names."""
        model = self.model.state_dict(keep_vars=True)
        return {name: self.masters.of(tensor).detach() for name, tensor in model.items()}

    @override
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        experts = {} if self.experts is None else self.experts.whole()
        return {**self.model.state_dict(), **experts} if rank() == 0 else {}

    @override
    def num_parameters(self) -> int:
        return self._num_parameters
