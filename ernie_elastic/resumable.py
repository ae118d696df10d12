"""An output directory that a run which was cut off goes on with, where `stages.stage_output` would begin anew.

Two hidden siblings of the output exist while it is made: `.NAME.partial`, which becomes the output, and
`.NAME.progress`, in which the work notes what is done. Both survive a kill, a crash or a full disk as long as something
is noted; they go when the output has its name. Another run with the same inputs and settings goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ernie_elastic.errors import CheckpointError
from ernie_elastic.stages import (
    disk_error,
    fingerprint,
    publish_directory,
    recover_published,
    say,
    write_json,
    write_manifest,
)

SETTINGS_NAME, LOCK_NAME = "settings.json", "lock"


@dataclass(frozen=True)
class PartialOutput:
    """target: the directory to fill. notes: where the work writes what is done. hashes: SHA-256 (hex) of files of
    `target` that the work knows already, by relative path; they are not read again for the manifest."""

    target: Path
    notes: Path
    hashes: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def resumable_output(
    path: Path | str,
    stage: str,
    config: Any,
    inputs: Any,
    parent: Path | None = None,
    overwrite: bool = False,
    extra: dict[str, Any] | None = None,
    decisive: Any = None,
) -> Iterator[PartialOutput]:
    """Yield the partial output of `path`, empty or as an earlier run left it; it gets its name and manifest at the end.

    config, parent, overwrite, extra: as `stage_output` takes them. inputs (JSON-able): what the work is made of, such
    as names, sizes and times of files; an earlier run with other inputs or config is dropped; decisive: the part of the
    config that an earlier run must share, when it is not all of it. Raises CheckpointError
    when `path` exists and `overwrite` is False, when another process is at work on it, or when the disk is full.
    """
    path = Path(path)
    recover_published(path)
    check_free(path, overwrite)
    partial = PartialOutput(path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.progress"))
    extra = {} if extra is None else extra
    settings = {"stage": stage, "config": config if decisive is None else decisive, "inputs": inputs}
    try:
        with _locked(partial.notes, path):
            check_free(path, overwrite)  # another process may have made it in the meantime
            _begin(partial, settings)
            try:
                yield partial
                write_manifest(partial.target, stage, config, parent, extra, partial.hashes)
            except BaseException:
                notes = [note for note in partial.notes.iterdir() if note.name not in (SETTINGS_NAME, LOCK_NAME)]
                if not any(note.stat().st_size for note in notes):
                    shutil.rmtree(partial.target, ignore_errors=True)
                    shutil.rmtree(partial.notes, ignore_errors=True)
                raise
            publish_directory(partial.target, path)
            shutil.rmtree(partial.notes, ignore_errors=True)
    except OSError as error:
        again, read = partial.notes.exists(), error.filename and Path(os.fsdecode(error.filename))
        if read and not {partial.target, partial.notes, path} & {read, *read.parents}:
            kept = "; what is done is kept: run the same command again" if again else ""
            raise CheckpointError(f"cannot use {read}: {error.strerror}; mend it or its rights{kept}") from error
        raise disk_error(error, path, again=again) from error


def check_free(path: Path, overwrite: bool) -> None:
    """CheckpointError when `path` exists and must not be replaced."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already; pass --overwrite to replace it, or choose another --out")


@contextlib.contextmanager
def _locked(notes: Path, path: Path) -> Iterator[None]:
    """Hold the lock of `notes`. CheckpointError when another process has it."""
    while True:
        notes.mkdir(parents=True, exist_ok=True)
        lock: BinaryIO
        with open(notes / LOCK_NAME, "wb") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise CheckpointError(
                    f"another process is writing {path}; wait for it, or choose another --out"
                ) from error
            if not _is_file(lock, notes / LOCK_NAME):
                continue  # a process that ended between the opening and the locking removed this very file
            yield
            return


def _is_file(stream: BinaryIO, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _begin(partial: PartialOutput, settings: dict[str, Any]) -> None:
    """Keep what an earlier run with the same settings left, drop anything else."""
    mark = partial.notes / SETTINGS_NAME
    known = None
    if mark.is_file() and partial.target.is_dir():
        with contextlib.suppress(ValueError):
            known = json.loads(mark.read_text(encoding="utf-8")).get("fingerprint")
    if known == fingerprint(settings):
        say(f"going on with {partial.target}, which an earlier run left")
        for cut_off in partial.target.rglob(".*.tmp-*"):
            cut_off.unlink()
        return
    shutil.rmtree(partial.target, ignore_errors=True)
    for note in partial.notes.iterdir():
        if note.name != LOCK_NAME:
            shutil.rmtree(note) if note.is_dir() else note.unlink()
    partial.target.mkdir(parents=True)
    write_json(mark, {"fingerprint": fingerprint(settings), "settings": settings, "process": os.getpid()})
