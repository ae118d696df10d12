"""Triton kernels of `zip_moe`: routing plan, gate and up with SwiGLU, down with the combine weights, ordered sum.

Contract: one kernel body serves the packed experts and the plain BF16 twin, with the same tiles, the same order of K
steps and the same `tl.dot`, so the outputs of both are bit-identical. Nothing is added atomically: a pair has one row,
and the rows of a token are added in the order of its choices. Nothing waits for the host, so a call can be captured.

Weights are the left operand of the dots: a program computes a tile [BR, BM] of y^T for BM pairs of one expert.

Legend: N tokens, K chosen, S = N * K pairs, E experts, H hidden, I width; BR, BC, BM tile sizes; BE >= E, BS pairs of
a program of the plan. A slot is a place in the pairs sorted by expert, each expert's padded to a multiple of BM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.kernels.lane_tiles import triton_impl as lane_tiles
from ernie_elastic.kernels.lane_tiles.product import add_product, load_words, round_to_bf16
from ernie_elastic.kernels.lane_tiles.reference import TILE, PackedStack
from ernie_elastic.kernels.triton_backend import interpreting, launches_kernels

# Read when the kernels below are decorated: the interpreter keeps BF16 as raw bits and truncates when it rounds to it.
INTERPRETED = interpreting()
PLAN_PAIRS = 32
COMBINE_COLUMNS = 512


@dataclass(frozen=True)
class Stacks:
    """The weights as the kernels take them: arguments of gate_up_kernel and of down_kernel, E, I, packed or plain."""

    gate_up: tuple[Any, ...]
    down: tuple[Any, ...]
    experts: int
    width: int
    packed: bool


@triton.jit
def plan_kernel(
    ids, pair_of_slot, expert_of_block, pairs, experts, blocks,
    BE: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Slots of the BS pairs of this program; the first program also marks what is padding.

    ids int64 [S]; pair_of_slot int32 [blocks * BM], `pairs` where a block's slot is empty; expert_of_block int32
    [blocks], -1 behind the last one. Pairs whose id is no expert get no slot.
    """
    first = tl.program_id(0) * BS
    expert = tl.arange(0, BE)
    place = first + tl.arange(0, BS)
    mine = tl.load(ids + place, mask=place < pairs, other=-1).to(tl.int32)
    count = tl.zeros((BE,), dtype=tl.int32)
    rank = tl.zeros((BS,), dtype=tl.int32)
    for start in range(0, pairs, BS):
        other = start + tl.arange(0, BS)
        theirs = tl.load(ids + other, mask=other < pairs, other=-1).to(tl.int32)
        count += tl.sum((theirs[None, :] == expert[:, None]).to(tl.int32), 1)
        before = (theirs[None, :] == mine[:, None]) & (other[None, :] < place[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    count = tl.where(expert < experts, count, 0)
    size = (count + BM - 1) // BM
    begin = tl.cumsum(size, 0) - size
    slot = tl.sum(tl.where(mine[:, None] == expert[None, :], begin[None, :], 0), 1) * BM + rank
    tl.store(pair_of_slot + slot, place.to(tl.int32), mask=(mine >= 0) & (mine < experts))
    if first == 0:
        for k in range(BM):
            empty = begin * BM + count + k
            tl.store(pair_of_slot + empty, expert * 0 + pairs, mask=count + k < size * BM)
        for k in range(tl.max(size, 0)):
            tl.store(expert_of_block + begin + k, expert, mask=k < size)
        for start in range(tl.sum(size, 0), blocks, BE):
            tl.store(expert_of_block + start + expert, expert * 0 - 1, mask=start + expert < blocks)


@triton.jit
def load_rows(x, row_M, column, columns, inside_M):
    """BF16 tile [BC, BM] of x [*, columns]: the rows row_M, the columns `column`, transposed; 0 outside."""
    inside = (column[:, None] < columns) & inside_M[None, :]
    return tl.load(x + row_M[None, :].to(tl.int64) * columns + column[:, None], mask=inside, other=0.0)


@triton.jit
def gate_up_kernel(
    x, low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, pair_of_slot, expert_of_block, active,
    pairs, top_k, width, hidden,
    BR: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """active BF16 [S, I] = silu(gate) * up, for BR units of the width of the BM pairs of one block."""
    block = tl.program_id(1)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    row_tile = tl.program_id(0)
    row = row_tile * BR + tl.arange(0, BR)
    pair = tl.load(pair_of_slot + block * BM + tl.arange(0, BM))
    inside = pair < pairs
    gate = tl.zeros((BR, BM), dtype=tl.float32)
    up = tl.zeros((BR, BM), dtype=tl.float32)
    for start in range(0, hidden, BC):
        column = start + tl.arange(0, BC)
        x_tile = load_rows(x, pair // top_k, column, hidden, inside)
        word = load_words(
            low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, 2 * expert, row_tile, start, width,
            hidden, PACKED, INTERP,
        )  # fmt: skip
        gate = add_product(word, x_tile, gate, INTERP)
        word = load_words(
            low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, 2 * expert + 1, row_tile, start, width,
            hidden, PACKED, INTERP,
        )  # fmt: skip
        up = add_product(word, x_tile, up, INTERP)
    value = round_to_bf16(gate / (1.0 + tl.exp(-gate)) * up, INTERP)
    place = active + pair[None, :].to(tl.int64) * width + row[:, None]
    tl.store(place, value, mask=inside[None, :] & (row[:, None] < width))


@triton.jit
def down_kernel(
    active, low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, pair_of_slot, expert_of_block, weights,
    out, pairs, hidden, width,
    BR: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    SPLITS: tl.constexpr, PACKED: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """out float32 [SPLITS, S, H] = combine weight * down, for BR rows of the BM pairs of one block.

    A split takes every SPLITS-th K step, so that programs which run together read neighbouring weights.
    """
    block = tl.program_id(1)
    split = tl.program_id(2)
    expert = tl.load(expert_of_block + block).to(tl.int64)
    if expert < 0:
        return
    row_tile = tl.program_id(0)
    row = row_tile * BR + tl.arange(0, BR)
    pair = tl.load(pair_of_slot + block * BM + tl.arange(0, BM))
    inside = pair < pairs
    total = tl.zeros((BR, BM), dtype=tl.float32)
    for start in range(split * BC, width, SPLITS * BC):
        column = start + tl.arange(0, BC)
        x_tile = load_rows(active, pair, column, width, inside)
        word = load_words(
            low, planes, tables, fallbacks, offsets, raw_index, raw_warps, raw, expert, row_tile, start, hidden, width,
            PACKED, INTERP,
        )  # fmt: skip
        total = add_product(word, x_tile, total, INTERP)
    total *= tl.load(weights + pair, mask=inside, other=0.0)[None, :]
    place = out + (split * pairs + pair[None, :]).to(tl.int64) * hidden + row[:, None]
    tl.store(place, total, mask=inside[None, :] & (row[:, None] < hidden))


@triton.jit
def combine_kernel(
    rows, ids, out, tokens, hidden, experts, top_k,
    SPLITS: tl.constexpr, BH: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """out BF16 [N, H] = sum over choices, in their order, of the sum over splits of rows float32 [SPLITS, S, H]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), dtype=tl.float32)
    for k in range(top_k):
        pair = token * top_k + k
        expert = tl.load(ids + pair)
        inside = (column < hidden) & (expert >= 0) & (expert < experts)
        for split in tl.static_range(SPLITS):
            place = (split * tokens * top_k + pair) * hidden + column
            total += tl.load(rows + place, mask=inside, other=0.0)
    tl.store(out + token * hidden + column, round_to_bf16(total, INTERP), mask=column < hidden)


@dataclass(frozen=True)
class Tiles:
    """How the kernels cut the work. pairs: of one expert in a program; splits: of the sum over I in the down product.

    warps and stages (loads in flight) of both products.
    """

    pairs: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 3


def packed_stacks(gate_up: PackedStack, down: PackedStack) -> Stacks:
    """Packed stacks of gate and up [2E, I, H] and down [E, H, I]."""
    return Stacks(lane_tiles.arguments(gate_up), lane_tiles.arguments(down), down.shape[0], down.shape[2], packed=True)


def plain_stacks(gate_up: Tensor, down: Tensor, experts: int, width: int) -> Stacks:
    """Plain stacks: int16 words [E, 2I, H] and [E, H, I], which take the place of the planes too."""
    arguments = [(words,) * 8 for words in (gate_up, down)]
    return Stacks(arguments[0], arguments[1], experts, width, packed=False)


def tile_choices(pairs: int, experts: int) -> list[Tiles]:
    """The grid that is worth trying for that many pairs; the same for both twins. ours: unmeasured."""
    sizes = [8, 16] if pairs <= 8 * min(pairs, experts) else [16, 32]
    splits = [1, 2] if pairs <= 64 else [1]
    return [Tiles(size, split, 4, stages) for size in sizes for split in splits for stages in (2, 4)]


def default_tiles(pairs: int, experts: int) -> Tiles:
    """Tiles without measuring: programs for many multiprocessors when there are few pairs. ours: unmeasured."""
    return Tiles(16 if pairs <= 8 * min(pairs, experts) else 32, 2 if pairs <= 64 else 1)


def plan(ids_NK: Tensor, experts: int, size: int) -> tuple[Tensor, Tensor]:
    """Slots int32 [B * size] and the experts of the B blocks, int32 [B]: see plan_kernel. Nothing waits."""
    pairs = ids_NK.numel()
    most = min(pairs, experts)
    blocks = most + (pairs - most) // size
    pair_of_slot = torch.empty(blocks * size, dtype=torch.int32, device=ids_NK.device)
    expert_of_block = torch.empty(blocks, dtype=torch.int32, device=ids_NK.device)
    plan_kernel[(triton.cdiv(pairs, PLAN_PAIRS),)](
        ids_NK.contiguous(), pair_of_slot, expert_of_block, pairs, experts, blocks,
        BE=max(16, triton.next_power_of_2(experts)), BS=PLAN_PAIRS, BM=size, num_warps=8,
    )  # fmt: skip
    return pair_of_slot, expert_of_block


@launches_kernels
def run(x_NH: Tensor, stacks: Stacks, ids_NK: Tensor, weights_NK: Tensor, tiles: Tiles) -> Tensor:
    """BF16 [N, H] -> BF16 [N, H]: all four kernels, on packed or plain stacks."""
    (tokens, hidden), top_k = x_NH.shape, ids_NK.shape[1]
    if not ids_NK.numel():
        return torch.zeros_like(x_NH)
    experts, width, pairs = stacks.experts, stacks.width, ids_NK.numel()
    ids_NK, weights_NK, x_NH = ids_NK.contiguous(), weights_NK.float().contiguous(), x_NH.contiguous()
    slots = plan(ids_NK, experts, tiles.pairs)
    options: dict[str, Any] = {"BM": tiles.pairs, "PACKED": stacks.packed, "INTERP": INTERPRETED}
    options |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
    active_SI = x_NH.new_empty(pairs, width)
    gate_up_kernel[(triton.cdiv(width, TILE), slots[1].numel())](
        x_NH, *stacks.gate_up, *slots, active_SI, pairs, top_k, width, hidden, BR=TILE, BC=TILE, **options
    )
    rows_SH = x_NH.new_empty(tiles.splits * pairs, hidden, dtype=torch.float32)
    down_kernel[(triton.cdiv(hidden, TILE), slots[1].numel(), tiles.splits)](
        active_SI, *stacks.down, *slots, weights_NK, rows_SH, pairs, hidden, width,
        BR=TILE, BC=TILE, SPLITS=tiles.splits, **options,
    )  # fmt: skip
    out_NH = torch.empty_like(x_NH)
    combine_kernel[(tokens, triton.cdiv(hidden, COMBINE_COLUMNS))](
        rows_SH, ids_NK, out_NH, tokens, hidden, experts, top_k,
        SPLITS=tiles.splits, BH=COMBINE_COLUMNS, INTERP=INTERPRETED,
    )  # fmt: skip
    return out_NH
