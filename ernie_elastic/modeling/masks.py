"""The compact mask (document, group) and its lowerings: dense for SDPA, a function for FlexAttention, cached decoding.

Position q sees position k when both belong to one document and group_k <= group_q: globally causal, bidirectional
inside a group. paper: section 3. Letters: B rows, T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def dense_mask(document_BT: torch.Tensor, group_BT: torch.Tensor) -> torch.Tensor:
    """Bool [B, 1, T, T], True where the query (dim 2) sees the key (dim 3); padding (document -1) sees padding."""
    same = document_BT[:, :, None] == document_BT[:, None, :]
    earlier = group_BT[:, None, :] <= group_BT[:, :, None]
    return (same & earlier)[:, None]


def flex_mask_mod(
    document_BT: torch.Tensor, group_BT: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same rule as a FlexAttention mask_mod(b, head, q_index, k_index)."""

    def mask_mod(b: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (document_BT[b, q] == document_BT[b, k]) & (group_BT[b, k] <= group_BT[b, q])

    return mask_mod


def cached_mask(key_valid_BS: torch.Tensor, num_queries: int) -> torch.Tensor | None:
    """Mask of one new group against the cache: every valid key, its own group included.

    key_valid_BS: bool, False at left padding. Returns bool [B, 1, num_queries, S], or None when nothing is hidden.
    """
    if bool(key_valid_BS.all()):
        return None
    return key_valid_BS[:, None, None, :].expand(-1, 1, num_queries, -1)
