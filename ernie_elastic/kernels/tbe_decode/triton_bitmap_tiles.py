"""Triton kernel of `tbe_decode` for the published layout: one program decodes one BlockTile. See bitmap_tiles.py.

Contract: bit-exact; integers only, so the interpreter and a GPU give the same bits. The two running counts of the
format (weights with a code, fallbacks) are one sum along the BlockTile, since they add up to the place.

Legend: E matrices, R rows, C columns, B BlockTiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.kernels.tbe_decode.bitmap_tiles import SIDE, WEIGHTS, BitmapTiles
from ernie_elastic.kernels.tbe_decode.triton_impl import join_word, load_codes
from ernie_elastic.kernels.triton_backend import launches_kernels


@triton.jit
def bitmap_tiles_kernel(
    low, bitmaps, full, ends, first, out, rows, columns, across, blocks_of_a_matrix, plane_bytes,
    PLACES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """out (int16 [E, R, C]): the words of BlockTile `program_id`, which lies at (block // across, block % across)."""
    tile = tl.program_id(0).to(tl.int64)
    matrix = tile // blocks_of_a_matrix
    block = (tile % blocks_of_a_matrix).to(tl.int32)
    n = tl.arange(0, PLACES)
    code = load_codes(bitmaps, tile * PLACES + n, plane_bytes, n < PLACES)
    inside = code != 0
    rank = tl.cumsum(inside.to(tl.int32), 0)
    low_begin = tl.load(ends + 2 * tile - 2, mask=tile > 0, other=0)
    full_begin = tl.load(ends + 2 * tile - 1, mask=tile > 0, other=0)
    byte = tl.load(low + low_begin + rank - 1, mask=inside, other=0).to(tl.int32)
    whole = tl.load(full + full_begin + n - rank, mask=code == 0, other=0).to(tl.int32)
    exponent = tl.load(first + matrix).to(tl.int32) + code - 1
    word = tl.where(inside, join_word(byte, exponent), whole)
    # n = stripe, TensorCoreTile, FragTile column, FragTile row (1 bit each), row, column (3 bits each)
    row = block // across * EDGE + (n >> 10 << 4 | (n >> 6 & 1) << 3 | n >> 3 & 7)
    column = block % across * EDGE + ((n >> 8 & 3) << 4 | (n >> 7 & 1) << 3 | n & 7)
    place = (matrix * rows + row) * columns + column
    tl.store(out + place, word.to(tl.int16), mask=(row < rows) & (column < columns))


@launches_kernels
def decode(tiles: BitmapTiles) -> Tensor:
    """BF16 [E, R, C], bit-exact, on the device of the tiles (CUDA, or CPU when TRITON_INTERPRET was set at import)."""
    matrices, rows, columns = tiles.shape
    out_ERC = torch.empty(tiles.shape, dtype=torch.int16, device=tiles.low.device)
    bitmap_tiles_kernel[(tiles.blocks,)](
        tiles.low, tiles.bitmaps, tiles.full, tiles.ends, tiles.first, out_ERC, rows, columns, -(-columns // SIDE),
        tiles.blocks // matrices, WEIGHTS // 8 * tiles.blocks, PLACES=WEIGHTS, EDGE=SIDE,
    )  # fmt: skip
    return out_ERC.view(torch.bfloat16)
