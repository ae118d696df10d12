"""A mixture of SwiGLU experts with packed BF16 weights, in plain torch: the definition of `zip_moe`.

Contract: for every token, the sum over its choices, in their order, of weight * down(bf16(silu(gate) * up)), with the
exact BF16 weights and float32 sums, rounded to BF16 once at the end. Ids outside of 0..E-1 (what an expert-parallel
model hands out for experts of other ranks) contribute nothing.

Letters: N tokens, K chosen, E experts, H hidden, I expert width (gate half first in the fused 2I).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from ernie_elastic.errors import ConfigError


def check(x_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, hidden: int) -> None:
    """ConfigError unless x is BF16 [N, H], ids int64 [N, K] and weights [N, K]."""
    fits = (
        x_NH.dtype == torch.bfloat16
        and ids_NK.dtype == torch.int64
        and (x_NH.ndim, ids_NK.ndim) == (2, 2)
        and x_NH.shape[1] == hidden
        and ids_NK.shape == weights_NK.shape
        and ids_NK.shape[0] == x_NH.shape[0]
    )
    if not fits:
        named = {"x": x_NH, "ids": ids_NK, "weights": weights_NK}
        found = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise ConfigError(f"zip_moe: {found}; expected bfloat16 [N, {hidden}], int64 [N, K], [N, K]")


def experts(
    x_NH: Tensor,
    weights_of: Callable[[int], tuple[Tensor, Tensor]],
    num_experts: int,
    ids_NK: Tensor,
    weights_NK: Tensor,
) -> Tensor:
    """BF16 [N, H] -> BF16 [N, H]. weights_of(e) gives BF16 gate_up [2I, H] and down [H, I] of one expert."""
    rows_NKH = x_NH.new_zeros(*ids_NK.shape, x_NH.shape[1], dtype=torch.float32)
    for expert in ids_NK.unique().tolist():
        if not 0 <= expert < num_experts:
            continue
        token, slot = torch.where(ids_NK == expert)
        gate_up_2IH, down_HI = weights_of(expert)
        gate, up = (x_NH[token].float() @ gate_up_2IH.float().T).chunk(2, dim=1)
        active = (silu(gate) * up).bfloat16()
        rows_NKH[token, slot] = active.float() @ down_HI.float().T * weights_NK[token, slot, None].float()
    return add_in_order(rows_NKH)


def add_in_order(rows_NKH: Tensor) -> Tensor:
    """float32 [N, K, H] -> BF16 [N, H]: the rows of a token added in the order of its choices."""
    total_NH = torch.zeros_like(rows_NKH[:, 0])
    for k in range(rows_NKH.shape[1]):
        total_NH = total_NH + rows_NKH[:, k]
    return total_NH.bfloat16()
