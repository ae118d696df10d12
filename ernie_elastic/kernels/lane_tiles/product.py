"""Device functions that `zip_gemm` and `zip_moe` share: a step of a product whose left operand is packed or plain.

Contract: PACKED or not, a step reads the same tile of the same matrix and makes the same `tl.dot`, so outputs of the
packed kernels and of their plain BF16 twins are bit-identical. The interpreter keeps BF16 as raw bits and truncates
when it rounds to it, hence the branches on INTERP.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ernie_elastic.kernels.lane_tiles.triton_impl import decode_tile


@triton.jit
def round_to_bf16(value, INTERP: tl.constexpr):
    """float32 -> BF16, to the nearest, ties to even; both branches give the same bits for all numbers."""
    if INTERP:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(tl.bfloat16)


@triton.jit
def add_product(word, x_tile, total, INTERP: tl.constexpr):
    """total + W x for the words (int32) of a tile of weights [BR, BC] and BF16 x [BC, BM]."""
    if INTERP:
        weight = (word << 16).to(tl.float32, bitcast=True)
        return tl.dot(weight, x_tile.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(word.to(tl.int16).to(tl.bfloat16, bitcast=True), x_tile, total)


@triton.jit
def load_plain(words, matrix, row, column, rows, columns):
    """Words (int32) of a tile of matrix number `matrix` of int16 [matrices, rows, columns]; 0 outside."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    index = matrix * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    return tl.load(words + index, mask=inside, other=0).to(tl.int32)


@triton.jit
def load_words(
    low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, matrix, row_tile, start, rows, columns,
    PACKED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Words (int32) [64, 64] of the tile in row tile `row_tile` and from column `start` of matrix `matrix` (int64)."""
    if PACKED:
        tile = (matrix * ((rows + 63) // 64) + row_tile) * ((columns + 63) // 64) + start // 64
        table_0, table_1 = tl.load(tables + 2 * matrix), tl.load(tables + 2 * matrix + 1)
        return decode_tile(
            low, planes, table_0, table_1, fallbacks, offsets, raw_index, raw_warps, raw, tile, INTERP
        ).to(tl.uint32)
    else:
        row, column = row_tile * 64 + tl.arange(0, 64), start + tl.arange(0, 64)
        return load_plain(low, matrix, row, column, rows, columns).to(tl.uint32)
