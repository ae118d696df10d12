"""Forward and backward of the experts over (token, slot) pairs sorted by expert, in plain torch operations.

A pair is gathered, multiplied and reduced once each way. The pairs go through in blocks of whole experts, so that what
lies between two matrix products stays in the cache and no expert-sorted copy of the inputs outlives its block. Only
the pre-activations are kept for the backward. Every product writes into its place, so nothing is zeroed or added up.

Letters: N tokens, K chosen, S = N * K pairs sorted by expert, R pairs of a block, E experts, H hidden, I width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError

# Pairs per block: large enough that a call per block costs nothing, small enough for a block to stay in the L2 cache.
BLOCK_PAIRS = 1024


@dataclass(frozen=True)
class Order:
    """The pairs sorted by expert. pair_S: sorted place -> n * K + k (int64); counts_E: pairs of each expert (int64)."""

    pair_S: Tensor
    counts_E: Tensor


def sort_pairs(ids_NK: Tensor, num_experts: int) -> Order:
    """Stable sort of the pairs of int64 [N, K] by expert. Raises ConfigError for an id that is not an expert."""
    flat_S = ids_NK.reshape(-1)
    try:
        counts_E = torch.bincount(flat_S, minlength=num_experts)
    except RuntimeError as error:  # a negative id; looking for one first would make a GPU wait twice
        raise ConfigError(f"sorted_experts: cannot count the ids: {error}") from error
    if counts_E.shape[0] > num_experts:
        raise ConfigError(f"sorted_experts: an id is {counts_E.shape[0] - 1}, there are {num_experts} experts")
    # Sorting bytes is several times faster than sorting int64.
    narrow_S = flat_S.to(torch.uint8 if num_experts <= 256 else torch.int32)
    return Order(torch.sort(narrow_S, stable=True).indices, counts_E)


def blocks(counts: Sequence[int], limit: int) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """Runs of whole experts with at most `limit` pairs, or one larger expert: (start, stop, experts, their counts).

    Experts without a pair are in no block.
    """
    start = stop = 0
    experts: list[int] = []
    sizes: list[int] = []
    for expert, count in enumerate(counts):
        if not count:
            continue
        if experts and stop + count - start > limit:
            yield start, stop, experts, sizes
            start, experts, sizes = stop, [], []
        experts.append(expert)
        sizes.append(count)
        stop += count
    if experts:
        yield start, stop, experts, sizes


def reduce_pairs(rows_SH: Tensor, pair_S: Tensor, top_k: int) -> Tensor:
    """Sum of the K rows of each token: rows_SH in sorted order -> [N, H]. Deterministic on every device."""
    place_NK = invert(pair_S).view(-1, top_k)
    if not place_NK.shape[0]:
        return rows_SH.new_zeros(0, rows_SH.shape[1])
    return torch.nn.functional.embedding_bag(place_NK, rows_SH, mode="sum")


def invert(pair_S: Tensor) -> Tensor:
    """Where each pair is in the sorted order: int64 [S]."""
    places = torch.arange(pair_S.shape[0], device=pair_S.device)
    return torch.empty_like(pair_S).scatter_(0, pair_S, places)


def forward(
    hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, order: Order, keep: bool
) -> tuple[Tensor, Tensor]:
    """Output [N, H] and the pre-activations [S, 2I] (only if `keep`; else [0, 2I])."""
    pairs, top_k = order.pair_S.shape[0], weights_NK.shape[1]
    width = down_EHI.shape[2]
    token_S, weight_S1 = order.pair_S // top_k, sorted_weights(weights_NK, order)
    up_weights, down_weights = gate_up_E2IH.transpose(1, 2).unbind(0), down_EHI.transpose(1, 2).unbind(0)
    rows_SH = hidden_NH.new_empty(pairs, hidden_NH.shape[1])
    kept_S2I = hidden_NH.new_empty(pairs if keep else 0, 2 * width)
    for start, stop, experts, sizes in blocks(order.counts_E.tolist(), BLOCK_PAIRS):
        input_RH = hidden_NH.index_select(0, token_S[start:stop])
        fused_R2I = kept_S2I[start:stop] if keep else hidden_NH.new_empty(stop - start, 2 * width)
        for expert, x_RH, out_R2I in zip(experts, input_RH.split(sizes), fused_R2I.split(sizes), strict=True):
            torch.mm(x_RH, up_weights[expert], out=out_R2I)
        gate_RI, up_RI = fused_R2I.split(width, dim=1)
        # Weighting here instead of after the down projection touches I numbers a pair, not H.
        active_RI = torch.nn.functional.silu(gate_RI).mul_(up_RI).mul_(weight_S1[start:stop])
        for expert, a_RI, out_RH in zip(experts, active_RI.split(sizes), rows_SH[start:stop].split(sizes), strict=True):
            torch.mm(a_RI, down_weights[expert], out=out_RH)
    return reduce_pairs(rows_SH, order.pair_S, top_k), kept_S2I


@dataclass
class Target:
    """Where a projection's gradient goes: grad [E, ...] as the projection, added to (beta 1), or written or made anew
    (beta 0)."""

    grad: Tensor
    beta: int


def new_target(projection: Tensor, counts_E: Tensor) -> Target:
    """A dense gradient to be written; the blocks of experts without a pair are zero already."""
    grad = torch.empty_like(projection, memory_format=torch.contiguous_format)
    for expert, count in enumerate(counts_E.tolist()):
        if not count:
            grad[expert].zero_()
    return Target(grad, 0)


def backward(
    grad_NH: Tensor,
    hidden_NH: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    weights_NK: Tensor,
    kept_S2I: Tensor,
    order: Order,
    gate_up_target: Target | None,
    down_target: Target | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [N, H] and of weights [N, K]; the projections' gradients go where the targets say."""
    token_S, weight_S1 = order.pair_S // weights_NK.shape[1], sorted_weights(weights_NK, order)
    up_weights, down_weights = gate_up_E2IH.unbind(0), down_EHI.unbind(0)
    rows_SH = hidden_NH.new_empty(token_S.shape[0], hidden_NH.shape[1])
    weight_grad_S = weights_NK.new_empty(token_S.shape[0])
    for start, stop, experts, sizes in blocks(order.counts_E.tolist(), BLOCK_PAIRS):
        here = slice(start, stop)
        grads_RH = grad_NH.index_select(0, token_S[here]).split(sizes)
        active_grad_RI = hidden_NH.new_empty(stop - start, down_EHI.shape[2])
        for expert, g_RH, out_RI in zip(experts, grads_RH, active_grad_RI.split(sizes), strict=True):
            torch.mm(g_RH, down_weights[expert], out=out_RI)
        active_RI, fused_grad_R2I = swiglu_backward(
            kept_S2I[here], active_grad_RI, weight_S1[here], weight_grad_S[here]
        )
        fused_grads_R2I = fused_grad_R2I.split(sizes)
        if down_target is not None:
            add_products(down_target, experts, grads_RH, active_RI.split(sizes))
        if gate_up_target is not None:
            inputs_RH = hidden_NH.index_select(0, token_S[here]).split(sizes)
            add_products(gate_up_target, experts, fused_grads_R2I, inputs_RH)
        for expert, f_R2I, out_RH in zip(experts, fused_grads_R2I, rows_SH[here].split(sizes), strict=True):
            torch.mm(f_R2I, up_weights[expert], out=out_RH)
    weights_grad_NK = weight_grad_S.index_select(0, invert(order.pair_S)).view_as(weights_NK)
    return reduce_pairs(rows_SH, order.pair_S, weights_NK.shape[1]), weights_grad_NK


