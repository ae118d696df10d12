"""Decode and linear layers with packed weights on a GPU, against a copy and against torch's BF16 product, M = 1 to 64.

Decode rows: GB/s read and written by decoding a matrix to BF16; peer `copy`, torch's copy of the BF16 matrix (what the
memory gives). Product rows: GB/s of BF16 weights (2 bytes a weight, whatever the variant reads); peers `torch_bf16`,
torch's product (cuBLAS), and `bf16_twin`, our Triton kernel on plain weights, tuned on the same grid of tile sizes.
Shapes are those that the ZipServ paper measures. Matrices rotate beyond twice the L2 cache. Decoded weights are
compared bit for bit, and ours with its twin, before anything is timed.

Legend: R rows, C columns, M rows of x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import gpu
from bench.common import Row
from ernie_elastic.kernels import zip_gemm

PEERS = ("copy", "bf16_twin", "torch_bf16", "bf16")
# Linear layers of LLaMA-3.1 8B (gate and up, down, QKV, output, head), Mistral 24B (gate and up), LLaMA-3.1 70B.
SHAPES = (
    (28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (65536, 5120), (57344, 8192), (8192, 28672),
    (128256, 4096),
)  # fmt: skip
QUICK_SHAPES = ((28672, 4096), (4096, 14336))
BATCHES = (1, 8, 16, 32, 64)
QUICK_BATCHES = (1, 16)
UNIT = "GB/s of BF16 weights"


def run(quick: bool) -> list[Row]:
    """Rows of decode and products. ConfigError without a CUDA device."""
    return gpu.run_all("zip_gemm", tasks, quick)


def tasks(quick: bool) -> list[gpu.Task]:
    """A task per shape: its size, its decode and its products; then the geometric mean."""
    rows: list[Row] = []
    batches = QUICK_BATCHES if quick else BATCHES

    def work_of(shape: tuple[int, int]) -> Callable[[], list[Row]]:
        return lambda: shape_rows(*shape, batches, rows)

    found = [
        gpu.Task(f"{shape[0]}x{shape[1]}", work_of(shape), 25 if k else 45)
        for k, shape in enumerate(QUICK_SHAPES if quick else SHAPES)
    ]
    return [*found, gpu.Task("geometric mean", lambda: [gpu.mean_row("products", rows)] if rows else [], 0)]


def shape_rows(rows: int, columns: int, batches: tuple[int, ...], products: list[Row]) -> list[Row]:
    """Rows of one shape; those of products are also added to `products`."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(0)
    weight_RC = torch.randn(rows, columns, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16).mul_(0.02)
    packed = zip_gemm.pack(weight_RC)
    gpu.check_bits(f"decode of {rows}x{columns}", zip_gemm.unpack(packed), weight_RC)
    turns = gpu.copies(packed.nbytes)
    plain = [weight_RC.clone() for _ in range(turns)]
    packs = [packed.clone() for _ in range(turns)]
    bits = 8 * packed.nbytes / weight_RC.numel()
    found = [Row(f"{rows}x{columns}: size", bits, {"bf16": 16.0}, "bits/weight", higher_is_better=False)]
    found.append(decode_row(plain, packs, turns))
    for batch in batches:
        found.append(product_row(batch, plain, packs, turns))
        products.append(found[-1])
    return found


def decode_row(plain: list[Tensor], packs: list[Any], turns: int) -> Row:
    """Decode of one matrix [R, C] at a time into a buffer, against a copy of it."""
    out_RC = torch.empty_like(plain[0])
    variants: dict[str, Callable[[int], Any]] = {
        "ours": lambda k: zip_gemm.unpack(packs[k], out=out_RC),
        "copy": lambda k: out_RC.copy_(plain[k]),
    }
    moved = {"ours": packs[0].nbytes + 2 * out_RC.numel(), "copy": 4 * out_RC.numel()}
    return gpu.speed_row(f"{out_RC.shape[0]}x{out_RC.shape[1]}: decode", variants, turns, moved)


def product_row(batch: int, plain: list[Tensor], packs: list[Any], turns: int) -> Row:
    """x [M, C] times one matrix [R, C] at a time."""
    rows, columns = plain[0].shape
    generator = torch.Generator(gpu.DEVICE).manual_seed(1)
    x_MC = torch.randn(batch, columns, generator=generator, device=gpu.DEVICE).bfloat16()

    def ours(tiles: Any) -> Callable[[int], Tensor]:
        return lambda k: zip_gemm.matmul_fused(x_MC, packs[k], tiles)

    def twin(tiles: Any) -> Callable[[int], Tensor]:
        return lambda k: zip_gemm.matmul_plain(x_MC, plain[k], tiles)

    grid = zip_gemm.tile_choices(batch)
    best = {name: gpu.fastest({tiles: make(tiles) for tiles in grid}, turns) for name, make in
            (("ours", ours), ("bf16_twin", twin))}  # fmt: skip
    case = f"{rows}x{columns} M={batch}"
    print(f"zip_gemm: {case}: {best}", file=sys.stderr)
    gpu.check_bits(f"{case} against its twin", ours(best["ours"])(0), twin(best["ours"])(0))
    exact = x_MC.double() @ plain[0].double().T if plain[0].numel() < 2**28 else x_MC.float() @ plain[0].float().T
    variants: dict[str, Callable[[int], Any]] = {
        "ours": ours(best["ours"]),
        "bf16_twin": twin(best["bf16_twin"]),
        "torch_bf16": lambda k: x_MC @ plain[k].T,
    }
    for name, variant in variants.items():
        gpu.check_close(f"{case}, {name}", variant(0), exact, 1e-2)
    speed = {name: 2 * rows * columns / value / 1e9 for name, value in gpu.seconds_per_call(variants, turns).items()}
    return Row(case, speed.pop("ours"), speed, UNIT, higher_is_better=True)
