"""Triton kernel of `zip_gemm`: fused decode + GEMM, and its plain BF16 twin.

Contract: one kernel body serves both, PACKED or not, so the twin has the same tiles, the same order of K steps and the
same `tl.dot`: outputs of both are bit-identical. Weights are the left operand of the dot (on Hopper only the left one
may come from registers), so a program computes a tile [BR, BM] of y^T.

A program walks its rows from column 0 on and carries, for each row, how many fallbacks it has met.

Legend: R rows, C columns (the sum runs over them), M rows of the activations; BR, BC, BM their tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.tbe_decode.triton_impl import join_word, load_codes
from ernie_elastic.kernels.triton_backend import interpreting
from ernie_elastic.kernels.zip_gemm.reference import RowPlanes, check_x

# Read when the kernels below are decorated: the interpreter keeps BF16 as raw bits, so its dots run in float32.
INTERPRETED = interpreting()


@triton.jit
def load_packed(low, planes, fallbacks, met, index, inside, plane_bytes, base):
    """Words (int32) of a tile of weights, and `met` (int64 per row) moved on by the row's fallbacks in it."""
    code = load_codes(planes, index, plane_bytes, inside)
    missing = inside & (code == 0)
    rank = tl.cumsum(missing.to(tl.int32), 1)
    stored = tl.load(fallbacks + met[:, None] + rank - 1, mask=missing, other=0).to(tl.int32)
    exponent = tl.where(missing, stored, code + base)
    word = join_word(tl.load(low + index, mask=inside, other=0).to(tl.int32), exponent)
    return tl.where(inside, word, 0), met + tl.sum(missing.to(tl.int32), 1)


@triton.jit
def gemm_kernel(
    x, weight, planes, fallbacks, row_offsets, y, rows, columns, batch, plane_bytes, base,
    BR: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """y (float32 [M, R]) of one tile. weight: the `low` plane when PACKED, else BF16 words as int16 [R, C]."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    item = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros((BR, BM), dtype=tl.float32)
    if PACKED:
        met = tl.load(row_offsets + row, mask=row < rows, other=0)
    for start in range(0, columns, BC):
        column = start + tl.arange(0, BC)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        index = row[:, None] * columns + column[None, :]
        if PACKED:
            word, met = load_packed(weight, planes, fallbacks, met, index, inside, plane_bytes, base)
        else:
            word = tl.load(weight + index, mask=inside, other=0).to(tl.int32)
        x_inside = (column[:, None] < columns) & (item[None, :] < batch)
        x_tile = tl.load(x + item[None, :] * columns + column[:, None], mask=x_inside, other=0.0)
        if INTERP:
            w_tile = (word << 16).to(tl.float32, bitcast=True)
            total = tl.dot(w_tile, x_tile.to(tl.float32), total, input_precision="ieee")
        else:
            w_tile = word.to(tl.int16).to(tl.bfloat16, bitcast=True)
            total = tl.dot(w_tile, x_tile, total)
    tl.store(y + item[None, :] * rows + row[:, None], total, mask=(row[:, None] < rows) & (item[None, :] < batch))


def tile_sizes(batch: int) -> dict[str, int]:
    """Tile sizes for a batch of that many rows of x; the same for both twins. ours: small, clear and untuned."""
    return {"BR": 64, "BC": 64, "BM": 16 if batch <= 16 else 64}


def _launch(x_MC: Tensor, tensors: tuple[Tensor, ...], shape: tuple[int, int], base: int, packed: bool) -> Tensor:
    """Run the kernel; tensors: weight, planes, fallbacks, row offsets."""
    check_x(x_MC, shape[1])
    x_MC = x_MC.contiguous()
    rows, columns = shape
    batch = x_MC.shape[0]
    y_MR = torch.empty(batch, rows, dtype=torch.float32, device=x_MC.device)
    sizes = tile_sizes(batch)
    if batch:
        gemm_kernel[(triton.cdiv(rows, sizes["BR"]), triton.cdiv(batch, sizes["BM"]))](
            x_MC, *tensors, y_MR, rows, columns, batch, tensors[1].numel() // 3, base,
            **sizes, PACKED=packed, INTERP=INTERPRETED,
        )  # fmt: skip
    return y_MR


def matmul(x_MC: Tensor, packed: RowPlanes) -> Tensor:
    """x BF16 [M, C] times the transpose of the packed matrix: float32 [M, R], decoded on the fly."""
    planes = packed.planes
    tensors = (planes.low, planes.planes, planes.fallbacks, packed.row_offsets)
    return _launch(x_MC, tensors, packed.shape, planes.base, packed=True)


def matmul_plain(x_MC: Tensor, weight_RC: Tensor) -> Tensor:
    """The twin: x BF16 [M, C] times the transpose of plain BF16 [R, C]: float32 [M, R], same order of sums."""
    if weight_RC.dtype != torch.bfloat16 or weight_RC.ndim != 2:
        raise ConfigError(f"zip_gemm: weight is {weight_RC.dtype} {tuple(weight_RC.shape)}, expected bfloat16 [R, C]")
    words_RC = weight_RC.contiguous().view(torch.int16)
    shape = (weight_RC.shape[0], weight_RC.shape[1])
    return _launch(x_MC, (words_RC, words_RC, words_RC, words_RC), shape, 0, packed=False)
