"""x / rms(x) * weight for float32 on CPUs: C++ where it can be built, else torch in few passes.

torch has no fused RMSNorm for CPUs; its own form takes several times as long, for one token and for thousands.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ernie_elastic.kernels.rms_norm import cpu_impl, torch_impl

__all__ = ["available_backends", "backend_reason", "rms_norm"]
logger = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """The back ends that can run here: ("torch",) or ("native", "torch")."""
    return ("native", "torch") if cpu_impl.load().library is not None else ("torch",)


def backend_reason() -> str:
    """One line: which back end runs, and why."""
    return f"rms_norm: {available_backends()[0]} ({cpu_impl.load().reason})"


@functools.cache
def _library() -> Any:
    """The native library or None; logged once a process."""
    logger.info(backend_reason())
    return cpu_impl.load().library


class _Norm(torch.autograd.Function):
    """One derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        library = _library()
        if library is not None:
            x = x.contiguous()
            run: Any = functools.partial(cpu_impl.forward, library, keep=True)
        else:
            run = torch_impl.forward
        out: Tensor
        out, scale = run(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        library = _library()
        if library is None:
            return *torch_impl.backward(grad, x, weight, scale), None
        return *cpu_impl.backward(library, grad, x, weight, scale), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 [..., size] and weight float32 [size], both on the CPU -> x / sqrt(mean(x^2) + eps) * weight, x's shape.

    Differentiable once in x and weight. ours: reason: it is a sixth of a small model's step otherwise.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Norm.apply(x, weight, eps)
        return out
    library = _library()
    if library is None:
        return torch_impl.forward(x, weight, eps)[0]
    return cpu_impl.forward(library, x.contiguous(), weight, eps, keep=False)[0]
