"""Lossless BF16 codec: any tensor to one stream and back, bit for bit, in either stored layout (docs/formats.md).

`dense_plane` is here, `tca_tbe` in its own file. Everything is vectorised numpy over chunks that stay in cache.

Legend: E matrices, R rows, C columns, n = R * C weights of a matrix, N weights of a run, T tiles of 4096 weights,
F fallbacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ernie_elastic.compression import tca_tbe
from ernie_elastic.compression.bits import best_window, exponents, join_words, low_bytes
from ernie_elastic.compression.format import (
    LAYOUTS,
    MAX_FIRST,
    WINDOW,
    BodyReader,
    Bytes,
    Header,
    build_stream,
    check_byte_order,
    matrix_view,
    read_header,
)
from ernie_elastic.errors import ConfigError, FormatError

TILE = 4096
CHUNK = 64 * TILE
DEFAULT_LAYOUT = "dense_plane"


@dataclass(frozen=True)
class Encoded:
    """One compressed tensor: the stream u8 [bytes] and what the tables print about it."""

    stream: Bytes
    weights: int
    fallbacks: int
    entropy_bits: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, header and padding included; 0 for an empty tensor."""
        return 8 * self.stream.size / self.weights if self.weights else 0.0


def encode(weight: torch.Tensor, name: str = "", layout: str = DEFAULT_LAYOUT) -> Encoded:
    """Compress a BF16 tensor of any shape. The same tensor, name and layout always give the same bytes.

    source: paper: ZipServ, TCA-TBE (`tca_tbe`); ours: `dense_plane`, same payload with one stream that varies in
    place of two. Raises ConfigError for another dtype or layout, FormatError beyond the format's limits.
    """
    check_byte_order()
    if weight.dtype != torch.bfloat16:
        raise ConfigError(f"{name or 'tensor'}: dtype {weight.dtype}, only torch.bfloat16 is compressed; leave it")
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is not known; choose {' or '.join(LAYOUTS)}")
    shape = tuple(weight.shape)
    matrices, rows, columns = matrix_view(shape)
    words_N = weight.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    words_ERC = words_N.reshape(matrices, rows, columns)
    counts_E = [count_exponents(words_RC.reshape(-1)) for words_RC in words_ERC]
    first_E = np.array([best_window(counts) for counts in counts_E], dtype=np.uint8)
    total = np.sum(counts_E, axis=0)
    covered = sum(int(c[f : f + WINDOW].sum()) for c, f in zip(counts_E, first_E.tolist(), strict=True))
    body = (_encode_dense if layout == "dense_plane" else tca_tbe.encode_body)(words_ERC, first_E)
    stream = build_stream(layout, name, shape, body)
    return Encoded(stream, weight.numel(), weight.numel() - covered, 8 + entropy(total))


