"""One safetensors file in, its compressed twin out: tensor by tensor, verified from what was written, resumable.

Contract: at most two tensors in memory. While a file is made, `NAME.journal` among the notes says which tensors are
written, so that a run that was cut off goes on with the next one; when the file is verified, `NAME.json` takes its
place and the file is not touched again. A file that does not verify leaves neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ernie_elastic.compression import codec
from ernie_elastic.compression.container import (
    STREAM_PREFIX,
    Entry,
    SafetensorsFile,
    SafetensorsWriter,
    Stored,
    largest_stream,
)
from ernie_elastic.compression.format import Bytes, fits_a_stream
from ernie_elastic.errors import CheckpointError, FormatError
from ernie_elastic.stages import sha256_file, write_json

# ours: below this a stream's own header eats what it saves.
MIN_WEIGHTS = 512
COMPARE_BYTES = 1 << 22


@dataclass(frozen=True)
class Shard:
    """What compressing one file found; JSON-able. Sizes in bytes, hashes as hex, entropy in bits over all weights."""

    names: dict[str, str]  # stream key -> tensor name
    tensor_bytes: int
    stream_bytes: int
    weights: int  # of the streams
    entropy_bits: float
    kept: dict[str, int]  # dtype -> tensors that were left alone
    not_smaller: int  # of them: those whose streams would be no smaller
    total_weights: int
    source_sha256: str
    sha256: str
    fsync_seconds: float


@dataclass
class Journal:
    """The streams that a file has so far, and the candidates that do not get smaller; each line is one of them."""

    path: Path
    streams: list[dict[str, Any]] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """The journal of an earlier run, without a line that was cut off; an empty one when there is none."""
        journal, text = cls(path), ""
        with contextlib.suppress(FileNotFoundError, ValueError):
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                row = json.loads(line)
                journal.streams.append(row) if "size" in row else journal.misfits.append(row["name"])
        if text != journal.text():
            journal.write()
        return journal

    def text(self) -> str:
        """What the file holds."""
        rows = [{"name": name} for name in self.misfits] + self.streams
        return "".join(json.dumps(row) + "\n" for row in rows)

    def write(self) -> None:
        """All lines anew, or, on a full disk, those that were there (an OSError, which the output's maker explains)."""
        fresh = self.path.with_name(f".{self.path.name}.new")
        fresh.write_text(self.text(), encoding="utf-8")
        os.replace(fresh, self.path)

    def add(self, row: dict[str, Any]) -> None:
        """One stream more: name, size (bytes), weights, entropy_bits."""
        self.streams.append(row)
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def is_candidate(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is worth a stream and fits one: BF16, two dimensions or more, MIN_WEIGHTS or more."""
    return dtype == "BF16" and len(shape) >= 2 and math.prod(shape) >= MIN_WEIGHTS and fits_a_stream(name, shape)


def finished_shard(note: Path, written: Path) -> Shard | None:
    """The record of a file that an earlier run finished; None when there is none or the file is not there."""
    try:
        shard = Shard(**json.loads(note.read_text(encoding="utf-8")))
        header = len(SafetensorsFile(written).header)
        return shard if written.stat().st_size == header + shard.tensor_bytes else None
    except (OSError, ValueError, TypeError, FormatError):
        return None


def compress_shard(
    path: Path, written: Path, notes: Path, layout: str, first: int, hashing: Executor, step: Callable[[int], Any]
) -> Shard:
    """Compress the safetensors file `path` into `written`, verify it, and note it as done; or take it as done already.

    notes: directory of the journals. first: number of the file's first stream. hashing: runs the checksums of whole
    files beside the work. step is called with bytes of the source, once when encoded and once when verified. Raises
    CheckpointError for names that streams need, FormatError for a damaged source or a tensor that does not decode.
    """
    note = notes / f"{path.name}.json"
    shard = finished_shard(note, written)
    file = SafetensorsFile(path)
    if shard is not None:
        step(2 * file.data.size)
        return shard
    if any(entry.is_stream for entry in file.entries):
        raise CheckpointError(f"{path} holds names that begin with {STREAM_PREFIX!r}; rename those tensors first")
    source_hash = hashing.submit(sha256_file, path)
    journal = Journal.read(notes / f"{path.name}.journal")
    if not _write(file, written, layout, first, journal, step):
        # Some tensors do not get smaller, so the others get other numbers and places: once more, all known now.
        _write(file, written, layout, first, journal, lambda _: None)
    result = hashing.submit(_seal, written)
    names = {_key(first, k): row["name"] for k, row in enumerate(journal.streams)}
    try:
        verify(file, written, names, step)
    except FormatError:
        journal.path.unlink(missing_ok=True)  # there is none for a file without streams
        raise
    shard = _record(file, written, names, journal, source_hash, result)
    write_json(note, dataclasses.asdict(shard))
    journal.path.unlink(missing_ok=True)  # there is none for a file without streams
    return shard


def _key(first: int, k: int) -> str:
    return f"{STREAM_PREFIX}{first + k}"


def _seal(path: Path) -> tuple[str, float]:
    """SHA-256 of a written file, after the disk has it; and the seconds that the disk took."""
    digest, started = sha256_file(path), time.monotonic()
    with open(path, "rb") as opened:
        os.fsync(opened.fileno())
    return digest, time.monotonic() - started


def _write(
    file: SafetensorsFile, written: Path, layout: str, first: int, journal: Journal, step: Callable[[int], Any]
) -> bool:
    """Write what the journal does not have yet; False when tensors turned out not to get smaller: call once more."""
    fitting = [e for e in file.entries if is_candidate(e.name, e.dtype, e.shape) and e.name not in journal.misfits]
    names = {entry.name for entry in fitting}
    kept = [Stored(e.name, e.dtype, e.shape, e.end - e.begin, file.raw(e)) for e in file.entries if e.name not in names]
    largest = [largest_stream(_key(first, k), math.prod(entry.shape)) for k, entry in enumerate(fitting)]
    done = [Stored(_key(first, k), "U8", (row["size"],), row["size"]) for k, row in enumerate(journal.streams)]
    if [row["name"] for row in journal.streams] != [entry.name for entry in fitting[: len(done)]] or (
        done and not written.is_file()
    ):
        journal.streams, done = [], []
    step(file.data.size - sum(entry.end - entry.begin for entry in fitting[len(done) :]))
    misfits = []
    with SafetensorsWriter(written, kept, largest, done) as writer:
        for entry in fitting[len(done) :]:
            encoded = codec.encode_words(file.words(entry), entry.shape, entry.name, layout)
            size = encoded.stream.size
            if size >= entry.end - entry.begin:
                misfits.append(entry.name)
            elif not misfits:
                writer.append(Stored(_key(first, len(journal.streams)), "U8", (size,), size), encoded.stream)
                bits = encoded.entropy_bits * encoded.weights
                journal.add({"name": entry.name, "size": size, "weights": encoded.weights, "entropy_bits": bits})
            step(entry.end - entry.begin)
        if not misfits:
            writer.finish()
            return True
    journal.misfits += misfits
    journal.streams = []
    journal.write()
    return False


def verify(source: SafetensorsFile, written: Path, names: dict[str, str], step: Callable[[int], Any]) -> None:
    """Decode every tensor of the written file and compare it with the source; FormatError when one differs.

    names: stream key -> tensor name.
    """
    after = SafetensorsFile(written)
    found: dict[str, Entry] = {names.get(entry.name, entry.name): entry for entry in after.entries}
    for entry in source.entries:
        twin = found.pop(entry.name, None)
        if twin is None:
            raise FormatError(f"{written}: {entry.name!r} was not written; please report this defect")
        raw = after.raw(twin)
        if twin.is_stream:
            raw = codec.decode_words(raw, str(written), entry.name)[0].view(np.uint8)
        if not same_bytes(raw, source.raw(entry)):
            raise FormatError(f"{written}: {entry.name!r} does not decode to its source; please report this defect")
        step(raw.size)
    if found:
        raise FormatError(f"{written}: {sorted(found)[0]!r} is not in the source; please report this defect")


def same_bytes(a: Bytes, b: Bytes) -> bool:
    """Whether two u8 [bytes] are equal, eight bytes at a time and in pieces that stay in cache."""
    if a.size != b.size:
        return False
    whole = a.size - a.size % 8
    if not np.array_equal(a[whole:], b[whole:]):
        return False
    pieces = range(0, whole, COMPARE_BYTES)
    ends = [min(whole, begin + COMPARE_BYTES) for begin in pieces]
    return all(
        np.array_equal(a[begin:end].view(np.uint64), b[begin:end].view(np.uint64))
        for begin, end in zip(pieces, ends, strict=True)
    )


def _record(
    file: SafetensorsFile,
    written: Path,
    names: dict[str, str],
    journal: Journal,
    source_hash: Future[str],
    result: Future[tuple[str, float]],
) -> Shard:
    streams = set(names.values())
    kept = Counter(entry.dtype for entry in file.entries if entry.name not in streams)
    digest, fsync_seconds = result.result()
    return Shard(
        names=names,
        tensor_bytes=SafetensorsFile(written).data.size,
        stream_bytes=sum(row["size"] for row in journal.streams),
        weights=sum(row["weights"] for row in journal.streams),
        entropy_bits=sum(row["entropy_bits"] for row in journal.streams),
        kept=dict(sorted(kept.items())),
        not_smaller=len(journal.misfits),
        total_weights=sum(math.prod(entry.shape) for entry in file.entries),
        source_sha256=source_hash.result(),
        sha256=digest,
        fsync_seconds=fsync_seconds,
    )
