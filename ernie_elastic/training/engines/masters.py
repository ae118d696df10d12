"""fp32 masters of weights that the model holds in another dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Masters:
    """Pairs of (fp32 master that an optimizer steps, working tensor that the model computes with).

    A tensor that is its own master may be among them and is left alone.
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pairs = [(master, working) for master, working in pairs if master is not working]
        self._master_of = {id(working): master for master, working in self._pairs}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The master of a tensor [...] of the model, float32 of the same shape; the tensor itself if it has none."""
        return self._master_of.get(id(tensor), tensor)

    def collect(self) -> None:
        """Add the gradients of a micro-batch to the masters' in fp32, and clear them; call it after each backward."""
        for master, working in self._pairs:
            if working.grad is not None:
                gradient = working.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                working.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the tensors that the model computes with."""
        for master, working in self._pairs:
            working.copy_(master)


def keep_masters(model: nn.Module, dtype: torch.dtype) -> Masters:
    """Give the model parameters of `dtype`; those that it had go on as masters. Buffers keep their dtype.

    Whoever holds the old parameters (an optimizer) steps the masters. Tied parameters stay tied.
    """
    working: dict[int, nn.Parameter] = {}
    pairs = []
    for module in model.modules():
        for name, master in module._parameters.items():
            if master is None:
                continue
            if id(master) not in working:
                working[id(master)] = nn.Parameter(master.detach().to(dtype))
                pairs.append((master, working[id(master)]))
            module._parameters[name] = working[id(master)]
    return Masters(pairs)
