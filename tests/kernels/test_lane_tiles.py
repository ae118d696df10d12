"""lane_tiles: the reference and the Triton decode give back every BF16 word of every shape."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels import lane_tiles
from ernie_elastic.kernels.lane_tiles import reference
from ernie_elastic.kernels.lane_tiles import triton_impl as lane_triton
from ernie_elastic.kernels.tbe_decode import triton_bitmap_tiles as bitmap_triton
from ernie_elastic.kernels.tbe_decode import triton_impl as decode_triton
from ernie_elastic.kernels.triton_backend import launches_kernels
from ernie_elastic.kernels.zip_gemm import triton_impl as gemm_triton
from ernie_elastic.kernels.zip_moe import triton_impl as moe_triton
from tests.kernels.compare import any_words, gaussian, same_bits

SHAPES = [(1, 1, 1), (1, 64, 64), (3, 65, 63), (2, 7, 130), (1, 129, 64)]


def constant(value: float) -> Callable[..., Tensor]:
    return lambda *shape: torch.full(shape, value).bfloat16()


def heavy(*shape: int) -> Tensor:
    """Lanes with exactly seven fallbacks and with eight: the last that are packed, the first that stay raw."""
    weight = gaussian(*shape)
    lanes = reference.to_lanes(
        torch.nn.functional.pad(weight, (0, -shape[2] % 64, 0, -shape[1] % 64))[0, :64, :64][None]
    )
    lanes[:, ::7, :8] = 3e38
    lanes[:, 1::7, :7] = 1e-38
    weight[0, :64, :64] = reference.from_lanes(lanes)[0, : min(64, shape[1]), : min(64, shape[2])]
    return weight


MAKERS = [gaussian, any_words, constant(0.0), constant(-1.5), constant(float("inf")), constant(1e-39), heavy]


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_matrix_comes_back(shape: tuple[int, int, int], device: torch.device, stress: int) -> None:
    every = stress > 1 or device.type == "cuda" or shape in SHAPES[:2]
    for make in MAKERS if every else (any_words, heavy):
        weight_DRC = make(*shape)
        packed = lane_tiles.pack(weight_DRC)
        assert same_bits(lane_tiles.unpack(packed, backend="reference"), weight_DRC)
        assert same_bits(lane_tiles.unpack(packed.to(device), backend="triton").cpu(), weight_DRC)
        chosen = [shape[0] - 1, 0]
        out = torch.empty(2, *shape[1:], dtype=torch.bfloat16, device=device)
        found = lane_tiles.unpack(packed.to(device), chosen, "triton", out)
        assert found is out and same_bits(out.cpu(), weight_DRC[chosen])


@pytest.mark.parametrize("shape", [*SHAPES, (1, 200, 70)], ids=str)
@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_are_looked_up(shape: tuple[int, int, int], on: str) -> None:
    for make in MAKERS:
        weight_RC = make(*shape)[0]
        packed = lane_tiles.pack(weight_RC[None]).to(on)
        row_N = torch.cat((torch.randint(shape[1], (90,)), torch.arange(shape[1])))
        assert same_bits(lane_tiles.unpack_rows(packed, row_N.to(on)).cpu(), weight_RC[row_N])
    assert lane_tiles.unpack_rows(packed, row_N[:0].to(on)).shape == (0, shape[2])


def test_packing_in_parts_gives_the_same_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_DRC = torch.cat([gaussian(1, 300, 130), any_words(1, 300, 130)])
    whole = lane_tiles.pack(weight_DRC)
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 1)
    parts = lane_tiles.pack(weight_DRC)
    assert all(torch.equal(array, parts.tensors[name]) for name, array in whole.tensors.items())
    with pytest.raises(FormatError, match=r"low has \d+ of torch.int16, expected 30720 of int32"):
        dataclasses.replace(whole, low=whole.low.view(torch.int16))


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(index: torch.device) -> Iterator[None]:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = launches_kernels(lambda packed, number: torch.tensor(number))
    there = SimpleNamespace(low=SimpleNamespace(device=torch.device("cuda", 1)))
    assert kernel(there, number=3) == 3 and entered == [torch.device("cuda", 1)]
    assert kernel(torch.zeros(1), 4) == 4 and len(entered) == 1
    for module in (lane_triton, gemm_triton, moe_triton, decode_triton, bitmap_triton):
        assert hasattr(getattr(module, "run", None) or getattr(module, "unpack", None) or module.decode, "__wrapped__")


def test_a_row_that_is_not_there_is_named() -> None:
    packed = lane_tiles.pack(gaussian(1, 70, 64))
    for row in (-1, 70):
        with pytest.raises(IndexError, match=f"rows {row} to {row} of a matrix of 70"):
            lane_tiles.unpack_rows(packed, torch.tensor([row]))


@pytest.mark.interpreter
def test_all_patterns(all_patterns: Tensor, device: torch.device) -> None:
    mixed = all_patterns[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]
    for weight in (all_patterns.reshape(1, 256, 256), mixed.reshape(4, 64, 256)):
        packed = lane_tiles.pack(weight).to(device)
        assert same_bits(lane_tiles.unpack(packed, backend="triton").cpu(), weight)


def test_lanes_hold_the_left_fragments_of_the_tensor_cores() -> None:
    place = torch.arange(4096).reshape(1, 64, 64)
    lanes = reference.to_lanes(place)[0]
    for warp, g, t, n in ((0, 0, 0, 0), (1, 3, 2, 5), (3, 7, 3, 31), (2, 1, 0, 16)):
        h, j, high, low = n >> 4, n >> 2 & 3, n >> 1 & 1, n & 1
        row, column = 16 * warp + 8 * h + g, 16 * j + 8 * high + 2 * t + low
        assert int(lanes[32 * warp + 4 * g + t, n]) == 64 * row + column
    assert torch.equal(reference.from_lanes(reference.to_lanes(place)), place)


def test_size_and_copies() -> None:
    packed = lane_tiles.pack(gaussian(1, 512, 1024))
    bits = 8 * packed.nbytes / (512 * 1024)
    print(f"{bits:.3f} bits a weight")
    assert bits < 11.3
    copy = packed.clone()
    copy.low.zero_()
    assert not same_bits(lane_tiles.unpack(copy), lane_tiles.unpack(packed))


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ConfigError, match=r"expected bfloat16 \[D, R, C\]"):
        lane_tiles.pack(torch.zeros(1, 4, 4))
    packed = lane_tiles.pack(gaussian(2, 64, 64))
    with pytest.raises(IndexError, match="matrix 2 of a stack of 2"):
        lane_tiles.unpack(packed, [2])
    short = reference.PackedStack(packed.shape, **{**packed.tensors, "fallbacks": packed.fallbacks[:2]})
    with pytest.raises(FormatError, match="needs"):
        lane_tiles.unpack(short)
