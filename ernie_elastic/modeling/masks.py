"""ONE compact mask and its lowerings: dense for SDPA, FlexAttention, FlashMask-style column bounds, cached decoding.

Position q sees position k when both belong to one document, group_k <= group_q, and k is not history that the query's
frame may not use: inside one generated clip, a frame sees no frame that was dropped, nor one further back than the
window. paper: section 3 (globally causal, bidirectional inside a group), section 2.4 (windowed temporal attention,
random masking of historical frames).

Letters: B rows, T positions, S keys, Q queries. A document is contiguous in its row, and so is a clip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ernie_elastic.schema import PackedBatch


@dataclass(frozen=True)
class Places:
    """What the mask must know of each position, int32 or bool [B, n] each (any broadcastable shape while comparing).

    document, -1 for padding; group; clip, -1 outside of generated videos; frame inside its clip; dropped: True where
    later frames of the clip may not look (ours: drawn once per frame and clip, so that four integers a column say it).
    """

    document: torch.Tensor
    group: torch.Tensor
    clip: torch.Tensor
    frame: torch.Tensor
    dropped: torch.Tensor

    @staticmethod
    def of(batch: PackedBatch) -> Places:
        """The places of a packed batch, [B, T]."""
        return Places(batch.document_BT, batch.group_BT, batch.clip_BT, batch.frame_BT, batch.dropped_BT)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Places:
        """The same places with `change` applied to each field."""
        return Places(*(change(getattr(self, name)) for name in self.__dataclass_fields__))

    def cat(self, other: Places) -> Places:
        """These places followed by other ones, along the last dimension."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return Places(*(torch.cat(pair, dim=-1) for pair in pairs))


@dataclass(frozen=True)
class SequenceMask:
    """Places and the window (frames a frame sees back; 0 = all): lowered where it is used, row block by row block."""

    places: Places
    window: int = 0

    def dense(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """Bool [B, 1, Q, S], True where the query sees the key; padding (document -1) sees padding."""
        query = self.places.map(lambda field: field[:, rows, None])
        key = self.places.map(lambda field: field[:, None, columns])
        return visible(query, key, self.window)[:, None]

    def columns_of(self, rows: slice) -> slice:
        """The keys that any query of `rows` may see lie inside this slice: their documents, up to their last group."""
        document, group = self.places.document, self.places.group
        last = rows.stop - 1
        same_first = document == document[:, rows.start : rows.start + 1]
        last_group = (document == document[:, last : last + 1]) & (group <= group[:, last : last + 1])
        positions = torch.arange(document.shape[1], device=document.device)
        start = torch.where(same_first, positions, document.shape[1]).amin()
        stop = torch.where(last_group, positions + 1, 0).amax()
        return slice(int(start), int(torch.maximum(stop, torch.tensor(rows.stop, device=stop.device))))


def visible(query: Places, key: Places, window: int) -> torch.Tensor:
    """The rule itself: bool [B, Q, S] over fields [B, Q, 1] and [B, 1, S], or any that broadcast."""
    seen = (query.document == key.document) & (key.group <= query.group)
    behind = query.frame - key.frame
    history = (query.clip == key.clip) & (key.clip >= 0) & (behind > 0)
    forbidden = key.dropped if not window else key.dropped | (behind > window)
    return seen & ~(history & forbidden)


def flex_mask_mod(
    places: Places, window: int = 0
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The same rule as a FlexAttention mask_mod(b, head, q_index, k_index)."""

    def mask_mod(b: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible(places.map(lambda field: field[b, q]), places.map(lambda field: field[b, k]), window)

    return mask_mod


def flex_block_mask(places: Places, window: int = 0) -> Any:
    """The rule as a BlockMask over places [B, T], which Transformers' `flex_attention` takes as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = places.document.shape
    device = places.document.device
    return create_block_mask(flex_mask_mod(places, window), rows, None, length, length, device=device)


def column_bounds(places: Places, window: int = 0) -> torch.Tensor:
    """FlashMask-style row bounds of every key, int32 [B, T, 4]: (first, hole_start, hole_end, last).

    Rows first <= q < last see the key, but for the hole hole_start <= q < hole_end (empty when both are equal): the
    frames of its clip that may not look back to it. paper: section 3 (FlashMask; the form with four bounds).
    """
    length = places.document.shape[1]
    row_T = torch.arange(length, device=places.document.device)
    first = _run_edge((places.document, places.group), row_T, start=True)
    last = _run_edge((places.document,), row_T, start=False)
    clip_end = _run_edge((places.document, places.clip), row_T, start=False)
    # First row of the clip whose frame lies too far ahead; frames increase along a clip.
    reach = torch.where(places.dropped, 0, window if window else length)
    in_clip = (places.clip[:, None, :] == places.clip[:, :, None]) & (
        places.document[:, None, :] == places.document[:, :, None]
    )
    near = in_clip & (places.frame[:, None, :] <= (places.frame + reach)[:, :, None])
    hole_start = torch.where(near, row_T + 1, 0).amax(-1)
    hole_start = torch.where(places.clip >= 0, hole_start, clip_end)
    return torch.stack([first, hole_start, clip_end, last], dim=-1).int()


def _run_edge(fields: tuple[torch.Tensor, ...], row_T: torch.Tensor, start: bool) -> torch.Tensor:
    """First row, or one past the last row, of the run of equal fields that each position lies in: int64 [B, T]."""
    change = torch.zeros_like(fields[0][:, 1:], dtype=torch.bool)
    for field in fields:
        change = change | (field[:, 1:] != field[:, :-1])
    edge = change.new_ones((len(change), 1))
    if start:
        return torch.where(torch.cat([edge, change], dim=1), row_T, 0).cummax(dim=1).values
    ends = torch.where(torch.cat([change, edge], dim=1), row_T + 1, len(row_T))
    return ends.flip(1).cummin(dim=1).values.flip(1)


def cached_mask(query: Places, key: Places, window: int) -> torch.Tensor:
    """Mask of new groups [B, Q] against the cache [B, S], the new groups last in it: bool [B, 1, Q, S].

    A key with document -1 is hidden: left padding, or a draft that was rejected.
    """
    return visible(query.map(lambda field: field[:, :, None]), key.map(lambda field: field[:, None]), window)[:, None]
