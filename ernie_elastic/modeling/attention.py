"""Grouped-query attention through Transformers' attention registry, with Uni-RoPE and optional QK-norm.

Letters: B rows, T positions, H hidden, A heads, C head width, P rotary pairs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.rms_norm import rms_norm, rms_norm_rotary
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.masks import SequenceMask, flex_block_mask
from ernie_elastic.modeling.positions import Rotary, apply_rotary


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32. paper: silent; ERNIE 4.5 (eps 1e-5)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def runs_native(self, x: torch.Tensor) -> bool:
        """Whether x [..., size] and the weight are float32 on the CPU, outside of torch.compile."""
        weight = self.weight
        return x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32 and not is_compiling()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape [..., size]; returns x's dtype."""
        if self.runs_native(x):
            return rms_norm(x, self.weight, self.eps)
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def _norm_and_turn(norm: RMSNorm | None, x_BTAC: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Optional QK-norm, then Uni-RoPE: [B, T, A, C] -> [B, A, T, C]; in one pass where CPUs can."""
    # Hooks (an offloaded weight, say) run with the module alone; they also wrap its forward in its own dictionary.
    hooked = norm is not None and (norm._forward_pre_hooks or norm._forward_hooks or "forward" in vars(norm))
    if norm is not None and not hooked and norm.runs_native(x_BTAC):
        turned = rms_norm_rotary(x_BTAC, norm.weight, rotary[0], rotary[1], norm.eps)
        if turned is not None:
            return turned
    normed = x_BTAC if norm is None else norm(x_BTAC)
    return apply_rotary(normed.transpose(1, 2), *rotary)


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


class HeadExchange(Protocol):
    """Sequence parallelism as attention sees it: all positions of some heads instead of some positions of all heads."""

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, A, T / ranks, C] of this rank -> [B, A / ranks, T, C]."""

    def join_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, A / ranks, C] -> [B, T / ranks, A, C]."""


def packed_mask(mask: SequenceMask, config: ErnieElasticConfig) -> Any:
    """What the configured attention back end takes for a packed batch: a BlockMask for `flex_attention`, a bool mask
    for `sdpa` and `eager`, the mask itself for rows above `attention_block`. ConfigError for a back end without masks.
    """
    name = config._attn_implementation
    if name == "flex_attention":
        return flex_block_mask(mask.places, mask.window)
    if name not in ("sdpa", "eager"):
        raise ConfigError(f"packed batches need attn_implementation sdpa, eager or flex_attention, not {name!r}")
    long = mask.places.document.shape[1] > config.attention_block
    return mask if long else mask.dense()


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
        position_embeddings: Rotary,
        attention_mask: torch.Tensor | SequenceMask | None = None,
        past_key_values: Cache | None = None,
        cache_layer: int | None = None,
        exchange: HeadExchange | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, H] -> output [B, T, H] and the weights, when the back end gives them.

        attention_mask: whole (bool or additive [B, 1, T, S], or a back end's own form), or a SequenceMask that is
        lowered block by block. cache_layer: slot in the cache; a sub-model with dropped layers numbers its layers from
        0. exchange: sequence parallelism; hidden_states hold this rank's positions, the mask those of all ranks.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states)).transpose(1, 2)
        query = _norm_and_turn(self.q_norm, query, position_embeddings)
        key = _norm_and_turn(self.k_norm, key, position_embeddings)
        if past_key_values is not None:
            slot = self.layer_idx if cache_layer is None else cache_layer
            key, value = past_key_values.update(key, value, slot)
        if exchange is not None:
            query, key, value = exchange.split_heads(query), exchange.split_heads(key), exchange.split_heads(value)
        if isinstance(attention_mask, SequenceMask):
            output, weights = self._attend_in_blocks(query, key, value, attention_mask, **kwargs), None
        else:
            output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        if exchange is not None:
            output = exchange.join_heads(output)
        return self.o_proj(output.flatten(-2)), weights

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attend(self, query, key, value, mask, dropout=self.attention_dropout, scaling=self.scaling, **kwargs)

    def _attend_in_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SequenceMask, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of long rows, one block of queries at a time over the keys that any of them may see.

        ours: a mask of 32K x 32K floats takes 4 GiB; one of a block is gone after its block. Recomputed in backward.
        """
        size, blocks = self.config.attention_block, []
        for start in range(0, query.shape[2], size):
            rows = slice(start, min(start + size, query.shape[2]))
            columns = mask.columns_of(rows)
            parts = (query[:, :, rows], key[:, :, columns], value[:, :, columns])

            def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, area: tuple[slice, slice]) -> torch.Tensor:
                return self._attend(q, k, v, mask.dense(*area), **kwargs)[0]

            if torch.is_grad_enabled():
                blocks.append(checkpoint(block, *parts, (rows, columns), use_reentrant=False))
            else:
                blocks.append(block(*parts, (rows, columns)))
        return torch.cat(blocks, dim=1)

    def _split_heads(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """[B, T, A * C] -> [B, T, A, C]; A is what this rank holds, and B may be 0."""
        return x_BTX.view(*x_BTX.shape[:-1], x_BTX.shape[-1] // self.head_dim, self.head_dim)
