"""Batches of crops for training tokenizers: pictures, clips and sounds of any size become arrays of one shape.

Contract: a batch is a function of (records, settings, seed, step, rank); the union over ranks does not depend on their
number. A record that cannot be read is named and its place is taken by the next one, so batches keep their size.
ours: the report does not say how tokenizers are trained.

Shape letters: N items, F frames, H/W pixels, L samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ernie_elastic.data.packed.order import rows_of_step
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample
from ernie_elastic.tokenizer_training.loop import Batch
from ernie_elastic.training.ranks import rank, world_size

CACHE_BYTES = 256 * 2**20  # decoded media kept in memory: small sets are decoded once
Crop = Callable[[np.ndarray, np.random.Generator, int], np.ndarray]


class Records(Protocol):
    """Samples behind an index, such as `data.sources` gives."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError, which names the record, when it cannot be read."""


class MediaReader:
    """Media of records, those read lately kept in memory."""

    def __init__(self, records: Records, kinds: tuple[str, ...], source: str) -> None:
        """kinds: of the segments that are used. source: what errors call the records. DataError without records."""
        if not len(records):
            raise DataError(f"tokenizer training: {source} has no {' or '.join(kinds)} to train on")
        self.records, self.kinds, self.source = records, kinds, source
        self._cache: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._bytes = 0

    def readable(self, index: int) -> tuple[list[np.ndarray], list[str]]:
        """The media, uint8 [(F,) H, W, 3] or float32 [L], of the first readable record from `index` on, and why those
        before it are not. Raises DataError when none is."""
        problems: list[str] = []
        for shift in range(len(self.records)):
            try:
                return self.media((index + shift) % len(self.records)), problems
            except DataError as error:
                problems.append(str(error))
        raise DataError(f"tokenizer training: no record of {self.source} can be read; the first one: {problems[0]}")

    def media(self, index: int) -> list[np.ndarray]:
        """The media, uint8 [(F,) H, W, 3] or float32 [L], of record `index`. Raises DataError when it has none."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        sample = self.records[index]
        media = [part.array for part in sample.segments if part.kind in self.kinds and part.array is not None]
        if not media or any(not array.size for array in media):
            raise DataError(f"record {sample.key}: it holds no {' or '.join(self.kinds)}, or an empty one")
        self._cache[index] = media
        self._bytes += sum(array.nbytes for array in media)
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            self._bytes -= sum(array.nbytes for array in self._cache.popitem(last=False)[1])
        return media


class MediaBatches:
    """`Batches` of crops out of records. A record with several media gives one of them, drawn."""

    def __init__(self, reader: MediaReader, crop: Crop, batch_size: int, seed: int) -> None:
        """crop: (media array, random numbers, step) to an array of the shape of that step. batch_size: of all ranks.
        Raises ConfigError when batch_size is no multiple of the ranks.
        """
        if batch_size < 1 or batch_size % world_size():
            raise ConfigError(f"tokenizer training: batch_size {batch_size} is no multiple of {world_size()} processes")
        self.reader, self.crop, self.batch_size, self.seed = reader, crop, batch_size, seed

    def __call__(self, step: int) -> Batch:
        """This rank's crops of step `step`: items uint8 [N, F, H, W, 3] or float32 [N, L]."""
        items, rejects = [], []
        size = len(self.reader.records)
        for index, draw in rows_of_step(self.seed, step, self.batch_size, size, rank(), world_size()):
            rng = np.random.default_rng((self.seed, draw))
            media, problems = self.reader.readable(index)
            rejects += problems
            items.append(self.crop(media[int(rng.integers(len(media)))], rng, step))
        return Batch(torch.from_numpy(np.stack(items)), tuple(rejects))


def picture_crop(
    size_of_step: Callable[[int], tuple[int, int]], frames_of_step: Callable[[int], int], smallest: float, flip: bool
) -> Crop:
    """A crop uint8 [F, H, W, 3] out of a picture [h, w, 3] or clip [f, h, w, 3].

    size_of_step: (H, W) at a step; frames_of_step: F, frames in a row at a drawn place, the last one held when a clip
    is shorter (a picture is a clip of one). smallest: share of the largest area of that shape inside the picture that
    a crop has at least; it is then resized to H x W. flip: mirror every other one.
    """

    def crop(media: np.ndarray, rng: np.random.Generator, step: int) -> np.ndarray:
        frames = media[None] if media.ndim == 3 else media
        (height, width), (rows, columns) = frames.shape[1:3], size_of_step(step)
        largest = min(height / rows, width / columns)
        # Never below one stored pixel for one of the crop, when the picture is large enough: that would be blur.
        least = min(largest, max(1.0, largest * smallest**0.5))
        scale = float(rng.uniform(least, largest))
        box_h, box_w = max(1, round(rows * scale)), max(1, round(columns * scale))
        top, left = int(rng.integers(height - min(box_h, height) + 1)), int(rng.integers(width - min(box_w, width) + 1))
        num_frames = frames_of_step(step)
        start = int(rng.integers(max(1, len(frames) - num_frames + 1)))
        chosen = [frames[min(start + number, len(frames) - 1)] for number in range(num_frames)]
        cut = [frame[top : top + box_h, left : left + box_w] for frame in chosen]
        mirrored = flip and rng.random() < 0.5
        resized = [np.asarray(_resized(frame, rows, columns)) for frame in cut]
        return np.stack([frame[:, ::-1] if mirrored else frame for frame in resized])

    return crop


def _resized(frame_HW3: np.ndarray, rows: int, columns: int) -> np.ndarray:
    if frame_HW3.shape[:2] == (rows, columns):
        return frame_HW3
    picture = Image.fromarray(np.ascontiguousarray(frame_HW3))
    return np.asarray(picture.resize((columns, rows), Image.Resampling.LANCZOS, reducing_gap=2.0))


def wave_crop(length: int, gain: tuple[float, float] = (0.5, 1.0)) -> Crop:
    """A crop float32 [L] out of a sound [l]: a drawn place, zeros behind a shorter one, times a drawn gain."""

    def crop(media: np.ndarray, rng: np.random.Generator, _: int) -> np.ndarray:
        start = int(rng.integers(max(1, len(media) - length + 1)))
        wave = np.zeros(length, dtype=np.float32)
        part = media[start : start + length]
        wave[: len(part)] = part
        return wave * np.float32(rng.uniform(*gain))

    return crop
