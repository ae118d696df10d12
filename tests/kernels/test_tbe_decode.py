"""tbe_decode: the reference and the Triton kernel give back every BF16 word."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels import tbe_decode
from tests.kernels.compare import any_words, gaussian, same_bits

interpreted = pytest.mark.interpreter
COUNTS = [1, 7, 8, 4095, 4096, 4097, 20000]


def check(weight_n: Tensor, device: torch.device) -> None:
    """Both back ends give back the bits."""
    planes = tbe_decode.encode(weight_n)
    assert same_bits(tbe_decode.decode(planes, "reference"), weight_n)
    decoded_n = tbe_decode.decode(planes.to(device), "triton")
    assert same_bits(decoded_n.cpu(), weight_n)


@interpreted
def test_every_pattern_survives(all_patterns: Tensor, device: torch.device) -> None:
    check(all_patterns, device)
    check(all_patterns[torch.randperm(65536)], device)


@interpreted
@pytest.mark.parametrize("count", COUNTS)
def test_every_length_survives(count: int, device: torch.device) -> None:
    check(gaussian(count), device)
    check(any_words(count), device)


@interpreted
@pytest.mark.parametrize("first", [0, 1, 248, 249])
def test_windows_at_both_ends_of_the_exponents_survive(first: int, device: torch.device) -> None:
    exponent_n = first + torch.arange(5000, dtype=torch.int32) % 7
    word_n = (exponent_n << 7 | torch.arange(5000, dtype=torch.int32) % 128) | (torch.arange(5000) % 2 << 15).int()
    weight_n = word_n.to(torch.uint16).view(torch.bfloat16)
    assert tbe_decode.encode(weight_n).base == first - 1
    assert tbe_decode.encode(weight_n).fallbacks.numel() == 0
    check(weight_n, device)


def test_window_has_maximal_coverage() -> None:
    weight_n = gaussian(30000)
    exponent_n = weight_n.view(torch.int16).int() >> 7 & 0xFF
    best = max(int(((exponent_n >= first) & (exponent_n < first + 7)).sum()) for first in range(250))
    assert tbe_decode.encode(weight_n).fallbacks.numel() == 30000 - best > 0


def test_stored_codec_writes_these_planes() -> None:
    from ernie_elastic.compression import encode

    weight_n = gaussian(9001)
    stream = encode(weight_n).stream.tobytes()
    planes = tbe_decode.encode(weight_n)
    for part in (planes.low, planes.planes, planes.fallbacks):
        assert part.numpy().tobytes() in stream


BLOCK_SHAPES = [(1, 1, 1), (1, 64, 64), (3, 65, 63), (2, 7, 130), (1, 129, 200)]


@interpreted
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_bitmap_tiles_of_every_shape_survive(shape: tuple[int, int, int], device: torch.device) -> None:
    ones = torch.full(shape, 1.0).to(torch.bfloat16)
    for weight_ERC in (gaussian(*shape), any_words(*shape), ones, -ones * float("inf")):
        tiles = tbe_decode.encode_bitmap_tiles(weight_ERC)
        assert same_bits(tbe_decode.decode(tiles, "reference"), weight_ERC)
        assert same_bits(tbe_decode.decode(tiles.to(device), "triton").cpu(), weight_ERC)


@interpreted
def test_bitmap_tiles_keep_every_pattern(all_patterns: Tensor, device: torch.device) -> None:
    weight_ERC = all_patterns[torch.randperm(65536)].reshape(2, 256, 128)
    tiles = tbe_decode.encode_bitmap_tiles(weight_ERC)
    assert same_bits(tbe_decode.decode(tiles.to(device), "triton").cpu(), weight_ERC)


def test_the_stored_codec_writes_these_bitmap_tiles() -> None:
    from ernie_elastic.compression import encode

    weight_ERC = torch.cat([gaussian(1, 70, 130), 30 * gaussian(1, 70, 130)])
    tiles = tbe_decode.encode_bitmap_tiles(weight_ERC)
    encoded = encode(weight_ERC, layout="tca_tbe").stream.tobytes()
    assert len(set(tiles.first.tolist())) == 2 and tiles.full.numel() > 16
    for name in ("ends", "bitmaps", "full", "low", "first"):
        assert getattr(tiles, name).numpy().tobytes() in encoded, name


def test_wrong_bitmap_tiles_are_named() -> None:
    with pytest.raises(ConfigError, match=r"expected bfloat16 \[E, R, C\] with weights"):
        tbe_decode.encode_bitmap_tiles(gaussian(4, 4))
    tiles = tbe_decode.encode_bitmap_tiles(gaussian(1, 70, 64))
    with pytest.raises(FormatError, match="first has 0 elements, expected 1"):
        dataclasses.replace(tiles, first=tiles.first[:0])
    with pytest.raises(FormatError, match="ends disagree"):
        tbe_decode.decode(dataclasses.replace(tiles, ends=tiles.ends + 16), "reference")


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        tbe_decode.encode(torch.zeros(4))
    planes = tbe_decode.encode(gaussian(100))
    with pytest.raises(FormatError, match="planes has 0 elements"):
        tbe_decode.DensePlanes(planes.low, planes.planes[:0], planes.base, planes.fallbacks, planes.offsets)
    with pytest.raises(ConfigError, match="'cuda' is not known"):
        tbe_decode.decode(planes, "cuda")  # type: ignore[arg-type]


def test_triton_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    planes = tbe_decode.encode(gaussian(100))
    with pytest.raises(ConfigError, match="the tensors are on cpu"):
        tbe_decode.decode(planes, "triton")
    assert same_bits(tbe_decode.decode(planes), gaussian(100))
