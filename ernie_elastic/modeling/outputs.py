"""What the model returns. Letters: B rows, T positions, H hidden, N positions, V vocabulary or codes, S audio steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ernie_elastic.schema import RouterOutput


@dataclass
class StackOutput:
    """hidden [B, T, H] after the last norm; routing per run layer; audio logits [S, V + 1] per level at audio steps."""

    hidden: torch.Tensor
    routing: list[RouterOutput]
    layers: tuple[int, ...]
    audio_logits: list[torch.Tensor] = field(default_factory=list)


@dataclass
class PackedOutput:
    """What the packed entry returns: logits only where a target is.

    text_logits_NV at text_index_N; audio_logits: per level [S, V + 1] at audio_index_S; bit_logits_ND at the batch's
    bit_index_N; routing: one RouterOutput per run layer, whose indices are in `layers`.
    """

    text_logits_NV: torch.Tensor
    text_index_N: torch.Tensor
    audio_logits: list[torch.Tensor]
    audio_index_S: torch.Tensor
    bit_logits_ND: torch.Tensor
    hidden_BTH: torch.Tensor
    routing: list[RouterOutput]
    layers: tuple[int, ...]
