"""RMSNorm of float32 tensors in few passes over memory, for CPUs without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension of float32 [..., size]: [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., size] and weight [size] -> the result and 1 / rms [..., 1]."""
    scale = inverse_rms(x, eps)
    return (x * scale).mul_(weight), scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [..., size] of the result -> those of x and weight."""
    normed = x * scale
    product = (grad * normed).reshape(-1, x.shape[-1])
    shared = torch.mv(product, weight).view(scale.shape).div_(x.shape[-1])
    x_grad = torch.addcmul(grad * weight, normed, shared, value=-1).mul_(scale)
    return x_grad, product.sum(0)
