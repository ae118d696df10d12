"""zip_gemm: the fused kernel has the bits of its plain BF16 twin, and both have the values of the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import tbe_decode, zip_gemm
from tests.kernels.compare import any_words, gaussian, same_bits, same_values

CASES = [(65, 37, 3), (64, 128, 17), (100, 72, 1), (7, 200, 16)]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of infinities in the interpreter's numpy
@pytest.mark.parametrize(("rows", "columns", "batch"), CASES)
@pytest.mark.parametrize("make", [gaussian, any_words])
def test_fused_product_has_the_bits_of_the_plain_twin(
    make: Callable[..., Tensor], rows: int, columns: int, batch: int, device: torch.device
) -> None:
    from ernie_elastic.kernels.zip_gemm import triton_impl

    weight_RC = make(rows, columns).to(device)
    x_MC = gaussian(batch, columns, seed=1, scale=1.0).to(device)
    y_MR = zip_gemm.matmul(x_MC, zip_gemm.pack(weight_RC), "triton")
    assert same_values(y_MR, triton_impl.matmul_plain(x_MC, weight_RC))
    if make is gaussian:
        exact_MR = x_MC.double() @ weight_RC.double().T
        assert (y_MR.double() - exact_MR).abs().max() <= 1e-6 * x_MC.float().norm() * weight_RC.float().norm()


def test_reference_is_the_product_with_the_exact_weights() -> None:
    weight_RC, x_MC = gaussian(33, 41), gaussian(5, 41, seed=1)
    packed = zip_gemm.prepare(tbe_decode.encode(weight_RC), (33, 41))
    assert same_bits(zip_gemm.matmul(x_MC, packed), x_MC.float() @ weight_RC.float().T)
    missing_RC = (weight_RC.view(torch.int16).int() >> 7 & 0xFF) - packed.planes.base
    before_R = ((missing_RC < 1) | (missing_RC > 7)).sum(1).cumsum(0)
    assert torch.equal(packed.row_offsets[1:], before_R[:-1]) and int(before_R[-1]) > 0


def test_size_is_that_of_the_dense_planes_and_one_offset_a_row() -> None:
    packed = zip_gemm.pack(gaussian(64, 1024))
    assert 8 * packed.nbytes / (64 * 1024) < 11.35


def test_wrong_inputs_are_named() -> None:
    packed = zip_gemm.pack(gaussian(8, 16))
    with pytest.raises(ConfigError, match=r"expected torch.bfloat16 \[M, 16\]"):
        zip_gemm.matmul(torch.zeros(2, 16), packed)
    with pytest.raises(ConfigError, match="no matrix of shape"):
        zip_gemm.prepare(packed.planes, (8, 15))
    with pytest.raises(ConfigError, match=r"expected \[R, C\]"):
        zip_gemm.pack(gaussian(16))