def decode(stream: Bytes, where: str = "stream", name: str | None = None) -> torch.Tensor:
    """The BF16 tensor of a stream u8 [bytes], in its original shape.

    name: what the stream must call itself (None = anything). Raises FormatError on any damage.
    """
    header = read_header(stream, where)
    if name is not None and header.name != name:
        raise FormatError(f"{where}: holds {header.name!r}, expected {name!r}; the file is damaged")
    reader = BodyReader(stream, header)
    words_N = (_decode_dense if header.layout == "dense_plane" else tca_tbe.decode_body)(reader, header)
    return torch.from_numpy(words_N.view(np.int16)).view(torch.bfloat16).reshape(header.shape)


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy in bits of a histogram [256]; 0 for an empty one."""
    total = int(counts.sum())
    shares = [int(c) / total for c in counts if c]
    return -sum(p * math.log2(p) for p in shares) + 0.0 if total else 0.0


def count_exponents(words_N: npt.NDArray[np.uint16]) -> npt.NDArray[np.int64]:
    """Histogram int64 [256] of the exponents of BF16 words [N]."""
    counts = np.zeros(256, dtype=np.int64)
    for begin in range(0, words_N.size, CHUNK):
        part = torch.from_numpy(exponents(words_N[begin : begin + CHUNK]))
        counts += torch.bincount(part, minlength=256).numpy()
    return counts


def _encode_dense(words_ERC: npt.NDArray[np.uint16], first_E: Bytes) -> list[Bytes]:
    """Body of `dense_plane`."""
    matrices = words_ERC.shape[0]
    words_En = words_ERC.reshape(matrices, -1)
    count = words_En.shape[1]
    tiles, plane = -(-count // TILE), -(-count // 8)
    per_tile = np.zeros((matrices, tiles), dtype=np.int64)
    low_En = np.empty((matrices, count), dtype=np.uint8)
    planes_E3P = np.empty((matrices, 3, plane), dtype=np.uint8)
    fallbacks: list[Bytes] = []
    for e in range(matrices):
        for begin in range(0, count, CHUNK):
            part_N = words_En[e, begin : begin + CHUNK]
            low_En[e, begin : begin + CHUNK] = low_bytes(part_N)
            exponent_N = exponents(part_N)
            code_N = exponent_N - first_E[e] + np.uint8(1)  # wraps: every exponent below the window becomes > 7
            code_N *= code_N <= WINDOW
            for k in range(3):
                bits = np.packbits((code_N >> k) & 1, bitorder="little")
                planes_E3P[e, k, begin // 8 : begin // 8 + bits.size] = bits
            missing_F = np.flatnonzero(code_N == 0)
            fallbacks.append(exponent_N[missing_F])
            found = np.bincount(missing_F // TILE, minlength=-(-part_N.size // TILE))
            per_tile[e, begin // TILE : begin // TILE + found.size] = found
    ends = np.cumsum(per_tile.reshape(-1))
    tail = np.concatenate(fallbacks) if fallbacks else np.empty(0, dtype=np.uint8)
    return [ends.astype("<i8").view(np.uint8), low_En, planes_E3P, first_E, tail]


def _decode_dense(reader: BodyReader, header: Header) -> npt.NDArray[np.uint16]:
    """BF16 words [weights] of a `dense_plane` body; FormatError when its fields disagree."""
    matrices, count = header.matrices, header.rows * header.columns
    tiles, plane = -(-count // TILE), -(-count // 8)
    ends = reader.take("<i8", matrices * tiles)
    low_En = reader.take("u1", matrices * count).reshape(matrices, count)
    planes_E3P = reader.take("u1", matrices * 3 * plane).reshape(matrices, 3, plane)
    first_E = reader.take("u1", matrices)
    per_tile_ET = np.diff(ends, prepend=0).reshape(matrices, tiles)
    if per_tile_ET.size and (int(per_tile_ET.min()) < 0 or int(first_E.max()) > MAX_FIRST):
        raise FormatError(f"{header.name!r}: tile ends decrease or a window is above {MAX_FIRST}; the file is damaged")
    fallback_F = reader.take("u1", int(ends[-1]) if ends.size else 0)
    reader.end()
    if count % 8 and (planes_E3P[:, :, -1] >> (count % 8)).any():
        raise FormatError(f"{header.name!r}: unused bits of a code plane are set; the file is damaged")
    words_En = np.empty((matrices, count), dtype=np.uint16)
    at = 0
    for e in range(matrices):
        first = first_E[e]
        before = np.uint8((int(first) - 1) % 256)
        for begin in range(0, count, CHUNK):
            size = min(CHUNK, count - begin)
            at8, end8 = begin // 8, -(-(begin + size) // 8)
            bits = [np.unpackbits(planes_E3P[e, k, at8:end8], count=size, bitorder="little") for k in range(3)]
            code_N = bits[0] | bits[1] << np.uint8(1) | bits[2] << np.uint8(2)
            missing_F = np.flatnonzero(code_N == 0)
            found = np.bincount(missing_F // TILE, minlength=-(-size // TILE))
            expected = per_tile_ET[e, begin // TILE : begin // TILE + found.size]
            values = fallback_F[at : at + missing_F.size]
            at += missing_F.size
            if not np.array_equal(found, expected) or (values - first < WINDOW).any():
                raise FormatError(f"{header.name!r}: fallbacks disagree with the code planes; the file is damaged")
            exponent_N = code_N + before  # wraps back when the window begins at exponent 0
            exponent_N[missing_F] = values
            words_En[e, begin : begin + size] = join_words(low_En[e, begin : begin + size], exponent_N)
    return words_En.reshape(-1)
