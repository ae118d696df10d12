"""zip_gemm: the fused kernel has the bits of its plain BF16 twin, and all paths have the values of the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import lane_tiles, zip_gemm
from tests.kernels.compare import any_words, gaussian, same_bits, same_values

CASES = [(65, 37, 3), (64, 128, 17), (100, 72, 1), (7, 200, 16)]


def close(y_MR: Tensor, x_MC: Tensor, weight_RC: Tensor) -> bool:
    exact_MR = x_MC.double() @ weight_RC.double().T
    return bool((y_MR.double() - exact_MR).abs().max() <= 1e-6 * x_MC.float().norm() * weight_RC.float().norm())


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of infinities in the interpreter's numpy
@pytest.mark.parametrize(("rows", "columns", "batch"), CASES)
@pytest.mark.parametrize("make", [gaussian, any_words])
def test_fused_product_has_the_bits_of_the_plain_twin(
    make: Callable[..., Tensor], rows: int, columns: int, batch: int, device: torch.device
) -> None:
    from ernie_elastic.kernels.zip_gemm.triton_impl import Tiles

    weight_RC = make(rows, columns).to(device)
    x_MC = gaussian(batch, columns, seed=1, scale=1.0).to(device)
    packed = zip_gemm.pack(weight_RC)
    for tiles in (None, Tiles(16, 1), Tiles(32, 3)):
        y_MR = zip_gemm.matmul_fused(x_MC, packed, tiles)
        assert same_values(y_MR, zip_gemm.matmul_plain(x_MC, weight_RC, tiles))
        assert make is not gaussian or close(y_MR, x_MC, weight_RC)
    assert same_values(zip_gemm.matmul(x_MC, packed, "triton"), zip_gemm.matmul_fused(x_MC, packed))


@pytest.mark.interpreter
def test_many_rows_of_x_are_multiplied_by_decoded_weights(device: torch.device) -> None:
    weight_RC, x_MC = gaussian(70, 40).to(device), gaussian(zip_gemm.FUSED_MAX_ROWS + 1, 40, seed=1).to(device)
    packed = zip_gemm.pack(weight_RC)
    y_MR = zip_gemm.matmul(x_MC, packed, "triton")
    assert y_MR.dtype == torch.float32 and close(y_MR, x_MC, weight_RC)
    assert zip_gemm.matmul(x_MC[:0], packed, "triton").shape == (0, 70)


def test_reference_is_the_product_with_the_exact_weights() -> None:
    weight_RC, x_MC = gaussian(33, 41), gaussian(5, 41, seed=1)
    packed = zip_gemm.pack(weight_RC)
    assert same_bits(zip_gemm.unpack(packed), weight_RC)
    assert same_bits(zip_gemm.matmul(x_MC, packed), x_MC.float() @ weight_RC.float().T)


def test_a_tuned_grid_has_no_choice_twice_and_covers_splits() -> None:
    for batch in (1, 16, 17, 64):
        grid = zip_gemm.tile_choices(batch)
        assert len(set(grid)) == len(grid) <= 12 and {tiles.splits for tiles in grid} >= {1, 4}


def test_wrong_inputs_are_named() -> None:
    packed = zip_gemm.pack(gaussian(8, 16))
    with pytest.raises(ConfigError, match=r"expected torch.bfloat16 \[M, 16\]"):
        zip_gemm.matmul(torch.zeros(2, 16), packed)
    with pytest.raises(ConfigError, match=r"expected \[R, C\]"):
        zip_gemm.pack(gaussian(16))
    with pytest.raises(ConfigError, match="holds 2 matrices"):
        zip_gemm.matmul(gaussian(1, 16), lane_tiles.pack(gaussian(2, 8, 16)))
