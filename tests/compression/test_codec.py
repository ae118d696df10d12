"""The codec: every pattern, every shape, both layouts, and an independent decoder written from the format's text."""

from __future__ import annotations

import math
import struct

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ernie_elastic.compression import decode, encode
from ernie_elastic.compression.bits import best_windows, exponents, join_words, low_bytes
from ernie_elastic.compression.format import LAYOUTS
from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import tbe_codec
from tests.conftest import is_full

ALL_PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
SHAPES = [
    (), (1,), (0,), (1, 1), (3, 0), (0, 40, 40), (1, 9), (7, 1), (65, 37), (100, 72), (64, 64), (33, 70, 100),
    (3, 5000), (2, 3, 4, 5), (5, 31, 33), (4097,), (1, 1, 1, 1, 1, 1, 1, 2),
]  # fmt: skip


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Bits of a BF16 tensor as int16, flat."""
    return tensor.reshape(-1).view(torch.int16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(words(a), words(b))


def from_words(values: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(shape)


def slow_decode(stream: np.ndarray) -> list[int]:
    """`dense_plane` decoded one weight at a time, from docs/formats.md 2 and 2.1 alone."""
    data = stream.tobytes()
    assert data[:4] == b"ETBE" and data[4] == 2 and data[5] == 2
    ndim, (matrices, length) = data[6], struct.unpack("<II", data[8:16])
    shape = struct.unpack(f"<{ndim}Q", data[32 : 32 + 8 * ndim])
    at = 32 + 8 * ndim + length
    at += -at % 8
    count = math.prod(shape) // matrices if matrices else 0
    tiles, plane = (count + 4095) // 4096, (count + 7) // 8
    ends = struct.unpack(f"<{matrices * tiles}q", data[at : at + 8 * matrices * tiles])
    low_at = at + 8 * matrices * tiles
    planes_at = low_at + matrices * count
    first_at = planes_at + matrices * 3 * plane
    fallback_at = first_at + matrices
    out, used = [], 0
    for e in range(matrices):
        for i in range(count):
            byte = [data[planes_at + (3 * e + k) * plane + i // 8] >> (i % 8) & 1 for k in range(3)]
            code = byte[0] + 2 * byte[1] + 4 * byte[2]
            if code:
                exponent = data[first_at + e] + code - 1
            else:
                exponent, used = data[fallback_at + used], used + 1
            low = data[low_at + e * count + i]
            out.append((low & 0x80) << 8 | exponent << 7 | low & 0x7F)
            if i % 4096 == 4095 or i == count - 1:
                assert ends[e * tiles + i // 4096] == used
    assert fallback_at + used == len(data)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pattern_survives(layout: str) -> None:
    for shape in [(65536,), (256, 256), (64, 32, 32)]:
        tensor = ALL_PATTERNS.view(torch.bfloat16).reshape(shape)
        assert same_bits(decode(encode(tensor, "all", layout).stream), tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_survives(layout: str, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    for values in (
        torch.randn(count) * 0.02,  # like a trained matrix
        torch.zeros(count),
        torch.full((count,), -1.5),  # all equal
        torch.rand(count) * 1e-38,  # denormals: exponent 0
        torch.full((count,), float("inf")),
    ):
        tensor = values.to(torch.bfloat16).reshape(shape)
        assert same_bits(decode(encode(tensor, "x", layout).stream), tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_at_both_ends_and_all_fallbacks(layout: str) -> None:
    low = from_words([0x0000, 0x8000, 0x0001, 0x807F, 0x0300] * 30, (10, 15))
    high = from_words([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7C80] * 30, (10, 15))
    for tensor, first in ((low, 0), (high, 249)):
        encoded = encode(tensor, "", layout)
        assert encoded.fallbacks == 0 and same_bits(decode(encoded.stream), tensor)
        counts_E = tbe_codec.count_exponents(words(tensor).numpy().view(np.uint16)[None])
        assert best_windows(counts_E)[0].tolist() == [first]
    # One weight decides the window, so that every other one is a fallback.
    tensor = from_words([0x4000, 0x4000] + [e << 7 for e in range(0, 256, 8)], (2, 17))
    encoded = encode(tensor, "", layout)
    assert encoded.fallbacks >= 31 and same_bits(decode(encoded.stream), tensor)


@given(st.lists(st.integers(0, 65535), max_size=300), st.sampled_from(list(LAYOUTS)), st.integers(1, 7))
def test_random_words_survive(values: list[int], layout: str, columns: int) -> None:
    values = values[: len(values) // columns * columns]
    tensor = from_words(values, (len(values) // columns, columns))
    encoded = encode(tensor, "n.w", layout)
    assert same_bits(decode(encoded.stream, name="n.w"), tensor)
    assert np.array_equal(encode(tensor, "n.w", layout).stream, encoded.stream)


def some_tensor(shape: tuple[int, ...], spread: float, share: float, seed: int) -> torch.Tensor:
    """BF16 weights of a log-normal scale, a share of whose words are replaced by any word at all."""
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn((), generator=generator))
    ).bfloat16()
    other = torch.randint(0, 65536, shape, generator=generator, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return torch.where(torch.rand(shape, generator=generator) < share, other, values)


def test_round_trips_by_the_thousand(request: pytest.FixtureRequest) -> None:
    shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple) | st.tuples(st.integers(1, 9000))

    @settings(max_examples=10_000 if is_full(request.config) else 100, deadline=None, derandomize=True, database=None)
    @given(
        shapes, st.sampled_from(list(LAYOUTS)), st.floats(0, 60), st.sampled_from([0.0, 0.01, 0.3, 1.0]), st.integers(0)
    )
    def check(shape: tuple[int, ...], layout: str, spread: float, share: float, seed: int) -> None:
        tensor = some_tensor(shape, spread, share, seed % 2**63)
        assert same_bits(decode(encode(tensor, "w", layout).stream, name="w"), tensor)

    check()


@given(st.integers(0, 10_000), st.integers(1, 9000))
def test_vectorised_decoder_agrees_with_the_text(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(count, generator=generator) * 0.02).to(torch.bfloat16)
    assert slow_decode(encode(tensor, "t").stream) == words(tensor).numpy().view(np.uint16).tolist()


def test_experts_have_a_window_each() -> None:
    scales = torch.tensor([1e-20, 1.0, 1e20])[:, None, None]
    tensor = (torch.randn(3, 64, 64) * scales).to(torch.bfloat16)
    encoded = encode(tensor, "experts")
    assert encoded.fallbacks / encoded.weights < 0.04
    assert same_bits(decode(encoded.stream), tensor)
    assert slow_decode(encoded.stream) == words(tensor).numpy().view(np.uint16).tolist()


def test_fields_of_a_word() -> None:
    every = ALL_PATTERNS.numpy()
    assert np.array_equal(join_words(low_bytes(every), exponents(every)), every)
    assert low_bytes(np.array([0xBF81], dtype=np.uint16))[0] == 0x81
    assert exponents(np.array([0xBF81], dtype=np.uint16))[0] == 0x7F


def test_window_of_maximal_coverage_beats_the_most_frequent_run() -> None:
    counts = np.zeros(256, dtype=np.int64)
    counts[[100, 110, 111, 112, 113, 114, 115, 116]] = [50, 10, 10, 10, 10, 10, 10, 9]
    first_E, covered_E = best_windows(np.stack([counts, 0 * counts, np.eye(256, dtype=np.int64)[255]]))
    assert first_E.tolist() == [110, 0, 249]  # 110: 69 of 119, though exponent 100 is the most frequent one
    assert covered_E.tolist() == [69, 0, 1]
    assert best_windows(np.zeros((0, 256), dtype=np.int64))[0].size == 0


def test_size_is_close_to_what_the_format_promises() -> None:
    encoded = encode((torch.randn(512, 512) * 0.02).to(torch.bfloat16), "w")
    share = encoded.fallbacks / encoded.weights
    assert 11 + 8 * share < encoded.bits_per_weight < 11 + 8 * share + 0.03
    assert 10.5 < encoded.entropy_bits < 10.6 and encoded.bits_per_weight < 11.25


@pytest.mark.parametrize("shape", [(128, 128), (64, 128), (100, 72), (65, 37), (7, 144, 100)])
def test_small_matrices_keep_the_ratio(shape: tuple[int, ...]) -> None:
    name = "model.layers.11.mlp.experts.127.gate_proj.weight"
    encoded = encode((torch.randn(shape) * 0.02).to(torch.bfloat16), name)
    print(f"{shape}: {encoded.bits_per_weight:.3f} bits a weight, bound {encoded.entropy_bits:.3f}")
    assert encoded.bits_per_weight <= 0.725 * 16


def test_other_dtypes_and_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        encode(torch.zeros(3))
    with pytest.raises(ConfigError, match="zip"):
        encode(torch.zeros(3, dtype=torch.bfloat16), layout="zip")


def test_strides_do_not_matter() -> None:
    tensor = torch.randn(40, 30).to(torch.bfloat16)
    assert same_bits(decode(encode(tensor.T).stream), tensor.T.contiguous())
