"""Records of WebDataset tars: the files of one name before its first dot are one record, found by their byte offsets.

Contract: as `base`. Opening reads the headers of all members and no content. A record's media and texts come in the
order of the members; texts of a .json member count when the record has no text file, and its messages are the document
(their parts without content stand for the media). Compressed tars have no offsets
and are refused.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ernie_elastic.data.sources.base import SUFFIXES, TASK, Source, files_identity, read_segment
from ernie_elastic.data.sources.rows import MESSAGES, RowReader, kind_of_name
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, Segment, SegmentKind

ROW_SUFFIX = ".json"


class Member(NamedTuple):
    """One file inside a tar: its name behind the record's, and where its bytes lie."""

    ending: str
    start: int
    size: int

    @property
    def suffix(self) -> str:
        """Its last suffix in small letters, such as .png."""
        return PurePosixPath(f"x{self.ending}").suffix.lower()


class TarSource(Source):
    """Tars, in the order of their names; records in the order in which they begin."""

    def __init__(
        self, path: Path, files: Sequence[Path], kinds: Sequence[SegmentKind], sample_rate: int | None
    ) -> None:
        """path: what the user named. Raises ConfigError for a tar that is damaged or compressed, and when no member is
        of these kinds."""
        self.path, self.files, self.kinds, self.sample_rate = path, list(files), tuple(kinds), sample_rate
        self.suffixes: dict[str, SegmentKind] = {suffix: kind for kind in kinds for suffix in SUFFIXES[kind]}
        if "image" in kinds and "video" not in kinds:
            self.suffixes |= {".gif": "image", ".apng": "image"}
        self.records: list[tuple[int, str, tuple[Member, ...]]] = []  # (tar, name of the record, members)
        for number, file in enumerate(self.files):
            self.records += [(number, name, tuple(members)) for name, members in self._index(file).items()]
        if not self.records:
            known = " ".join([*self.suffixes, ROW_SUFFIX])
            raise ConfigError(f"--data {path} holds no {' or '.join(kinds)}: no member of its tars ends in {known}")

    def _index(self, file: Path) -> dict[str, list[Member]]:
        found: dict[str, list[Member]] = {}
        try:
            with tarfile.open(file, "r:") as tar:
                for entry in tar:
                    path = PurePosixPath(entry.name)
                    base, dot, ending = path.name.partition(".")
                    member = Member(f"{dot}{ending}", entry.offset_data, entry.size)
                    known = member.suffix in self.suffixes or member.suffix == ROW_SUFFIX
                    if not entry.isfile() or not base or not known:
                        continue
                    found.setdefault((path.parent / base).as_posix(), []).append(member)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ConfigError(
                f"--data {file} cannot be read as a tar without compression ({error}); copy it anew, or decompress it"
            ) from error
        # A .json alone is a record only where it may hold texts or messages.
        return {name: members for name, members in found.items() if self._counts(members)}

    def _counts(self, members: list[Member]) -> bool:
        return "text" in self.kinds or any(member.suffix != ROW_SUFFIX for member in members)

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The tar's name and the record's in it."""
        number, name, _ = self.records[index]
        return f"{self.files[number].name}/{name}"

    def __getitem__(self, index: int) -> Sample:
        number, _, members = self.records[index]
        name = self.key(index)
        rows = [self._row(number, member, name) for member in members if member.suffix == ROW_SUFFIX]
        found = [member for member in members if member.suffix != ROW_SUFFIX]
        messages = next((row[MESSAGES] for row in rows if row.get(MESSAGES) is not None), None)
        if messages is not None:
            return self._document(messages, [(m, self._read(number, m, name)) for m in found], name)
        segments = []
        for member in found:
            content = self._read(number, member, name)
            kind = self.suffixes[member.suffix]
            segments.append(read_segment(kind, content, f"{name}{member.ending}", self.sample_rate))
        if "text" in self.kinds and not any(segment.kind == "text" for segment in segments):
            texts = [value for row in rows for key, value in row.items() if kind_of_name(key) == "text"]
            segments += [Segment("text", "target", text=text) for text in texts if isinstance(text, str)]
        if not segments:
            raise DataError(f"{name} holds no {' or '.join(self.kinds)}; leave it out")
        return Sample(name, TASK, tuple(segments))

    def _document(self, messages: Any, media: list[tuple[Member, bytes]], name: str) -> Sample:
        """Messages whose parts without content stand for the record's media, in the order of the members."""
        row: dict[str, Any] = {MESSAGES: messages}
        columns: dict[str, SegmentKind | None] = {MESSAGES: None}
        for member, content in media:
            kind = self.suffixes[member.suffix]
            columns[kind] = kind
            row.setdefault(kind, []).append(content)
        return RowReader(self.kinds, self.files[0].parent, self.sample_rate).sample(row, columns, name)

    def identity(self) -> str:
        """Of the names, sizes and times of the tars."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return files_identity(folder, [file.relative_to(folder) for file in self.files])

    def _row(self, number: int, member: Member, name: str) -> dict[str, Any]:
        try:
            row = json.loads(self._read(number, member, name))
        except ValueError as error:
            raise DataError(f"{name}{member.ending} cannot be read as JSON ({error}); repair it") from error
        if not isinstance(row, dict):
            raise DataError(f"{name}{member.ending} is a JSON {type(row).__name__}; expected an object")
        return row

    def _read(self, number: int, member: Member, name: str) -> bytes:
        file = self.files[number]
        try:
            with open(file, "rb") as stream:
                stream.seek(member.start)
                data = stream.read(member.size)
        except OSError as error:
            raise DataError(f"{name}{member.ending} cannot be read: {error.strerror or error}") from error
        if len(data) != member.size:
            raise DataError(
                f"{name}{member.ending} is cut short: {file.name} has {len(data)} of its {member.size} bytes; copy it "
                "anew"
            )
        return data
