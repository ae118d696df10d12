"""The training side of expert parallelism: the exchange, the split of the experts, their own optimizer.

The experts of a rank are leaf tensors outside the module's parameters, so data parallelism (DeepSpeed's or ours) sees
the dense part alone. Letters: E experts, R ranks, I expert width, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.expert_parallel import ExpertShard
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.masters import Masters
from ernie_elastic.training.ranks import all_reduce_sum, rank, world_size

TENSORS = ("gate_up_proj", "down_proj")


class _Exchange(torch.autograd.Function):
    """all-to-all of rows; its derivative is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: Sequence[int], got: Sequence[int]) -> torch.Tensor:
        ctx.sizes = (sent, got)
        output = rows.new_empty((sum(got), *rows.shape[1:]))
        dist.all_to_all_single(output, rows.contiguous(), list(got), list(sent))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        sent, got = ctx.sizes
        return _Exchange.apply(gradients[0], got, sent), None, None


def exchange(rows: torch.Tensor, sent: Sequence[int], got: Sequence[int]) -> torch.Tensor:
    """rows [S, ...] in the order of the ranks that they go to, `sent` to each -> [M, ...], `got` from each."""
    return _Exchange.apply(rows, sent, got)


class ExpertParallel:
    """This rank's experts: their tensors, the shard that the model runs with, AdamW over fp32 masters.

    Made before the engine wraps the model, on every rank. Gradients: a rank's experts see the tokens of all ranks, so
    the all-to-all has summed their gradient already; it is divided by the number of ranks, as an average would be.
    """

    def __init__(self, model: ErnieElasticForCausalLM, training: TrainingConfig, device: torch.device) -> None:
        self.ranks, self.own = world_size(), rank()
        config = model.config
        if training.expert_parallel != self.ranks:
            raise ConfigError(
                f"training: expert_parallel {training.expert_parallel} must be 1 or the number of ranks {self.ranks}; "
                f"pass --training.expert-parallel {self.ranks}, or start other ranks"
            )
        if config.num_experts % self.ranks:
            raise ConfigError(
                f"training: {config.num_experts} experts cannot be split over {self.ranks} ranks; choose a number of "
                "ranks that divides them, or --training.expert-parallel 1"
            )
        self.shard = ExpertShard(self.own, self.ranks, exchange)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        self.masters: dict[str, torch.Tensor] = {}
        pairs = []
        for name, module in _expert_modules(model).items():
            module.num_experts = config.num_experts // self.ranks  # type: ignore[assignment]
            for part in TENSORS:
                pairs.append(self._split(module, f"{name}.{part}", part, device, dtype))
        self._working = Masters(pairs)
        decay, betas = training.weight_decay, (training.beta1, training.beta2)
        self.optimizer = torch.optim.AdamW(list(self.masters.values()), betas=betas, weight_decay=decay, foreach=True)

    def _split(
        self, module: nn.Module, name: str, part: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = module._parameters.pop(part)
        assert parameter is not None
        whole = parameter.detach().to(device)
        dist.broadcast(whole, 0)  # as data parallelism does with the dense part
        share = len(whole) // self.ranks
        master = whole[self.own * share : (self.own + 1) * share].float().clone().requires_grad_()
        working = master if dtype == torch.float32 else master.detach().to(dtype).requires_grad_()
        setattr(module, part, working)
        self.masters[name] = master
        return master, working

    def collect(self) -> None:
        """Take in the gradients of a micro-batch; every micro-batch calls it after its backward."""
        self._working.collect()

    def total_norm(self, dense: torch.Tensor) -> torch.Tensor:
        """Norm of the whole model's gradient, float32 [], of that of the dense part; scales the experts' gradients.

        Called once a step, after `collect`, by every rank.
        """
        for master in self.masters.values():
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad / self.ranks
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        squares = all_reduce_sum(torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum())
        return (dense.to(squares).pow(2) + squares).sqrt()

    @torch.no_grad()
    def step(self, lr: float, norm: float, clip: float) -> None:
        """AdamW with gradients clipped by the norm of the whole model; every rank agrees on `norm`."""
        coefficient = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master in self.masters.values():
            if master.grad is not None:
                master.grad.mul_(coefficient)
        self.optimizer.step()
        self._working.publish()

    def clear(self) -> None:
        """Forget the gradients of the step."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def whole(self) -> dict[str, torch.Tensor]:
        """Every expert tensor [E, ..., ...] float32 on the CPU of rank 0; an empty dictionary elsewhere."""
        state = {}
        for name, master in self.masters.items():
            parts = [torch.empty_like(master) for _ in range(self.ranks)]
            dist.all_gather(parts, master.detach())
            if self.own == 0:
                state[name] = torch.cat(parts).cpu()
        return state

    def save(self, directory: Path) -> None:
        """Write this rank's masters and optimizer state."""
        torch.save({"masters": self.masters, "optimizer": self.optimizer.state_dict()}, self._file(directory))

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Read what `save` wrote; raises CheckpointError when it is not there."""
        path = self._file(directory)
        if not path.exists():
            raise CheckpointError(
                f"{directory} has no {path.name}: it was not written under expert parallelism; start another run"
            )
        state = torch.load(path, map_location=next(iter(self.masters.values())).device, weights_only=True)
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self._working.publish()
        self.optimizer.load_state_dict(state["optimizer"])

    def _file(self, directory: Path) -> Path:
        return directory / f"experts_rank_{self.own}.pt"


def _expert_modules(model: ErnieElasticForCausalLM) -> dict[str, nn.Module]:
    layers = model.model.layers
    return {f"model.layers.{i}.mlp.experts": x.mlp.experts for i, x in enumerate(layers) if hasattr(x.mlp, "experts")}
