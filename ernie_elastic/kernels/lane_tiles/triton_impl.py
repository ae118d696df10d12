"""Triton device code of `lane_tiles`: decode of one tile in the registers of its lanes, and of whole matrices.

Contract: bit-exact; integers only, so the same bits in the interpreter and on a GPU. A program has 4 warps: then every
array below lies in registers as the left operand of a product wants it, and the reshapes at the end move nothing.

How: the bits that eight weights have in three planes become a word of eight selectors, and one byte permutation looks
up the exponents of four weights. Flags of fallbacks, times 0x11111111, are the ranks of the fallbacks among their
lane's, nibble by nibble: a second permutation looks four of them up among the lane's seven bytes (rank 0: no fallback,
a zero byte). Nothing branches but for raw warps.

Legend: R rows, C columns, G chosen matrices; a lane is [32, 4] = [8 * w + g, t], as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.kernels.lane_tiles.reference import TILE, PackedStack, tiles
from ernie_elastic.kernels.triton_backend import interpreting, launches_kernels

# Read when the kernels below are decorated: the interpreter has no inline assembly.
INTERPRETED = interpreting()


@triton.jit
def permute_bytes(low, high, selector, INTERP: tl.constexpr):
    """Four bytes out of the eight of two words: nibble n of `selector` (0..7) chooses byte n. All uint32."""
    if INTERP:
        table = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        found = selector & 0
        for n in tl.static_range(4):
            place = ((selector >> 4 * n) & 7).to(tl.uint64) * 8
            found |= ((table >> place) & 0xFF).to(tl.uint32) << 8 * n
        return found
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit
def four_words(words):
    """[32, 4, 4] -> four times [32, 4]."""
    even, odd = tl.split(words.reshape(32, 4, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def code_selectors(plane_0, plane_1, plane_2, SHIFT: tl.constexpr):
    """Codes of the weights 8 * SHIFT .. 8 * SHIFT + 7 of each lane, a nibble each."""
    bits_0 = plane_0 >> SHIFT
    bits_1 = plane_1 << 1 >> SHIFT if SHIFT < 2 else plane_1 >> (SHIFT - 1)
    bits_2 = plane_2 >> (SHIFT - 2) if SHIFT > 2 else plane_2 << (2 - SHIFT)
    return (bits_0 & 0x11111111) | (bits_1 & 0x22222222) | (bits_2 & 0x44444444)


@triton.jit
def add_ranks(missing, SHIFT: tl.constexpr, before):
    """Ranks 1.. of those fallbacks (0 for other weights), a nibble each, and the fallbacks of the lane so far."""
    flags = (missing >> SHIFT) & 0x11111111
    ranks = flags * 0x11111111 + before * 0x11111111
    return ranks & (flags * 7), ranks >> 28


@triton.jit
def word_pairs(low, codes, ranks, table_0, table_1, mine_0, mine_1, INTERP: tl.constexpr):
    """Four weights of each lane as two words of two BF16 each: uint32 [32, 4, b1]."""
    exponent = permute_bytes(table_0, table_1, codes, INTERP) | permute_bytes(mine_0, mine_1, ranks, INTERP)
    upper = (low & 0x80808080) | ((exponent >> 1) & 0x7F7F7F7F)
    lower = (low & 0x7F7F7F7F) | ((exponent << 7) & 0x80808080)
    first = permute_bytes(lower, upper, lower * 0 + 0x5140, INTERP)
    return tl.join(first, permute_bytes(lower, upper, lower * 0 + 0x7362, INTERP))


@triton.jit
def eight_weights(first, second, codes, ranks, table_0, table_1, mine_0, mine_1, INTERP: tl.constexpr):
    """Words n = 2 * SHIFT and the next: uint32 [32, 4, b1, lower bit of j]."""
    pairs = word_pairs(first, codes, ranks, table_0, table_1, mine_0, mine_1, INTERP)
    return tl.join(pairs, word_pairs(second, codes >> 16, ranks >> 16, table_0, table_1, mine_0, mine_1, INTERP))


@triton.jit
def lane_fallbacks(fallbacks, offsets, tile, count):
    """The seven fallback exponents of each lane behind a zero byte, as two words. count: int32 [32, 4]."""
    warp = tl.arange(0, 4)
    by_warp = count.reshape(4, 32)
    before = tl.cumsum(by_warp, 1) - by_warp + tl.load(offsets + tile * 4 + warp)[:, None]
    start = before.reshape(32, 4) + 3  # the byte before the first: the array begins with 4 bytes of padding
    word = fallbacks + (start >> 2)
    word_1 = tl.load(word + 1).to(tl.uint64)
    shift = ((start & 3) * 8).to(tl.uint64)
    mine_0 = ((word_1 << 32) | tl.load(word).to(tl.uint64)) >> shift
    mine_1 = ((tl.load(word + 2).to(tl.uint64) << 32) | word_1) >> shift
    return mine_0.to(tl.uint32) & 0xFFFFFF00, mine_1.to(tl.uint32)


@triton.jit
def put_raw(pairs, raw_warps, raw, index, lane):
    """pairs, uint32 [32, 4, b1, lower bit of j, upper bit of j, h], with the raw warps of the tile in their place."""
    place = tl.load(raw_warps + index.to(tl.int64) * 4 + tl.arange(0, 32) // 8).to(tl.int64)[:, None, None]
    inside = (place >= 0) & (lane[:, :, None] >= 0)
    word = raw + place * 512 + (lane % 32)[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    first = tl.join(tl.load(word, mask=inside, other=0), tl.load(word + 128, mask=inside, other=0))
    second = tl.join(tl.load(word + 256, mask=inside, other=0), tl.load(word + 384, mask=inside, other=0))
    stored = tl.join(first, second).reshape(32, 4, 2, 2, 2, 2).permute(0, 1, 4, 3, 2, 5)
    return tl.where(inside[:, :, :, None, None, None], stored, pairs)


@triton.jit
def decode_tile(
    low, planes, table_0, table_1, fallbacks, offsets, raw_index, raw_warps, raw, tile, INTERP: tl.constexpr
):
    """Words (uint16) [64, 64] of tile number `tile` (int64). table_0, table_1: its matrix's table, uint32 scalars."""
    lane = tl.arange(0, 32)[:, None] * 4 + tl.arange(0, 4)[None, :]
    word = lane[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    low_0, low_1, low_2, low_3 = four_words(tl.load(low + tile * 1024 + word))
    low_4, low_5, low_6, low_7 = four_words(tl.load(low + (tile * 1024 + 512) + word))
    plane_0 = tl.load(planes + tile * 384 + lane)
    plane_1 = tl.load(planes + (tile * 384 + 128) + lane)
    plane_2 = tl.load(planes + (tile * 384 + 256) + lane)
    missing = (plane_0 | plane_1 | plane_2) ^ 0xFFFFFFFF
    ranks_0, met = add_ranks(missing, 0, missing & 0)
    ranks_1, met = add_ranks(missing, 1, met)
    ranks_2, met = add_ranks(missing, 2, met)
    ranks_3, met = add_ranks(missing, 3, met)
    mine_0, mine_1 = lane_fallbacks(fallbacks, offsets, tile, met.to(tl.int32))
    table_0, table_1 = plane_0 * 0 + table_0, plane_0 * 0 + table_1
    codes = code_selectors(plane_0, plane_1, plane_2, 0)
    part_0 = eight_weights(low_0, low_1, codes, ranks_0, table_0, table_1, mine_0, mine_1, INTERP)
    codes = code_selectors(plane_0, plane_1, plane_2, 1)
    part_1 = eight_weights(low_2, low_3, codes, ranks_1, table_0, table_1, mine_0, mine_1, INTERP)
    codes = code_selectors(plane_0, plane_1, plane_2, 2)
    part_2 = eight_weights(low_4, low_5, codes, ranks_2, table_0, table_1, mine_0, mine_1, INTERP)
    codes = code_selectors(plane_0, plane_1, plane_2, 3)
    part_3 = eight_weights(low_6, low_7, codes, ranks_3, table_0, table_1, mine_0, mine_1, INTERP)
    pairs = tl.join(tl.join(part_0, part_1), tl.join(part_2, part_3))
    index = tl.load(raw_index + tile)
    if index >= 0:
        pairs = put_raw(pairs, raw_warps, raw, index, lane)
    words = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return words.reshape(4, 8, 4, 2, 2, 2, 2, 2).permute(0, 6, 1, 5, 4, 3, 2, 7).reshape(64, 64)


@triton.jit
def unpack_kernel(
    low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, matrices, out, rows, columns,
    INTERP: tl.constexpr,
):  # fmt: skip
    """out (uint16 [G, R, C]): one tile of one chosen matrix."""
    row_tile, chosen = tl.program_id(1), tl.program_id(2)
    matrix = tl.load(matrices + chosen).to(tl.int64)
    across = (columns + 63) // 64
    tile = (matrix * ((rows + 63) // 64) + row_tile) * across + tl.program_id(0)
    table_0, table_1 = tl.load(tables + 2 * matrix), tl.load(tables + 2 * matrix + 1)
    words = decode_tile(low, planes, table_0, table_1, fallbacks, offsets, raw_index, raw_warps, raw, tile, INTERP)
    row = row_tile * 64 + tl.arange(0, 64)[:, None]
    column = tl.program_id(0) * 64 + tl.arange(0, 64)[None, :]
    place = out + (chosen.to(tl.int64) * rows + row) * columns + column
    tl.store(place, words, mask=(row < rows) & (column < columns))


def arguments(packed: PackedStack) -> tuple[Tensor, ...]:
    """low [T, 2, 128, 4], planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, as kernels take them."""
    signed = ("offsets", "raw_index", "raw_warps")
    return tuple(tensor if name in signed else tensor.view(torch.uint32) for name, tensor in packed.tensors.items())


@launches_kernels
def unpack(packed: PackedStack, matrices: Sequence[int], out: Tensor | None = None) -> Tensor:
    """BF16 [G, R, C] of the listed matrices, decoded on the device of the arrays, into `out` if given."""
    _, rows, columns = packed.shape
    if out is None:
        out = torch.empty(len(matrices), rows, columns, dtype=torch.bfloat16, device=packed.low.device)
    if len(matrices):
        chosen = torch.tensor(matrices, dtype=torch.int32, device=out.device)
        unpack_kernel[(tiles(columns), tiles(rows), len(matrices))](
            *arguments(packed), chosen, out.view(torch.uint16), rows, columns, INTERP=INTERPRETED, num_warps=4
        )
    return out


__all__ = ["INTERPRETED", "TILE", "arguments", "decode_tile", "unpack"]
