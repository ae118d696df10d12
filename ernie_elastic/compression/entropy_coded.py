"""The `entropy_coded` layout, for disks and downloads: exponents through zstandard (docs/formats.md 2.3).

The exponents of a frame become 4-bit ranks by frequency, two to a byte, since a Huffman code spends a whole bit or more
on each symbol: pairs of exponents come within 0.5 % of the entropy of the weight, single ones lose 3 %. Frames are
independent, so threads share them and memory stays small.

Legend: N weights of a tensor or a frame, F frames, X escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import zstandard

from ernie_elastic.compression.bits import Words
from ernie_elastic.compression.format import BodyReader, Bytes, Header
from ernie_elastic.errors import FormatError
from ernie_elastic.kernels import tbe_codec
from ernie_elastic.kernels.native import num_threads
from ernie_elastic.kernels.tbe_codec.reference import RANKS

# Weights of a frame: zstandard's tables are per 128 KiB, so larger frames save nothing.
FRAME = 1 << 20
# The fast strategy with long matches only: ranks look random, what matters is its Huffman coder.
LEVEL, MIN_MATCH = 1, 7
Item = TypeVar("Item")
Result = TypeVar("Result")


def ranking(words_N: Words) -> Bytes:
    """The 15 most frequent exponents of a frame uint16 [N], most frequent first, lower first on a tie: u8 [15]."""
    counts = tbe_codec.count_exponents(words_N[None])[0]
    return np.argsort(-counts, kind="stable")[:RANKS].astype(np.uint8)


def encode_body(words_N: Words) -> list[Bytes]:
    """Body of `entropy_coded` for BF16 words uint16 [N]. ours: reason: see the module."""
    frames = [words_N[begin : begin + FRAME] for begin in range(0, words_N.size, FRAME)]
    low_N = np.empty(words_N.size, dtype=np.uint8)
    tasks = [(frame, low_N[k * FRAME : k * FRAME + frame.size]) for k, frame in enumerate(frames)]
    coded = list(_in_threads(lambda task: _encode_frame(*task), tasks))
    sizes_F2 = np.array([[len(packed), escapes.size] for _, packed, escapes in coded], dtype="<u4").reshape(-1, 2)
    fields = [sizes_F2.reshape(-1).view(np.uint8), *(table for table, _, _ in coded), low_N]
    fields += [np.frombuffer(packed, dtype=np.uint8) for _, packed, _ in coded]
    return fields + [escapes for _, _, escapes in coded]


def _encode_frame(words_N: Words, low_N: Bytes) -> tuple[Bytes, bytes, Bytes]:
    """The ranking, the compressed pairs and the escapes of one frame; its low bytes go into `low_N`."""
    table = ranking(words_N)
    pairs, escapes = tbe_codec.encode_ranks(words_N, table, low_N)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, strategy=zstandard.STRATEGY_FAST, min_match=MIN_MATCH, write_checksum=False, write_content_size=True
    )
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(pairs.data)
    return table, packed, escapes


def decode_body(reader: BodyReader, header: Header) -> Words:
    """BF16 words [weights] of an `entropy_coded` body; FormatError when its fields disagree."""
    count = header.weights
    frames = -(-count // FRAME)
    sizes_F2 = reader.take("<u4", 2 * frames).reshape(-1, 2).astype(np.int64)
    table_F15 = reader.take("u1", RANKS * frames).reshape(-1, RANKS)
    low_N = reader.take("u1", count)
    packed = [reader.take("u1", size) for size in sizes_F2[:, 0].tolist()]
    escapes = [reader.take("u1", size) for size in sizes_F2[:, 1].tolist()]
    reader.end()
    if frames and not np.diff(np.sort(table_F15, axis=1), axis=1).all():
        raise FormatError(f"{header.name!r}: an exponent has two ranks; the file is damaged")
    words_N = np.empty(count, dtype=np.uint16)

    def decode_frame(k: int) -> None:
        part = slice(k * FRAME, min(count, (k + 1) * FRAME))
        _decode_frame(packed[k], table_F15[k], low_N[part], escapes[k], words_N[part], header)

    for _ in _in_threads(decode_frame, list(range(frames))):
        pass
    return words_N


def _decode_frame(packed: Bytes, table: Bytes, low_N: Bytes, escape_X: Bytes, out_N: Words, header: Header) -> None:
    """Write the words of one frame to `out_N`."""
    pairs = _decompress(packed, -(-out_N.size // 2), header)
    if out_N.size % 2 and pairs[-1] >> 4:
        raise FormatError(f"{header.name!r}: the rank after the last weight is not zero; the file is damaged")
    if np.isin(escape_X, table).any() or not tbe_codec.decode_ranks(pairs, low_N, table, escape_X, out_N):
        raise FormatError(f"{header.name!r}: escapes disagree with the ranks; the file is damaged")


def _decompress(packed: Bytes, size: int, header: Header) -> Bytes:
    """The pairs u8 [size] of one zstandard frame, whose claim is compared before anything is allocated for it."""
    data = packed.tobytes()
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed != size:
            raise FormatError(f"{header.name!r}: a frame claims {claimed} bytes, expected {size}; the file is damaged")
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{header.name!r}: zstandard refuses a frame ({error}); the file is damaged") from error
    if len(content) != size:
        raise FormatError(f"{header.name!r}: a frame has {len(content)} bytes, not {size}; the file is damaged")
    return np.frombuffer(content, dtype=np.uint8)


def _in_threads(work: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
    """`work` of every item in order, on as many threads as native code takes; numpy and zstandard release the GIL."""
    if len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(min(len(items), num_threads())) as pool:
        yield from pool.map(work, items)
