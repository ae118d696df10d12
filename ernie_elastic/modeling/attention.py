"""Grouped-query attention through Transformers' attention registry, with Uni-RoPE and optional QK-norm.

Letters: B rows, T positions, H hidden, A heads, C head width, P rotary pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.positions import apply_rotary


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32. paper: silent; ERNIE 4.5 (eps 1e-5)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape [..., size]; returns x's dtype."""
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of attention: query [B, A, T, C], key/value [B, A_kv, S, C], mask bool or additive [B, 1, T, S].

    Returns output [B, T, A, C] and weights [B, A, T, S].
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ErnieElasticAttention(nn.Module):
    """q, k, v, o projections around the attention function that `config._attn_implementation` names."""

    def __init__(self, config: ErnieElasticConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = True
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_layer: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, H] -> output [B, T, H] and the weights, when the back end gives them.

        cache_layer: slot in the cache; a sub-model with dropped layers numbers its layers from 0.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states)).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = apply_rotary(query.transpose(1, 2), *position_embeddings)
        key = apply_rotary(key.transpose(1, 2), *position_embeddings)
        if past_key_values is not None:
            slot = self.layer_idx if cache_layer is None else cache_layer
            key, value = past_key_values.update(key, value, slot)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=self.attention_dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(-2)), weights

    def _split_heads(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """[B, T, A * C] -> [B, T, A, C]; A is what this rank holds, and B may be 0."""
        return x_BTX.view(*x_BTX.shape[:-1], x_BTX.shape[-1] // self.head_dim, self.head_dim)
