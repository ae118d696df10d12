"""BF16 matrices packed in tiles that a GPU's lanes decode alone: `reference` (the definition) and `triton`.

Contract: bit-exact. `pack` and `PackedStack` are in reference.py with the layout; the device function that other
kernels decode a tile with is `triton_impl.decode_tile`. `backend="auto"` means triton for CUDA tensors.

Legend: D matrices, R rows, C columns, G chosen matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ernie_elastic.kernels.lane_tiles import reference
from ernie_elastic.kernels.lane_tiles.reference import TILE, PackedStack, pack, unpack_rows
from ernie_elastic.kernels.triton_backend import use_triton

__all__ = ["TILE", "PackedStack", "pack", "unpack", "unpack_rows"]
Backend = Literal["auto", "triton", "reference"]


def unpack(
    packed: PackedStack, matrices: Sequence[int] | None = None, backend: Backend = "auto", out: Tensor | None = None
) -> Tensor:
    """BF16 [G, R, C] of the listed matrices (default: all), bit-exact, into `out` if given.

    IndexError for a number that is not there, ConfigError for a back end that is not known or cannot run.
    """
    chosen = reference.check_chosen(packed, matrices)
    if use_triton(backend, "lane_tiles", packed.low.device):
        from ernie_elastic.kernels.lane_tiles import triton_impl

        return triton_impl.unpack(packed, chosen, out)
    found = reference.unpack(packed, chosen)
    return found if out is None else out.copy_(found)
