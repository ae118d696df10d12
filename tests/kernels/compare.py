"""What the kernel tests share: seeded weights and comparisons of bits."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True when both have the same shape, dtype and bits, NaN payloads and signs of zeros included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def same_values(a: Tensor, b: Tensor) -> bool:
    """True when both are equal bit for bit except that any NaN equals any NaN (its payload is the FMA's choice)."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(0.0, 9e9, -9e9), b.nan_to_num(0.0, 9e9, -9e9))


def gaussian(*shape: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    """BF16 normal weights of that shape: what the layers of trained models look like."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def any_words(*shape: int, seed: int = 0) -> Tensor:
    """BF16 weights with uniformly random bits: mostly fallbacks, NaN and infinities among them."""
    words = torch.randint(0, 65536, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return words.to(torch.uint16).view(torch.bfloat16)
