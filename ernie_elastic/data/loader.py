"""Batches of a packed directory: step and rank in, PackedBatch out, with no state of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ernie_elastic.data.grouping import Flips, Layout, build_document
from ernie_elastic.data.order import rows_of_step
from ernie_elastic.data.packing import collate
from ernie_elastic.data.shards import PackedCorpus
from ernie_elastic.schema import PackedBatch


@dataclass(frozen=True)
class PackedLoader:
    """What one rank reads. rows_per_step counts all ranks and micro-batches; flips depend on (seed, draw) alone."""

    corpus: PackedCorpus
    layout: Layout
    rows_per_step: int
    row_length: int
    seed: int
    flips: Flips | None = None
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1

    def step(self, step: int) -> list[PackedBatch]:
        """The micro-batches of optimizer step `step` on this rank."""
        rows = []
        draws = rows_of_step(self.seed, step, self.rows_per_step, self.corpus.num_rows, self.rank, self.world_size)
        for row, draw in draws:
            generator = torch.Generator().manual_seed((self.seed << 32) + draw)
            rows.append(
                [
                    build_document(self.corpus.document(number), self.layout, self.flips, generator)
                    for number in self.corpus.row(row)
                ]
            )
        size = -(-len(rows) // self.micro_batches)
        return [collate(rows[start : start + size], self.row_length) for start in range(0, len(rows), size)]

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[PackedBatch]]]:
        """(step, micro-batches) for steps start..stop-1, one step ahead of the reader in a thread."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.step, start)
            for step in range(start, stop):
                batches = coming.result()
                if step + 1 < stop:
                    coming = pool.submit(self.step, step + 1)
                yield step, batches
