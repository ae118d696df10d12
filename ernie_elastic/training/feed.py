"""What the steps of a run read: units of rows_per_step rows, one step ahead of the training in a thread."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ernie_elastic.data.packed.loader import PackedLoader
from ernie_elastic.schema import PackedBatch


@dataclass(frozen=True)
class Feed:
    """loader reads one unit under its number, as if it were a step. units_of: the units of a step, after rollbacks.

    A step of several units has their micro-batches one after another, so a growing batch needs no more memory.
    """

    loader: PackedLoader
    units_of: Callable[[int], range]

    def read(self, step: int) -> list[PackedBatch]:
        """The micro-batches of a step on this rank."""
        loader = dataclasses.replace(self.loader, active_bits=lambda _: self.loader.active_bits(step))
        return [batch for unit in self.units_of(step) for batch in loader.step(unit)]

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[PackedBatch], float]]:
        """(step, micro-batches, seconds that the training waited for them) for steps start..stop-1."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.read, start)
            for step in range(start, stop):
                begun = time.perf_counter()
                batches = coming.result()
                waited = time.perf_counter() - begun
                if step + 1 < stop:
                    coming = pool.submit(self.read, step + 1)
                yield step, batches, waited
