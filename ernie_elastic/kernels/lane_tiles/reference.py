"""Stacks of BF16 matrices packed for tensor cores: tiles of 64 x 64 whose bytes lie where a lane's registers need them.

Contract: `unpack(pack(w))` has the bits of `w`; a kernel can begin at any tile of any matrix. A tile belongs to 128
lanes (4 warps); lane 32 * w + 4 * g + t holds 32 weights, in the order h, j, b1, b0:

    row 16 * w + 8 * h + g, column 16 * j + 8 * b1 + 2 * t + b0      (the left fragments of m16n8k16 products)

Weight n of a lane (0..31) is byte n % 4 of its word n / 4, and bit 4 * (n % 8) + n / 8 of each of its planes, so that a
plane shifted by n / 8 has the bits of eight weights in its nibbles: selectors of a byte permutation that looks the
exponents up. Arrays, T tiles in all, row tiles before column tiles, D matrices:

    low        i32 [T, 2, 128, 4]      sign and mantissa bytes: words 4 * h .. 4 * h + 3 of the lanes
    planes     i32 [T, 3, 128]         bits 0, 1, 2 of the 3-bit codes; code 0 is a fallback
    tables     i32 [D, 2]              exponents of the codes 0..7 of a matrix, a byte each; 0 for code 0
    fallbacks  i32 [F]                 exponents of the fallbacks, a byte each, by tile, lane, n; padded at both ends
    offsets    i32 [T * 4]             fallbacks before each warp of each tile
    raw_index  i32 [T]                 row of the tile in raw_warps, or -1
    raw_warps  i32 [X, 4]              for a tile with raw warps: the place of each warp in raw, or -1
    raw        i32 [Y, 2, 2, 32, 4]    warps with a lane of more than 7 fallbacks: pairs of words by h, b1, lane, j

A raw warp is rare in trained weights; its codes are all 7. Rows and columns are padded to whole tiles with a value
that is no fallback.

Legend: D matrices, R rows, C columns, T tiles, G chosen matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError

TILE, LANES, WARPS = 64, 128, 4
WINDOW = 7
MAX_FALLBACKS_OF_A_LANE = 7  # what two registers hold beside the zero of "no fallback"
BYTES_BEFORE, BYTES_BEHIND = 4, 12
WEIGHTS_AT_ONCE = 1 << 21  # of packing, rounded to whole rows of tiles: each costs some 60 bytes of temporaries
ROWS_AT_ONCE = 64  # of a look-up: each weight costs a few hundred bytes of temporaries
# Dimensions of a tile as rows (w, h, g) and columns (j, b1, t, b0), and the order in which lanes hold them.
SPLIT = (4, 2, 8, 4, 2, 4, 2)
TO_LANES = (0, 1, 3, 6, 2, 4, 5, 7)
FROM_LANES = (0, 1, 4, 2, 5, 6, 3, 7)


@dataclass(frozen=True, eq=False)
class PackedStack:
    """BF16 matrices of shape [D, R, C], as in the module docstring, all arrays on one device."""

    shape: tuple[int, int, int]
    low: Tensor
    planes: Tensor
    tables: Tensor
    fallbacks: Tensor
    offsets: Tensor
    raw_index: Tensor
    raw_warps: Tensor
    raw: Tensor

    def __post_init__(self) -> None:
        """FormatError for arrays of another size or kind than the layout has: kernels read by address."""
        count = self.shape[0] * self.tiles_of_a_matrix
        sizes = {"low": 1024 * count, "planes": 384 * count, "tables": 2 * self.shape[0], "offsets": WARPS * count,
                 "raw_index": count}  # fmt: skip
        for name, array in self.tensors.items():
            found = f"{array.numel()} of {array.dtype}{'' if array.is_contiguous() else ', not contiguous'}"
            if (
                array.dtype != torch.int32
                or not array.is_contiguous()
                or array.numel() != sizes.get(name, array.numel())
            ):
                raise FormatError(
                    f"packed stack {self.shape}: {name} has {found}, expected {sizes.get(name, 'some')} of int32; "
                    "pack the matrices anew"
                )
        if self.low.device != self.raw.device or self.low.device != self.fallbacks.device:
            raise FormatError(f"packed stack {self.shape}: its arrays lie on several devices; pack the matrices anew")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name: low [T, 2, 128, 4] and so on, as the module docstring has them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shape"}

    @property
    def tiles_of_a_matrix(self) -> int:
        """Tiles that a matrix is padded to."""
        return tiles(self.shape[1]) * tiles(self.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> PackedStack:
        """The same matrices with all arrays on `device`; every shape stays the same."""
        return PackedStack(self.shape, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def clone(self) -> PackedStack:
        """A copy in memory of its own; every shape stays the same."""
        return PackedStack(self.shape, **{name: tensor.clone() for name, tensor in self.tensors.items()})


def tiles(size: int) -> int:
    """Tiles that `size` rows or columns are padded to."""
    return -(-size // TILE)


def pack(weight_DRC: Tensor) -> PackedStack:
    """BF16 [D, R, C] -> PackedStack on the same device, one window of maximal coverage a matrix.

    ConfigError for other inputs. ours: reason: one lane's 32 weights need no byte of another lane.
    """
    if weight_DRC.ndim != 3 or weight_DRC.dtype != torch.bfloat16 or not weight_DRC.numel():
        found = f"{weight_DRC.dtype} {tuple(weight_DRC.shape)}"
        raise ConfigError(f"packed stack: weights are {found}, expected bfloat16 [D, R, C]")
    parts = [_pack_matrix(weight_RC) for weight_RC in weight_DRC.detach()]
    low, planes, tables, fallbacks, per_warp, is_raw, raw = (list(part) for part in zip(*parts, strict=True))
    count = torch.cat(per_warp)
    offsets = count.cumsum(0) - count
    total = sum(part.numel() for part in fallbacks)
    if total >= 2**31 - BYTES_BEHIND:
        raise ConfigError(f"packed stack: {total} fallbacks, at most 2**31; pack fewer matrices together")
    before, behind = (total_of.new_zeros(size) for total_of, size in
                      ((fallbacks[0], BYTES_BEFORE), (fallbacks[0], BYTES_BEHIND + -total % 4)))  # fmt: skip
    raw_TW = torch.cat(is_raw)
    raw_T = raw_TW.any(1)
    place_TW = torch.where(raw_TW, raw_TW.flatten().cumsum(0).view_as(raw_TW) - 1, -1)
    return PackedStack(
        (weight_DRC.shape[0], weight_DRC.shape[1], weight_DRC.shape[2]),
        low=torch.cat(low),
        planes=torch.cat(planes),
        tables=torch.stack(tables),
        fallbacks=torch.cat((before, *fallbacks, behind)).view(torch.int32),
        offsets=offsets.to(torch.int32),
        raw_index=torch.where(raw_T, raw_T.cumsum(0) - 1, -1).to(torch.int32),
        raw_warps=place_TW[raw_T].to(torch.int32),
        raw=torch.cat(raw),
    )


def _pack_matrix(weight_RC: Tensor) -> tuple[Tensor, ...]:
    """low, planes, table, fallbacks (bytes), fallbacks of each warp, raw tiles' flags and words of one matrix."""
    columns = weight_RC.shape[1]
    at_once = max(1, WEIGHTS_AT_ONCE // (TILE * columns)) * TILE  # rows, whole tiles
    counts_256 = torch.zeros(256, dtype=torch.int64, device=weight_RC.device)
    for part_RC in weight_RC.split(at_once):
        exponent = part_RC.contiguous().view(torch.int16).int() >> 7 & 0xFF
        counts_256 += torch.bincount(exponent.flatten(), minlength=256)
    cumulative = torch.cat((counts_256.new_zeros(1), counts_256.cumsum(0)))
    base = int((cumulative[WINDOW:] - cumulative[:-WINDOW]).argmax()) - 1
    parts = [_pack_rows(part_RC, base) for part_RC in weight_RC.split(at_once)]
    low, planes, fallbacks, per_warp, is_raw, raw = (torch.cat(part) for part in zip(*parts, strict=True))
    table = torch.tensor([0, *(base + c for c in range(1, 8))], dtype=torch.uint8, device=low.device)
    return low, planes, table.view(torch.int32), fallbacks, per_warp, is_raw, raw


def _pack_rows(weight_RC: Tensor, base: int) -> tuple[Tensor, ...]:
    """low, planes, fallbacks (bytes), fallbacks of each warp, raw tiles' flags and words of some rows of tiles."""
    rows, columns = weight_RC.shape
    word_RC = weight_RC.contiguous().view(torch.int16).int() & 0xFFFF
    pads = (0, -columns % TILE, 0, -rows % TILE)
    padded = torch.nn.functional.pad(word_RC, pads, value=base + 1 << 7)
    word_TL = to_lanes(padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).flatten(0, 1))
    exponent = word_TL >> 7 & 0xFF
    code = exponent - base
    code = torch.where((code >= 1) & (code <= WINDOW), code, 0)
    is_raw_TW = ((code == 0).sum(2) > MAX_FALLBACKS_OF_A_LANE).view(-1, WARPS, 32).any(2)
    code = torch.where(is_raw_TW.repeat_interleave(32, 1)[:, :, None], WINDOW, code)
    place = bit_of_weight(word_TL.device)
    planes = torch.stack([((code >> k & 1) << place).sum(2, dtype=torch.int32) for k in range(3)], 1)
    byte = (word_TL >> 8 & 0x80 | word_TL & 0x7F).to(torch.uint8)
    low = byte.view(-1, LANES, 2, 16).transpose(1, 2).contiguous().view(torch.int32)
    raw = word_TL.view(-1, WARPS, 32, 32)[is_raw_TW].to(torch.int16)
    raw = raw.view(-1, 32, 2, 4, 2, 2).permute(0, 2, 4, 1, 3, 5).contiguous().view(torch.int32).squeeze(5)
    missing = code == 0
    per_warp = missing.view(-1, LANES // WARPS * 32).sum(1)
    return low, planes, exponent[missing].to(torch.uint8), per_warp, is_raw_TW, raw


def bit_of_weight(device: torch.device) -> Tensor:
    """Where weight n of a lane has its bit in a plane: int32 [32]."""
    n = torch.arange(32, dtype=torch.int32, device=device)
    return 4 * (n % 8) + n // 8


def to_lanes(tiles_TRC: Tensor) -> Tensor:
    """[T, 64, 64] -> [T, 128, 32]: a tile in the order of its lanes."""
    return tiles_TRC.reshape(-1, *SPLIT).permute(TO_LANES).reshape(-1, LANES, 32)


def from_lanes(lanes_TL: Tensor) -> Tensor:
    """[T, 128, 32] -> [T, 64, 64]."""
    in_lanes = [(1, *SPLIT)[k] for k in TO_LANES[1:]]
    return lanes_TL.reshape(-1, *in_lanes).permute(FROM_LANES).reshape(-1, TILE, TILE)


def check_chosen(packed: PackedStack, matrices: Sequence[int] | None) -> list[int]:
    """The listed matrices of [D, R, C] (default: all). IndexError for a number that is not there."""
    chosen = list(range(packed.shape[0]) if matrices is None else matrices)
    for matrix in chosen:
        if not 0 <= matrix < packed.shape[0]:
            raise IndexError(f"matrix {matrix} of a stack of {packed.shape[0]}")
    return chosen


def unpack(packed: PackedStack, matrices: Sequence[int]) -> Tensor:
    """BF16 [G, R, C] of the listed matrices, bit-exact."""
    if not len(matrices):
        return packed.low.new_empty(0, *packed.shape[1:], dtype=torch.bfloat16)
    return torch.stack([_unpack_matrix(packed, matrix) for matrix in matrices])


def _unpack_matrix(packed: PackedStack, matrix: int) -> Tensor:
    """BF16 [R, C] of one matrix."""
    _, rows, columns = packed.shape
    count = packed.tiles_of_a_matrix
    here = slice(matrix * count, (matrix + 1) * count)
    low = packed.low[here].view(torch.uint8).view(count, 2, LANES, 16).transpose(1, 2).reshape(count, LANES, 32).int()
    place = bit_of_weight(low.device)
    bits = [packed.planes[here, k, :, None] >> place & 1 for k in range(3)]
    code = bits[0] | bits[1] << 1 | bits[2] << 2
    exponent = packed.tables[matrix].view(torch.uint8).int()[code]
    missing = code == 0
    first = int(packed.offsets[WARPS * here.start]) + BYTES_BEFORE
    stored = packed.fallbacks.view(torch.uint8)[first : first + int(missing.sum())]
    if stored.numel() != int(missing.sum()):
        found = f"needs {int(missing.sum())} fallbacks, {stored.numel()} are there"
        raise FormatError(f"packed stack: matrix {matrix} {found}; it is damaged")
    exponent[missing] = stored.int()
    word = (low & 0x80) << 8 | exponent << 7 | low & 0x7F
    index = packed.raw_index[here].long()
    place_XW = packed.raw_warps[index[index >= 0]].long()
    raw = packed.raw.view(torch.int16).view(-1, 2, 2, 32, 4, 2)[place_XW[place_XW >= 0]]
    patched = word[index >= 0].view(-1, WARPS, 32, 32)
    patched[place_XW >= 0] = raw.permute(0, 3, 1, 4, 2, 5).reshape(-1, 32, 32).int() & 0xFFFF
    word[index >= 0] = patched.view(-1, LANES, 32)
    tile_rows = from_lanes(word).view(tiles(rows), tiles(columns), TILE, TILE).transpose(1, 2)
    whole = tile_rows.reshape(tiles(rows) * TILE, tiles(columns) * TILE)[:rows, :columns]
    return torch.where(whole > 0x7FFF, whole - 0x10000, whole).to(torch.int16).view(torch.bfloat16)


def unpack_rows(packed: PackedStack, rows_N: Tensor) -> Tensor:
    """Rows int64 [N] of the first matrix [R, C], repeats allowed: BF16 [N, C], bit-exact. Nothing waits for a GPU.

    For a row that is not there: IndexError on the CPU, a failed assertion on a GPU. ours: reason: a row of a tile is
    half of each of four lanes.
    """
    rows, columns = packed.shape[1:]
    if rows_N.is_cuda:
        torch._assert_async(((rows_N >= 0) & (rows_N < rows)).all())  # as an embedding does: nothing waits
    elif rows_N.numel() and not 0 <= int(rows_N.min()) <= int(rows_N.max()) < rows:
        raise IndexError(f"rows {int(rows_N.min())} to {int(rows_N.max())} of a matrix of {rows}")
    if not rows_N.numel():
        return packed.low.new_empty(0, columns, dtype=torch.bfloat16)
    return torch.cat([_unpack_rows(packed, part_N) for part_N in rows_N.split(ROWS_AT_ONCE)])


def _unpack_rows(packed: PackedStack, rows_N: Tensor) -> Tensor:
    """`unpack_rows` of few rows. Letters: N rows, K column tiles, L = 4 lanes of the row, W = 16 weights of each."""
    columns, here = packed.shape[2], rows_N % TILE
    warp, half, group = here // 16, here % 16 // 8, here % 8
    device = rows_N.device
    tile_NK = (rows_N // TILE)[:, None] * tiles(columns) + torch.arange(tiles(columns), device=device)
    planes = packed.planes.view(-1, 3, WARPS, 32)[tile_NK, :, warp[:, None]]  # [N, K, 3, 32], the whole warp
    bits = planes[..., None] >> bit_of_weight(device) & 1
    code = bits[:, :, 0] | bits[:, :, 1] << 1 | bits[:, :, 2] << 2  # [N, K, 32, 32]
    missing = (code == 0).flatten(2)
    before = missing.cumsum(2).view_as(code) - 1
    lane = 4 * group[:, None, None] + torch.arange(4, device=device)  # [N, 1, L]
    weight = 16 * half[:, None, None, None] + torch.arange(16, device=device)  # [N, 1, 1, W]
    n, k = torch.arange(len(rows_N), device=device)[:, None, None], torch.arange(tiles(columns), device=device)[:, None]
    mine = (n[..., None], k[..., None], lane[..., None], weight)
    code, place = code[mine], before[mine]  # [N, K, L, W]
    first_NK = packed.offsets.view(-1, WARPS)[tile_NK, warp[:, None]].long() + BYTES_BEFORE
    stored = packed.fallbacks.view(torch.uint8)
    place = torch.where(code == 0, first_NK[..., None, None] + place, 0)
    exponent = torch.where(code == 0, stored[place], packed.tables[0].view(torch.uint8)[code.long()]).int()
    low_words = packed.low.view(-1, 2, WARPS, 32, 4)[tile_NK[..., None], half[:, None, None], warp[:, None, None], lane]
    low = low_words.contiguous().view(torch.uint8).view(code.shape).int()
    word = (low & 0x80) << 8 | exponent << 7 | low & 0x7F
    if packed.raw.numel():
        index_NK = packed.raw_index[tile_NK].long()
        place_NK = packed.raw_warps[index_NK.clamp(min=0), warp[:, None]].long().where(index_NK >= 0, -1)
        pairs = packed.raw[place_NK.clamp(min=0)[..., None], half[:, None, None], :, lane]  # [N, K, L, 2, 4]
        raw = pairs.transpose(3, 4).contiguous().view(torch.int16).view(code.shape).int() & 0xFFFF
        word = torch.where((place_NK >= 0)[..., None, None], raw, word)
    # From lanes t and weights (j, b1, b0) to columns 16 * j + 8 * b1 + 2 * t + b0.
    word = word.view(*word.shape[:2], 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(len(rows_N), -1)[:, :columns]
    return torch.where(word > 0x7FFF, word - 0x10000, word).to(torch.int16).view(torch.bfloat16)
