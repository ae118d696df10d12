"""The `tca_tbe` layout as published, the reference codec: bitmaps per 8x8 tile and two packed streams.

paper: ZipServ, section on TCA-TBE and Alg. 1; what differs from the published code is named in docs/formats.md 2.2.

Legend: E matrices, R rows, C columns, B BlockTiles of 64x64, S stripes of a BlockTile, N weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ernie_elastic.compression.bits import Words, exponents, join_words, low_bytes
from ernie_elastic.compression.format import MAX_FIRST, WINDOW, BodyReader, Bytes, Header
from ernie_elastic.errors import FormatError

BLOCK = 64
STRIPES = 4
PER_BLOCK = BLOCK * BLOCK
# Entries that each stream of a BlockTile is padded to: 16 bytes of sign_mantissa, 16 bytes of full words.
LOW_ALIGN, FULL_ALIGN = 16, 8


def to_tiles(words_RC: Words) -> Words:
    """[R, C], sides multiples of 64, to [B, 4096] in tile order (docs/formats.md 2.2)."""
    rows, columns = words_RC.shape
    # block row, stripe, FragTile row, row | block column, TensorCoreTile, FragTile column, column
    split = words_RC.reshape(rows // BLOCK, STRIPES, 2, 8, columns // BLOCK, 4, 2, 8)
    return np.ascontiguousarray(split.transpose(0, 4, 1, 5, 6, 2, 3, 7)).reshape(-1, PER_BLOCK)


def from_tiles(words_BN: Words, rows: int, columns: int) -> Words:
    """Inverse of `to_tiles`: [B, 4096] to [rows, columns], sides multiples of 64."""
    split = words_BN.reshape(rows // BLOCK, columns // BLOCK, STRIPES, 4, 2, 2, 8, 8)
    return np.ascontiguousarray(split.transpose(0, 2, 5, 6, 1, 3, 4, 7)).reshape(rows, columns)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _aligned(counts: npt.NDArray[np.int64], align: int) -> npt.NDArray[np.int64]:
    return -(-counts // align) * align


def _scatter(values: Words | Bytes, counts_B: npt.NDArray[np.int64], align: int) -> Words | Bytes:
    """Values of all BlockTiles in order, each tile's run padded with zeros to a multiple of `align`."""
    sizes_B = _aligned(counts_B, align)
    out = np.zeros(int(sizes_B.sum()), dtype=values.dtype)
    shift_B = np.cumsum(sizes_B - counts_B) - (sizes_B - counts_B)
    out[np.arange(values.size) + np.repeat(shift_B, counts_B)] = values
    return out


