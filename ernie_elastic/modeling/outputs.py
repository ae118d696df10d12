"""What the model returns. Letters: B rows, T positions, H hidden, N positions, V vocabulary or codes, S audio steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from ernie_elastic.schema import RouterOutput


@dataclass
class ErnieElasticModelOutput(MoeModelOutputWithPast):
    """Transformers' output, plus router_loss: the weighted router losses, a mean over layers; None while off."""

    router_loss: torch.Tensor | None = None


@dataclass
class StackOutput:
    """hidden [B, T, H] after the last norm; routing per run layer; audio logits [S, V + 1] per level at audio steps.

    layers: indices of the run layers that hold a mixture of experts, one for each entry of routing.
    """

    hidden: torch.Tensor
    routing: list[RouterOutput]
    layers: tuple[int, ...]
    audio_logits: list[torch.Tensor] = field(default_factory=list)


@dataclass
class PackedOutput:
    """What the packed entry returns: logits only where a target is.

    text_logits_NV at text_index_N; audio_logits: per level [S, V + 1] at audio_index_S; bit_logits_ND at bit_index_N;
    mtp_logits_NV at mtp_index_N, positions whose successor has a text target (empty without the module); routing: one
    RouterOutput per run layer with experts, whose indices are in `layers`; router_loss: scalar, None while off.
    """

    text_logits_NV: torch.Tensor
    text_index_N: torch.Tensor
    audio_logits: list[torch.Tensor]
    audio_index_S: torch.Tensor
    bit_logits_ND: torch.Tensor
    bit_index_N: torch.Tensor
    mtp_logits_NV: torch.Tensor
    mtp_index_N: torch.Tensor
    hidden_BTH: torch.Tensor
    routing: list[RouterOutput]
    layers: tuple[int, ...]
    router_loss: torch.Tensor | None = None


def router_loss(routing: list[RouterOutput]) -> torch.Tensor | None:
    """Mean over layers of the router losses, a scalar [] of float32; None while they are off."""
    losses = [decision.loss for decision in routing if decision.loss is not None]
    return torch.stack(losses).mean() if losses else None
