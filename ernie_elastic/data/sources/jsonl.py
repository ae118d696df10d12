"""Records of JSONL files: one line, one record, found by its byte offset and parsed when it is asked for.

Contract: as `base`. A line that is no JSON is a bad record like any other, and does not keep the file from being
opened. ours: not the datasets library, which wants one type for each column of all lines and stops at the first line
that has another. Blank lines are no records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_elastic.data.sources.base import Source, files_identity
from ernie_elastic.data.sources.rows import MESSAGES, NAMES, Columns, RowReader, kind_of_name
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, SegmentKind

BLOCK = 1 << 24  # bytes that are searched for line ends at once
LOOKED_AT = 100  # records that must hold something wanted in one of them


class JsonlSource(Source):
    """The lines of some JSONL files of one directory. Names are those of `datasets`: FILE, row N."""

    def __init__(
        self, path: Path, files: Sequence[Path], kinds: Sequence[SegmentKind], sample_rate: int | None
    ) -> None:
        """path: what the user named. Raises ConfigError when no record is there, or none of the first has a column of
        these kinds, DataError when a file cannot be read."""
        self.path, self.files, self.kinds = path, list(files), tuple(kinds)
        self.reader = RowReader(kinds, files[0].parent, sample_rate)
        spans = [_lines(file) for file in files]
        self.spans = np.concatenate(spans)  # int64 [records, 2]: first byte and byte behind the last
        self.firsts = np.cumsum([0, *(len(span) for span in spans)])  # number of each file's first record
        self._check()

    def _check(self) -> None:
        if not len(self):
            raise ConfigError(f"--data {self.path} holds no record: its files have no line")
        seen: dict[str, str] = {}
        for index in range(min(LOOKED_AT, len(self))):
            try:
                row = self._row(index)
            except DataError:
                continue
            if self._wanted(row):
                return
            seen |= {name: type(value).__name__ for name, value in row.items()}
        if seen:
            columns = ", ".join(f"{name} ({kind})" for name, kind in seen.items())
            names = ", ".join(name for kind in self.kinds for name in NAMES[kind])
            raise ConfigError(
                f"--data {self.path} has no column of {' or '.join(self.kinds)}: {columns}; name one of them "
                f"{MESSAGES}, {names}"
            )

    def __len__(self) -> int:
        return len(self.spans)

    def key(self, index: int) -> str:
        """The name that was given and the number of the record."""
        return f"{self.path.name}, row {index}"

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        return self.reader.sample(row, self._wanted(row), self.key(index))

    def identity(self) -> str:
        """Of the names, sizes and times of the files."""
        folder = self.files[0].parent
        return files_identity(folder, [file.relative_to(folder) for file in self.files])

    def _wanted(self, row: dict[str, Any]) -> Columns:
        """Columns of one row that count, in its order."""
        kinds = {name: kind_of_name(name) for name in row if name != MESSAGES}
        found: dict[str, SegmentKind | None] = {name: kind for name, kind in kinds.items() if kind in self.kinds}
        return found | {MESSAGES: None} if row.get(MESSAGES) is not None else found

    def _row(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        start, end = (int(value) for value in self.spans[index])
        name = self.key(index)
        try:
            with open(self.files[number], "rb") as file:
                file.seek(start)
                row = json.loads(file.read(end - start).decode("utf-8-sig"))
        except (OSError, ValueError) as error:  # a decoding error is a ValueError
            line = f"{self.files[number].name}, byte {start}"
            raise DataError(f"{name} ({line}) cannot be read as JSON ({error}); repair it or leave it out") from error
        if not isinstance(row, dict):
            raise DataError(f"{name} is a JSON {type(row).__name__}; expected an object with named columns")
        return row


def _lines(path: Path) -> np.ndarray:
    """First byte and byte behind the last of every line that is not blank: int64 [lines, 2]."""
    try:
        size = path.stat().st_size
        ends = np.concatenate([*_line_ends(path), np.asarray([size], dtype=np.int64)])
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1] + 1])
    spans = np.stack([starts, ends], axis=1)
    spans = spans[spans[:, 1] > spans[:, 0]]
    short = np.flatnonzero(spans[:, 1] - spans[:, 0] <= 2)
    if len(short):  # a blank of one or two bytes, such as the line end of another system; longer ones are bad records
        with open(path, "rb") as file:
            blank = [row for row in short if not _read(file, *spans[row]).strip()]
        spans = np.delete(spans, blank, axis=0)
    return spans


def _read(file: Any, start: int, end: int) -> bytes:
    file.seek(int(start))
    return file.read(int(end - start))


def _line_ends(path: Path) -> Iterator[np.ndarray]:
    offset = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10).astype(np.int64) + offset
            offset += len(block)
