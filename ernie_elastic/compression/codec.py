"""Lossless BF16 codec: the words of any tensor to one stream and back, bit for bit, in any layout (docs/formats.md).

`dense_plane` is here, on top of kernels/tbe_codec; the other layouts have files of their own.

Legend: E matrices, R rows, C columns, n = R * C weights of a matrix, N weights, T tiles of 4096 weights, F fallbacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ernie_elastic.compression import entropy_coded, tca_tbe
from ernie_elastic.compression.bits import Words, best_windows
from ernie_elastic.compression.format import (
    LAYOUTS,
    MAX_FIRST,
    BodyReader,
    Bytes,
    Header,
    build_stream,
    check_byte_order,
    matrix_view,
    new_stream,
    read_header,
    seal,
    smallest_body,
)
from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels import tbe_codec
from ernie_elastic.kernels.tbe_codec import Fields
from ernie_elastic.kernels.tbe_codec.reference import TILE

DEFAULT_LAYOUT = "dense_plane"
LAYOUT_FOR = {"serving": DEFAULT_LAYOUT, "storage": "entropy_coded"}


@dataclass(frozen=True)
class Encoded:
    """One compressed tensor: the stream u8 [bytes] and what the tables print about it.

    fallbacks: weights outside of their matrix's window, whatever the layout. entropy_bits: 8 + H of the exponents.
    """

    stream: Bytes
    weights: int
    fallbacks: int
    entropy_bits: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, header and padding included; 0 for an empty tensor."""
        return 8 * self.stream.size / self.weights if self.weights else 0.0


def encode_words(words_N: Words, shape: tuple[int, ...], name: str = "", layout: str = DEFAULT_LAYOUT) -> Encoded:
    """Compress a BF16 tensor of any shape, given as its words uint16 [weights]; deterministic.

    Raises ConfigError for an unknown layout, FormatError beyond the format's limits. source: see `tensors.encode`.
    """
    check_byte_order()
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is not known; choose {' or '.join(LAYOUTS)}")
    matrices, rows, columns = matrix_view(shape)
    counts_E = tbe_codec.count_exponents(words_N.reshape(matrices, rows * columns))
    first_E, covered_E = best_windows(counts_E)
    fallbacks = words_N.size - int(covered_E.sum())
    words_ERC = words_N.reshape(matrices, rows, columns)
    if layout == "dense_plane":
        stream = _encode_dense(name, shape, words_ERC, first_E, fallbacks)
    elif layout == "tca_tbe":
        stream = build_stream(layout, name, shape, tca_tbe.encode_body(words_ERC, first_E))
    else:
        stream = build_stream(layout, name, shape, entropy_coded.encode_body(words_N))
    return Encoded(stream, words_N.size, fallbacks, 8 + entropy(counts_E.sum(axis=0)))


def decode_words(stream: Bytes, where: str = "stream", name: str | None = None) -> tuple[Words, tuple[int, ...]]:
    """The BF16 words uint16 [weights] of a stream u8 [bytes], and the shape of its tensor.

    name: what the stream must call itself (None = anything). Raises FormatError on any damage.
    """
    header = read_header(stream, where)
    if name is not None and header.name != name:
        raise FormatError(f"{where}: holds {header.name!r}, expected {name!r}; the file is damaged")
    return DECODERS[header.layout](BodyReader(stream, header), header), header.shape


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy in bits of a histogram [256]; 0 for an empty one."""
    total = int(counts.sum())
    shares = [int(c) / total for c in counts if c]
    return -sum(p * math.log2(p) for p in shares) + 0.0 if total else 0.0


def _dense_fields(body: Bytes, matrices: int, count: int) -> Fields:
    """The arrays of a `dense_plane` body u8 [bytes], as views of it; the rest after the windows are the fallbacks."""
    tiles, plane = -(-count // TILE), -(-count // 8)
    sizes = (8 * matrices * tiles, matrices * count, 3 * matrices * plane, matrices)
    ends, low, planes, first, fallbacks = np.split(body, np.cumsum(sizes))
    return Fields(
        np.require(ends.view("<i8"), requirements="A"),
        low.reshape(matrices, count),
        planes.reshape(matrices, 3, plane),
        first,
        fallbacks,
    )


def _encode_dense(name: str, shape: tuple[int, ...], words_ERC: Words, first_E: Bytes, fallbacks: int) -> Bytes:
    """The stream of `dense_plane`, written in place."""
    matrices, count = words_ERC.shape[0], words_ERC.shape[1] * words_ERC.shape[2]
    size = smallest_body("dense_plane", *words_ERC.shape) + fallbacks
    stream, body = new_stream("dense_plane", name, shape, size)
    fields = _dense_fields(body, matrices, count)
    fields.first_E[:] = first_E
    if not tbe_codec.encode(words_ERC.reshape(matrices, count), fields):
        raise RuntimeError(f"{name}: the weights changed while they were encoded; keep them still")
    return seal(stream)


def _decode_dense(reader: BodyReader, header: Header) -> Words:
    """BF16 words [weights] of a `dense_plane` body; FormatError when its fields disagree."""
    matrices, count = header.matrices, header.rows * header.columns
    fields = _dense_fields(reader.take("u1", reader.left), matrices, count)
    ends_T, first_E, fallbacks = fields.ends_T, fields.first_E, fields.fallback_F.size
    if (int(ends_T[-1]) if ends_T.size else 0) != fallbacks:
        raise FormatError(f"{header.name!r}: {fallbacks} fallbacks do not end with the last tile; the file is damaged")
    if first_E.size and int(first_E.max()) > MAX_FIRST:
        raise FormatError(f"{header.name!r}: a window is above {MAX_FIRST}; the file is damaged")
    if count % 8 and (fields.planes_E3P[:, :, -1] >> (count % 8)).any():
        raise FormatError(f"{header.name!r}: unused bits of a code plane are set; the file is damaged")
    words_En = np.empty((matrices, count), dtype=np.uint16)
    if not tbe_codec.decode(fields, words_En):
        raise FormatError(f"{header.name!r}: fallbacks disagree with the code planes; the file is damaged")
    return words_En.reshape(-1)


DECODERS = {"dense_plane": _decode_dense, "tca_tbe": tca_tbe.decode_body, "entropy_coded": entropy_coded.decode_body}
