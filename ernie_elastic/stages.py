"""Atomic output directories, manifests, hashes, progress bars and the one-line error exit of every command.

A stage writes into a temporary sibling and renames it at the end, so a directory under its final name is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm

import ernie_elastic
from ernie_elastic.errors import CheckpointError, ErnieElasticError
from ernie_elastic.schema import Manifest

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
Item = TypeVar("Item")


def fingerprint(config: Any) -> str:
    """First 16 hex digits of the SHA-256 of `config` as canonical JSON."""
    text = json.dumps(to_jsonable(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_jsonable(value: Any) -> Any:
    """Dataclasses, tuples and paths as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_commit() -> str:
    """Commit of the package's checkout, with `-dirty` when it has changes; "unknown" outside of a checkout."""
    here = Path(ernie_elastic.__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: temporary sibling, fsync, rename. Raises CheckpointError on a full disk."""
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(to_jsonable(value), indent=2) + "\n")


def system_error(error: Exception, folder: Path | None = None) -> OSError | None:
    """The operating system's error behind an exception, or None: itself, or what a library made of it.

    safetensors quotes the number in its text. torch.save raises another error while it handles that of a Python stream;
    where it opened the file itself it names none, so a full disk is looked for under `folder`.
    """
    if isinstance(error, OSError):
        return error
    text, number = str(error), None
    if isinstance(error, SafetensorError):
        quoted = re.search(r"\(os error (\d+)\)", text)
        number = int(quoted[1]) if quoted else None
    elif isinstance(error, RuntimeError) and ("iostream error" in text or "inline_container" in text):
        if isinstance(error.__context__, OSError):
            return error.__context__
        full = folder is not None and folder.exists() and shutil.disk_usage(folder).free < 2**20
        number = errno.ENOSPC if full else errno.EIO
    return None if number is None else OSError(number, os.strerror(number))


def disk_error(error: OSError, path: Path, again: bool = False) -> CheckpointError:
    """An OSError as a line that says what, where and the fix; again: what is done is kept for another run."""
    rest = "what is done is kept: run the same command again" if again else "nothing was left under the final name"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = path if path.is_dir() else path.parent
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return CheckpointError(
            f"disk full while writing {path}: {free / 2**20:.1f} MiB free there; free some space or choose another "
            f"--out; {rest}"
        )
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; choose another --out")


@contextlib.contextmanager
def stage_output(
    path: Path | str,
    stage: str,
    config: Any,
    parent: Path | None = None,
    overwrite: bool = False,
    extra: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path`, with its manifest, when the block ends without an error.

    stage names the kind of directory; config (JSON-able or dataclass) is stored resolved; parent is the directory
    this one was made from; extra is filled by the caller before the block ends. Raises CheckpointError when `path`
    exists and `overwrite` is False, or when the disk is full.
    """
    path = Path(path)
    recover_published(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already; pass --overwrite to replace it, or choose another --out")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    extra = {} if extra is None else extra
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        write_manifest(temporary, stage, config, parent, extra)
        publish_directory(temporary, path)
    except (OSError, SafetensorError) as error:
        if (cause := system_error(error)) is None:
            raise
        raise disk_error(cause, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Wait until the disk has every file and folder below `directory`, names included."""
    for path in [*directory.rglob("*"), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish_directory(temporary: Path, path: Path) -> None:
    """Move a finished directory to its final name; an older one under that name goes only after the move.

    At every moment the final name is that of the old directory or of the new one, where the system can exchange names
    (Linux); elsewhere a kill between two renames leaves the old one to `recover_published`.
    """
    if not path.exists():
        os.replace(temporary, path)
        return
    fresh, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    os.replace(temporary, fresh)  # first, so that `temporary` never holds the old content
    if exchange_names(fresh, path):
        old = fresh
    else:
        os.replace(path, old)
        os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)


def exchange_names(one: Path, other: Path) -> bool:
    """Exchange two names at once; False, with nothing changed, where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def recover_published(path: Path) -> None:
    """Undo what a kill in the middle of `publish_directory` left: bring `path` back if it is gone, remove the rest."""
    siblings = [path.parent.glob(f".{glob.escape(path.name)}.{kind}-*") for kind in ("new", "old")]
    for left in [*siblings[0], *siblings[1]]:
        if _runs(left.name.rpartition("-")[2]):
            continue
        if path.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.replace(left, path)


def _runs(process: str) -> bool:
    """Whether a process of this machine with that number runs."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_manifest(
    directory: Path,
    stage: str,
    config: Any,
    parent: Path | None = None,
    extra: dict[str, Any] | None = None,
    known: dict[str, str] | None = None,
) -> None:
    """Hash every file of `directory`, but those whose SHA-256 is `known` by relative path; write its manifest.json."""
    known = known or {}
    names = {
        str(file.relative_to(directory)): file
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST_NAME
    }
    files = {
        name: {"bytes": file.stat().st_size, "sha256": known.get(name) or sha256_file(file)}
        for name, file in names.items()
    }
    manifest = Manifest(
        stage=stage,
        format_version=FORMAT_VERSION,
        config=to_jsonable(config),
        fingerprint=fingerprint(config),
        parent=None if parent is None else {"path": str(parent), "sha256": directory_hash(parent)},
        package_version=ernie_elastic.__version__,
        git_commit=git_commit(),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        files=files,
        extra=to_jsonable(extra or {}),
    )
    write_json(directory / MANIFEST_NAME, manifest)


def directory_hash(directory: Path) -> str | None:
    """Hash that names a stage directory: the SHA-256 of its manifest's file table; None when it has no manifest."""
    if not (directory / MANIFEST_NAME).exists():
        return None
    table = json.loads((directory / MANIFEST_NAME).read_text()).get("files", {})
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path | str, stages: tuple[str, ...] = (), verify: bool = False) -> Manifest:
    """Read and check the manifest of a stage directory.

    stages: the accepted stage names (empty = any). Sizes of all listed files are always compared; verify=True
    compares their SHA-256 too. Raises CheckpointError naming the directory, both values and the fix.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; expected the output of {' or '.join(stages) or 'a stage'}"
        )
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no {MANIFEST_NAME}, so it is not the output of {' or '.join(stages) or 'a stage'}; "
            "check the path or make it anew"
        )
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); make {directory} anew") from error
    if manifest.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has format version {manifest.format_version}, this package reads up to {FORMAT_VERSION}; "
            "install a newer ernie_elastic"
        )
    if stages and manifest.stage not in stages:
        raise CheckpointError(f"{directory} is the output of {manifest.stage!r}, expected {' or '.join(stages)}")
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory} is damaged: {name} is missing; make it anew")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{directory} is damaged: {name} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}; "
                "make it anew"
            )
        if verify and sha256_file(file) != entry["sha256"]:
            raise CheckpointError(f"{directory} is damaged: the SHA-256 of {name} is not its manifest's; make it anew")
    return manifest


def is_main_process() -> bool:
    """True on rank 0, and without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(
    items: Any = None, *, total: int | None = None, desc: str = "", unit: str = "it", initial: int = 0
) -> tqdm:
    """A progress bar with ETA on stderr, on rank 0, for work that takes more than two seconds."""
    live = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        delay=0 if live else 2,
        disable=not is_main_process(),
        mininterval=0.2 if live else 5.0,
        dynamic_ncols=live,
        file=sys.stderr,
    )


def say(message: str) -> None:
    """One line to standard output from rank 0."""
    if is_main_process():
        print(message, flush=True)


def run_command(name: str, function: Callable[[], Any]) -> int:
    """Run a command's body: 0 on success, 2 with one line on a user's error, 130 on Ctrl-C."""
    try:
        function()
    except ErnieElasticError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        cause = system_error(error)
        if cause is not None and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = Path(cause.filename or ".")
            print(f"{name}: error: {disk_error(cause, where)}", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print(f"{name}: stopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0
