"""Safetensors files, read and written tensor by tensor, with their headers kept verbatim.

Contract: a file is checked before anything in it is used; nothing larger than one tensor is held in memory; the same
tensors in the same order always give the same bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ernie_elastic.compression.format import Bytes
from ernie_elastic.errors import CheckpointError, FormatError

MAX_HEADER = 100_000_000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
STREAM_PREFIX = "tbe__"


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors header: begin and end count from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def is_stream(self) -> bool:
        """True for a compressed tensor."""
        return self.name.startswith(STREAM_PREFIX)


class SafetensorsFile:
    """A checked, memory-mapped safetensors file. `header` is its length and JSON header verbatim."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise FormatError(f"{path}: {size} bytes with a header of {length} is no safetensors file")
            self.header = head + stream.read(length)
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.data = np.frombuffer(self._map, dtype=np.uint8)[8 + length :]
        self.metadata, self.entries = parse_header(self.header[8:], self.data.size, str(path))

    def raw(self, entry: Entry) -> Bytes:
        """The bytes u8 [bytes] of one tensor, a read-only view of the file."""
        return self.data[entry.begin : entry.end]

    def words(self, entry: Entry) -> npt.NDArray[np.uint16]:
        """The BF16 words uint16 [weights] of one tensor, a read-only view of the file where alignment allows it."""
        return np.require(self.raw(entry).view("<u2"), requirements="A")


def parse_header(text: bytes, data_size: int | None, where: str) -> tuple[dict[str, str], list[Entry]]:
    """Metadata and entries in data order. FormatError unless the entries fill the data without overlap or hole.

    data_size: bytes of the data (None = not known here).
    """
    try:
        table = json.loads(text)
        metadata = table.pop("__metadata__", {}) or {}
        entries = [
            Entry(name, item["dtype"], tuple(map(_whole, item["shape"])), *map(_whole, item["data_offsets"]))
            for name, item in table.items()
        ]
        bits = [BITS[entry.dtype] * math.prod(entry.shape) for entry in entries]
        "".join(table).encode()  # half of a surrogate pair is no name: safetensors refuses it too
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where}: its safetensors header is unreadable ({error}); the file is damaged") from error
    for entry, count in zip(entries, bits, strict=True):
        if min((*entry.shape, 0)) < 0 or 8 * (entry.end - entry.begin) != count:
            raise FormatError(
                f"{where}: {entry.name!r} {entry.dtype} {entry.shape} takes {count / 8} bytes, its offsets say "
                f"{entry.end - entry.begin}; the file is damaged"
            )
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            raise FormatError(f"{where}: {entry.name!r} begins at {entry.begin}, expected {at}; the file is damaged")
        at = entry.end
    if data_size is not None and at != data_size:
        raise FormatError(f"{where}: its tensors take {at} bytes, the file holds {data_size}; it is damaged")
    return metadata, entries


def _whole(number: Any) -> int:
    """A JSON number that is whole as written; 1.0, 1e999 and true are not."""
    if type(number) is not int:
        raise ValueError(f"{number!r} is no whole number")
    return number


@dataclass(frozen=True)
class Stored:
    """One tensor to be written: its bytes are `source` (u8 [size]), or come later (None)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    source: Bytes | None = None


def largest_stream(key: str, weights: int) -> Stored:
    """The most that the stream `key` of a BF16 tensor takes in a file: it is kept only when it gets smaller."""
    return Stored(key, "U8", (2 * weights,), 2 * weights)


class SafetensorsWriter:
    """Writes one file straight to its place: known tensors first, then others whose sizes turn out one by one.

    kept: by falling element size, so that every tensor is aligned. largest: the most that each of the others can take,
    which sets the room for the header, filled up with spaces. appended: those that an earlier writer, cut off, wrote
    already. The file is whole after `finish`.
    """

    def __init__(self, path: Path, kept: list[Stored], largest: list[Stored], appended: Iterable[Stored] = ()) -> None:
        self.kept = sorted(kept, key=lambda item: -BITS[item.dtype])  # stable: the order of the source within a size
        self.items = list(appended)
        total = sum(item.size for item in (*kept, *largest))
        room = len(_header_text([*self.kept, *largest], total))
        self.room = room + -room % 8
        end = 8 + self.room + sum(item.size for item in (*self.kept, *self.items))
        self._file: BinaryIO = open(path, "r+b" if self.items else "wb")  # noqa: SIM115 - __exit__ closes it
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, item: Stored, data: Bytes) -> None:
        """Write the next tensor: u8 [item.size]."""
        self._file.write(np.ascontiguousarray(data).data)
        self._file.flush()  # whoever notes it as written must not lose it when the process dies
        self.items.append(item)

    def finish(self) -> None:
        """Write the header and the kept tensors."""
        text = _header_text([*self.kept, *self.items])
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self.room) + text + b" " * (self.room - len(text)))
        for item in self.kept:
            assert item.source is not None
            self._file.write(np.ascontiguousarray(item.source).data)
        self._file.flush()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _header_text(items: list[Stored], end: int | None = None) -> bytes:
    """The JSON header of tensors that lie one after the other; end: stands for every number of bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in items:
        offsets = [at, at + item.size] if end is None else [end, end]
        table[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets}
        at += item.size
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()


def read_index(path: Path) -> dict[str, Any]:
    """A `*.safetensors.index.json`. CheckpointError when it is damaged."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(file, str) for file in index["weight_map"].values()):
            raise ValueError("weight_map must map names to files")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); make the directory anew") from error
    return index


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files at the top of a directory, in name order; CheckpointError when there is none or one lacks.

    Every file that an index names must be there.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; expected a Hugging Face model directory")
    files = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors file; save the model with save_pretrained first")
    for path in sorted(directory.glob("*.safetensors.index.json")):
        for name in sorted(set(read_index(path)["weight_map"].values())):
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory} is damaged: {name}, named by {path.name}, is missing; fetch all")
    return files


def model_bytes(directory: Path | str) -> int:
    """Bytes of the weight safetensors of a directory, headers included. CheckpointError when there are none."""
    return sum(path.stat().st_size for path in weight_files(Path(directory)))
