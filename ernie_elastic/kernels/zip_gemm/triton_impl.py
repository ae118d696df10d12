"""Triton kernels of `zip_gemm`: decode + product in tiles, and the sum of the splits.

Contract: one kernel body serves both, PACKED or not, so the twin has the same tiles, the same order of K steps and the
same `tl.dot`: outputs of both are bit-identical. Weights are the left operand of the dot (on Hopper only the left one
may come from registers), so a program computes a tile [64, BM] of y^T; it carries nothing from step to step, so splits
of the sum may begin anywhere. They are added in their order.

Legend: R rows, C columns (the sum runs over them), M rows of the activations; BM their tile size; S splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.kernels.lane_tiles.product import add_product, load_words
from ernie_elastic.kernels.lane_tiles.reference import TILE
from ernie_elastic.kernels.lane_tiles.triton_impl import arguments
from ernie_elastic.kernels.triton_backend import interpreting, launches_kernels

# Read when the kernels below are decorated: the interpreter keeps BF16 as raw bits, so its dots run in float32.
INTERPRETED = interpreting()
SUM_COLUMNS = 1024


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts the work. batch: rows of x in a program; splits: of the sum over C; warps; stages (loads in
    flight)."""

    batch: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 3


@triton.jit
def gemm_kernel(
    x, low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, out, rows, columns, batch,
    BM: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """out float32 [S, M, R]: one tile of y of one split, which takes every SPLITS-th K step."""
    row_tile = tl.program_id(0)
    split = tl.program_id(2)
    item = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((64, BM), dtype=tl.float32)
    matrix = tl.program_id(0).to(tl.int64) * 0
    for start in range(split * 64, columns, SPLITS * 64):
        column = start + tl.arange(0, 64)
        inside = (column[:, None] < columns) & (item[None, :] < batch)
        x_tile = tl.load(x + item[None, :].to(tl.int64) * columns + column[:, None], mask=inside, other=0.0)
        word = load_words(
            low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, matrix, row_tile, start, rows, columns,
            PACKED, INTERP,
        )  # fmt: skip
        total = add_product(word, x_tile, total, INTERP)
    row = row_tile * 64 + tl.arange(0, 64)
    place = out + (split * batch + item[None, :]).to(tl.int64) * rows + row[:, None]
    tl.store(place, total, mask=(row[:, None] < rows) & (item[None, :] < batch))


@triton.jit
def sum_kernel(parts, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out float32 [count] = the splits float32 [S, count] added in their order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + place, mask=place < count, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * count + place, mask=place < count, other=0.0)
    tl.store(out + place, total, mask=place < count)


def tile_choices(batch: int) -> list[Tiles]:
    """The grid that is worth trying for that many rows of x; the same for both twins. ours: unmeasured."""
    sizes = [16] if batch <= 16 else [32] if batch <= 32 else [32, 64]
    return [Tiles(size, splits, 4, stages) for size in sizes for splits in (1, 4, 8) for stages in (2, 4)]


def default_tiles(batch: int, rows: int, columns: int) -> Tiles:
    """Tiles without measuring: splits until some hundred programs run, each with eight K steps at least. ours."""
    size = 16 if batch <= 16 else 32 if batch <= 32 else 64
    programs = triton.cdiv(rows, TILE) * triton.cdiv(batch, size)
    splits = 1
    while splits < 8 and programs * splits < 512 and triton.cdiv(columns, TILE) >= 16 * splits:
        splits *= 2
    return Tiles(size, splits)


@launches_kernels
def run(x_MC: Tensor, weights: tuple[Tensor, ...], shape: tuple[int, ...], tiles: Tiles | None, packed: bool) -> Tensor:
    """x BF16 [M, C] times the transpose of the packed or plain matrix of `shape` [R, C]: float32 [M, R]."""
    (rows, columns), batch = shape, x_MC.shape[0]
    y_MR = torch.empty(batch, rows, dtype=torch.float32, device=x_MC.device)
    if not batch:
        return y_MR
    tiles = tiles or default_tiles(batch, rows, columns)
    parts = y_MR if tiles.splits == 1 else y_MR.new_empty(tiles.splits, batch, rows)
    options: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    gemm_kernel[(triton.cdiv(rows, TILE), triton.cdiv(batch, tiles.batch), tiles.splits)](
        x_MC.contiguous(), *weights, parts, rows, columns, batch,
        BM=tiles.batch, SPLITS=tiles.splits, PACKED=packed, INTERP=INTERPRETED, **options,
    )  # fmt: skip
    if tiles.splits > 1:
        sum_kernel[(triton.cdiv(y_MR.numel(), SUM_COLUMNS),)](
            parts, y_MR, y_MR.numel(), SPLITS=tiles.splits, BLOCK=SUM_COLUMNS
        )
    return y_MR


__all__ = ["INTERPRETED", "Tiles", "arguments", "default_tiles", "run", "tile_choices"]
