"""A layer of packed experts on a GPU against torch's grouped product and the plain BF16 twin, top-8.

Unit: GB/s of the routed experts' BF16 weights (2 bytes a weight, whatever the variant reads), for the whole layer:
sorting of the pairs, both products, SwiGLU and the weighted sum. Peers: `grouped_mm`, torch's grouped product with the
same steps around it; `bf16_twin`, our Triton kernels on plain weights, tuned on the same grid of tile sizes. Every call
routes other tokens, drawn so that experts are equally likely. Outputs are compared before anything is timed.

Legend: N tokens, K chosen, S = N * K, E experts, H hidden, I width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from bench import gpu
from bench.common import Row, skip_peer
from ernie_elastic.kernels import zip_moe

PEERS = ("grouped_mm", "bf16_twin", "bf16")
TOP_K = 8
SHAPES = ((64, 2560, 1536), (256, 4096, 1024))  # E, H, I
QUICK_SHAPES = ((64, 2560, 1536),)
TOKENS = (1, 4, 8, 16, 32, 64)
QUICK_TOKENS = (1, 16)
ROUTES = 8  # routings that the calls take in turn
UNIT = "GB/s of BF16 weights"


@dataclass(frozen=True)
class Layer:
    """BF16 experts, plain and packed."""

    gate_up_E2IH: Tensor
    down_EHI: Tensor
    packed: Any


def run(quick: bool) -> list[Row]:
    """Rows for the shapes and numbers of tokens. ConfigError without a CUDA device."""
    return gpu.run_all("zip_moe", tasks, quick)


def tasks(quick: bool) -> list[gpu.Task]:
    """A task per layer and number of tokens; the first of a layer also packs it and gives its size."""
    found = []
    for experts, hidden, width in QUICK_SHAPES if quick else SHAPES:
        layers: list[Layer] = []  # filled by the first task of the shape, emptied by the last
        rows: list[Row] = []
        shape = (experts, hidden, width)
        tokens = QUICK_TOKENS if quick else TOKENS
        for count in tokens:
            work = work_of(shape, count, layers, rows, last=count == tokens[-1])
            seconds = 30 if count == tokens[0] else 12
            found.append(gpu.Task(f"{experts} experts, {count} tokens", work, seconds))
    return found


def work_of(
    shape: tuple[int, int, int], tokens: int, layers: list[Layer], rows: list[Row], last: bool
) -> Callable[[], list[Row]]:
    """What one task does."""

    def work() -> list[Row]:
        found = []
        if not layers:
            layers.append(make_layer(*shape))
            found.append(size_row(layers[0], shape))
        row = layer_row(layers[0], tokens)
        rows.append(row)
        found.append(row)
        if last:
            found.append(gpu.mean_row(f"{shape[0]} experts", rows))
            layers.clear()
        return found

    return work


def make_layer(experts: int, hidden: int, width: int) -> Layer:
    """Seeded normal BF16 weights; the packed form is decoded and compared."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(0)

    def weights(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16).mul_(0.02)

    gate_up_E2IH, down_EHI = weights(experts, 2 * width, hidden), weights(experts, hidden, width)
    packed = zip_moe.pack(gate_up_E2IH, down_EHI)
    for name, ours, plain in zip(("gate_up", "down"), zip_moe.unpack(packed), (gate_up_E2IH, down_EHI), strict=True):
        gpu.check_bits(f"{name} of {experts} experts", ours, plain)
    return Layer(gate_up_E2IH, down_EHI, packed)


def size_row(layer: Layer, shape: tuple[int, int, int]) -> Row:
    """Bits per weight in memory."""
    weights = layer.gate_up_E2IH.numel() + layer.down_EHI.numel()
    case = f"{shape[0]} experts of {shape[1]}x{shape[2]}: size"
    return Row(case, 8 * layer.packed.nbytes / weights, {"bf16": 16.0}, "bits/weight", higher_is_better=False)


