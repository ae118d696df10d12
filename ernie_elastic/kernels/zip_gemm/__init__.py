"""Fused decode + GEMM with a dense-plane matrix: `reference` (plain torch) and `triton` (GPU, or interpreted).

Contract: weights exact, sums in float32. The Triton kernel's outputs are bit-identical to `triton_impl.matmul_plain`
on the plain BF16 matrix. `backend="auto"` means triton for CUDA tensors; see `kernels.triton_backend`.

Legend: R rows, C columns, M rows of the activations.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ernie_elastic.kernels.triton_backend import use_triton
from ernie_elastic.kernels.zip_gemm import reference
from ernie_elastic.kernels.zip_gemm.reference import RowPlanes, pack, prepare

__all__ = ["RowPlanes", "matmul", "pack", "prepare"]
Backend = Literal["auto", "triton", "reference"]


def matmul(x_MC: Tensor, packed: RowPlanes, backend: Backend = "auto") -> Tensor:
    """x BF16 [M, C] times the transpose of the matrix: float32 [M, R].

    Raises ConfigError for another dtype or width of x, or a back end that is not known or cannot run.
    """
    if use_triton(backend, "zip_gemm", x_MC.device):
        from ernie_elastic.kernels.zip_gemm import triton_impl

        return triton_impl.matmul(x_MC, packed)
    return reference.matmul(x_MC, packed)
