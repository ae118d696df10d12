"""Where records come from: a directory of files, or a Hugging Face dataset; one index-addressed sequence of samples.

Contract: opening reads no media; record i is the same at every call and in every process; one that cannot be read is a
DataError that names it. Media come as they are stored, at their own size, sounds at the rate that is asked for.
`source_datasets` reads datasets. ours: the report does not say where records come from.

Shape letters: H/W pixels, F frames, L samples.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from ernie_elastic.data.decoding import read_audio, read_image, read_video
from ernie_elastic.errors import ConfigError, DataError
from ernie_elastic.schema import Sample, Segment, SegmentKind, SegmentRole
from ernie_elastic.stages import say

# Tasks of samples that no checker knows.
TASK = "data"  # files, and columns of a row, which have no roles
MESSAGES_TASK = "messages"  # documents, whose parts have their roles and order
SUFFIXES: dict[SegmentKind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".ogv", ".apng", ".gif"),
    "audio": (".wav", ".aiff", ".aif", ".flac", ".ogg", ".mp3"),
    "text": (".txt", ".md", ".rst"),
}
DATASET_SUFFIXES = (".parquet", ".jsonl", ".csv")
TAR_SUFFIX = ".tar"
SAVED_DATASET = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SPLIT_BITS = 64
SPLIT_NAMES = {
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip


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
        from ernie_elastic.data.source_jsonl import JsonlSource

        return JsonlSource(path, files, kinds, sample_rate)
    # Takes seconds to import.
    from ernie_elastic.data.source_datasets import DatasetSource

    return DatasetSource(path, files, kinds, sample_rate)


def _tar_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(file for file in paths if file.suffix.lower() == TAR_SUFFIX and file.name[0] != ".")


def _tars(path: Path, files: Sequence[Path], kinds: Sequence[SegmentKind], sample_rate: int | None) -> Source:
    from ernie_elastic.data.source_tars import TarSource

    return TarSource(path, files, kinds, sample_rate)


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
            return _tars(path, [path], kinds, sample_rate)
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
        return _tars(path, tars, kinds, sample_rate)
    source = FolderSource(path, kinds, sample_rate)
    if not len(source):
        # Datasets as hubs keep them: a readme, and the files in data/.
        files = _dataset_files(path, path.rglob("*"))
        if files:
            return _dataset(path, files, kinds, sample_rate)
        tars = _tar_files(path.rglob("*"))
        if tars:
            return _tars(path, tars, kinds, sample_rate)
        known = " ".join(suffix for kind in kinds for suffix in SUFFIXES[kind])
        raise ConfigError(f"--data {path} holds no {' or '.join(kinds)}: no file ends in {known}")
    return source
