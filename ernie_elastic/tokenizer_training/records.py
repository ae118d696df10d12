"""Where the records of a tokenizer's training come from: files, datasets, or the embedded world.

Shape letters: F frames, H/W pixels, L samples.
"""

from __future__ import annotations

from typing import Literal, Protocol

from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.data.world.scenes import world_sample
from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import Sample, SegmentKind
from ernie_elastic.tokenizer_training.media_batches import Records

Split = Literal["train", "held-out"]
WORLD = "world"
WORLD_RECORDS = {"train": 20_000, "held-out": 500}
WORLD_TASKS: dict[SegmentKind, tuple[str, ...]] = {
    "text": ("text",), "image": ("text_to_image",), "video": ("text_to_video",),
    "audio": ("text_to_audio", "text_to_speech"),
}  # fmt: skip


class Settings(Protocol):
    """The part of a run that chooses its records."""

    @property
    def data(self) -> str:
        """A directory, a dataset, a file, or "world"."""

    @property
    def seed(self) -> int:
        """Of the embedded world's records."""

    @property
    def held_out_share(self) -> float:
        """Share of the records that is not trained on."""


class WorldRecords:
    """Records of the embedded world, drawn when they are read; held-out ones are of its test split."""

    def __init__(self, kinds: tuple[SegmentKind, ...], seed: int, split: Split, world: WorldConfig) -> None:
        self.tasks = [task for kind in kinds for task in WORLD_TASKS[kind]]
        self.seed, self.split, self.world = seed, split, world

    def __len__(self) -> int:
        return WORLD_RECORDS[self.split]

    def __getitem__(self, index: int) -> Sample:
        split: Literal["train", "test"] = "train" if self.split == "train" else "test"
        number, task = divmod(index, len(self.tasks))
        return world_sample(self.tasks[task], self.seed, number, split, self.world)


def open_records(
    run: Settings, kinds: tuple[SegmentKind, ...], split: Split, sample_rate: int | None = None, size: int | None = None
) -> Records:
    """The records of one split, whose media are uint8 [H, W, 3] or [F, H, W, 3], or float32 [L] at sample_rate Hz.

    size: pixels of a side of the embedded world's pictures. Raises ConfigError for data that cannot be opened.
    """
    if run.data != WORLD:
        # Takes seconds to import, since it knows Hugging Face datasets.
        from ernie_elastic.data.sources.open import open_source

        return open_source(run.data, kinds, sample_rate=sample_rate).split(run.held_out_share, split == "held-out")
    world = WorldConfig()
    if sample_rate not in (None, world.sample_rate):
        raise ConfigError(
            f"train-tokenizer: the embedded world has {world.sample_rate} Hz and the tokenizer {sample_rate}; pass "
            f"--model.sample-rate {world.sample_rate} with fitting --model.strides"
        )
    side = size or world.image_size
    return WorldRecords(kinds, run.seed, split, WorldConfig(image_size=side, video_size=side))
