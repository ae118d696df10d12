"""Experts for many tokens: the routed ones are decoded, a few at a time, and multiplied by torch's grouped product.

Contract: only experts that a token was routed to are decoded, at most DECODED_EXPERTS of them are dense at a time. The
rows of a token are added in the order of its choices, so the numbers are the same in every run.

Letters: N tokens, K chosen, S = N * K pairs sorted by expert, G experts of a group, R pairs of a group, H hidden,
I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import silu

from ernie_elastic.kernels.zip_moe import reference

# Dense experts at a time: enough rows for a grouped product, a small part of a layer of 64 or more.
DECODED_EXPERTS = 16


def experts(
    x_NH: Tensor,
    weights_of: Callable[[list[int]], tuple[Tensor, Tensor]],
    num_experts: int,
    ids_NK: Tensor,
    weights_NK: Tensor,
) -> Tensor:
    """BF16 [N, H] -> BF16 [N, H]. weights_of gives BF16 gate_up [G, 2I, H] and down [G, H, I] of a list of experts."""
    tokens, top_k = ids_NK.shape
    sorted_S, pair_S = ids_NK.flatten().sort(stable=True)
    rows_SH = x_NH.new_zeros(tokens * top_k, x_NH.shape[1], dtype=torch.float32)
    for start, group, counts in groups(sorted_S, num_experts):
        pair_R = pair_S[start : start + sum(counts)]
        gate_up_G2IH, down_GHI = weights_of(group)
        gate_RI, up_RI = grouped_product(x_NH[pair_R // top_k], gate_up_G2IH, counts).float().chunk(2, dim=1)
        active_RI = (silu(gate_RI) * up_RI).bfloat16()
        product_RH = grouped_product(active_RI, down_GHI, counts)
        rows_SH[pair_R] = product_RH.float() * weights_NK.flatten()[pair_R, None].float()
    return reference.add_in_order(rows_SH.view(tokens, top_k, x_NH.shape[1]))


def groups(sorted_S: Tensor, num_experts: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Runs of at most DECODED_EXPERTS routed experts of sorted ids [S]: (first pair, experts, pairs of each)."""
    used, counts = torch.unique_consecutive(sorted_S, return_counts=True)
    ends = list(accumulate(counts.tolist()))
    known = [(e, end - n, n) for e, end, n in zip(used.tolist(), ends, counts.tolist(), strict=True)]
    known = [item for item in known if 0 <= item[0] < num_experts]
    for k in range(0, len(known), DECODED_EXPERTS):
        part = known[k : k + DECODED_EXPERTS]
        yield part[0][1], [item[0] for item in part], [item[2] for item in part]


def grouped_product(x_RA: Tensor, weight_GBA: Tensor, counts: list[int]) -> Tensor:
    """Rows of x [R, A], counts of them for each of the G matrices [B, A], times its transpose: BF16 [R, B].

    torch's grouped product where it has a kernel for it (Hopper and later, rows of whole 16 bytes), else one by one.
    """
    product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    aligned = weight_GBA.shape[1] % 8 == 0 and weight_GBA.shape[2] % 8 == 0
    if product is not None and aligned and x_RA.is_cuda and torch.cuda.get_device_capability(x_RA.device) >= (9, 0):
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=x_RA.device)
        found: Tensor = product(x_RA.contiguous(), weight_GBA.transpose(1, 2), offs=ends)
        return found
    parts = zip(x_RA.split(counts), weight_GBA, strict=True)
    return torch.cat([part_RA @ weight_BA.T for part_RA, weight_BA in parts])
