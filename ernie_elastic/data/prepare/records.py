"""The records that `prepare-data` reads: those of any source, or of the embedded world, behind one index.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ernie_elastic.data.sources.base import Source, Subset
from ernie_elastic.data.sources.open import open_source
from ernie_elastic.data.world.facts import WorldConfig
from ernie_elastic.data.world.scenes import task_of_index, world_sample
from ernie_elastic.schema import Sample, SegmentKind

WORLD = "world"


class WorldSource(Source):
    """The first `count` training records of a mixture of the world's tasks, drawn when they are read."""

    def __init__(self, task_weights: Mapping[str, float], seed: int, count: int, world: WorldConfig) -> None:
        """Raises ConfigError for unknown tasks or weights that do not make a distribution."""
        self.task_weights, self.seed, self.count, self.world = dict(task_weights), seed, count, world
        task_of_index(self.task_weights, seed, 0)

    def __len__(self) -> int:
        return self.count

    def key(self, index: int) -> str:
        """As `world_sample` names it."""
        return f"world/train/{task_of_index(self.task_weights, self.seed, index)}/{index}"

    def __getitem__(self, index: int) -> Sample:
        task = task_of_index(self.task_weights, self.seed, index)
        return world_sample(task, self.seed, index, "train", self.world)

    def identity(self) -> str:
        """Nothing beside its settings."""
        return WORLD


def open_data(data: str, kinds: Sequence[SegmentKind], sample_rate: int, limit: int) -> Source:
    """The first `limit` records of a source (0: all), its media as `open_source` gives them; raises as it does."""
    source = open_source(data, kinds, sample_rate)
    return Subset(source, range(limit)) if 0 < limit < len(source) else source
