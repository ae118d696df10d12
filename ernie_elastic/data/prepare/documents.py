"""Records of any source as documents for pre-training: media made to fit the tokenizers, roles, pieces of long ones.

Contract: a document is a function of its record, of the tokenizers and of the settings alone. What cannot be a document
is a DataError that names the record. ours: the report does not say how records become documents.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from ernie_elastic.data.groups.layout import Layout, part_length
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.media.resampling import even_times, fit_frames, fit_image
from ernie_elastic.data.sources.base import TASK
from ernie_elastic.errors import DataError
from ernie_elastic.schema import Sample, Segment, SegmentRole

# Ends a piece that the next document goes on with: a text of no tokens that is read, so that no end is predicted.
GOES_ON = Tokens("text", "input", ids=np.zeros(0, dtype=np.int32))


def fit_sample(sample: Sample, image_size: int, video_frames: int, frames_per_token: int) -> Sample:
    """The sample with pictures uint8 [S, S, 3] and clips uint8 [F, S, S, 3], S = image_size; the rest as it was.

    A clip gives video_frames frames at even times; a shorter one the most that is a multiple of frames_per_token, or
    its middle one (the model reads 1 frame or such a multiple). Raises DataError for a medium that has no pixels.
    """
    segments = []
    for segment in sample.segments:
        if segment.kind == "image" and segment.array is not None:
            segment = dataclasses.replace(segment, array=fit_image(segment.array, image_size))
        elif segment.kind == "video" and segment.array is not None:
            stored = len(segment.array)
            count = min(video_frames, stored // frames_per_token * frames_per_token) or 1
            chosen = even_times([1.0] * stored, count, f"record {sample.key}")
            segment = dataclasses.replace(segment, array=fit_frames(segment.array[chosen], image_size))
        segments.append(segment)
    return dataclasses.replace(sample, segments=tuple(segments))


def assign_roles(sample: Sample, understanding_share: float, seed: int) -> Sample:
    """The sample with the roles that training gives its segments, in reading order; arrays of shape [...] stay as is.

    A row of a dataset or a group of files that has both texts and media is a pair without roles: in understanding_share
    of them, drawn by (seed, key), the media are read and the texts predicted, in the others the media are drawn from
    the texts. All else stays as it is: messages bring their roles, and of one kind alone everything is predicted.
    Raises DataError when nothing is left to predict.
    """
    texts = [segment for segment in sample.segments if segment.kind == "text"]
    media = [segment for segment in sample.segments if segment.kind != "text"]
    if sample.task == TASK and texts and media:
        digest = hashlib.blake2b(f"{seed}:roles:{sample.key}".encode("utf-8", "surrogateescape"), digest_size=8)
        understood = int.from_bytes(digest.digest(), "little") < understanding_share * 2**64
        first, second = (media, texts) if understood else (texts, media)
        return dataclasses.replace(sample, segments=(*_with_role(first, "input"), *_with_role(second, "target")))
    if not any(segment.role == "target" for segment in sample.segments):
        raise DataError(f"record {sample.key} has no target, so nothing is to be learnt: messages need an assistant")
    return sample


def _with_role(segments: Sequence[Segment], role: SegmentRole) -> list[Segment]:
    return [dataclasses.replace(segment, role=role) for segment in segments]


def pieces_of(parts: Sequence[Tokens], layout: Layout, row_length: int, key: str) -> list[list[Tokens]]:
    """The document itself when it fits a row of row_length positions; else pieces that do, each a document.

    Only documents that are predicted as a whole are cut: inside texts anywhere, between other segments. Every piece
    but the last ends with GOES_ON. Raises DataError, naming the record, for one that is too long and has inputs, and
    for a medium that is longer than a row.
    """
    total = 1 + sum(part_length(part, layout) for part in parts)
    if total <= row_length:
        return [list(parts)]
    longest = max((part_length(part, layout) for part in parts if part.kind != "text"), default=0)
    if any(part.role == "input" for part in parts) or 1 + longest > row_length:
        raise DataError(
            f"record {key} is too long: {total} positions, a row has {row_length}; raise --row-length, shorten it or "
            "leave it out"
        )
    pieces: list[list[Tokens]] = [[]]
    room = row_length - 1
    for part in parts:
        for cut in _cuts(part, layout, room, row_length - 1):
            size = part_length(cut, layout)
            if size > room:
                pieces[-1].append(GOES_ON)
                pieces.append([])
                room = row_length - 1
            pieces[-1].append(cut)
            room -= size
    return pieces


def _cuts(part: Tokens, layout: Layout, room: int, whole: int) -> list[Tokens]:
    """A text in parts: the first fills `room`, the others have at most `whole` tokens; a medium as it is."""
    if part.kind != "text" or part.ids is None or part_length(part, layout) <= room:
        return [part]
    starts = [0, *range(room, len(part.ids), whole)] if room else [*range(0, len(part.ids), whole)]
    ends = [*starts[1:], len(part.ids)]
    return [dataclasses.replace(part, ids=part.ids[start:end]) for start, end in zip(starts, ends, strict=True)]
