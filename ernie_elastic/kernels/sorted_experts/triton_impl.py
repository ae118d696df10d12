"""Triton kernels of what lies between grouped products: SwiGLU with the combine weight, its backward, empty experts.

Plain torch reads and writes the pairs' activations once for every operation (14 KB a pair forward and 44 KB backward
at width 1,000 in BF16); these kernels do it once (6 and 12 KB). They compute in float32.

Letters: S pairs sorted by expert, E experts, I width, `units` times UNIT numbers; BI, BLOCK tile sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie_elastic.kernels.triton_backend import launches_kernels

COLUMNS = 1024
BLOCK = 4096


@triton.jit
def weighted_swiglu_kernel(fused, weight, active, units, UNIT: tl.constexpr, BI: tl.constexpr):
    """active [S, I] = silu(gate) * up * weight of its pair; fused [S, 2I] holds gate, then up; weight [S]."""
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = column < width
    gate = tl.load(fused + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(fused + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * tl.load(weight + row).to(tl.float32)
    tl.store(active + row * width + column, value.to(active.dtype.element_ty), mask=inside)


@triton.jit
def weighted_swiglu_backward_kernel(
    fused, weight, active, fused_grad, weight_grad, units, UNIT: tl.constexpr, BI: tl.constexpr
):  # fmt: skip
    """active [S, I]: holds the gradient of the weighted activation, then the weighted activation itself.

    Writes fused_grad [S, 2I] and weight_grad [S]. One program a pair, so the sum over the width has one order.
    """
    width = units * UNIT
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row).to(tl.float32)
    total = tl.zeros((BI,), dtype=tl.float32)
    for start in range(0, width, BI):
        column = start + tl.arange(0, BI)
        inside = column < width
        gate_at = fused + row * 2 * width + column
        gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(active + row * width + column, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += silu * up * grad
        grad_at = fused_grad + row * 2 * width + column
        gate_grad = grad * scale * up * (share + silu * (1.0 - share))
        tl.store(grad_at, gate_grad.to(fused_grad.dtype.element_ty), mask=inside)
        tl.store(grad_at + width, (grad * scale * silu).to(fused_grad.dtype.element_ty), mask=inside)
        tl.store(active + row * width + column, (silu * up * scale).to(active.dtype.element_ty), mask=inside)
    tl.store(weight_grad + row, tl.sum(total, 0).to(weight_grad.dtype.element_ty))


@triton.jit
def zero_unused_kernel(grad, counts, size, BLOCK: tl.constexpr):
    """Zeros in the `size` numbers of every expert whose count is 0; grad [E, size], counts int64 [E]."""
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(counts + expert) == 0:
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(grad + expert * size + place, tl.zeros((BLOCK,), dtype=grad.dtype.element_ty), mask=place < size)


def columns_of(width: int) -> int:
    """Tile width: the next power of 2 up to COLUMNS, at least 16."""
    return min(COLUMNS, max(16, triton.next_power_of_2(width)))


def unit_of(tensor: Tensor) -> int:
    """Numbers of tensor [...] in 16 bytes. The width goes to the kernels as a count of them: so the compiler knows that
    rows begin at multiples of 16 bytes, and moves 16 bytes at once, also where the width is no multiple of 16."""
    return 16 // tensor.element_size()


@launches_kernels
def weighted_swiglu(fused_S2I: Tensor, weight_S: Tensor) -> Tensor:
    """silu(gate) * up * weight: fused [S, 2I] and weight [S], any float dtypes -> [S, I] in fused's dtype."""
    pairs, width = fused_S2I.shape[0], fused_S2I.shape[1] // 2
    active_SI = fused_S2I.new_empty(pairs, width)
    tile, unit = columns_of(width), unit_of(fused_S2I)
    weighted_swiglu_kernel[(pairs, triton.cdiv(width, tile))](
        fused_S2I, weight_S, active_SI, width // unit, UNIT=unit, BI=tile
    )
    return active_SI


@launches_kernels
def weighted_swiglu_backward(fused_S2I: Tensor, weight_S: Tensor, active_SI: Tensor, weight_grad_S: Tensor) -> Tensor:
    """Gradient of the pre-activations, [S, 2I].

    active_SI: the gradient of the weighted activation, overwritten with the activation. weight_grad_S [S]: written.
    """
    pairs, width = active_SI.shape
    fused_grad_S2I = torch.empty_like(fused_S2I)
    tile, unit = columns_of(width), unit_of(fused_S2I)
    weighted_swiglu_backward_kernel[(pairs,)](
        fused_S2I, weight_S, active_SI, fused_grad_S2I, weight_grad_S, width // unit, UNIT=unit, BI=tile
    )
    return fused_grad_S2I


@launches_kernels
def zero_unused(grad_EAB: Tensor, counts_E: Tensor) -> Tensor:
    """grad [E, A, B], contiguous, with zeros where an expert has no pair (int64 counts [E]); written in place."""
    size = grad_EAB[0].numel()
    zero_unused_kernel[(grad_EAB.shape[0], triton.cdiv(size, BLOCK))](grad_EAB, counts_E, size, BLOCK=BLOCK)
    return grad_EAB
