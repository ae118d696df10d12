"""Fused decode + GEMV on the CPU against plain BF16 and float32 products, weights read from memory.

Unit: GB/s of BF16 weights (2 bytes a weight, whatever the variant reads) per product. Peers: `bf16_gemv`, our
hand-written plain BF16 twin; `torch_bf16`, torch's BF16 product (x rounded to BF16); `torch_fp32`. Every product takes
another matrix, so that weights come from memory: together they exceed the last-level cache several times.

Legend: R rows, C columns, M rows of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.common import Row, cache_bytes, interleave
from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import zip_gemv
from ernie_elastic.kernels.zip_gemv import cpu_impl

PEERS = ("bf16_gemv", "torch_bf16", "torch_fp32")
SHAPES = ((4096, 4096), (14336, 4096))
QUICK_SHAPES = ((4096, 4096),)
CACHES = 4  # how often the BF16 matrices fill the last-level cache


def weights(rows: int, columns: int) -> list[Tensor]:
    """Seeded normal BF16 matrices [R, C], as many as fill the cache CACHES times."""
    count = max(3, -(-CACHES * cache_bytes() // (2 * rows * columns)))
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, columns, generator=generator) * 0.02).bfloat16() for _ in range(count)]


def run(quick: bool) -> list[Row]:
    """Rows for M = 1 and 4. ConfigError where the native back end cannot run."""
    if "native" not in zip_gemv.available_backends():
        raise ConfigError(f"zip_gemv_cpu measures the native back end, which is not there: {zip_gemv.backend_reason()}")
    rows = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        plain = weights(*shape)
        packed = [zip_gemv.pack(weight_RC) for weight_RC in plain]
        wide = [weight_RC.float() for weight_RC in plain]
        bits = packed[0].bits_per_weight
        for batch in (1, 4):
            case = f"{shape[0]}x{shape[1]} M={batch} ({bits:.2f} bits/weight)"
            rows.append(measure(case, plain, packed, wide, batch, repeats=9 if quick else 31))
    return rows


def measure(
    case: str, plain: list[Tensor], packed: list[zip_gemv.PackedMatrix], wide: list[Tensor], batch: int, repeats: int
) -> Row:
    """One row: the product of x [M, C] with one matrix [R, C] of each list in turn."""
    x_MC = torch.randn(batch, plain[0].shape[1], generator=torch.Generator().manual_seed(1))
    x16_MC = x_MC.bfloat16()
    count = len(plain)
    seconds = interleave(
        {
            "ours": lambda turn: zip_gemv.matmul(x_MC, packed[turn % count], "native"),
            "bf16_gemv": lambda turn: cpu_impl.bf16_matmul(x_MC, plain[turn % count]),
            "torch_bf16": lambda turn: x16_MC @ plain[turn % count].T,
            "torch_fp32": lambda turn: x_MC @ wide[turn % count].T,
        },
        repeats,
        warmup=2,
    )
    speed = {name: 2 * plain[0].numel() / value / 1e9 for name, value in seconds.items()}
    return Row(case, speed.pop("ours"), speed, "GB/s of BF16 weights", higher_is_better=True)
