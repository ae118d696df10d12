"""Records of Hugging Face datasets: saved ones, and Parquet, JSONL and CSV files.

Contract: as `sources`. Media columns are never decoded by the library (which needs torchcodec for sounds and videos):
its bytes or paths go to our readers. Relative paths are relative to the file that names them. Nothing is fetched from a
network. The library keeps its Arrow copy of Parquet, JSONL and CSV files in its own cache (HF_DATASETS_CACHE).
ours: the report does not say how records are stored.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets

from ernie_elastic.data.sources import DATASET_SUFFIXES, TASK, Source, read_segment
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, Segment, SegmentKind, SegmentRole
from ernie_elastic.stages import say

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
# Column names that say their kind when the column holds paths or text; a media feature says it by itself.
NAMES: dict[SegmentKind, tuple[str, ...]] = {
    "image": ("image", "images", "img", "picture", "photo"),
    "audio": ("audio", "sound", "speech", "wav"),
    "video": ("video", "clip"),
    "text": ("text", "content", "caption", "sentence", "transcription"),
}
PARTS: dict[str, SegmentKind] = {
    "text": "text", "image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio",
    "input_audio": "audio", "video": "video", "video_url": "video",
}  # fmt: skip
MESSAGES = "messages"
MEDIA: dict[type[Any], SegmentKind] = {datasets.Image: "image", datasets.Audio: "audio", datasets.Video: "video"}
LISTS = (datasets.List, datasets.LargeList)


class DatasetSource(Source):
    """Rows of a dataset; a row's media and texts of the wanted kinds are the segments of its sample, column by column.

    A column `messages` has typed parts ({"type": "image", "image": ...} or {"type": "image_url", "image_url": {"url":
    ...}}); what the assistant says is the target, all else is input.
    """

    def __init__(
        self, path: Path, files: Sequence[Path], kinds: Sequence[SegmentKind], sample_rate: int | None
    ) -> None:
        """files: of one type; none for a dataset that `save_to_disk` wrote. Raises ConfigError when it cannot be opened
        or no column is of these kinds."""
        self.path, self.kinds, self.sample_rate = path, tuple(kinds), sample_rate
        self.folder = files[0].parent if files else path
        self.table = _saved(path) if not files else _from_files(path, files)
        self.columns = self._columns()
        # Only these: a row gives all columns, and the library would decode those that nobody asked for.
        table = self.table.select_columns(list(self.columns))
        named = [name for name in self.columns if name != MESSAGES]
        listed = [name for name in named if isinstance(table.features[name], LISTS)]
        self.size = len(table)
        # As stored: casting lists of media would copy the whole dataset into the cache.
        self.listed = table.select_columns(listed).with_format("arrow") if listed else None
        self.table = table.remove_columns(listed) if listed else table
        for name, feature in self.table.features.items():
            if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
                self.table = self.table.cast_column(name, type(feature)(decode=False))

    def _columns(self) -> dict[str, SegmentKind | None]:
        """Wanted columns and their kinds; None for messages."""
        found: dict[str, SegmentKind | None] = {}
        for name, feature in self.table.features.items():
            if isinstance(feature, LISTS):
                feature = feature.feature
            kind = MEDIA.get(type(feature))
            if kind is None and _holds_content(feature):
                kind = next((kind for kind, names in NAMES.items() if name.lower() in names), None)
            if kind in self.kinds:
                found[name] = kind
        if MESSAGES in self.table.features:
            found[MESSAGES] = None
        if not found:
            columns = ", ".join(f"{name} ({_short(feature)})" for name, feature in self.table.features.items())
            names = ", ".join(name for kind in self.kinds for name in NAMES[kind])
            raise ConfigError(
                f"--data {self.path} has no column of {' or '.join(self.kinds)}: {columns}; name one of them "
                f"{MESSAGES}, {names}"
            )
        return found

    def __len__(self) -> int:
        return self.size

    def key(self, index: int) -> str:
        """The dataset's name and the row."""
        return f"{self.path.name}, row {index}"

    def __getitem__(self, index: int) -> Sample:
        name = self.key(index)
        row = self._row(index, name)
        segments: list[Segment] = []
        for column, kind in self.columns.items():
            if kind is None:
                segments += self._messages(row[column], name)
                continue
            values = row[column] if isinstance(row[column], list) else [row[column]]
            for value in values:
                if value is not None:
                    segments.append(self._segment(kind, value, f"{name}, column {column}", "target"))
        if not segments:
            raise DataError(f"{name} holds no {' or '.join(self.kinds)}; leave it out")
        return Sample(name, TASK, tuple(segments))

    def _row(self, index: int, name: str) -> dict[str, Any]:
        try:
            row = dict(self.table[index]) if self.table.column_names else {}
            if self.listed is not None:
                row |= self.listed.select([index])[:].to_pylist()[0]
        except IndexError:
            raise
        except Exception as error:  # the library raises many kinds, and bytes that are no UTF-8 come up here
            raise DataError(
                f"{name} cannot be read from the dataset ({_line(error)}); repair it or leave it out"
            ) from error
        return row

    def _messages(self, messages: Any, name: str) -> Iterator[Segment]:
        if not isinstance(messages, list):
            raise DataError(f"{name}: messages is {type(messages).__name__}; expected a list of messages")
        for number, message in enumerate(messages):
            where = f"{name}, message {number}"
            if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
                raise DataError(f"{where} has no content that is a text or a list of parts")
            role: SegmentRole = "target" if message.get("role") == "assistant" else "input"
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = PARTS.get(part.get("type", "")) if isinstance(part, dict) else None
                if kind is None:
                    raise DataError(f"{where} has a part {str(part)[:80]}; its type must be one of {', '.join(PARTS)}")
                if kind in self.kinds:
                    yield self._segment(kind, _content_of(part, where), where, role)

    def _segment(self, kind: SegmentKind, value: Any, name: str, role: SegmentRole) -> Segment:
        content: Path | bytes | str
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            content = data if data is not None else self._located(path, name)
        elif kind == "text":
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{name} cannot be used: it holds no text; leave it out")
            content = value
        else:
            content = value if isinstance(value, bytes) else self._located(value, name)
        return read_segment(kind, content, name, self.sample_rate, role)

    def _located(self, value: Any, name: str) -> Path | bytes:
        """The file or bytes that a path or URL means."""
        if not isinstance(value, str) or not value:
            raise DataError(f"{name} has neither bytes nor a path")
        if value.startswith("data:"):
            return _base64(value.partition(",")[2], name)
        if "://" in value and not value.startswith("file://"):
            raise DataError(f"{name} lies at {value[:80]}; nothing is fetched: copy it and give its path")
        try:
            path = unquote(urlsplit(value).path) if value.startswith("file://") else value
        except ValueError as error:
            raise DataError(f"{name} lies at {value[:80]!r}, which is no URL ({error}); give its path") from error
        if "\0" in path:
            raise DataError(f"{name} has the path {path[:80]!r}, which has a null character; give its path")
        return self.folder / path


