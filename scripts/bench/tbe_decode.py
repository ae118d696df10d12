"""Decode of both stored layouts to a BF16 buffer on a GPU: GB/s read and written, against torch's copy.

Peer `copy`: torch's copy of the BF16 matrix, what the memory gives. `lane_tiles` is the same decode of the run-time
layout that the products read. Matrices rotate beyond twice the L2 cache; bits are compared before anything is timed.

Legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import gpu
from bench.common import Row
from ernie_elastic.kernels import lane_tiles, tbe_decode

PEERS = ("copy", "lane_tiles")
SHAPES = ((28672, 4096), (4096, 14336))
QUICK_SHAPES = SHAPES[:1]


def run(quick: bool) -> list[Row]:
    """Rows of both layouts. ConfigError without a CUDA device."""
    return gpu.run_all("tbe_decode", tasks, quick)


def tasks(quick: bool) -> list[gpu.Task]:
    """A task per shape."""

    def work_of(shape: tuple[int, int]) -> Callable[[], list[Row]]:
        return lambda: shape_rows(*shape)

    return [gpu.Task(f"{rows}x{columns}", work_of((rows, columns)), 20)
            for rows, columns in (QUICK_SHAPES if quick else SHAPES)]  # fmt: skip


def shape_rows(rows: int, columns: int) -> list[Row]:
    """A row per stored layout of one matrix [R, C]."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(0)
    weight_RC = torch.randn(rows, columns, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16).mul_(0.02)
    stored: dict[str, Any] = {
        "dense_plane": tbe_decode.encode(weight_RC),
        "tca_tbe": tbe_decode.encode_bitmap_tiles(weight_RC[None]),
    }
    tiles = lane_tiles.pack(weight_RC[None])
    turns = gpu.copies(tiles.nbytes)
    plain = [weight_RC.clone() for _ in range(turns)]
    many_tiles = [tiles.clone() for _ in range(turns)]
    out_RC = torch.empty_like(weight_RC)
    found = []
    for name, packed in stored.items():
        gpu.check_bits(f"{name} of {rows}x{columns}", tbe_decode.decode(packed).view_as(weight_RC), weight_RC)
        packs = [packed.to("cpu").to(gpu.DEVICE) for _ in range(turns)]
        variants = variants_of(packs, plain, many_tiles, out_RC)
        moved = {"ours": packed.nbytes, "copy": 2 * weight_RC.numel(), "lane_tiles": tiles.nbytes}
        moved = {peer: size + 2 * weight_RC.numel() for peer, size in moved.items()}
        found.append(gpu.speed_row(f"{rows}x{columns}: {name}", variants, turns, moved))
    return found


def variants_of(
    packs: list[Any], plain: list[torch.Tensor], tiles: list[lane_tiles.PackedStack], out_RC: torch.Tensor
) -> dict[str, Callable[[int], Any]]:
    """The calls that are timed, by name: the k-th matrix [R, C] in each form."""
    return {
        "ours": lambda k: tbe_decode.decode(packs[k]),
        "copy": lambda k: out_RC.copy_(plain[k]),
        "lane_tiles": lambda k: lane_tiles.unpack(tiles[k], out=out_RC[None]),
    }
