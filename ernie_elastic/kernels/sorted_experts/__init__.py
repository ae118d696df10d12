"""An experts back end for training and inference: pairs sorted by expert once, only experts with tokens multiplied.

`sorted_experts` is the function, `sorted_experts_forward` the same behind Transformers' experts interface, `register`
makes it selectable there as `experts_implementation="sorted_experts"`. `reference.py` is the definition.

Letters: N tokens, K chosen, S = N * K pairs sorted by expert, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.sorted_experts import autograd
from ernie_elastic.kernels.sorted_experts.dispatch import Backend, available_backends, backend_reason, implementation

__all__ = ["NAME", "available_backends", "backend_reason", "register", "sorted_experts", "sorted_experts_forward"]
NAME = "sorted_experts"


def sorted_experts(
    hidden_NH: Tensor,
    gate_up_proj_E2IH: Tensor,
    down_proj_EHI: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    accumulate_into_grad: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """sum over k of weights_NK * down(silu(gate) * up) of expert ids_NK -> [N, H]; gate is the first half of 2I.

    hidden and both projections share one float dtype, weights_NK is any float dtype, ids are int64. N may be 0.
    Differentiable once in everything but the ids; the same numbers in every run.

    accumulate_into_grad: the backward adds the projections' gradients into their `.grad` itself (made where it is
    None) and returns none, which saves writing and adding a dense gradient of all experts. The projections must be
    leaves. Hooks on them do not fire and `torch.autograd.grad` does not see them, so it is for plain loops only.
    Inside torch.compile it has no effect: autograd accumulates.
    backend: "native" is C++ for contiguous float32 on the CPU, "grouped" torch's grouped products with Triton kernels
    for BF16 on a GPU, "torch" runs everywhere; "auto" takes native or grouped where it can and logs once which and why
    (always "auto" inside torch.compile).

    Raises ConfigError for shapes, dtypes or ids that do not fit, or a back end that cannot run them.
    ours: reason: Transformers' grouped back end writes every pair's input, output and weighted output to memory and
    scatters their gradients on one thread.
    """
    _check(hidden_NH, gate_up_proj_E2IH, down_proj_EHI, ids_NK, weights_NK)
    tensors = (hidden_NH, gate_up_proj_E2IH, down_proj_EHI, weights_NK)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if torch.compiler.is_compiling():
        return autograd.operator(*tensors, ids_NK, needs_grad)[0]
    if needs_grad:
        return autograd.Experts.apply(*tensors, ids_NK, accumulate_into_grad, backend)
    run = implementation(backend, *tensors[:3])
    order = run.sort_pairs(ids_NK, down_proj_EHI.shape[0])
    return run.forward(*tensors, order, keep=False)[0]


def sorted_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Transformers' experts interface: hidden_states [N, H], ids int64 [N, K], weights [N, K] -> [N, H].

    `self` has gate_up_proj [E, 2I, H] and down_proj [E, H, I]; its attribute `accumulate_into_grad` (default False)
    is passed on. Raises ConfigError for experts that are not plain SwiGLU with SiLU.
    """
    module: Any = self
    layout = {"has_bias": False, "is_transposed": False, "has_gate": True, "is_concatenated": True}
    layout |= {"has_post_expert_norm": False, "_is_expert_parallel": False}
    wrong = [name for name, value in layout.items() if getattr(module, name, value) != value]
    activation = type(module.act_fn).__name__
    if activation not in ("SiLU", "SiLUActivation"):  # torch's and Transformers' own class of it
        wrong.append(f"act_fn {activation}")
    if wrong:
        raise ConfigError(f"{NAME}: cannot run these experts ({', '.join(wrong)}); choose grouped_mm or eager")
    dtype = module.gate_up_proj.dtype
    output = sorted_experts(
        hidden_states.to(dtype),
        module.gate_up_proj,
        module.down_proj,
        top_k_index,
        top_k_weights,
        getattr(module, "accumulate_into_grad", False),
    )
    return output.to(hidden_states.dtype)


def register() -> None:
    """Make the back end selectable in Transformers under NAME; may be called any number of times."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)


def _check(hidden: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Raise ConfigError unless shapes and dtypes fit together."""
    fits = (
        (hidden.ndim, gate_up.ndim, down.ndim, ids.ndim) == (2, 3, 3, 2)
        and ids.shape == weights.shape
        and ids.shape[1] > 0
        and ids.shape[0] == hidden.shape[0]
        and gate_up.shape == (down.shape[0], 2 * down.shape[2], hidden.shape[1])
        and down.shape[1] == hidden.shape[1]
        and hidden.dtype == gate_up.dtype == down.dtype
        and ids.dtype == torch.int64
    )
    if not fits:
        named = {"hidden": hidden, "gate_up": gate_up, "down": down, "ids": ids, "weights": weights}
        found = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise ConfigError(f"{NAME}: {found}; needs [N, H], [E, 2I, H], [E, H, I], int64 [N, K], [N, K], one dtype")