def _content_of(part: dict[str, Any], name: str) -> Any:
    """A typed part's text, path, URL, bytes or {bytes, path}."""
    value = part.get(part["type"])
    if not isinstance(value, dict):
        return value
    if value.get("url") is not None:
        return value["url"]
    # What chat APIs call input_audio: base64 without the head of a data URL.
    return _base64(value["data"], name) if isinstance(value.get("data"), str) else value


def _base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{name} has data that is no base64 ({error}); write it anew") from error


def _saved(path: Path) -> datasets.Dataset:
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds
        raise ConfigError(f"--data {path} is no whole saved dataset ({_line(error)})") from error
    if isinstance(found, datasets.Dataset):
        return found
    if "train" in found:
        say(f"{path}: of its splits {', '.join(found)} train is read")
        return found["train"]
    raise ConfigError(f"--data {path} has the splits {', '.join(found)}; give the directory of one of them")


def _from_files(path: Path, files: Sequence[Path]) -> datasets.Dataset:
    folders = sorted({file.parent.as_posix() for file in files})
    if len(folders) > 1:
        raise ConfigError(f"--data {path} holds dataset files in {folders[0]} and {folders[1]}; give one directory")
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1 or not suffixes <= set(DATASET_SUFFIXES):
        raise ConfigError(f"--data {path} holds files of the types {', '.join(sorted(suffixes))}; give one of them")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            BUILDERS[files[0].suffix.lower()], data_files=[str(file) for file in files], split="train"
        )
    except Exception as error:  # the library raises many kinds
        raise ConfigError(f"--data {path} cannot be read as {files[0].suffix[1:]} ({_line(error)})") from error
    finally:
        datasets.enable_progress_bars()


def _line(error: BaseException) -> str:
    """What went wrong: the first cause, since the library wraps it in words that say nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _holds_content(feature: Any) -> bool:
    """True for a column of texts or paths, and for one of {bytes, path} that lost its media type."""
    if isinstance(feature, dict):
        return "bytes" in feature or "path" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _short(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__.lower()
