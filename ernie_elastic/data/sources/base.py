"""What every source of records is and shares: a sequence of samples behind an index, segments of what a file holds.

Contract: opening reads no media; record i is the same at every call and in every process; one that cannot be read is a
DataError that names it. Media come as they are stored, at their own size, sounds at the rate that is asked for.
ours: the report does not say where records come from.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from ernie_elastic.data.media.decoding import read_audio, read_image, read_video
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, Segment, SegmentKind, SegmentRole

# Tasks of samples that no checker knows.
TASK = "data"  # files, and columns of a row, which have no roles
MESSAGES_TASK = "messages"  # documents, whose parts have their roles and order
SUFFIXES: dict[SegmentKind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".ogv", ".apng", ".gif"),
    "audio": (".wav", ".aiff", ".aif", ".flac", ".ogg", ".mp3"),
    "text": (".txt", ".md", ".rst"),
}
SPLIT_BITS = 64


class Source(ABC):
    """Records behind an index; picklable, so that processes may share the work."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """A name of record `index` that does not depend on where the source lies."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The record. Raises DataError, which names it, when it cannot be read."""

    @abstractmethod
    def identity(self) -> str:
        """Hex hash that changes when records come, go or move, or when one of the source's own files is written anew;
        files that a dataset's rows name are not looked at."""

    def split(self, share: float, held_out: bool) -> Subset:
        """The records whose names' hash falls into the last `share`, or (held_out False) all others.

        A file stays on its side when others come or go; a dataset's row, which is named by its number, when later ones
        do.
        """
        chosen = [i for i in range(len(self)) if (_place(self.key(i)) < share) == held_out]
        return Subset(self, chosen)


class Subset(Source):
    """Some records of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        """The record's key in the whole source."""
        return self.source.key(self.indices[index])

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def identity(self) -> str:
        """Of the whole source and of the choice."""
        return hashlib.sha256(f"{self.source.identity()} {self.indices}".encode()).hexdigest()


def read_segment(
    kind: SegmentKind, content: Path | bytes | str, name: str, sample_rate: int | None, role: SegmentRole = "target"
) -> Segment:
    """One segment: a picture uint8 [H, W, 3], a clip uint8 [F, H, W, 3], a sound float32 [L], or text.

    content: a file, its bytes, or (for text) the text itself. name: what errors call it. Raises DataError when it
    cannot be read, ConfigError for a sound without sample_rate.
    """
    if kind == "text":
        return Segment("text", role, text=content if isinstance(content, str) else _text(content, name))
    if isinstance(content, str):
        raise DataError(f"{name}: a {kind} is a file or its bytes, not a text")
    if kind == "image":
        return Segment("image", role, array=read_image(content, name))
    if kind == "video":
        return Segment("video", role, array=read_video(content, name=name))
    if sample_rate is None:
        raise ConfigError(f"{name}: sounds are read at a sample rate, and none was given")
    return Segment("audio", role, array=read_audio(content, sample_rate, name))


def files_identity(folder: Path, files: Iterable[Path]) -> str:
    """Hex hash of the names below `folder`, the sizes and the times of writing of its `files`, in this order."""
    found = hashlib.sha256()
    for path in files:
        try:
            state = (folder / path).stat()
        except OSError as error:
            raise DataError(f"{folder / path} cannot be read: {error.strerror or error}") from error
        found.update(os.fsencode(path) + f"\0{state.st_size} {state.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _text(content: Path | bytes, name: str) -> str:
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is no UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}; save it as UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{name} cannot be used: it holds no text; leave it out")
    return text


def _place(key: str) -> float:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=SPLIT_BITS // 8).digest()
    return int.from_bytes(digest, "big") / 2**SPLIT_BITS
