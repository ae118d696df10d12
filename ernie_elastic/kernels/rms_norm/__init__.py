"""x / rms(x) * weight for float32 on CPUs: C++ where it can be built, else torch in few passes.

torch has no fused RMSNorm for CPUs; its own form takes several times as long, for one token and for thousands.
`rms_norm_rotary` norms the heads of a query or key and turns them by their positions in the same pass.

Letters: B rows, T positions, A heads, C head width, P = C / 2 rotary pairs.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.rms_norm import cpu_impl, torch_impl

__all__ = ["available_backends", "backend_reason", "rms_norm", "rms_norm_rotary"]
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


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:] or not x.dtype == weight.dtype == torch.float32:
        raise ConfigError(
            f"rms_norm: x is {x.dtype} {tuple(x.shape)} and weight {weight.dtype} {tuple(weight.shape)}; pass float32 "
            "[..., size] and float32 [size]"
        )


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


class _TurnedNorm(torch.autograd.Function):
    """One derivative only, and none for the angles."""

    @staticmethod
    def forward(ctx: Any, x_BTAC: Tensor, weight_C: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, eps: float) -> Tensor:
        out, scale = cpu_impl.forward(_library(), x_BTAC, weight_C, eps, True, (cos_BTP, sin_BTP))
        ctx.save_for_backward(x_BTAC, weight_C, scale, cos_BTP, sin_BTP)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BATC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTAC, weight_C, scale, *turn = ctx.saved_tensors
        return *cpu_impl.backward(_library(), grad_BATC, x_BTAC, weight_C, scale, tuple(turn)), None, None, None


def rms_norm_rotary(x_BTAC: Tensor, weight_C: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, eps: float) -> Tensor | None:
    """RMSNorm of every head, then the rotation of its neighbouring pairs: float32 [B, T, A, C] -> [B, A, T, C].

    weight [C], cos and sin [B, T, P] with P = C / 2, all float32 on the CPU. Differentiable once in x and weight. None
    where there is no native back end: the caller takes the two steps apart. ours: reason: apart they are seven small
    operations a head group, a tenth of a decoding step. Raises ConfigError for shapes or dtypes that do not fit.
    """
    _check(x_BTAC, weight_C)
    *rest, _, size = x_BTAC.shape
    shape_BTP = (*rest, size // 2)
    if len(rest) != 2 or size % 2 or cos_BTP.shape != sin_BTP.shape or cos_BTP.shape[-1] != size // 2:
        raise ConfigError(
            f"rms_norm_rotary: x {tuple(x_BTAC.shape)}, cos {tuple(cos_BTP.shape)}, sin {tuple(sin_BTP.shape)}; pass "
            "[B, T, A, C] and twice [B, T, C / 2]"
        )
    library = _library()
    if library is None:
        return None
    if cos_BTP.shape != shape_BTP or not cos_BTP.dtype == sin_BTP.dtype == torch.float32:
        cos_BTP, sin_BTP = cos_BTP.float().expand(shape_BTP), sin_BTP.float().expand(shape_BTP)
    # Usually nothing to do: each takes a third of a microsecond then.
    x_BTAC, weight_C, cos_BTP, sin_BTP = (t.contiguous() for t in (x_BTAC, weight_C, cos_BTP, sin_BTP))
    if torch.is_grad_enabled() and (x_BTAC.requires_grad or weight_C.requires_grad):
        out: Tensor = _TurnedNorm.apply(x_BTAC, weight_C, cos_BTP, sin_BTP, eps)
        return out
    return cpu_impl.forward(library, x_BTAC, weight_C, eps, False, (cos_BTP, sin_BTP))[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 [..., size] and weight float32 [size], both on the CPU -> x / sqrt(mean(x^2) + eps) * weight, x's shape.

    Differentiable once in x and weight. Raises ConfigError for other shapes or dtypes. ours: reason: it is a sixth of a
    small model's step otherwise.
    """
    _check(x, weight)
    weight = weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Norm.apply(x, weight, eps)
        return out
    library = _library()
    if library is None:
        return torch_impl.forward(x, weight, eps)[0]
    return cpu_impl.forward(library, x.contiguous(), weight, eps, keep=False)[0]
