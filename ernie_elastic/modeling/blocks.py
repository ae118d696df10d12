"""Parts of the stack that are no mixture: the dense SwiGLU block and the multi-token prediction module.

Letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from ernie_elastic.modeling.attention import RMSNorm
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.positions import Rotary


class ErnieElasticMLP(nn.Module):
    """Dense SwiGLU: the first layers of a model that has them, and shared experts. peer: ERNIE 4.5."""

    def __init__(self, config: ErnieElasticConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MultiTokenPredictor(nn.Module):
    """Predicts the token after next: block(W [norm(h_i) ; norm(emb(x_{i+1}))]), then the model's own head.

    paper: section 1.4 (MTP on text, embedding and head shared); the module is DeepSeek-V3's. ours: its block is dense,
    so that a sub-model with fewer experts keeps it whole.
    """

    def __init__(self, config: ErnieElasticConfig, block: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embed_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = block
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        next_embedded: torch.Tensor,
        position_embeddings: Rotary,
        mask: Any = None,
        cache: Cache | None = None,
        cache_layer: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden [B, T, H] of the stack and the embedding [B, T, H] of the position after each -> [B, T, H].

        Position and mask are those of `hidden`: a position sees embeddings up to its own successor, never its target.
        """
        joined = torch.cat([self.hidden_norm(hidden), self.embed_norm(next_embedded)], dim=-1)
        output, _ = self.block(self.proj(joined), position_embeddings, mask, cache, cache_layer, **kwargs)
        return self.norm(output)


def shift_left(embedded_BTH: torch.Tensor) -> torch.Tensor:
    """Each position's successor in the row, zeros after the last: [B, T, H]."""
    return torch.cat([embedded_BTH[:, 1:], torch.zeros_like(embedded_BTH[:, :1])], dim=1)
