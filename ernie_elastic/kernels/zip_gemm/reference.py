"""Product with a matrix in the dense-plane layout, in plain torch: the definition of `zip_gemm`.

Contract: y = x W^T with the exact BF16 weights and float32 sums. `RowPlanes` is the run-time form: the stored dense
planes of a matrix [R, C] in row order plus the number of fallbacks before each row, so that a kernel that walks along
a row knows where its fallback exponents begin (one int64 a row: 64 / C bits a weight).

Legend: R rows, C columns (the sum runs over them), M rows of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.tbe_decode import reference as tbe
from ernie_elastic.kernels.tbe_decode.reference import DensePlanes


@dataclass(frozen=True, eq=False)
class RowPlanes:
    """A BF16 matrix of shape [R, C]: its dense planes and row_offsets int64 [R] (fallbacks before each row)."""

    shape: tuple[int, int]
    planes: DensePlanes
    row_offsets: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together; the tile offsets are not needed here and not counted."""
        planes = self.planes
        tensors = (planes.low, planes.planes, planes.fallbacks, self.row_offsets)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def prepare(planes: DensePlanes, shape: tuple[int, int]) -> RowPlanes:
    """Dense planes of a matrix of `shape` [R, C] -> RowPlanes on the same device. ConfigError on another size."""
    if shape[0] * shape[1] != planes.count:
        raise ConfigError(f"zip_gemm: {planes.count} weights are no matrix of shape {shape}; pass its true shape")
    per_row_R = (tbe.codes_of(planes) == 0).reshape(shape).sum(1)
    return RowPlanes(shape, planes, per_row_R.cumsum(0) - per_row_R)


def pack(weight_RC: Tensor) -> RowPlanes:
    """BF16 [R, C] -> RowPlanes on the same device. ConfigError for other inputs."""
    if weight_RC.ndim != 2:
        raise ConfigError(f"zip_gemm: weight has shape {tuple(weight_RC.shape)}, expected [R, C]; reshape it")
    return prepare(tbe.encode(weight_RC), (weight_RC.shape[0], weight_RC.shape[1]))


def check_x(x_MC: Tensor, columns: int) -> None:
    """ConfigError unless x is BF16 [M, C] with the matrix's C."""
    if x_MC.dtype != torch.bfloat16 or x_MC.ndim != 2 or x_MC.shape[1] != columns:
        raise ConfigError(f"zip_gemm: x is {x_MC.dtype} {tuple(x_MC.shape)}, expected torch.bfloat16 [M, {columns}]")


def matmul(x_MC: Tensor, packed: RowPlanes) -> Tensor:
    """x BF16 [M, C] times the transpose of the matrix: float32 [M, R]."""
    check_x(x_MC, packed.shape[1])
    weight_RC = tbe.decode(packed.planes).reshape(packed.shape)
    return x_MC.float() @ weight_RC.float().T
