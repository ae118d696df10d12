"""torch_impl's functions for GPUs: torch's grouped products, and Triton kernels for what lies between them.

Against Transformers' grouped path: the combine weight is applied to I numbers of a pair instead of H, nothing is
brought back to the tokens' order before it is added up, and no step of ours waits for the host (torch's product does,
but on sm_90 and sm_10x). Contract: gradients of experts without a pair are exactly zero, also where the grouped product
leaves them unwritten (seen by others on sm_100).

Letters: N tokens, K chosen, S = N * K pairs sorted by expert, E experts, H hidden, I width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.sorted_experts.torch_impl import Order, Target, invert, reduce_pairs
from ernie_elastic.kernels.triton_backend import triton_problem

ALIGNMENT = 16  # bytes that the strides and addresses of a grouped product are multiples of
MAX_EXPERTS = 1023  # groups that torch's kernels take


def problem(hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> str | None:
    """Why hidden [N, H] and the projections cannot run here; None when they can."""
    tensors = (hidden_NH, gate_up_E2IH, down_EHI)
    if (missing := triton_problem(hidden_NH.device)) is not None:
        return missing
    if hidden_NH.is_cuda and hidden_NH.dtype != torch.bfloat16:
        return f"torch's grouped product takes bfloat16 on a GPU, these are {hidden_NH.dtype}"
    if hidden_NH.is_cuda and torch.cuda.get_device_capability(hidden_NH.device) < (8, 0):
        return "torch's grouped product needs compute capability 8.0"
    if gate_up_E2IH.shape[0] > MAX_EXPERTS:
        return f"{gate_up_E2IH.shape[0]} experts, torch's grouped product takes {MAX_EXPERTS}"
    if hidden_NH.dtype == torch.float64:
        return "the kernels compute in float32"
    width = down_EHI.shape[2]
    if any(size * hidden_NH.element_size() % ALIGNMENT for size in (hidden_NH.shape[1], width)):
        return f"rows of {hidden_NH.shape[1]} and {width} numbers are no multiples of {ALIGNMENT} bytes"
    if not all(tensor.is_contiguous() for tensor in tensors[1:]):
        return "the projections are not contiguous"
    aligned = all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors[1:])
    return None if aligned else f"the projections do not begin at multiples of {ALIGNMENT} bytes"


def sort_pairs(ids_NK: Tensor, num_experts: int) -> Order:
    """Stable sort of the pairs of int64 [N, K] by expert. An id that is no expert: ConfigError on the CPU, a device
    assertion on a GPU, since looking would make it wait."""
    # Sorting bytes is several times faster than sorting int64.
    narrow = torch.uint8 if num_experts <= 256 else torch.int32
    flat_S = ids_NK.reshape(-1)
    known = (flat_S >= 0) & (flat_S < num_experts)
    if not ids_NK.is_cuda and not bool(known.all()):
        raise ConfigError(f"sorted_experts: an id is not among the {num_experts} experts")
    torch._assert_async(known.all())
    ids_S, pair_S = torch.sort(flat_S.to(narrow), stable=True)
    experts = torch.arange(num_experts, device=ids_NK.device, dtype=narrow)
    ends_E = torch.searchsorted(ids_S, experts, right=True)
    return Order(pair_S, torch.diff(ends_E, prepend=ends_E.new_zeros(1)))


def forward(
    hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, order: Order, keep: bool
) -> tuple[Tensor, Tensor]:
    """Output [N, H] and the pre-activations [S, 2I] (only if `keep`; else [0, 2I])."""
    from ernie_elastic.kernels.sorted_experts.triton_impl import weighted_swiglu

    token_S, weight_S, ends_E = _places(weights_NK, order)
    fused_S2I = grouped_mm(hidden_NH.index_select(0, token_S), gate_up_E2IH.transpose(1, 2), offs=ends_E)
    active_SI = weighted_swiglu(fused_S2I, weight_S)
    rows_SH = grouped_mm(active_SI, down_EHI.transpose(1, 2), offs=ends_E)
    output_NH = reduce_pairs(rows_SH, order.pair_S, weights_NK.shape[1])
    return output_NH, fused_S2I if keep else fused_S2I.new_empty(0, fused_S2I.shape[1])


def new_target(projection: Tensor, counts_E: Tensor) -> Target:
    """A gradient that `backward` makes: the grouped product allocates what it writes."""
    return Target(projection.new_empty(0), 0)


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
    from ernie_elastic.kernels.sorted_experts.triton_impl import weighted_swiglu_backward

    token_S, weight_S, ends_E = _places(weights_NK, order)
    grads_SH = grad_NH.index_select(0, token_S)
    active_SI = grouped_mm(grads_SH, down_EHI, offs=ends_E)
    weight_grad_S = weights_NK.new_empty(token_S.shape[0])
    fused_grad_S2I = weighted_swiglu_backward(kept_S2I, weight_S, active_SI, weight_grad_S)
    if down_target is not None:
        _add_products(down_target, grads_SH, active_SI, ends_E, order.counts_E)
    if gate_up_target is not None:
        inputs_SH = hidden_NH.index_select(0, token_S)
        _add_products(gate_up_target, fused_grad_S2I, inputs_SH, ends_E, order.counts_E)
    rows_SH = grouped_mm(fused_grad_S2I, gate_up_E2IH, offs=ends_E)
    weights_grad_NK = weight_grad_S.index_select(0, invert(order.pair_S)).view_as(weights_NK)
    return reduce_pairs(rows_SH, order.pair_S, weights_NK.shape[1]), weights_grad_NK


def _places(weights_NK: Tensor, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    """Token [S] and combine weight [S] of each sorted pair, and where each expert's pairs end, int32 [E]."""
    weight_S = weights_NK.reshape(-1).index_select(0, order.pair_S)
    return order.pair_S // weights_NK.shape[1], weight_S, order.counts_E.cumsum(0).to(torch.int32)


def _add_products(target: Target, left_SA: Tensor, right_SB: Tensor, ends_E: Tensor, counts_E: Tensor) -> None:
    """left^T right of each expert's pairs, [E, A, B], to the target: as a new gradient, or added to the one there."""
    from ernie_elastic.kernels.sorted_experts.triton_impl import zero_unused

    grad_EAB = zero_unused(grouped_mm(left_SA.t(), right_SB, offs=ends_E), counts_E)
    if target.beta:
        target.grad.add_(grad_EAB)
    else:
        target.grad = grad_EAB
