"""Triton kernels on a GPU: decode against a copy, fused GEMM against its plain twin and torch's BF16 product.

Unit: GB/s of BF16 weights (2 bytes a weight, whatever the variant reads). Peers: `copy`, torch's copy of the BF16
matrix; `reference`, our decode in plain torch; `bf16_twin`, our Triton kernel on plain weights, same order of sums;
`torch_bf16`, torch's product. Every call takes another matrix; a measurement is CALLS calls and one synchronisation.

Legend: R rows, C columns, M rows of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import Row, interleave
from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import tbe_decode, zip_gemm

PEERS = ("copy", "reference", "bf16_twin", "torch_bf16")
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BATCHES = (1, 16, 64, 256)
CALLS = 20
MATRICES = 4
UNIT = "GB/s of BF16 weights"


def run(quick: bool) -> list[Row]:
    """Rows of the decode and of products for several M. ConfigError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError("gpu_kernels needs a CUDA device and torch sees none; run it on a machine with a GPU")
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        weights = [torch.randn(shape, device="cuda").mul_(0.02).bfloat16() for _ in range(MATRICES)]
        rows.append(decode_row(weights))
        rows += [gemm_row(weights, batch) for batch in (BATCHES[:2] if quick else BATCHES)]
    return rows


def row(case: str, variants: dict[str, Callable[[int], Any]], weights: int) -> Row:
    """Time the variants, each CALLS times a measurement; weights is their number per call."""
    repeated = {
        name: lambda turn, variant=variant: [variant((turn + k) % MATRICES) for k in range(CALLS)]
        for name, variant in variants.items()
    }
    seconds = interleave(repeated, repeats=9, warmup=2, synchronize=torch.cuda.synchronize)
    speed = {name: 2 * weights * CALLS / value / 1e9 for name, value in seconds.items()}
    return Row(case, speed.pop("ours"), speed, UNIT, higher_is_better=True)


def decode_row(weights: list[Tensor]) -> Row:
    """Decode of one matrix [R, C] at a time."""
    planes = [tbe_decode.encode(weight_RC) for weight_RC in weights]
    rows, columns = weights[0].shape
    bits = 8 * planes[0].nbytes / weights[0].numel()
    variants: dict[str, Callable[[int], Any]] = {
        "ours": lambda k: tbe_decode.decode(planes[k], "triton"),
        "copy": lambda k: weights[k].clone(),
        "reference": lambda k: tbe_decode.decode(planes[k], "reference"),
    }
    return row(f"decode {rows}x{columns} ({bits:.2f} bits/weight)", variants, weights[0].numel())


def gemm_row(weights: list[Tensor], batch: int) -> Row:
    """x [M, C] times one matrix [R, C] at a time."""
    from ernie_elastic.kernels.zip_gemm import triton_impl

    packed = [zip_gemm.pack(weight_RC) for weight_RC in weights]
    rows, columns = weights[0].shape
    x_MC = torch.randn(batch, columns, device="cuda").bfloat16()
    variants: dict[str, Callable[[int], Any]] = {
        "ours": lambda k: zip_gemm.matmul(x_MC, packed[k], "triton"),
        "bf16_twin": lambda k: triton_impl.matmul_plain(x_MC, weights[k]),
        "torch_bf16": lambda k: x_MC @ weights[k].T,
    }
    return row(f"gemm {rows}x{columns} M={batch}", variants, weights[0].numel())
