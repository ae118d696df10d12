"""Data order as a pure function of (seed, epoch, index): a permutation that needs no memory.

Resuming is exact for any number of workers and ranks, since nobody holds a state. ours: a four-round Feistel network
over the next power of four, walked until the value falls inside the range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ernie_elastic.errors import ConfigError

ROUNDS = 4


def _mix(value: int, key: bytes) -> int:
    digest = hashlib.blake2b(value.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little")


def shuffled_index(seed: int, epoch: int, index: int, size: int) -> int:
    """Which of `size` items comes at place `index` of `epoch`. For each (seed, epoch) it is a bijection of 0..size-1.

    Raises ConfigError when index lies outside 0..size-1.
    """
    if not 0 <= index < size:
        raise ConfigError(f"data order: index {index} lies outside 0..{size - 1}")
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    keys = [f"{seed}:{epoch}:{round_}".encode() for round_ in range(ROUNDS)]
    value = index
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        value = (left << half) | right
        if value < size:
            return value


def rows_of_step(
    seed: int, step: int, rows_per_step: int, num_rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, int]]:
    """(row, draw number) that `rank` reads at optimizer step `step`; the draw number counts rows since the start.

    The union over ranks does not depend on the world size. Raises ConfigError when rows_per_step does not divide.
    """
    for draw in draws_of_step(step, rows_per_step, rank, world_size):
        epoch, index = divmod(draw, num_rows)
        yield shuffled_index(seed, epoch, index, num_rows), draw


def draws_of_step(step: int, rows_per_step: int, rank: int = 0, world_size: int = 1) -> range:
    """The draw numbers of `rank` at a step, counted since the start. Raises ConfigError as `rows_of_step` does."""
    if rows_per_step % world_size:
        raise ConfigError(
            f"rows_per_step {rows_per_step} is no multiple of the {world_size} ranks; change --training.rows-per-step"
        )
    share = rows_per_step // world_size
    start = step * rows_per_step + rank * share
    return range(start, start + share)
