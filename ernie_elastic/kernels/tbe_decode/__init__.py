"""Decode of the dense-plane layout: `reference` (plain torch, the definition) and `triton` (GPU, or interpreted).

Contract: bit-exact on both. `backend="auto"` means triton for CUDA tensors and reference for others, and logs once
why; asking for triton where it cannot run raises ConfigError with the reason.

Legend: n elements.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ernie_elastic.kernels.tbe_decode import reference
from ernie_elastic.kernels.tbe_decode.reference import DensePlanes, encode
from ernie_elastic.kernels.triton_backend import use_triton

__all__ = ["DensePlanes", "decode", "encode"]
Backend = Literal["auto", "triton", "reference"]


def decode(planes: DensePlanes, backend: Backend = "auto") -> Tensor:
    """The weights as BF16 [n], bit-exact. ConfigError for a back end that is not known or cannot run."""
    if use_triton(backend, "tbe_decode", planes.low.device):
        from ernie_elastic.kernels.tbe_decode import triton_impl

        return triton_impl.decode(planes)
    return reference.decode(planes)
