"""The definition of a mixture of SwiGLU experts on plain tensors: one expert after the other.

Letters: N tokens, K chosen, E experts, H hidden, I expert width (gate half first in the fused 2I).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def sorted_experts(
    hidden_NH: Tensor, gate_up_proj_E2IH: Tensor, down_proj_EHI: Tensor, ids_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """sum over k of weights_NK * down(silu(gate) * up) of expert ids_NK (int64) -> [N, H] in hidden_NH's dtype.

    Differentiable by autograd in everything but the ids. paper: silent; ERNIE 4.5's experts.
    """
    output_NH = torch.zeros_like(hidden_NH)
    for expert in ids_NK.unique().tolist():
        token, slot = torch.where(ids_NK == expert)
        gate, up = linear(hidden_NH[token], gate_up_proj_E2IH[expert]).chunk(2, dim=-1)
        mixed = linear(silu(gate) * up, down_proj_EHI[expert]) * weights_NK[token, slot, None]
        output_NH = output_NH.index_add(0, token, mixed.to(output_NH.dtype))
    return output_NH
