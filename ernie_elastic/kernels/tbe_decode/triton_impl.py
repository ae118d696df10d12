"""Triton kernel of `tbe_decode`: one program decodes one tile of 4096 weights. See reference.py for the layout.

Contract: bit-exact. The kernel works on integers only, so it gives the same bits in the interpreter and on a GPU.

Legend: n elements, T tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.kernels.tbe_decode.reference import TILE, DensePlanes
from ernie_elastic.kernels.triton_backend import launches_kernels


@triton.jit
def load_codes(planes, index, plane_bytes, mask):
    """3-bit codes of the elements `index` from three bit planes of `plane_bytes` bytes each; 0 where masked."""
    bit = (index % 8).to(tl.int32)
    place = planes + index // 8
    first = tl.load(place, mask=mask, other=0).to(tl.int32) >> bit & 1
    place += plane_bytes  # step by step: twice the size may not fit its integer
    second = tl.load(place, mask=mask, other=0).to(tl.int32) >> bit & 1
    place += plane_bytes
    third = tl.load(place, mask=mask, other=0).to(tl.int32) >> bit & 1
    return first | second << 1 | third << 2


@triton.jit
def join_word(low, exponent):
    """The 16 bits of BF16 weights, as int32, from their sign-and-mantissa bytes and exponents (both int32)."""
    return (low & 0x80) << 8 | exponent << 7 | low & 0x7F


@triton.jit
def decode_kernel(low, planes, fallbacks, offsets, out, count, plane_bytes, base, TILE_SIZE: tl.constexpr):
    """out (int16 [count]): the words of the tile `program_id`. All pointers as in DensePlanes."""
    tile = tl.program_id(0)
    index = tile.to(tl.int64) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = index < count
    code = load_codes(planes, index, plane_bytes, inside)
    missing = inside & (code == 0)
    rank = tl.cumsum(missing.to(tl.int32), 0) - 1
    stored = tl.load(fallbacks + tl.load(offsets + tile) + rank, mask=missing, other=0).to(tl.int32)
    exponent = tl.where(missing, stored, code + base)
    word = join_word(tl.load(low + index, mask=inside, other=0).to(tl.int32), exponent)
    tl.store(out + index, word.to(tl.int16), mask=inside)


@launches_kernels
def decode(planes: DensePlanes) -> Tensor:
    """BF16 [n], bit-exact, on the device of the planes (CUDA, or CPU when TRITON_INTERPRET was set at import)."""
    out_n = torch.empty(planes.count, dtype=torch.int16, device=planes.low.device)
    decode_kernel[(triton.cdiv(planes.count, TILE),)](
        planes.low, planes.planes, planes.fallbacks, planes.offsets, out_n,
        planes.count, planes.planes.numel() // 3, planes.base, TILE_SIZE=TILE,
    )  # fmt: skip
    return out_n.view(torch.bfloat16)
