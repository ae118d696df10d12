"""Fused decode + product on the CPU against plain BF16 and float32 products, weights read from memory.

Unit of the products: GB/s of BF16 weights (2 bytes a weight that is used, whatever the variant reads). Peers:
`bf16_gemv`, our hand-written plain BF16 twin; `torch_bf16`, torch's BF16 product (x rounded to BF16); `torch_fp32`;
`memory_read`, reading the plain weights and doing nothing with them. Every product takes another matrix, so that
weights come from memory: together they exceed 2 GB and the last-level cache. A mixture of experts is one call of ours
and a loop over the routed experts for the others. Packing and decoding: GB/s of BF16, the peer is our reference.

Legend: E experts, R rows, C columns, I width of an expert, M rows of x, K experts chosen for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import Row, cache_bytes, interleave
from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import zip_gemv
from ernie_elastic.kernels.zip_gemv import cpu_impl

PEERS = ("bf16_gemv", "torch_bf16", "torch_fp32", "memory_read", "reference")
SHAPES = ((16384, 4096), (4096, 4096))
QUICK_SHAPES = ((4096, 4096),)
EXPERTS = ((64, 1024, 2048, 8),)  # E, I, C, K
QUICK_EXPERTS = ((16, 256, 1024, 4),)
# Rows of x; from the third on to find where decoding first would pay (cpu_impl.FUSED_MAX_ROWS).
BATCHES = (1, 4, 16, 64)
QUICK_BATCHES = (1, 4)
BYTES = 2 << 30  # of all plain matrices together, at least
QUICK_BYTES = 256 << 20
Variants = Mapping[str, Callable[[int], Any]]


def run(quick: bool) -> list[Row]:
    """Rows for each shape and batch, packing, and experts. ConfigError where the native back end cannot run."""
    if "native" not in zip_gemv.available_backends():
        raise ConfigError(f"zip_gemv_cpu measures the native back end, which is not there: {zip_gemv.backend_reason()}")
    rows = []
    for shape in QUICK_SHAPES if quick else SHAPES:
        plain = copies(normal(*shape), quick)
        packed = [prepared(weight_RC) for weight_RC in plain]
        wide = [weight_RC.float() for weight_RC in plain[: len(plain) // 2 + 1]]
        for batch in QUICK_BATCHES if quick else BATCHES:
            rows.append(measure(plain, packed, wide, batch, repeats=9 if quick or batch > 4 else 31))
        rows += layout_rows(plain, repeats=3 if quick else 7)
        del plain, packed, wide
    for experts in QUICK_EXPERTS if quick else EXPERTS:
        rows += expert_rows(*experts, quick)
    return rows


def normal(*shape: int) -> Tensor:
    """A seeded normal BF16 tensor."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def copies(weight: Tensor, quick: bool) -> list[Tensor]:
    """As many copies as are wanted together, on large pages as packed weights are; an odd number, 3 or more.

    Odd and not a multiple of 5: variants that take turns meet every copy.
    """
    count = max(3, -(-max(QUICK_BYTES if quick else BYTES, 0 if quick else cache_bytes()) // (2 * weight.numel())))
    count += 1 - count % 2
    found = []
    for _ in range(count + 2 if count % 5 == 0 else count):
        copy = torch.empty_like(weight)
        cpu_impl.advise_large_pages(copy)
        found.append(copy.copy_(weight))
    return found


def prepared(weight_RC: Tensor) -> zip_gemv.PackedMatrix:
    """Packed and checked, as after the first use."""
    packed = zip_gemv.pack(weight_RC, "native")
    cpu_impl.prepare(packed)
    return packed


def row_of(case: str, weights: int, variants: Variants, repeats: int) -> Row:
    """The row of variants that each use `weights` weights a call; "ours" is ours."""
    seconds = interleave(variants, repeats, warmup=2)
    speed = {name: 2 * weights / value / 1e9 for name, value in seconds.items()}
    return Row(case, speed.pop("ours"), speed, "GB/s of BF16 weights", higher_is_better=True)


def measure(
    plain: list[Tensor], packed: list[zip_gemv.PackedMatrix], wide: list[Tensor], batch: int, repeats: int
) -> Row:
    """The product of x [M, C] with one matrix [R, C] of each list in turn."""
    rows, columns = plain[0].shape
    x_MC = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))
    x16_MC = x_MC.bfloat16()
    variants: Variants = {
        "ours": lambda turn: zip_gemv.matmul(x_MC, packed[turn % len(packed)], "native"),
        "bf16_gemv": lambda turn: cpu_impl.bf16_matmul(x_MC, plain[turn % len(plain)]),
        "torch_bf16": lambda turn: F.linear(x16_MC, plain[turn % len(plain)]),
        "torch_fp32": lambda turn: F.linear(x_MC, wide[turn % len(wide)]),
        "memory_read": lambda turn: cpu_impl.read(plain[turn % len(plain)]),
    }
    case = f"{rows}x{columns} M={batch} ({packed[0].bits_per_weight:.2f} bits/weight)"
    return row_of(case, plain[0].numel(), variants, repeats)


