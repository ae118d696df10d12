"""Muon for the matrices of the stack, AdamW for everything else, as one optimizer over whole (unflattened) parameters.

Muon (Jordan et al. 2024): momentum, then the nearest orthogonal matrix by a quintic Newton-Schulz iteration. ours: the
experts of a layer are a batch of matrices, gate and up apart; each rank orthogonalises its share of the matrices and
the updates are summed over ranks, so that every rank steps alike. fp32 throughout, since BF16 is slow on CPUs.

Letters: E matrices of a batch, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: largest slope at zero
ITERATIONS = 5


def orthogonalise(matrix_ERC: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Float [..., R, C] -> the same shape, singular values pushed towards 1 (0.7 to 1.2 after five iterations)."""
    a, b, c = COEFFICIENTS
    tall = matrix_ERC.shape[-2] > matrix_ERC.shape[-1]
    wide = matrix_ERC.mT if tall else matrix_ERC
    x = wide.reshape(-1, *wide.shape[-2:])
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(wide.shape)
    return x.mT if tall else x


def is_matrix_of_the_stack(name: str, parameter: torch.Tensor) -> bool:
    """True for attention [R, C] and expert [E, R, C] matrices of the layers; not for routers, reader, heads, tables."""
    return ".layers." in name and parameter.dim() >= 2 and ".gate.weight" not in name


class MuonAdamW(torch.optim.Optimizer):
    """Groups with "muon": True take Muon steps, others AdamW's. "split" counts the matrices stacked in one parameter.

    A group's lr is its own. Parameters without a gradient count as having a zero one; a matrix of the stack whose
    gradient is zero (an expert that the step left out) takes no Muon step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "muon": False, "split": 1})
        self.betas, self.momentum, self.eps = betas, momentum, 1e-8

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter. Raises ValueError for a closure, which no engine here uses."""
        if closure is not None:
            raise ValueError("MuonAdamW.step takes no closure")
        matrices = [(p, group) for group in self.param_groups if group["muon"] for p in group["params"]]
        updates = self._shared_updates(matrices)
        for (parameter, group), update in zip(matrices, updates, strict=True):
            rows, columns = parameter.shape[-2] // group["split"], parameter.shape[-1]
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        for group in self.param_groups:
            if not group["muon"]:
                self._adamw(group)

    def _shared_updates(self, matrices: list[tuple[nn.Parameter, dict[str, Any]]]) -> list[torch.Tensor]:
        """Orthogonal updates of all matrices: each rank makes every world-size-th, the sum over ranks has all."""
        if not matrices:
            return []
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        own = dist.get_rank() if dist.is_initialized() else 0
        flat = torch.zeros(sum(p.numel() for p, _ in matrices), device=matrices[0][0].device)
        views = flat.split([p.numel() for p, _ in matrices])
        for number, ((parameter, group), view) in enumerate(zip(matrices, views, strict=True)):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
            if number % ranks == own:
                direction = gradient.lerp(momentum, self.momentum)  # Nesterov
                # An orthogonal update has full size whatever is left of the momentum: what got no gradient rests.
                used = gradient.abs().amax(dim=(-2, -1), keepdim=True) > 0
                parts = orthogonalise(direction.unflatten(-2, (group["split"], -1))).reshape(direction.shape)
                view.copy_((parts * used).reshape(-1))
        if ranks > 1:
            dist.all_reduce(flat)
        return [view.view_as(parameter) for view, (parameter, _) in zip(views, matrices, strict=True)]

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter)
                )
        states = [self.state[parameter] for parameter in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        adamw(
            parameters,
            gradients,
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )
