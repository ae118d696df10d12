"""One row of a dataset as a sample: which of its columns count, typed parts of messages, and where media lie.

Contract: a row is a dict of JSON-like values (bytes too). Relative paths are relative to the file that names them.
Nothing is fetched from a network. What cannot be read is a DataError that names the row.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ernie_elastic.data.sources.base import MESSAGES_TASK, TASK, read_segment
from ernie_elastic.errors import DataError
from ernie_elastic.schema import Sample, Segment, SegmentKind, SegmentRole

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
# Wanted columns and their kinds; None for messages.
Columns = Mapping[str, SegmentKind | None]
# Media of other columns, which parts without content of their own stand for, each with its column's name.
Stock = Mapping[SegmentKind, deque[tuple[Any, str]]]


def kind_of_name(column: str) -> SegmentKind | None:
    """What a column of this name holds."""
    return next((kind for kind, names in NAMES.items() if column.lower() in names), None)


class RowReader:
    """Makes samples of rows. Messages are a row's document where it has them; else its columns are, in their order.

    Typed parts: {"type": "image", "image": ...}, {"type": "image_url", "image_url": {"url": ...}}, or {"type": "image"}
    for the next medium of the row's other columns. What the assistant says is the target, all else is input; messages
    without roles, and a list of parts where messages are wanted, are interleaved documents: all of it is target.
    """

    def __init__(self, kinds: Sequence[SegmentKind], folder: Path, sample_rate: int | None) -> None:
        """folder: what relative paths are relative to. sample_rate: Hz of sounds."""
        self.kinds, self.folder, self.sample_rate = tuple(kinds), folder, sample_rate

    def sample(self, row: Mapping[str, Any], columns: Columns, name: str) -> Sample:
        """The row's sample: pictures uint8 [H, W, 3], clips uint8 [F, H, W, 3], sounds float32 [L], texts."""
        if row.get(MESSAGES) is not None and MESSAGES in columns:
            segments, task = self._document(row, columns, name), MESSAGES_TASK
        else:
            segments, task = list(self._columns(row, columns, name)), TASK
        if not segments:
            raise DataError(f"{name} holds no {' or '.join(self.kinds)}; leave it out")
        return Sample(name, task, tuple(segments))

    def _columns(self, row: Mapping[str, Any], columns: Columns, name: str) -> Iterator[Segment]:
        for column, kind in columns.items():
            if kind is not None:
                for value in _values(row.get(column)):
                    yield self._segment(kind, value, f"{name}, column {column}", "target")

    def _document(self, row: Mapping[str, Any], columns: Columns, name: str) -> list[Segment]:
        stock: dict[SegmentKind, deque[tuple[Any, str]]] = {kind: deque() for kind in self.kinds}
        for column, kind in columns.items():
            if kind is not None and kind != "text":
                stock[kind].extend((value, column) for value in _values(row.get(column)))
        segments = list(self._messages(row[MESSAGES], name, stock))
        left = [column for values in stock.values() for _, column in values]
        if left:
            raise DataError(
                f"{name} has {len(left)} media in column {left[0]} that no part of its messages stands for; add parts "
                'like {"type": "image"}, or leave the column out'
            )
        return segments

    def _messages(self, messages: Any, name: str, stock: Stock) -> Iterator[Segment]:
        if not isinstance(messages, list):
            raise DataError(f"{name}: messages is {type(messages).__name__}; expected a list of messages")
        for number, message in enumerate(messages):
            where = f"{name}, message {number}"
            is_part = isinstance(message, dict) and message.get("type") in PARTS and message.get("content") is None
            if is_part:
                message = {"content": [message]}
            if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
                raise DataError(f"{where} has no content that is a text or a list of parts")
            role: SegmentRole = "target" if message.get("role") in ("assistant", None) else "input"
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = PARTS.get(part.get("type", "")) if isinstance(part, dict) else None
                if kind is None:
                    raise DataError(f"{where} has a part {str(part)[:80]}; its type must be one of {', '.join(PARTS)}")
                if kind in self.kinds:
                    value = _content_of(part, where)
                    if value is None and kind != "text" and stock[kind]:
                        value, _ = stock[kind].popleft()
                    yield self._segment(kind, value, where, role)

    def _segment(self, kind: SegmentKind, value: Any, name: str, role: SegmentRole) -> Segment:
        content: Path | bytes | str
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            content = data if data is not None else self._located(path or value.get("url"), name)
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


def _values(value: Any) -> list[Any]:
    """A column's content as a list without gaps."""
    return [item for item in (value if isinstance(value, list) else [value]) if item is not None]


def _content_of(part: dict[str, Any], name: str) -> Any:
    """A typed part's text, path, URL, bytes or {bytes, path}."""
    value = part.get(part["type"])
    if value is None:
        # The spellings of chat templates: {"type": "image", "url": ...} and {"type": "image", "path": ...}.
        value = next((part[key] for key in ("url", "path", "base64") if part.get(key) is not None), None)
        return _base64(value, name) if part.get("base64") == value and isinstance(value, str) else value
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