def add_products(target: Target, experts: Sequence[int], left_RA: Sequence[Tensor], right_RB: Sequence[Tensor]) -> None:
    """left^T right of each expert's rows, [A, B], into the target's block of that expert."""
    for expert, left, right in zip(experts, left_RA, right_RB, strict=True):
        target.grad[expert].addmm_(left.t(), right, beta=target.beta)


def sorted_weights(weights_NK: Tensor, order: Order) -> Tensor:
    """The combine weights in sorted order, [S, 1]."""
    return weights_NK.reshape(-1, 1).index_select(0, order.pair_S)


def swiglu_backward(
    fused_R2I: Tensor, active_grad_RI: Tensor, weight_R1: Tensor, weight_grad_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted activations [R, I] and the gradient of the pre-activations [R, 2I].

    active_grad_RI: gradient of the weighted activation over the weight, overwritten. weight_grad_R: written.
    """
    gate_RI, up_RI = fused_R2I.chunk(2, dim=1)
    fused_grad_R2I = torch.empty_like(fused_R2I)
    gate_grad_RI, up_grad_RI = fused_grad_R2I.chunk(2, dim=1)
    silu_RI = torch.nn.functional.silu(gate_RI)
    active_RI = silu_RI * up_RI
    torch.sum(active_RI * active_grad_RI, dim=1, out=weight_grad_R)
    active_grad_RI.mul_(weight_R1)
    torch.mul(active_grad_RI, silu_RI, out=up_grad_RI)
    active_grad_RI.mul_(up_RI)
    torch.ops.aten.silu_backward.grad_input(active_grad_RI, gate_RI, grad_input=gate_grad_RI)
    return active_RI.mul_(weight_R1), fused_grad_R2I
