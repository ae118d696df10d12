"""The experts as one differentiable step: an autograd function for eager mode, an operator for torch.compile.

The function can add into `.grad` and costs less per call; the operator is opaque to the compiler, so no graph breaks.

Letters: N tokens, K chosen, S = N * K pairs sorted by expert, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.sorted_experts.dispatch import implementation
from ernie_elastic.kernels.sorted_experts.torch_impl import Order, Target


class Experts(torch.autograd.Function):
    """hidden [N, H], gate_up [E, 2I, H], down [E, H, I], weights [N, K], ids [N, K], accumulate, backend -> [N, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
        weights_NK: Tensor,
        ids_NK: Tensor,
        accumulate: bool,
        backend: str,
    ) -> Tensor:
        """Output [N, H]; keeps the pre-activations [S, 2I]."""
        run = implementation(backend, hidden_NH, gate_up_E2IH, down_EHI)
        order = run.sort_pairs(ids_NK, down_EHI.shape[0])
        output_NH, kept_S2I = run.forward(hidden_NH, gate_up_E2IH, down_EHI, weights_NK, order, keep=True)
        ctx.save_for_backward(hidden_NH, gate_up_E2IH, down_EHI, weights_NK, kept_S2I, order.pair_S, order.counts_E)
        # Under checkpointing saved tensors come back as copies; the gradient belongs to the parameter itself.
        ctx.backend = backend
        ctx.owners = tuple(
            _leaf(projection) if accumulate and needed else None
            for projection, needed in zip((gate_up_E2IH, down_EHI), ctx.needs_input_grad[1:3], strict=True)
        )
        return output_NH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs [N, H], [E, 2I, H], [E, H, I], [N, K]; none for what accumulates by itself."""
        hidden_NH, gate_up_E2IH, down_EHI, weights_NK, kept_S2I, pair_S, counts_E = ctx.saved_tensors
        run = implementation(ctx.backend, hidden_NH, gate_up_E2IH, down_EHI)
        targets = [
            _target(run, projection, owner, counts_E) if needed else None
            for projection, owner, needed in zip(
                (gate_up_E2IH, down_EHI), ctx.owners, ctx.needs_input_grad[1:3], strict=True
            )
        ]
        hidden_grad, weights_grad = run.backward(
            grad_NH, hidden_NH, gate_up_E2IH, down_EHI, weights_NK, kept_S2I, Order(pair_S, counts_E), *targets
        )
        grads = []
        for owner, target in zip(ctx.owners, targets, strict=True):
            if owner is not None and target is not None and owner.grad is None:
                owner.grad = target.grad
            grads.append(target.grad if target is not None and owner is None else None)
        return hidden_grad, *grads, weights_grad, None, None, None


def _leaf(projection: Tensor) -> Tensor:
    if not projection.is_leaf:
        raise ConfigError("sorted_experts: accumulate_into_grad needs leaves (parameters), not computed projections")
    return projection


def _target(run: ModuleType, projection: Tensor, owner: Tensor | None, counts_E: Tensor) -> Target:
    if owner is None or owner.grad is None:
        return run.new_target(projection, counts_E)
    if not owner.grad.is_contiguous():
        owner.grad = owner.grad.contiguous()
    return Target(owner.grad, 1)


@torch.library.custom_op("ernie_elastic::sorted_experts", mutates_args=())
def operator(
    hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, ids_NK: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [N, H], pre-activations [S, 2I] (if `keep`), order int64 [S] and counts int64 [E]."""
    run = implementation("auto", hidden_NH, gate_up_E2IH, down_EHI)
    order = run.sort_pairs(ids_NK, down_EHI.shape[0])
    output_NH, kept_S2I = run.forward(hidden_NH, gate_up_E2IH, down_EHI, weights_NK, order, keep)
    return output_NH, kept_S2I, order.pair_S, order.counts_E


@operator.register_fake
def _(
    hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, ids_NK: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = ids_NK.shape[0] * ids_NK.shape[1]
    kept_S2I = hidden_NH.new_empty(pairs if keep else 0, gate_up_E2IH.shape[1])
    return (
        hidden_NH.new_empty(hidden_NH.shape), kept_S2I, ids_NK.new_empty(pairs), ids_NK.new_empty(down_EHI.shape[0])
    )  # fmt: skip


@torch.library.custom_op("ernie_elastic::sorted_experts_backward", mutates_args=())
def backward_operator(
    grad_NH: Tensor,
    hidden_NH: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    weights_NK: Tensor,
    kept_S2I: Tensor,
    pair_S: Tensor,
    counts_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden [N, H], gate_up [E, 2I, H], down [E, H, I] and weights [N, K]."""
    run = implementation("auto", hidden_NH, gate_up_E2IH, down_EHI)
    gate_up_target, down_target = (run.new_target(item, counts_E) for item in (gate_up_E2IH, down_EHI))
    hidden_grad, weights_grad = run.backward(
        grad_NH, hidden_NH, gate_up_E2IH, down_EHI, weights_NK, kept_S2I, Order(pair_S, counts_E),
        gate_up_target, down_target,
    )  # fmt: skip
    return hidden_grad, gate_up_target.grad, down_target.grad, weights_grad


@backward_operator.register_fake
def _(
    grad_NH: Tensor, hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    return tuple(item.new_empty(item.shape) for item in (hidden_NH, gate_up_E2IH, down_EHI, weights_NK))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backward(ctx: Any, grad_NH: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *backward_operator(grad_NH, *ctx.saved_tensors), None, None


operator.register_autograd(_backward, setup_context=_setup_context)
