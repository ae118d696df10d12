"""The byte layout of a compressed tensor (`docs/formats.md` section 2): header, checksum, and what a reader rejects.

Contract: `read_header` checks sizes before anything is allocated and the checksum before anything is decoded; every
violation is a FormatError that names the tensor.

Legend: E matrices, R rows, C columns, n = R * C weights of a matrix.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ernie_elastic.errors import FormatError
from ernie_elastic.kernels.tbe_codec.reference import WINDOW, Bytes

MAGIC = b"ETBE"
# What is written. Version 1 has SHA-256 as its checksum, which took longer than decoding did; it is read for ever.
VERSION = 2
VERSIONS = (1, 2)
LAYOUTS = {"tca_tbe": 1, "dense_plane": 2, "entropy_coded": 3}
LAYOUT_NAMES = {number: name for name, number in LAYOUTS.items()}
FIXED = struct.Struct("<4sBBBBII16s")
CHECKSUM_AT, CHECKSUM_BYTES = 16, 16
MAX_DIMENSIONS = 8
MAX_NAME = 4096
MAX_WEIGHTS = 2**62
# ours: a matrix below this would pay more for its own window and tile end than the window saves.
MIN_MATRIX = 1024
MAX_FIRST = 256 - WINDOW


@dataclass(frozen=True)
class Header:
    """What precedes the body. matrices, rows, columns: how the tensor is read; body: where the body begins."""

    layout: str
    name: str
    shape: tuple[int, ...]
    matrices: int
    rows: int
    columns: int
    checksum: str
    body: int

    @property
    def weights(self) -> int:
        """Weights of the whole tensor."""
        return self.matrices * self.rows * self.columns


def matrix_view(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(E, R, C): how a tensor of `shape` is read as matrices (docs/formats.md section 2)."""
    if not shape:
        return 1, 1, 1
    if len(shape) == 1:
        return 1, 1, shape[0]
    if len(shape) == 3 and shape[1] * shape[2] >= MIN_MATRIX and shape[0] > 0:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def check_byte_order() -> None:
    """FormatError on a big-endian machine: weights are viewed as little-endian words."""
    if sys.byteorder != "little":
        raise FormatError("compressed weights need a little-endian machine, this one is big-endian; use another")


