"""Records of Hugging Face datasets: saved ones, and Parquet and CSV files.

Contract: as `base`. Media columns are never decoded by the library (which needs torchcodec for sounds and videos):
its bytes or paths go to our readers (`rows`). Nothing is fetched from a network. The library keeps its Arrow
copy of Parquet and CSV files in its own cache (HF_DATASETS_CACHE).
ours: the report does not say how records are stored.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ernie_elastic.data.sources.base import Source, files_identity
from ernie_elastic.data.sources.rows import MESSAGES, NAMES, RowReader, kind_of_name
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, SegmentKind
from ernie_elastic.stages import say

BUILDERS = {".parquet": "parquet", ".csv": "csv"}
MEDIA: dict[type[Any], SegmentKind] = {datasets.Image: "image", datasets.Audio: "audio", datasets.Video: "video"}
LISTS = (datasets.List, datasets.LargeList)


class DatasetSource(Source):
    """Rows of a dataset; a row's media and texts of the wanted kinds are the segments of its sample (`RowReader`)."""

    def __init__(
        self, path: Path, files: Sequence[Path], kinds: Sequence[SegmentKind], sample_rate: int | None
    ) -> None:
        """files: of one type; none for a dataset that `save_to_disk` wrote. Raises ConfigError when it cannot be opened
        or no column is of these kinds."""
        self.path, self.kinds, self.sample_rate = path, tuple(kinds), sample_rate
        self.files = sorted(files or (file for file in path.rglob("*") if file.is_file()))
        self.folder = files[0].parent if files else path
        self.reader = RowReader(self.kinds, self.folder, sample_rate)
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
                kind = kind_of_name(name)
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

    def identity(self) -> str:
        """Of the dataset's files and of the columns that are read."""
        files = files_identity(self.folder, [file.relative_to(self.folder) for file in self.files])
        return f"{files} {sorted(self.columns)}"

    def __getitem__(self, index: int) -> Sample:
        name = self.key(index)
        row = self._row(index, name)
        return self.reader.sample(row, self.columns, name)

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