def routes(experts: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """ROUTES routings: int64 ids [N, K] without repetition in a token, and weights float32 [N, K] that sum to 1."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(1)
    found = []
    for _ in range(ROUTES):
        scores = torch.rand(tokens, experts, generator=generator, device=gpu.DEVICE)
        weights_NK, ids_NK = scores.topk(TOP_K, dim=1)
        found.append((ids_NK, weights_NK.softmax(1)))
    return found


def layer_row(layer: Layer, tokens: int) -> Row:
    """Compare and time one layer with that many tokens."""
    experts, hidden = layer.gate_up_E2IH.shape[0], layer.down_EHI.shape[1]
    generator = torch.Generator(gpu.DEVICE).manual_seed(2)
    x_NH = torch.randn(tokens, hidden, generator=generator, device=gpu.DEVICE).bfloat16()
    drawn = routes(experts, tokens)
    plain = (layer.gate_up_E2IH, layer.down_EHI)

    def ours(tiles: Any) -> Callable[[int], Tensor]:
        return lambda k: zip_moe.experts_fused(x_NH, layer.packed, *drawn[k], tiles)

    def twin(tiles: Any) -> Callable[[int], Tensor]:
        return lambda k: zip_moe.experts_plain(x_NH, *plain, *drawn[k], tiles)

    grid = zip_moe.tile_choices(tokens * TOP_K, experts)
    chosen = {name: gpu.fastest({tiles: make(tiles) for tiles in grid}, ROUTES) for name, make in
              (("ours", ours), ("bf16_twin", twin))}  # fmt: skip
    print(f"zip_moe: {experts} experts, {tokens} tokens: {chosen}", file=sys.stderr)
    variants = {"ours": ours(chosen["ours"]), "bf16_twin": twin(chosen["bf16_twin"])}
    if grouped_product() is None:
        skip_peer("zip_moe", "grouped_mm", f"torch {torch.__version__} has none")
    else:
        variants["grouped_mm"] = lambda k: experts_grouped(x_NH, *plain, *drawn[k])
    for k in range(2):
        gpu.check_bits("zip_moe against its twin", ours(chosen["ours"])(k), twin(chosen["ours"])(k))
        exact = experts_exact(x_NH, *plain, *drawn[k])
        for name, variant in variants.items():
            gpu.check_close(f"zip_moe, {name}", variant(k), exact, 1e-2)
    routed = sum(int(ids_NK.unique().numel()) for ids_NK, _ in drawn) / ROUTES
    size = int(routed * 2 * (layer.gate_up_E2IH[0].numel() + layer.down_EHI[0].numel()))
    seconds = gpu.seconds_per_call(variants, ROUTES)
    speed = {name: size / value / 1e9 for name, value in seconds.items()}
    case = f"{experts} experts, {tokens} tokens ({routed:.0f} routed)"
    return Row(case, speed.pop("ours"), speed, UNIT, higher_is_better=True)


def grouped_product() -> Callable[..., Tensor] | None:
    """torch's grouped product, under the name that this version has for it."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public or getattr(torch, "_grouped_mm", None)


def experts_grouped(x_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The layer with torch's grouped product: BF16 [N, H]. Nothing in it waits for the host."""
    product = grouped_product()
    assert product is not None
    tokens, top_k = ids_NK.shape
    sorted_S, pair_S = ids_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(
        sorted_S, torch.arange(gate_up_E2IH.shape[0], device=x_NH.device), right=True, out_int32=True
    )
    fused_S2I = product(x_NH[pair_S // top_k], gate_up_E2IH.transpose(1, 2), offs=ends_E)
    gate_SI, up_SI = fused_S2I.chunk(2, dim=1)
    rows_SH = product(silu(gate_SI) * up_SI, down_EHI.transpose(1, 2), offs=ends_E)
    weighted_SH = rows_SH * weights_NK.flatten()[pair_S, None]
    placed_SH = torch.empty_like(weighted_SH).index_copy_(0, pair_S, weighted_SH)
    return placed_SH.view(tokens, top_k, -1).sum(1).to(x_NH.dtype)


def experts_exact(x_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The layer in float64 without any rounding between: [N, H]."""
    total_NH = torch.zeros(x_NH.shape, dtype=torch.float64, device=x_NH.device)
    for expert in ids_NK.unique().tolist():
        token, slot = torch.where(ids_NK == expert)
        gate, up = (x_NH[token].double() @ gate_up_E2IH[expert].double().T).chunk(2, dim=1)
        rows = (silu(gate) * up) @ down_EHI[expert].double().T
        total_NH.index_add_(0, token, rows * weights_NK[token, slot, None].double())
    return total_NH
