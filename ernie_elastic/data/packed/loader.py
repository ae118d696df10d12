"""Batches of a packed directory: step and rank in, PackedBatch out, with no state of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ernie_elastic.data.groups.augmentation import Augmentation
from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.groups.layout import Layout
from ernie_elastic.data.packed.mixture import PackedMixture
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.data.packed.shards import PackedCorpus
from ernie_elastic.schema import PackedBatch


@dataclass(frozen=True)
class PackedLoader:
    """What one rank reads. rows_per_step counts all ranks and micro-batches; augmentation depends on (seed, draw).

    active_bits: visual bits in use at a step, None = all (paper: section 2.2, from few bits to many while training).
    """

    corpus: PackedCorpus | PackedMixture
    layout: Layout
    rows_per_step: int
    row_length: int
    seed: int
    augmentation: Augmentation | None = None
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    active_bits: Callable[[int], int | None] = lambda _: None

    def step(self, step: int) -> list[PackedBatch]:
        """The micro-batches of optimizer step `step` on this rank."""
        rows, augmentation = [], self.augmentation
        if augmentation is not None:
            augmentation = replace(augmentation, active_bits=self.active_bits(step))
        draws = self.corpus.rows_of_step(self.seed, step, self.rows_per_step, self.rank, self.world_size)
        for row, draw in draws:
            generator = torch.Generator().manual_seed((self.seed << 32) + draw)
            rows.append(
                [
                    build_document(self.corpus.document(number), self.layout, augmentation, generator)
                    for number in self.corpus.row(row)
                ]
            )
        size = -(-len(rows) // self.micro_batches)
        return [collate(rows[start : start + size], self.row_length) for start in range(0, len(rows), size)]