def fits_a_stream(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is within the format's limits: length of its name, dimensions, weights."""
    return (
        len(name.encode()) <= MAX_NAME
        and len(shape) <= MAX_DIMENSIONS
        and math.prod(max(d, 1) for d in shape) < MAX_WEIGHTS
    )


def new_stream(layout: str, name: str, shape: tuple[int, ...], body_bytes: int) -> tuple[Bytes, Bytes]:
    """A stream u8 [bytes] with its header, and the view u8 [body_bytes] of its end that the caller fills, then `seal`s.

    The body begins at a multiple of 8 bytes in memory. FormatError beyond the format's limits.
    """
    if not fits_a_stream(name, shape):
        raise FormatError(
            f"{name[:80]!r}: shape {shape} or a name of {len(name)} characters is beyond the format's limits "
            f"({MAX_DIMENSIONS} dimensions, 2^62 weights, {MAX_NAME} bytes); store it as it is"
        )
    encoded = name.encode()
    fixed = FIXED.pack(
        MAGIC, VERSION, LAYOUTS[layout], len(shape), 0, matrix_view(shape)[0], len(encoded), bytes(CHECKSUM_BYTES)
    )
    head = fixed + struct.pack(f"<{len(shape)}Q", *shape) + encoded + bytes(-len(encoded) % 8)
    stream = np.empty(len(head) + body_bytes, dtype=np.uint8)
    stream[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    return stream, stream[len(head) :]


def seal(stream: Bytes) -> Bytes:
    """Write the checksum of a stream u8 [bytes] into it; returns the stream."""
    stream[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = np.frombuffer(checksum_of(stream), dtype=np.uint8)
    return stream


def build_stream(layout: str, name: str, shape: tuple[int, ...], body: list[Bytes]) -> Bytes:
    """The whole stream u8 [bytes] of one tensor from the parts of its body. FormatError beyond the format's limits."""
    parts = [part.reshape(-1).view(np.uint8) for part in body]
    stream, space = new_stream(layout, name, shape, sum(part.size for part in parts))
    np.concatenate([space[:0], *parts], out=space)
    return seal(stream)


def checksum_of(stream: Bytes) -> bytes:
    """The 16 checksum bytes of a stream u8 [bytes], of the kind that its version has."""
    head, tail = stream[:CHECKSUM_AT].tobytes(), np.ascontiguousarray(stream[CHECKSUM_AT + CHECKSUM_BYTES :]).data
    digest = hashlib.sha256(head) if head[4] == 1 else xxhash.xxh3_128(head)
    digest.update(tail)
    return digest.digest()[:CHECKSUM_BYTES]


def smallest_body(layout: str, matrices: int, rows: int, columns: int) -> int:
    """Bytes that the body has at least; with Python integers, so that no claim can overflow."""
    if layout == "dense_plane":
        count = rows * columns
        return matrices * (8 * -(-count // 4096) + count + 3 * -(-count // 8) + 1)
    if layout == "entropy_coded":
        # Sizes 8, ranks 15 and at least 10 of zstandard a frame of 2^20 weights.
        return matrices * rows * columns + 33 * -(-matrices * rows * columns // 2**20)
    # Fields of fixed size only: ends 16, stripes 32, bitmaps 3 * 64 * 8 bytes a BlockTile.
    return matrices * (-(-rows // 64) * -(-columns // 64) * (16 + 32 + 1536) + 1)


def read_header(stream: Bytes, where: str = "stream", verify: bool = True) -> Header:
    """The header of a stream u8 [bytes], whole or (verify=False) with a body that is not looked at yet.

    where: names the stream in errors. verify: also compare the checksum. FormatError: docs/formats.md 2.4.
    """
    check_byte_order()
    if stream.size < FIXED.size:
        raise FormatError(f"{where}: {stream.size} bytes, a stream has at least {FIXED.size}; the file is damaged")
    magic, version, layout, ndim, zero, matrices, length, digest = FIXED.unpack(stream[: FIXED.size].tobytes())
    if magic != MAGIC or version not in VERSIONS:
        raise FormatError(
            f"{where}: magic {magic!r} version {version}, expected {MAGIC!r} version 1 to {VERSION}; "
            "the file is damaged or was written by a later ernie_elastic"
        )
    if layout not in LAYOUT_NAMES or zero or ndim > MAX_DIMENSIONS or length > MAX_NAME:
        raise FormatError(
            f"{where}: layout {layout}, reserved {zero}, {ndim} dimensions, name of {length} bytes is not allowed; "
            "the file is damaged"
        )
    body = FIXED.size + 8 * ndim + length + -length % 8
    if stream.size < body:
        raise FormatError(f"{where}: {stream.size} bytes, its header alone has {body}; the file is damaged")
    shape = struct.unpack(f"<{ndim}Q", stream[FIXED.size : FIXED.size + 8 * ndim].tobytes())
    name_at = FIXED.size + 8 * ndim
    try:
        name = stream[name_at : name_at + length].tobytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: its name is not UTF-8; the file is damaged") from error
    expected, rows, columns = matrix_view(shape)
    if math.prod(max(d, 1) for d in shape) >= MAX_WEIGHTS or matrices != expected:
        raise FormatError(f"{where}: {name!r} of shape {shape} in {matrices} matrices is wrong; the file is damaged")
    least = body + smallest_body(LAYOUT_NAMES[layout], matrices, rows, columns)
    if verify and stream.size < least:
        raise FormatError(
            f"{where}: {name!r} of shape {shape} takes {least} bytes or more, found {stream.size}; the file is damaged"
        )
    if verify and (checksum_of(stream) != digest or stream[name_at + length : body].any()):
        raise FormatError(f"{where}: {name!r} does not match its checksum {digest.hex()}; the file is damaged")
    return Header(LAYOUT_NAMES[layout], name, shape, matrices, rows, columns, digest.hex(), body)


class BodyReader:
    """Takes typed fields from a body one after the other and refuses to read past its end."""

    def __init__(self, stream: Bytes, header: Header) -> None:
        self.stream, self.name, self.at = stream, header.name, header.body

    @property
    def left(self) -> int:
        """Bytes that have not been taken."""
        return self.stream.size - self.at

    def take(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """The next `count` numbers of little-endian `dtype`, 1-D [count]; FormatError when the body is too short."""
        size = np.dtype(dtype).itemsize * count
        if count < 0 or self.at + size > self.stream.size:
            raise FormatError(
                f"{self.name!r}: a field of {size} bytes at {self.at} ends past {self.stream.size}; the file is damaged"
            )
        part = np.ascontiguousarray(self.stream[self.at : self.at + size]).view(dtype)
        self.at += size
        return part

    def end(self) -> None:
        """FormatError when bytes are left."""
        if self.at != self.stream.size:
            raise FormatError(f"{self.name!r}: {self.stream.size - self.at} bytes too many; the file is damaged")
