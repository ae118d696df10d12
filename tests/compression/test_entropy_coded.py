"""The storage layout: close to the entropy, every kind of weight, and every field that lies is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard

from ernie_elastic.compression import decode, encode, entropy_coded
from ernie_elastic.compression.entropy_coded import FRAME, RANKS
from ernie_elastic.compression.format import read_header
from ernie_elastic.errors import FormatError
from tests.compression.test_format import sealed


def gaussian(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 0.02).to(torch.bfloat16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.int16), b.reshape(-1).view(torch.int16))


@pytest.mark.parametrize("kind", ["normal", "scaled rows", "heavy tails", "experts"])
def test_size_is_within_half_a_percent_of_the_bound(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1024, 1100, generator=generator) * 0.02
    if kind == "scaled rows":
        weight *= torch.exp2(0.5 * torch.randn(1024, 1, generator=generator))
    elif kind == "heavy tails":
        weight /= torch.rand(1024, 1100, generator=generator).clamp_min(1e-3).sqrt()
    elif kind == "experts":
        weight = weight.reshape(16, 64, 1100)
    encoded = encode(weight.to(torch.bfloat16), "w", "entropy_coded")
    print(kind, encoded.bits_per_weight, encoded.entropy_bits)
    assert encoded.bits_per_weight <= 1.005 * encoded.entropy_bits
    assert same(decode(encoded.stream), weight.to(torch.bfloat16))


@pytest.mark.parametrize("count", [1, 2, 3, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME + 7])
def test_frames_of_every_length(count: int) -> None:
    weight = gaussian(count)
    stream = encode(weight, "w", "entropy_coded").stream
    assert same(decode(stream), weight)
    assert np.array_equal(encode(weight, "w", "entropy_coded").stream, stream)


def test_a_table_names_the_most_frequent_exponents_once_each() -> None:
    words = (np.repeat([200, 3, 77], [5, 9, 5]) << 7).astype(np.uint16)
    assert entropy_coded.ranking(words).tolist() == [3, 77, 200, *range(3), *range(4, 13)]
    assert entropy_coded.ranking(np.empty(0, dtype=np.uint16)).tolist() == list(range(RANKS))


def fields(stream: np.ndarray, count: int) -> dict[str, int]:
    """Where the fields of a stream of one frame begin."""
    body = read_header(stream).body
    packed = int(stream[body : body + 4].view("<u4")[0])
    frame = body + 8 + RANKS + count
    return {"sizes": body, "table": body + 8, "low": body + 8 + RANKS, "frame": frame, "escapes": frame + packed}


def refused(stream: np.ndarray, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        decode(sealed(stream))


def test_every_field_that_lies_is_refused() -> None:
    weight = torch.cat([gaussian(1000), torch.tensor([3e38, 1e-38, 1e30]).to(torch.bfloat16)])
    stream = encode(weight, "w", "entropy_coded").stream
    at = fields(stream, 1003)
    assert stream.size - at["escapes"] >= 2

    def changed(place: int, value: int) -> np.ndarray:
        copy = stream.copy()
        copy[place] = value
        return copy

    refused(changed(at["sizes"], 0), "too many")
    refused(changed(at["sizes"] + 3, 255), "ends past")
    refused(changed(at["sizes"] + 4, 200), "ends past")
    refused(changed(at["table"], stream[at["table"] + 1]), "two ranks")
    refused(changed(at["escapes"], stream[at["table"] + 2]), "escapes disagree")
    refused(changed(at["frame"], 0), "claims|refuses")
    for place in range(at["frame"] + 4, at["frame"] + 12):
        try:
            decoded = decode(sealed(changed(place, stream[place] ^ 0x55)))
        except FormatError:
            continue
        assert decoded.shape == weight.shape


def rebuilt(stream: np.ndarray, count: int, packed: bytes) -> np.ndarray:
    """The stream with another frame in it."""
    at = fields(stream, count)
    copy = np.concatenate([stream[: at["frame"]], np.frombuffer(packed, np.uint8), stream[at["escapes"] :]])
    copy[at["sizes"] : at["sizes"] + 4] = np.frombuffer(np.uint32(len(packed)).tobytes(), np.uint8)
    return copy


def test_frames_of_a_forger_are_refused_before_they_take_memory() -> None:
    weight = gaussian(1001)
    stream = encode(weight, "w", "entropy_coded").stream
    at = fields(stream, 1001)
    pairs = zstandard.ZstdDecompressor().decompress(stream[at["frame"] : at["escapes"]].tobytes())
    compress = zstandard.ZstdCompressor(level=1).compress
    assert same(decode(sealed(rebuilt(stream, 1001, compress(pairs)))), weight)  # any encoder's frame is read
    refused(rebuilt(stream, 1001, compress(bytes(1 << 30))), "claims 1073741824 bytes, expected 501")
    refused(rebuilt(stream, 1001, compress(pairs[:-1])), "claims 500 bytes")
    refused(rebuilt(stream, 1001, zstandard.ZstdCompressor(write_content_size=False).compress(pairs)), "claims -1")
    refused(rebuilt(stream, 1001, compress(pairs) + b"more"), "refuses")
    refused(rebuilt(stream, 1001, compress(pairs)[:-3]), "refuses")
    refused(rebuilt(stream, 1001, compress(pairs[:-1] + bytes([pairs[-1] | 0x30]))), "after the last weight")
    refused(rebuilt(stream, 1001, compress(b"\xff" + pairs[1:])), "escapes disagree")
