"""Rows of a PackedBatch taken out and put together; flat indices [N] into [B * T] are moved along.

Letters: B rows, T positions, N flat positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ernie_elastic.schema import MediaInput, PackedBatch


def select_rows(batch: PackedBatch, rows: list[int]) -> PackedBatch:
    """The named rows of a batch, in that order; flat positions are moved along."""
    count, length = batch.document_BT.shape
    place = torch.full((count,), -1, dtype=torch.int64)
    place[torch.tensor(rows)] = torch.arange(len(rows))
    fields: dict[str, Any] = {}

    def keep(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moved = place[index // length] * length + index % length
        chosen = place[index // length] >= 0
        return chosen, moved[chosen]

    for item in dataclasses.fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, torch.Tensor) and item.name.split("_")[-1].startswith("BT"):
            fields[item.name] = value[rows]
    for index, others in (
        ("visual_index_N", ("visual_inputs_ND", "visual_scale_N")),
        ("sound_index_N", ("sound_features_NF", "sound_item_N")),
        ("speaker_index_N", ("speaker_NF",)),
        ("bit_index_N", ("bit_targets_ND", "bit_weight_N")),
    ):
        chosen, fields[index] = keep(getattr(batch, index))
        fields.update({name: getattr(batch, name)[chosen] for name in others})
    media = []
    for part in batch.media:
        chosen = place[part.position_GM[:, 0] // length] >= 0
        if bool(chosen.any()):
            _, moved = keep(part.position_GM[chosen].reshape(-1))
            media.append(
                MediaInput(part.pixels_GFHW3[chosen], part.features_GFhwD[chosen], moved.view(int(chosen.sum()), -1))
            )
    return PackedBatch(**fields, media=media, active_bits=batch.active_bits)


def stack_rows(first: PackedBatch, second: PackedBatch) -> PackedBatch:
    """Two left-padded batches of prompts as one; the shorter one gets more padding."""
    length = max(first.document_BT.shape[1], second.document_BT.shape[1])
    padding = {"text_ids_BT": -1, "audio_codes_BTQ": -1, "next_codes_BTQ": -1, "document_BT": -1, "clip_BT": -1}
    padding |= {"task_BT": -1, "text_targets_BT": -100}
    media: list[MediaInput] = []
    offset = 0
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in (first, second):
        rows, old = batch.document_BT.shape

        def moved(index: torch.Tensor, old: int = old, offset: int = offset) -> torch.Tensor:
            return offset + index // old * length + index % old + (length - old)

        for item in dataclasses.fields(batch):
            value = getattr(batch, item.name)
            if not isinstance(value, torch.Tensor):
                continue
            if item.name.split("_")[-1].startswith("BT"):
                shape = (rows, length - old, *value.shape[2:])
                value = torch.cat([value.new_full(shape, padding.get(item.name, 0)), value], dim=1)
            elif "_index_" in item.name:
                value = moved(value)
            elif item.name == "sound_item_N" and parts.get(item.name):
                value = value + sum(int(part.amax()) + 1 for part in parts[item.name] if len(part))
            parts.setdefault(item.name, []).append(value)
        media += [MediaInput(m.pixels_GFHW3, m.features_GFhwD, moved(m.position_GM)) for m in batch.media]
        offset += rows * length
    joined: dict[str, Any] = {name: torch.cat(values) for name, values in parts.items()}
    return PackedBatch(**joined, media=media, active_bits=first.active_bits)
