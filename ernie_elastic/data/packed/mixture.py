"""Several packed directories as one corpus, each with a weight that may change along the run.

Contract: which source and which row a draw reads is a pure function of (seed, draw) and the weights: resuming is exact
for any number of workers and ranks, and nobody holds a state. Every source is read in its own shuffled epochs, each of
its rows once an epoch, whatever the others do. With one source the order is that of `order.rows_of_step`.

ours: a draw's place in [0, 1) is the sequence (golden ratio * draw + offset) modulo 1, cut at the cumulative weights:
after any number of draws each source has its share but for a few rows, and how often it was drawn before is a sum of
floors, which Euclid's steps give exactly, without a walk over the draws.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_elastic.data.groups.layout import Layout
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.order import draws_of_step, shuffled_index
from ernie_elastic.data.packed.shards import STAGE, PackedCorpus
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.schema import Manifest
from ernie_elastic.stages import read_manifest

CIRCLE = 1 << 32  # places of the sequence
STRIDE = 2654435769  # odd, the nearest to CIRCLE / golden ratio
SOURCE_SEEDS = 1 << 40  # between the seeds of two sources' orders

Stage = tuple[int, tuple[float, ...]]  # first step, weights of the sources from there


@dataclass(frozen=True)
class MixtureConfig:
    """What is read, and how often.

    sources: (packed directory, weight); weights are shares of the rows, of any sum. changes: (share of the run, number
    of a source from 0, its weight from there): a source that begins with weight 0 can come in late, such as a cleaner
    one for the end. The shares count steps of --training.steps, so a run that is made longer moves them.
    """

    sources: tuple[tuple[Path, float], ...] = ()
    changes: tuple[tuple[float, int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.changes and not self.sources:
            raise ConfigError("data: changes of weights need --data.sources")
        for share, number, weight in self.changes:
            if not 0 <= share <= 1 or not 0 <= number < len(self.sources):
                raise ConfigError(
                    f"data: change {(share, number, weight)} must be (share of the run in 0..1, source in 0.."
                    f"{len(self.sources) - 1}, weight)"
                )
        if self.sources:
            self.stages(1)

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """(first step, weights from there) over so many steps. Raises ConfigError for weights without a sum."""
        weights = [weight for _, weight in self.sources]
        found: list[Stage] = []
        for share in sorted({0.0, *(share for share, _, _ in self.changes)}):
            for at, number, weight in self.changes:
                if at == share:
                    weights[number] = weight
            if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
                raise ConfigError(
                    f"data: weights {weights} from {share:.0%} of the run must not be negative and need a sum above 0"
                )
            found.append((math.ceil(share * steps), tuple(weights)))
        return tuple(found)


class PackedMixture:
    """Rows of several corpora behind one numbering: those of the first come first."""

    def __init__(self, corpora: Sequence[PackedCorpus], stages: Sequence[Stage]) -> None:
        """stages: first steps rise from 0, each with a weight per corpus."""
        self.corpora, self.stages = tuple(corpora), tuple(stages)
        self.first_row = [0, *itertools.accumulate(corpus.num_rows for corpus in corpora)]
        self.first_document = [0, *itertools.accumulate(corpus.num_documents for corpus in corpora)]

    def counted_by(self, unit_of: Callable[[int], int]) -> PackedMixture:
        """The same corpora for a run whose steps read several units of rows: what is asked for are units, and stages
        begin at unit_of(their first step)."""
        return PackedMixture(self.corpora, [(unit_of(first), weights) for first, weights in self.stages])

    @property
    def num_rows(self) -> int:
        """Rows of all corpora."""
        return self.first_row[-1]

    @property
    def num_documents(self) -> int:
        """Documents of all corpora."""
        return self.first_document[-1]

    def row(self, index: int) -> list[int]:
        """Document numbers of one row."""
        source = _holder(self.first_row, index)
        start = self.first_document[source]
        return [start + number for number in self.corpora[source].row(index - self.first_row[source])]

    def document(self, number: int) -> list[Tokens]:
        """Token segments of one document."""
        source = _holder(self.first_document, number)
        return self.corpora[source].document(number - self.first_document[source])

    def rows_of_step(
        self, seed: int, step: int, rows_per_step: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, int]]:
        """(row, draw number) that `rank` reads at optimizer step `step`; as `order.rows_of_step`."""
        sizes = [corpus.num_rows for corpus in self.corpora]
        for source, row, draw in mixed_rows(sizes, self.stages, seed, step, rows_per_step, rank, world_size):
            yield self.first_row[source] + row, draw


def mixed_rows(
    sizes: Sequence[int],
    stages: Sequence[Stage],
    seed: int,
    step: int,
    rows_per_step: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, int, int]]:
    """(source, row of it, draw number) that `rank` reads at a step. sizes: rows of each source."""
    digest = hashlib.blake2b(f"{seed}:mixture".encode(), digest_size=8).digest()
    offset = int.from_bytes(digest, "little") % CIRCLE
    past = [(first, _bounds(weights)) for first, weights in stages if first <= step]
    begun, bounds = past[-1]
    before = [0] * len(sizes)
    for (first, old), (stop, _) in itertools.pairwise(past):
        for source in range(len(sizes)):
            before[source] += _drawn(first * rows_per_step, stop * rows_per_step, old, source, offset)
    for draw in draws_of_step(step, rows_per_step, rank, world_size):
        source = _holder(bounds, (STRIDE * draw + offset) % CIRCLE)
        count = before[source] + _drawn(begun * rows_per_step, draw, bounds, source, offset)
        epoch, index = divmod(count, sizes[source])
        yield source, shuffled_index(seed + source * SOURCE_SEEDS, epoch, index, sizes[source]), draw


def open_packed(config: MixtureConfig, steps: int, tokenizers: str, layout: Layout) -> tuple[Any, int, list[Manifest]]:
    """(corpus, its row length, the manifests) of the sources: a PackedCorpus for one, a PackedMixture for several.

    tokenizers: `tokenizers_hash` of the run's. Raises CheckpointError for a directory that was packed with other
    tokenizers or for a model whose documents have other lengths, ConfigError without sources or with rows of two
    lengths.
    """
    if not config.sources:
        raise ConfigError("data: no packed directory is named; pass --data.sources DIR WEIGHT")
    manifests = []
    for directory, _ in config.sources:
        manifest = read_manifest(directory, (STAGE,))
        for name, ours in (("tokenizers", tokenizers), ("layout", layout.sizes())):
            theirs = manifest.extra.get(name)
            if theirs != ours:
                raise CheckpointError(
                    f"{directory} was packed for {name} {_short(theirs)}, this run has {_short(ours)}; prepare the "
                    "data with the tokenizers and for the model (--preset) of this run"
                )
        manifests.append(manifest)
    lengths = [int(manifest.config["row_length"]) for manifest in manifests]
    for (directory, _), length in zip(config.sources, lengths, strict=True):
        if length != lengths[0]:
            raise ConfigError(
                f"data: {config.sources[0][0]} has rows of {lengths[0]} positions and {directory} of {length}; shorter "
                "ones would be padded: prepare all with one --row-length"
            )
    row_length = lengths[0]
    corpora = [PackedCorpus(directory) for directory, _ in config.sources]
    if len(corpora) == 1:
        return corpora[0], row_length, manifests
    return PackedMixture(corpora, config.stages(steps)), row_length, manifests


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _holder(bounds: Sequence[int], value: int) -> int:
    """Which part of rising bounds holds the value; parts may be empty."""
    return next(part for part, end in enumerate(bounds[1:]) if value < end)


def _bounds(weights: Sequence[float]) -> list[int]:
    """Where on the circle each source's part begins, and CIRCLE."""
    total = math.fsum(weights)
    ends = [round(math.fsum(weights[: source + 1]) / total * CIRCLE) for source in range(len(weights))]
    return [0, *ends[:-1], CIRCLE]


def _drawn(start: int, stop: int, bounds: Sequence[int], source: int, offset: int) -> int:
    """How many of the draws start..stop-1 the part `source` of the circle gets."""

    def below(draws: int, end: int) -> int:
        # One draw at place p counts floor(y / C) - floor((y - end) / C) = 1 when p < end; y is the place before modulo.
        return (
            _floor_sum(draws, CIRCLE, STRIDE, offset) - _floor_sum(draws, CIRCLE, STRIDE, offset + CIRCLE - end) + draws
        )

    low, high = bounds[source], bounds[source + 1]
    return below(stop, high) - below(stop, low) - below(start, high) + below(start, low)


def _floor_sum(count: int, modulus: int, stride: int, offset: int) -> int:
    """Sum of floor((stride * i + offset) / modulus) over i = 0..count-1, all not negative, in steps of Euclid's."""
    total = 0
    while count:
        total += (count - 1) * count // 2 * (stride // modulus) + count * (offset // modulus)
        stride, offset = stride % modulus, offset % modulus
        top = stride * count + offset
        count, offset = divmod(top, modulus)
        modulus, stride = stride, modulus
    return total
