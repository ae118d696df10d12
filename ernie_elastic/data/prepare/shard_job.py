"""One shard of `prepare-data`: some records to one file and one note.

Contract: a shard and its note are functions of the records, the tokenizers and the settings alone. Each is written
whole or not at all, the note last: a shard without a note is made anew.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ernie_elastic.data.groups.layout import Layout, document_length, part_length
from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.shards import shard_bytes
from ernie_elastic.data.prepare.documents import assign_roles, fit_sample, pieces_of
from ernie_elastic.data.prepare.records import WORLD
from ernie_elastic.data.prepare.tokenise import Tokenizers, check_sample, plain_arithmetic, tokenise
from ernie_elastic.data.sources.base import Source
from ernie_elastic.errors import DataError
from ernie_elastic.schema import Sample, Segment
from ernie_elastic.stages import sha256_file, write_atomic, write_json

CHUNK_BYTES, CHUNK_RECORDS = 128 << 20, 256  # of media that are held and tokenised at once
# Why records are rejected, as the report counts them.
UNREADABLE, REFUSED, TOO_LONG = "cannot be read", "the tokenizers cannot read it", "too long for a row"
Reject = tuple[str, str]  # why, and the line that names the record


@dataclass(frozen=True)
class ShardSettings:
    """What decides a shard's bytes beside its records and the tokenizers; the fields are those of `PrepareConfig`."""

    data: str
    seed: int
    row_length: int
    row_frames: int
    sound_features: bool
    text_dropout: float
    understanding_share: float
    video_frames: int


@dataclass(frozen=True)
class Job:
    """The records start..stop-1, and where their shard and its note go."""

    path: Path
    note: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Note:
    """What became of a shard's records.

    lengths, frames: positions, and frames that are read, of each document. records: those that gave documents. tokens:
    text tokens, frames and audio steps by kind and role. positions: by kind, markers counted with their medium.
    sha256: hex, of the file.
    """

    lengths: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    records: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    sha256: str = ""

    @staticmethod
    def read(path: Path) -> Note:
        """The note of a finished shard."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Note(**{**fields, "rejects": [(str(why), str(line)) for why, line in fields["rejects"]]})


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of a source's records; picklable, so that a worker makes the same ones."""

    source: Source
    tokenizers_dir: str
    layout: Layout
    settings: ShardSettings

    def load(self) -> Tokenizers:
        """The tokenizers of the directory. Raises CheckpointError."""
        return Tokenizers.load(self.tokenizers_dir)

    def make(self, job: Job, tokenizers: Tokenizers, done: Callable[[int], None]) -> None:
        """Write a job's shard, then its note; done is told how many more records are behind it."""
        documents: list[list[Tokens]] = []
        rejects: list[Reject] = []
        records = 0
        with plain_arithmetic():
            for samples, size in self._chunks(job, tokenizers, rejects):
                for sample, parts in self._tokenised(samples, tokenizers, rejects):
                    pieces = self._pieces(sample, parts, rejects)
                    documents += pieces
                    records += bool(pieces)
                done(size)
        write_atomic(job.path, shard_bytes(documents, self.settings.sound_features))
        tokens: Counter[str] = Counter()
        positions: Counter[str] = Counter()
        for document in documents:
            positions["text"] += 1  # BOS
            for part in document:
                tokens[f"{part.kind}_{part.role}"] += len(part)
                positions[part.kind] += part_length(part, self.layout)
        lengths = [document_length(document, self.layout) for document in documents]
        frames = [read_frames(document) for document in documents]
        digest = sha256_file(job.path)
        write_json(job.note, Note(lengths, frames, records, dict(tokens), dict(positions), rejects, digest))

    def _chunks(self, job: Job, tokenizers: Tokenizers, rejects: list[Reject]) -> Iterator[tuple[list[Sample], int]]:
        """(samples, how many records they were chosen from), as many as are held at once."""
        samples: list[Sample] = []
        held, first = 0, job.start
        for number in range(job.start, job.stop):
            sample = self._sample(number, tokenizers, rejects)
            if sample is not None:
                samples.append(sample)
                held += sum(_bytes(segment) for segment in sample.segments)
            if held >= CHUNK_BYTES or len(samples) == CHUNK_RECORDS:
                yield samples, number + 1 - first
                samples, held, first = [], 0, number + 1
        yield samples, job.stop - first

    def _sample(self, number: int, tokenizers: Tokenizers, rejects: list[Reject]) -> Sample | None:
        """A record as the tokenizers read it, or None when it is rejected."""
        why, settings = UNREADABLE, self.settings
        try:
            sample = self.source[number]
            why = REFUSED
            if settings.data != WORLD:
                size = tokenizers.visual.config.image_size
                sample = fit_sample(sample, size, settings.video_frames, self.layout.frames_per_token)
                sample = assign_roles(sample, settings.understanding_share, settings.seed)
            check_sample(sample, tokenizers)
        except DataError as error:
            rejects.append((why, _named(error, self.source.key(number))))
            return None
        return sample

    def _tokenised(
        self, samples: list[Sample], tokenizers: Tokenizers, rejects: list[Reject]
    ) -> Iterator[tuple[Sample, list[Tokens]]]:
        dropout, seed = self.settings.text_dropout, self.settings.seed
        try:
            yield from zip(samples, tokenise(samples, tokenizers, dropout, seed), strict=True)
            return
        except DataError:  # of one record among them; which one, each alone will show
            pass
        for sample in samples:
            try:
                (parts,) = tokenise([sample], tokenizers, dropout, seed)
            except DataError as error:
                rejects.append((REFUSED, _named(error, sample.key)))
            else:
                yield sample, parts

    def _pieces(self, sample: Sample, parts: list[Tokens], rejects: list[Reject]) -> list[list[Tokens]]:
        limit, frames = self.settings.row_frames, read_frames(parts)
        try:
            if limit and frames > limit:
                raise DataError(
                    f"record {sample.key} has {frames} frames to read, a row takes {limit}; raise --row-frames, or "
                    "leave it out"
                )
            return pieces_of(parts, self.layout, self.settings.row_length, sample.key)
        except DataError as error:
            rejects.append((TOO_LONG, str(error)))
            return []


def read_frames(parts: list[Tokens]) -> int:
    """Frames of pictures and clips that a document reads: what the vision tower has to carry for it."""
    return sum(len(part) for part in parts if part.pixels is not None)


def _bytes(segment: Segment) -> int:
    return len(segment.text or "") + (0 if segment.array is None else segment.array.nbytes)


def _named(error: Exception, key: str) -> str:
    """One line that names the record."""
    text = " ".join(str(error).split())
    return text if key in text else f"record {key}: {text}"
