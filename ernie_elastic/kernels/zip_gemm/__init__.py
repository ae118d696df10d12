"""Decode + product with a packed matrix: `reference` (plain torch) and `triton` (GPU, or interpreted).

Contract: weights exact, sums in float32, no atomic additions: the same bits in every run. Up to FUSED_MAX_ROWS rows of
x the Triton kernel decodes inside the product (`matmul_fused`), with outputs bit-identical to `matmul_plain`, the same
kernel on plain weights. For more rows the matrix is decoded into a buffer and torch multiplies. `backend="auto"` means
triton for CUDA tensors. The packed form is that of `lane_tiles`.

Legend: R rows, C columns, M rows of the activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import lane_tiles
from ernie_elastic.kernels.lane_tiles import PackedStack
from ernie_elastic.kernels.triton_backend import use_triton
from ernie_elastic.kernels.zip_gemm import reference
from ernie_elastic.kernels.zip_gemm.reference import pack

if TYPE_CHECKING:
    from ernie_elastic.kernels.zip_gemm.triton_impl import Tiles

__all__ = ["PackedStack", "matmul", "matmul_fused", "matmul_plain", "pack", "tile_choices", "unpack"]
Backend = Literal["auto", "triton", "reference"]
# Above this many rows of x reading the weights is no longer the cost. ours: unmeasured; gpu_check measures it.
FUSED_MAX_ROWS = 64


def unpack(packed: PackedStack, backend: Backend = "auto", out: Tensor | None = None) -> Tensor:
    """BF16 [R, C], bit-exact, into `out` if given. ConfigError for a back end that is not known or cannot run."""
    return lane_tiles.unpack(packed, [0], backend, None if out is None else out[None])[0]


def matmul(x_MC: Tensor, packed: PackedStack, backend: Backend = "auto") -> Tensor:
    """x BF16 [M, C] times the transpose of the matrix: float32 [M, R].

    Raises ConfigError for another dtype or width of x, or a back end that is not known or cannot run.
    """
    reference.check(x_MC, packed.shape[2], packed.shape[0])
    if not use_triton(backend, "zip_gemm", x_MC.device):
        return reference.matmul(x_MC, packed)
    if x_MC.shape[0] <= FUSED_MAX_ROWS:
        return matmul_fused(x_MC, packed)
    weight_RC = unpack(packed, backend)
    if not x_MC.is_cuda:  # the interpreter, for tests
        return x_MC.float() @ weight_RC.float().T
    return torch.mm(x_MC, weight_RC.T, out_dtype=torch.float32)


def matmul_fused(x_MC: Tensor, packed: PackedStack, tiles: Tiles | None = None) -> Tensor:
    """`matmul` with the decode inside the product, whatever M: float32 [M, R]. ConfigError as there."""
    from ernie_elastic.kernels.zip_gemm import triton_impl

    reference.check(x_MC, packed.shape[2], packed.shape[0])
    arguments = triton_impl.arguments(packed)
    return triton_impl.run(x_MC, arguments, packed.shape[1:], tiles, packed=True)


def matmul_plain(x_MC: Tensor, weight_RC: Tensor, tiles: Tiles | None = None) -> Tensor:
    """The twin: x BF16 [M, C] times the transpose of plain BF16 [R, C], same order of sums: float32 [M, R]."""
    from ernie_elastic.kernels.zip_gemm import triton_impl

    if weight_RC.dtype != torch.bfloat16 or weight_RC.ndim != 2:
        raise ConfigError(f"zip_gemm: weight is {weight_RC.dtype} {tuple(weight_RC.shape)}, expected bfloat16 [R, C]")
    reference.check(x_MC, weight_RC.shape[1])
    words = (weight_RC.contiguous().view(torch.int16),) * 8
    return triton_impl.run(x_MC, words, (weight_RC.shape[0], weight_RC.shape[1]), tiles, packed=False)


def tile_choices(batch: int) -> list[Tiles]:
    """Tiles worth trying for that many rows of x; the same for both twins."""
    from ernie_elastic.kernels.zip_gemm import triton_impl

    return triton_impl.tile_choices(batch)
