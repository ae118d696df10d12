"""Documents to rows, rows to batches. Letters: B rows, T positions of a row, Q levels, D bits."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import torch

from ernie_elastic.data.groups.layout import IGNORE, Document
from ernie_elastic.errors import DataError
from ernie_elastic.schema import PAD_TASK, MediaInput, PackedBatch


def pack_lengths(
    lengths: Sequence[int], row_length: int, frames: Sequence[int] | None = None, row_frames: int = 0
) -> list[list[int]]:
    """Best-fit-decreasing: rows of document indices whose lengths add up to at most `row_length`.

    frames: read frames of each document; those of a row add up to at most row_frames (0: any number). The fullest row
    that takes a document gets it, the first of equal ones; so rows are the same everywhere. Raises DataError for a
    document longer than a row, or with more frames than it may have.
    """
    frames = frames if frames is not None and row_frames else [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = []
    # One set of shelves for each number of frames that a row may still read.
    shelves = [_Shelves() for _ in range(row_frames + 1)]
    for index in order:
        length, needed = lengths[index], frames[index]
        if length > row_length:
            raise DataError(f"document {index} has {length} positions, a row has {row_length}; raise --row-length")
        if needed > row_frames:
            raise DataError(
                f"document {index} has {needed} frames to read, a row takes {row_frames}; raise --row-frames"
            )
        found = [(*place, left) for left in range(needed, row_frames + 1) if (place := shelves[left].fullest(length))]
        if found:
            room, row, left = min(found)
            shelves[left].remove(room)
        else:
            room, row, left = row_length, len(rows), row_frames
            rows.append([])
        rows[row].append(index)
        shelves[left - needed].put(room - length, row)
    return rows


class _Shelves:
    """Rows by the room that is left in them; finding the fullest takes no longer with more rows."""

    def __init__(self) -> None:
        self.heaps: dict[int, list[int]] = {}
        self.filled = 0  # bit r: some row has room r

    def put(self, room: int, row: int) -> None:
        heapq.heappush(self.heaps.setdefault(room, []), row)
        self.filled |= 1 << room

    def fullest(self, length: int) -> tuple[int, int] | None:
        """(room, row) of the fullest row with room for `length`, the first of equal ones."""
        rest = self.filled >> length << length
        if not rest:
            return None
        room = (rest & -rest).bit_length() - 1
        return room, self.heaps[room][0]

    def remove(self, room: int) -> None:
        """Take the first row with exactly this room off its shelf."""
        heapq.heappop(self.heaps[room])
        if not self.heaps[room]:
            self.filled &= ~(1 << room)


def packing_efficiency(lengths: Sequence[int], rows: Sequence[Sequence[int]], row_length: int) -> float:
    """Share of the positions of all rows that hold data."""
    return sum(lengths[index] for row in rows for index in row) / max(1, len(rows) * row_length)


Media = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _add_flat(
    flat: dict[str, list[torch.Tensor]], media: dict[tuple[int, ...], list[Media]], document: Document, offset: int
) -> None:
    """Append what a document holds at some positions only; offset: flat position of its first one."""
    flat["visual_inputs"].append(document.visual_inputs)
    flat["visual_index"].append(document.visual_index + offset)
    flat["visual_scale"].append(document.visual_scale)
    flat["bit_targets"].append(document.bit_targets)
    flat["bit_index"].append(document.bit_index + offset)
    flat["bit_weight"].append(document.bit_weight)
    for sound, index in document.sounds:
        flat["sound_features"].append(sound)
        flat["sound_index"].append(index + offset)
        flat["sound_item"].append(torch.full_like(index, len(flat["sound_item"])))
    for vector, place in document.speakers:
        flat["speaker"].append(vector[None])
        flat["speaker_index"].append(torch.tensor([place + offset]))
    for pixels, features, index in document.media:
        media[tuple(pixels.shape)].append((pixels, features, index + offset))


def collate(
    rows: Sequence[Sequence[Document]], row_length: int | None = None, pad_left: bool = False, pad_id: int = -1
) -> PackedBatch:
    """Rows of documents as one PackedBatch of [B, T]; padding has document -1.

    row_length: T (default: the longest row). pad_left: documents end at the right edge, as decoding wants.
    pad_id: text id at padding (-1: no embedding at all).
    """
    totals = [sum(len(document) for document in row) for row in rows]
    if not any(totals):
        raise DataError("a batch needs at least one document; every row is empty")
    length = row_length or max(totals)
    sample = next(document for row in rows for document in row)
    feature_size, speaker_size = sample.feature_size, sample.speaker_size
    sizes = {(d.feature_size, d.speaker_size, d.active_bits) for row in rows for d in row}
    if len(sizes) > 1:
        raise DataError(f"documents of different layouts in one batch: (features, speaker, bits) are {sorted(sizes)}")
    shape, levels = (len(rows), length), sample.audio_codes.shape[1]
    text_ids = torch.full(shape, pad_id, dtype=torch.int64)
    codes = torch.full((*shape, levels), -1, dtype=torch.int64)
    next_codes = codes.clone()
    document_id = torch.full(shape, -1, dtype=torch.int32)
    group = torch.zeros(shape, dtype=torch.int32)
    clip, frame = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    dropped = torch.zeros(shape, dtype=torch.bool)
    position = torch.zeros((*shape, 3))
    task = torch.full(shape, PAD_TASK, dtype=torch.int8)
    text_targets = torch.full(shape, IGNORE, dtype=torch.int64)
    flat: dict[str, list[torch.Tensor]] = defaultdict(list)
    media: dict[tuple[int, ...], list[Media]] = defaultdict(list)
    for b, row in enumerate(rows):
        start = length - totals[b] if pad_left else 0
        if totals[b] > length:
            raise DataError(f"row {b} holds {totals[b]} positions, more than {length}")
        for number, document in enumerate(row):
            span = slice(start, start + len(document))
            text_ids[b, span] = document.text_ids
            codes[b, span] = document.audio_codes
            next_codes[b, span] = document.next_codes
            document_id[b, span] = number
            group[b, span] = document.group
            clip[b, span] = document.clip
            frame[b, span] = document.frame
            dropped[b, span] = document.dropped
            position[b, span] = document.position
            task[b, span] = document.task
            text_targets[b, span] = document.text_targets
            _add_flat(flat, media, document, b * length + start)
            start += len(document)
    joined = {name: torch.cat(values) for name, values in flat.items() if values}
    no_index = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        text_ids_BT=text_ids,
        audio_codes_BTQ=codes,
        visual_inputs_ND=joined["visual_inputs"],
        visual_index_N=joined["visual_index"],
        visual_scale_N=joined["visual_scale"],
        media=[
            MediaInput(*(torch.stack(parts) for parts in zip(*items, strict=True)))
            for _, items in sorted(media.items())
        ],
        sound_features_NF=joined.get("sound_features", torch.zeros(0, feature_size)),
        sound_index_N=joined.get("sound_index", no_index),
        sound_item_N=joined.get("sound_item", no_index),
        speaker_NF=joined.get("speaker", torch.zeros(0, speaker_size)),
        speaker_index_N=joined.get("speaker_index", no_index),
        document_BT=document_id,
        group_BT=group,
        clip_BT=clip,
        frame_BT=frame,
        dropped_BT=dropped,
        position_BT3=position,
        task_BT=task,
        text_targets_BT=text_targets,
        next_codes_BTQ=next_codes,
        bit_targets_ND=joined["bit_targets"],
        bit_index_N=joined["bit_index"],
        bit_weight_N=joined["bit_weight"],
        active_bits=sample.active_bits,
    )
