"""Product with a packed matrix, in plain torch: the definition of `zip_gemm`.

Contract: y = x W^T with the exact BF16 weights and float32 sums.

Legend: R rows, C columns (the sum runs over them), M rows of the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import lane_tiles
from ernie_elastic.kernels.lane_tiles import PackedStack


def pack(weight_RC: Tensor) -> PackedStack:
    """BF16 [R, C] -> a stack of one matrix on the same device. ConfigError for other inputs."""
    if weight_RC.ndim != 2:
        raise ConfigError(f"zip_gemm: weight has shape {tuple(weight_RC.shape)}, expected [R, C]; reshape it")
    return lane_tiles.pack(weight_RC[None])


def check(x_MC: Tensor, columns: int, matrices: int = 1) -> None:
    """ConfigError unless x is BF16 [M, C] with the matrix's C, and there is one matrix."""
    if matrices != 1:
        raise ConfigError(f"zip_gemm: the packed stack holds {matrices} matrices, expected 1; use zip_moe for experts")
    if x_MC.dtype != torch.bfloat16 or x_MC.ndim != 2 or x_MC.shape[1] != columns:
        raise ConfigError(f"zip_gemm: x is {x_MC.dtype} {tuple(x_MC.shape)}, expected torch.bfloat16 [M, {columns}]")


def matmul(x_MC: Tensor, packed: PackedStack) -> Tensor:
    """x BF16 [M, C] times the transpose of the matrix: float32 [M, R]."""
    return x_MC.float() @ lane_tiles.unpack(packed, [0], "reference")[0].float().T
