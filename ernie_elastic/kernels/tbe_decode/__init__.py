"""Decode of both stored layouts: `reference` (plain torch, the definition) and `triton` (GPU, or interpreted).

`DensePlanes` (reference.py) is the dense-plane layout, `BitmapTiles` (bitmap_tiles.py) `tca_tbe`, the published one.

Contract: bit-exact on both. `backend="auto"` means triton for CUDA tensors and reference for others, and logs once
why; asking for triton where it cannot run raises ConfigError with the reason.

Legend: n elements, E matrices, R rows, C columns.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ernie_elastic.kernels.tbe_decode import bitmap_tiles, reference
from ernie_elastic.kernels.tbe_decode.bitmap_tiles import BitmapTiles
from ernie_elastic.kernels.tbe_decode.bitmap_tiles import encode as encode_bitmap_tiles
from ernie_elastic.kernels.tbe_decode.reference import DensePlanes, encode
from ernie_elastic.kernels.triton_backend import use_triton

__all__ = ["BitmapTiles", "DensePlanes", "decode", "encode", "encode_bitmap_tiles"]
Backend = Literal["auto", "triton", "reference"]


def decode(packed: DensePlanes | BitmapTiles, backend: Backend = "auto") -> Tensor:
    """The weights, bit-exact: BF16 [n] of dense planes, BF16 [E, R, C] of bitmap tiles.

    Raises ConfigError for a back end that is not known or cannot run.
    """
    triton = use_triton(backend, "tbe_decode", packed.low.device)
    if isinstance(packed, BitmapTiles):
        if triton:
            from ernie_elastic.kernels.tbe_decode import triton_bitmap_tiles

            return triton_bitmap_tiles.decode(packed)
        return bitmap_tiles.decode(packed)
    if triton:
        from ernie_elastic.kernels.tbe_decode import triton_impl

        return triton_impl.decode(packed)
    return reference.decode(packed)
