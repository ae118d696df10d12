"""The stored layouts `dense_plane` and `entropy_coded` (but for zstandard) in vectorised numpy: the definition that the
native code is compared with.

Legend: E matrices, n weights of a matrix, N weights of a run or frame, T tiles of 4096 weights, P bytes of a plane,
F fallbacks, X escapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]
Counts = npt.NDArray[np.int64]

WINDOW = 7
TILE = 4096
CHUNK = 64 * TILE  # stays in cache
RANKS = 15
ESCAPE = 15


@dataclass(frozen=True)
class Fields:
    """The arrays of a `dense_plane` body (docs/formats.md 2.1), of which `encode` fills all but `first_E`.

    ends_T int64 [E * T]; low_En u8 [E, n]; planes_E3P u8 [E, 3, P]; first_E u8 [E]; fallback_F u8 [F].
    """

    ends_T: Counts
    low_En: Bytes
    planes_E3P: Bytes
    first_E: Bytes
    fallback_F: Bytes


def exponents(words_N: Words) -> Bytes:
    """Exponent byte of each BF16 word, u8 of the same shape."""
    return (words_N >> 7).astype(np.uint8)


def low_bytes(words_N: Words) -> Bytes:
    """Sign in bit 7 and mantissa in bits 6..0 of each word, u8 of the same shape."""
    return (((words_N >> 8) & 0x80) | (words_N & 0x7F)).astype(np.uint8)


def join_words(low_N: Bytes, exponent_N: Bytes) -> Words:
    """Inverse of `low_bytes` and `exponents`: BF16 words of the same shape."""
    words_N = low_N.astype(np.uint16)
    words_N += (words_N & 0x80) * np.uint16(0xFF)  # moves the sign from bit 7 to bit 15
    words_N += exponent_N.astype(np.uint16) << np.uint16(7)
    return words_N


def count_exponents(words_En: Words) -> Counts:
    """Histograms int64 [E, 256] of the exponents of BF16 words [E, n]."""
    counts_E = np.zeros((words_En.shape[0], 256), dtype=np.int64)
    for words_n, counts in zip(words_En, counts_E, strict=True):
        for begin in range(0, words_n.size, CHUNK):
            counts += np.bincount(exponents(words_n[begin : begin + CHUNK]), minlength=256)
    return counts_E


def encode(words_En: Words, fields: Fields) -> bool:
    """Fill `fields` from BF16 words [E, n]; False when their fallbacks are not as many as fields.fallback_F holds."""
    matrices, count = words_En.shape
    per_tile_ET = fields.ends_T.reshape(matrices, -(-count // TILE))
    fallbacks: list[Bytes] = []
    for e in range(matrices):
        for begin in range(0, count, CHUNK):
            part_N = words_En[e, begin : begin + CHUNK]
            fields.low_En[e, begin : begin + CHUNK] = low_bytes(part_N)
            exponent_N = exponents(part_N)
            code_N = exponent_N - fields.first_E[e] + np.uint8(1)  # wraps: an exponent below the window becomes > 7
            code_N *= code_N <= WINDOW
            for k in range(3):
                bits = np.packbits((code_N >> k) & 1, bitorder="little")
                fields.planes_E3P[e, k, begin // 8 : begin // 8 + bits.size] = bits
            missing_F = np.flatnonzero(code_N == 0)
            fallbacks.append(exponent_N[missing_F])
            found = np.bincount(missing_F // TILE, minlength=-(-part_N.size // TILE))
            per_tile_ET[e, begin // TILE : begin // TILE + found.size] = found
    np.cumsum(fields.ends_T, out=fields.ends_T)
    tail = np.concatenate(fallbacks) if fallbacks else np.empty(0, dtype=np.uint8)
    if tail.size != fields.fallback_F.size:
        return False
    fields.fallback_F[:] = tail
    return True


def decode(fields: Fields, out_En: Words) -> bool:
    """BF16 words [E, n] of `fields` into `out_En`; False when the fields disagree with each other."""
    matrices, count = out_En.shape
    per_tile_ET = np.diff(fields.ends_T, prepend=0).reshape(matrices, -(-count // TILE))
    if per_tile_ET.size and int(per_tile_ET.min()) < 0:
        return False
    at = 0
    for e in range(matrices):
        first = fields.first_E[e]
        before = np.uint8((int(first) - 1) % 256)
        for begin in range(0, count, CHUNK):
            size = min(CHUNK, count - begin)
            at8, end8 = begin // 8, -(-(begin + size) // 8)
            planes_3P = fields.planes_E3P[e, :, at8:end8]
            bits = [np.unpackbits(planes_3P[k], count=size, bitorder="little") for k in range(3)]
            code_N = bits[0] | bits[1] << np.uint8(1) | bits[2] << np.uint8(2)
            missing_F = np.flatnonzero(code_N == 0)
            found = np.bincount(missing_F // TILE, minlength=-(-size // TILE))
            values = fields.fallback_F[at : at + missing_F.size]
            at += missing_F.size
            expected = per_tile_ET[e, begin // TILE : begin // TILE + found.size]
            if not np.array_equal(found, expected) or (values - first < WINDOW).any():
                return False
            exponent_N = code_N + before  # wraps back when the window begins at exponent 0
            exponent_N[missing_F] = values
            out_En[e, begin : begin + size] = join_words(fields.low_En[e, begin : begin + size], exponent_N)
    return at == fields.fallback_F.size


def encode_ranks(words_N: Words, table: Bytes, low_N: Bytes) -> tuple[Bytes, Bytes]:
    """A frame of BF16 words [N] -> pairs of ranks u8 [ceil(N / 2)] and escapes u8 [X]; its low bytes go into `low_N`.

    table u8 [15]: exponents by rank.
    """
    rank_of = np.full(256, ESCAPE, dtype=np.uint8)
    rank_of[table] = np.arange(RANKS, dtype=np.uint8)
    exponent_N = exponents(words_N)
    low_N[:] = low_bytes(words_N)
    rank_N = np.zeros(words_N.size + words_N.size % 2, dtype=np.uint8)
    rank_N[: words_N.size] = rank_of[exponent_N]
    return rank_N[::2] | rank_N[1::2] << np.uint8(4), exponent_N[rank_N[: words_N.size] == ESCAPE]


def decode_ranks(pairs: Bytes, low_N: Bytes, table: Bytes, escape_X: Bytes, out_N: Words) -> bool:
    """The way back into `out_N`; False when the ranks ask for another number of escapes."""
    rank_N = np.empty(2 * pairs.size, dtype=np.uint8)
    rank_N[::2], rank_N[1::2] = pairs & 15, pairs >> 4
    rank_N = rank_N[: out_N.size]
    missing_X = np.flatnonzero(rank_N == ESCAPE)
    if missing_X.size != escape_X.size:
        return False
    exponent_N = np.append(table, np.uint8(0))[rank_N]
    exponent_N[missing_X] = escape_X
    out_N[:] = join_words(low_N, exponent_N)
    return True
