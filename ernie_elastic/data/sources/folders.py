"""Records of a directory of files: one file, one record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ernie_elastic.data.sources.base import SUFFIXES, TASK, Source, files_identity, read_segment
from ernie_elastic.schema import Sample, SegmentKind


class FolderSource(Source):
    """The files of a directory and the directories in it, in the order of their names; hidden ones are left out."""

    def __init__(
        self, directory: Path, kinds: Sequence[SegmentKind], sample_rate: int | None, only: Path | None = None
    ) -> None:
        """kinds: of the files that count. only: the one file that does.

        A GIF or APNG is a video where videos are wanted, else a picture.
        """
        self.directory, self.sample_rate = directory, sample_rate
        suffixes = {suffix: kind for kind in kinds for suffix in SUFFIXES[kind]}
        if "image" in kinds and "video" not in kinds:
            suffixes |= {".gif": "image", ".apng": "image"}
        paths = directory.rglob("*") if only is None else [only]
        found = [path for path in paths if path.suffix.lower() in suffixes and path.is_file()]
        relative = [path.relative_to(directory) for path in found]
        shown = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
        self.files = [(path, suffixes[path.suffix.lower()]) for path in sorted(shown)]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        """The file's path below the directory; bytes of it that are no UTF-8 as \\xff, so that it can be written."""
        return os.fsencode(self.files[index][0].as_posix()).decode(errors="backslashreplace")

    def __getitem__(self, index: int) -> Sample:
        (path, kind), name = self.files[index], self.key(index)
        return Sample(name, TASK, (read_segment(kind, self.directory / path, name, self.sample_rate),))

    def identity(self) -> str:
        """Of the names, sizes and times of the files."""
        return files_identity(self.directory, [path for path, _ in self.files])
