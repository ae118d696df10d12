"""Opens what `--data` names: a directory of files, a saved dataset, Parquet, JSONL, CSV or tar files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ernie_elastic.data.sources.base import SUFFIXES, Source
from ernie_elastic.data.sources.folders import FolderSource
from ernie_elastic.data.sources.jsonl import JsonlSource
from ernie_elastic.data.sources.tars import TarSource
from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import SegmentKind
from ernie_elastic.stages import say

DATASET_SUFFIXES = (".parquet", ".jsonl", ".csv")
TAR_SUFFIX = ".tar"
SAVED_DATASET = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SPLIT_NAMES = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip


def _dataset_files(directory: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` below `directory` that are Parquet, JSONL or CSV files and not hidden.

    Where names tell splits apart (train-00000-of-00002.parquet, test.jsonl) and one of them is train, its files alone.
    """
    found = sorted(path for path in paths if path.suffix.lower() in DATASET_SUFFIXES and path.is_file())
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    splits = {path: _split_of(path) for path in shown}
    if "train" in splits.values() and len(set(splits.values()) - {None}) > 1:
        left = sorted({split for split in splits.values() if split not in (None, "train")})
        say(f"{directory}: of its files those of the split train are read, not those of {', '.join(map(str, left))}")
        return [path for path in shown if splits[path] in (None, "train")]
    return shown


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((name for name, spellings in SPLIT_NAMES.items() if set(spellings) & set(words)), None)


def _dataset(path: Path, files: Sequence[Path], kinds: Sequence[SegmentKind], sample_rate: int | None) -> Source:
    folders = sorted({file.parent.as_posix() for file in files})
    if len(folders) > 1:
        raise ConfigError(f"--data {path} holds dataset files in {folders[0]} and {folders[1]}; give one directory")
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) > 1:
        raise ConfigError(f"--data {path} holds files of the types {', '.join(sorted(suffixes))}; give one of them")
    if suffixes == {".jsonl"}:
        return JsonlSource(path, files, kinds, sample_rate)
    # Takes seconds to import.
    from ernie_elastic.data.sources.datasets import DatasetSource

    return DatasetSource(path, files, kinds, sample_rate)


def _tar_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(file for file in paths if file.suffix.lower() == TAR_SUFFIX and file.name[0] != ".")


def open_source(spec: Path | str, kinds: Sequence[SegmentKind], sample_rate: int | None = None) -> Source:
    """The records of a directory of files, of a saved dataset's directory, of Parquet, JSONL and CSV files, or of tars.

    Dataset files of a directory come before its tars (WebDataset), these before its media; those of one directory in it
    count when it has no such media.

    kinds: of the media that are wanted; records give no others. sample_rate: Hz, for sounds. Raises ConfigError when
    nothing of these kinds is there.
    """
    path = Path(spec)
    if not path.exists():
        raise ConfigError(f"--data {path} does not exist; give a directory, a dataset or a file")
    if path.is_file():
        if path.suffix.lower() == TAR_SUFFIX:
            return TarSource(path, [path], kinds, sample_rate)
        if path.suffix.lower() in [suffix for kind in kinds for suffix in SUFFIXES[kind]]:
            return FolderSource(path.parent, kinds, sample_rate, only=path)
        if path.suffix.lower() not in DATASET_SUFFIXES:
            raise ConfigError(
                f"--data {path}: a file must end in {', '.join((*DATASET_SUFFIXES, TAR_SUFFIX))}; or give its directory"
            )
        return _dataset(path, [path], kinds, sample_rate)
    if any((path / name).exists() for name in SAVED_DATASET):
        return _dataset(path, [], kinds, sample_rate)
    files = _dataset_files(path, path.iterdir())
    if files:
        return _dataset(path, files, kinds, sample_rate)
    tars = _tar_files(path.iterdir())
    if tars:
        return TarSource(path, tars, kinds, sample_rate)
    source = FolderSource(path, kinds, sample_rate)
    if not len(source):
        # Datasets as hubs keep them: a readme, and the files in data/.
        files = _dataset_files(path, path.rglob("*"))
        if files:
            return _dataset(path, files, kinds, sample_rate)
        tars = _tar_files(path.rglob("*"))
        if tars:
            return TarSource(path, tars, kinds, sample_rate)
        known = " ".join(suffix for kind in kinds for suffix in SUFFIXES[kind])
        raise ConfigError(f"--data {path} holds no {' or '.join(kinds)}: no file ends in {known}")
    return source