def layout_rows(plain: list[Tensor], repeats: int) -> list[Row]:
    """Packing and decoding, into memory that was used before, against the reference on a part of the matrix."""
    small_RC = plain[0][: max(1, plain[0].shape[0] // 16)]
    packed, small = zip_gemv.pack(plain[0]), zip_gemv.pack(small_RC)
    out_RC = torch.empty_like(plain[0])
    share = small_RC.numel() / plain[0].numel()
    shape = f"{plain[0].shape[0]}x{plain[0].shape[1]}"
    pairs: dict[str, tuple[Callable[[int], Any], Callable[[int], Any]]] = {
        "pack": (
            lambda turn: zip_gemv.pack(plain[turn % len(plain)], "native"),
            lambda _: zip_gemv.pack(small_RC, "reference"),
        ),
        "unpack": (
            lambda _: zip_gemv.unpack(packed, torch.bfloat16, "native", out=out_RC),
            lambda _: zip_gemv.unpack(small, torch.bfloat16, "reference"),
        ),
    }
    rows = []
    for name, (ours, reference) in pairs.items():
        fast = interleave({"ours": ours}, repeats)["ours"]
        slow = interleave({"reference": reference}, 3)["reference"] / share
        gigabytes = 2 * plain[0].numel() / 1e9
        theirs = {"reference": gigabytes / slow}
        rows.append(Row(f"{shape} {name}", gigabytes / fast, theirs, "GB/s of BF16 weights", higher_is_better=True))
    return rows


def expert_rows(experts: int, width: int, columns: int, top_k: int, quick: bool) -> list[Row]:
    """A layer of experts for one and for four rows of x: gate and up, SwiGLU, down, weighted sum."""
    gate_up = copies(normal(experts, 2 * width, columns), quick)
    plain = list(zip(gate_up, copies(normal(experts, columns, width), quick), strict=False))
    packed = [(prepared(a.flatten(0, 1)), prepared(b.flatten(0, 1))) for a, b in plain]
    return [expert_row(plain, packed, batch, top_k, repeats=9 if quick else 61) for batch in (1, 4)]


def expert_row(
    plain: list[tuple[Tensor, Tensor]],
    packed: list[tuple[zip_gemv.PackedMatrix, zip_gemv.PackedMatrix]],
    batch: int,
    top_k: int,
    repeats: int,
) -> Row:
    """x [M, C] by the layers in turn, each time with another routing, as the layers of a model have it."""
    experts, columns, width = plain[0][1].shape
    layers, wide = len(plain), (plain[0][0].float(), plain[0][1].float())
    generator = torch.Generator().manual_seed(2)
    x_MC = torch.randn(batch, columns, generator=generator)
    routing = [torch.rand(batch, experts, generator=generator).topk(top_k).indices for _ in range(61)]
    weights_MK = torch.full((batch, top_k), 1 / top_k)

    def ours(turn: int) -> Tensor | None:
        return zip_gemv.experts(x_MC, *packed[turn % layers], routing[turn % len(routing)], weights_MK)

    def loop(turn: int, product: Callable[[Tensor, Tensor], Tensor], x: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
        return expert_loop(product, x, *layer, routing[turn % len(routing)], weights_MK.to(x.dtype))

    variants: Variants = {
        "ours": ours,
        "bf16_gemv": lambda turn: loop(turn, cpu_impl.bf16_matmul, x_MC, plain[turn % layers]),
        "torch_bf16": lambda turn: loop(turn, F.linear, x_MC.bfloat16(), plain[turn % layers]),
        "torch_fp32": lambda turn: loop(turn, F.linear, x_MC, wide),
    }
    used = sum(len(ids.unique()) for ids in routing) / len(routing) * 3 * width * columns
    case = f"{experts} experts 2x{width}x{columns}, top-{top_k}, M={batch}"
    return row_of(case, round(used), variants, repeats)


def expert_loop(
    product: Callable[[Tensor, Tensor], Tensor],
    x_MC: Tensor,
    gate_up_ERC: Tensor,
    down_ECI: Tensor,
    ids_MK: Tensor,
    weights_MK: Tensor,
) -> Tensor:
    """The same layer, expert by expert, with product(x, weight) for each matrix -> [M, C]."""
    y_MC = torch.zeros_like(x_MC)
    for expert in ids_MK.unique().tolist():
        token, slot = torch.where(ids_MK == expert)
        gate, up = product(x_MC[token], gate_up_ERC[expert]).chunk(2, dim=-1)
        out = product(F.silu(gate) * up, down_ECI[expert])
        y_MC.index_add_(0, token, out * weights_MK[token, slot, None])
    return y_MC