def _stripes(inside_BN: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Entries (sign_mantissa, full) before each stripe of its BlockTile, int32 [B, 4, 2]."""
    inside_BS = inside_BN.reshape(-1, STRIPES, PER_BLOCK // STRIPES).sum(axis=2)
    both_BS2 = np.stack([inside_BS, PER_BLOCK // STRIPES - inside_BS], axis=2)
    return (np.cumsum(both_BS2, axis=1) - both_BS2).astype("<i4")


def encode_body(words_ERC: Words, first_E: Bytes) -> list[Bytes]:
    """Body of `tca_tbe` for matrices uint16 [E, R, C] with windows u8 [E]."""
    matrices, rows, columns = words_ERC.shape
    tiles = []
    for words_RC, first in zip(words_ERC, first_E, strict=True):
        padded = np.full((_padded(rows), _padded(columns)), np.uint16(first) << np.uint16(7), dtype=np.uint16)
        padded[:rows, :columns] = words_RC
        tiles.append(to_tiles(padded))
    words_BN = np.concatenate(tiles)
    blocks = words_BN.shape[0]
    first_B = np.repeat(first_E, blocks // matrices)
    code_BN = exponents(words_BN) - first_B[:, None] + np.uint8(1)
    code_BN *= code_BN <= WINDOW
    inside_BN = code_BN != 0
    bitmaps = [np.packbits((code_BN >> k) & 1, axis=1, bitorder="little") for k in range(3)]
    low_count_B = inside_BN.sum(axis=1)
    full_count_B = PER_BLOCK - low_count_B
    ends_B2 = np.stack(
        [np.cumsum(_aligned(low_count_B, LOW_ALIGN)), np.cumsum(_aligned(full_count_B, FULL_ALIGN))], axis=1
    )
    low = _scatter(low_bytes(words_BN)[inside_BN], low_count_B, LOW_ALIGN)
    full = _scatter(words_BN[~inside_BN], full_count_B, FULL_ALIGN)
    fields = [ends_B2.astype("<i8"), _stripes(inside_BN), *bitmaps, full, low, first_E]
    return [np.ascontiguousarray(field).reshape(-1).view(np.uint8) for field in fields]


def decode_body(reader: BodyReader, header: Header) -> Words:
    """BF16 words [weights] of a `tca_tbe` body; FormatError when its fields disagree."""
    padded_rows, padded_columns = _padded(header.rows), _padded(header.columns)
    per_matrix = padded_rows * padded_columns // PER_BLOCK
    blocks = header.matrices * per_matrix
    ends_B2 = reader.take("<i8", 2 * blocks).reshape(-1, 2)
    stripes_BS2 = reader.take("<i4", 2 * STRIPES * blocks).reshape(-1, STRIPES, 2)
    bitmaps = reader.take("u1", 3 * PER_BLOCK // 8 * blocks).reshape(3, -1)
    sizes_B2 = np.diff(ends_B2, axis=0, prepend=0)
    if sizes_B2.size and int(sizes_B2.min()) < 0:
        raise FormatError(f"{header.name!r}: tile ends decrease; the file is damaged")
    full = reader.take("<u2", int(ends_B2[-1, 1]) if blocks else 0)
    low = reader.take("u1", int(ends_B2[-1, 0]) if blocks else 0)
    first_E = reader.take("u1", header.matrices)
    reader.end()
    code_BN = np.zeros((blocks, PER_BLOCK), dtype=np.uint8)
    for k in range(3):
        code_BN |= np.unpackbits(bitmaps[k], bitorder="little").reshape(blocks, PER_BLOCK) << np.uint8(k)
    inside_BN = code_BN != 0
    low_count_B = inside_BN.sum(axis=1)
    full_count_B = PER_BLOCK - low_count_B
    expected_B2 = np.stack([_aligned(low_count_B, LOW_ALIGN), _aligned(full_count_B, FULL_ALIGN)], axis=1)
    if (
        not np.array_equal(sizes_B2, expected_B2)
        or not np.array_equal(stripes_BS2, _stripes(inside_BN))
        or (blocks and int(first_E.max()) > MAX_FIRST)
    ):
        raise FormatError(f"{header.name!r}: offsets disagree with the bitmaps, or a bad window; the file is damaged")
    low_N = _gather(low, low_count_B, LOW_ALIGN, header)
    full_N = _gather(full, full_count_B, FULL_ALIGN, header)
    first_B = np.repeat(first_E, per_matrix)
    words_BN = np.empty((blocks, PER_BLOCK), dtype=np.uint16)
    exponent_BN = code_BN + (first_B[:, None] - np.uint8(1))
    words_BN[inside_BN] = join_words(low_N, exponent_BN[inside_BN])
    words_BN[~inside_BN] = full_N
    if (exponents(full_N) - np.repeat(first_B, full_count_B) < WINDOW).any():
        raise FormatError(f"{header.name!r}: a fallback lies inside its window; the file is damaged")
    return _crop(words_BN, first_E, header)


def _gather(values: npt.NDArray[Any], counts_B: npt.NDArray[np.int64], align: int, header: Header) -> npt.NDArray[Any]:
    """Inverse of `_scatter`; FormatError when padding is not zero."""
    sizes_B = _aligned(counts_B, align)
    starts_B = np.cumsum(sizes_B) - sizes_B
    within = np.arange(values.size) - np.repeat(starts_B, sizes_B)
    real = within < np.repeat(counts_B, sizes_B)
    if values[~real].any():
        raise FormatError(f"{header.name!r}: padding of a stream is not zero; the file is damaged")
    return values[real]


def _crop(words_BN: Words, first_E: Bytes, header: Header) -> Words:
    """Tiles [B, 4096] to the weights [E * R * C]; FormatError when a padded weight is not the padding weight."""
    rows, columns = header.rows, header.columns
    if not header.weights:  # whatever the other sides claim to be
        return np.empty(0, dtype=np.uint16)
    out_ERC = np.empty((header.matrices, rows, columns), dtype=np.uint16)
    for e, tiles_BN in enumerate(np.split(words_BN, header.matrices)):
        padded = from_tiles(tiles_BN, _padded(rows), _padded(columns))
        filler = np.uint16(first_E[e]) << np.uint16(7)
        if (padded[rows:] != filler).any() or (padded[:, columns:] != filler).any():
            raise FormatError(f"{header.name!r}: padded weights are not the padding weight; the file is damaged")
        out_ERC[e] = padded[:rows, :columns]
    return out_ERC.reshape(-1)
