"""A compression that is killed or meets a full disk: the source stays, nothing half done appears, the next goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie_elastic import resumable, stages
from ernie_elastic.compression import compress_directory, container, shard
from ernie_elastic.compression.restore import decompress_directory
from ernie_elastic.errors import CheckpointError, FormatError
from tests.compression.conftest import hashes

TENSORS = 5  # a file


def make_source(folder: Path) -> Path:
    """Three files of five matrices, one of which does not get smaller, and a vector."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for k in range(3):
        tensors = {f"f{k}.w{j}": (torch.randn(40, 50) * 0.02).to(torch.bfloat16) for j in range(TENSORS)}
        tensors[f"f{k}.norm"] = torch.rand(7)
        if k == 1:
            tensors["f1.w2"] = (
                torch.randint(0, 65536, (40, 50), dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
            )
        name = f"model-{k}.safetensors"
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of a compressed directory, without the manifest, which has a date."""
    return {name: value for name, value in hashes(folder).items() if name != "manifest.json"}


def at_call(target: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """Run `action` before call `number` (from 1) of an attribute."""
    original, calls = getattr(target, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*args, **kwargs)

    setattr(target, name, counted)


def killed_run(source: Path, out: Path, target: Any, name: str, number: int) -> None:
    """Compress in a child that kills itself with SIGKILL before a call; fails when the call never comes."""
    child = os.fork()
    if child == 0:
        try:
            at_call(target, name, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            compress_directory(source, out, overwrite=True)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, number, status)


# Where the child dies, and how many tensors at least the next run need not encode again.
MOMENTS: list[tuple[Any, str, int, int]] = [
    (shard.codec, "encode_words", 1, 0),
    (shard.codec, "encode_words", 4, 3),
    (container.SafetensorsWriter, "append", 3, 2),
    (container.SafetensorsWriter, "finish", 1, TENSORS),
    (shard.codec, "decode_words", 2, TENSORS),
    (shard, "write_json", 1, TENSORS),
    (shard.codec, "encode_words", TENSORS + 4, TENSORS),
    (shard.codec, "decode_words", TENSORS + 2, 2 * TENSORS - 1),
    (shard, "write_json", 3, 3 * TENSORS - 1),
    (resumable, "write_manifest", 1, 3 * TENSORS - 1),
    (resumable, "publish_directory", 1, 3 * TENSORS - 1),
]


@pytest.mark.parametrize(("target", "name", "number", "spared"), MOMENTS, ids=[f"{m[1]} {m[2]}" for m in MOMENTS])
def test_killed_at_any_moment_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, number: int, spared: int
) -> None:
    torch.manual_seed(number)
    source = make_source(tmp_path / "source")
    before = hashes(source)
    compress_directory(source, tmp_path / "whole")
    out = tmp_path / "out"
    killed_run(source, out, target, name, number)
    assert not out.exists() and hashes(source) == before
    encoded: list[str] = []
    encode = shard.codec.encode_words

    def noted(words: Any, shape: Any, tensor: str, layout: str) -> Any:
        encoded.append(tensor)
        return encode(words, shape, tensor, layout)

    monkeypatch.setattr(shard.codec, "encode_words", noted)
    report = compress_directory(source, out)
    assert report["compressed"] == 3 * TENSORS - 1 and report["kept"] == {"BF16": 1, "F32": 3}
    assert len(set(encoded)) <= 3 * TENSORS - spared, encoded
    assert files_of(out) == files_of(tmp_path / "whole")
    decompress_directory(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == before == hashes(source)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("moment", range(5))
def test_killed_while_it_replaces_an_output_there_is_always_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, moment: int
) -> None:
    """Killed before each system call of the replacement, with and without a system that exchanges names."""
    new, out = tmp_path / "new", tmp_path / "out"
    for folder, text in ((new, "new"), (out, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return function(*args, **kwargs)

            return call

        stages.os = SimpleNamespace(**{**vars(os), "replace": counted(os.replace)})
        stages.shutil = SimpleNamespace(rmtree=counted(shutil.rmtree))
        stages.exchange_names = counted(stages.exchange_names if exchange else lambda one, other: False)
        try:
            stages.publish_directory(new, out)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (moment < (3 if exchange else 5))
    whole = out.exists()
    assert whole or not exchange
    stages.recover_published(out)
    assert (out / "file").read_text() in ("old", "new")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(("name", "number", "kept"), [("append", 1, False), ("append", 7, True), ("finish", 2, True)])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, kept: bool
) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    before = hashes(source)

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = getattr(container.SafetensorsWriter, name)
    monkeypatch.setattr(container.SafetensorsWriter, name, original)
    at_call(container.SafetensorsWriter, name, number, full)
    with pytest.raises(CheckpointError, match="run the same command again" if kept else "disk full"):
        compress_directory(source, out)
    assert not out.exists() and hashes(source) == before
    assert bool(list(tmp_path.glob(".out.*"))) == kept
    compress_directory(source, out)
    decompress_directory(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == before and not list(tmp_path.glob(".out*"))


def test_what_is_left_of_another_source_is_dropped(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    killed_run(source, out, shard.codec, "encode_words", TENSORS + 4)
    tensors = {f"f0.w{j}": torch.ones(40, 50, dtype=torch.bfloat16) for j in range(TENSORS)}
    save_file(tensors, source / "model-0.safetensors")
    compress_directory(source, out)
    decompress_directory(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_files_that_the_source_lost_since_do_not_come_back(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    (source / "sub").mkdir()
    for name in ("notes.txt", "sub/more.txt"):
        (source / name).write_text("old")
    killed_run(source, out, resumable, "write_manifest", 1)
    assert (tmp_path / ".out.partial" / "sub" / "more.txt").exists()
    shutil.rmtree(source / "sub")
    (source / "notes.txt").unlink()
    compress_directory(source, out)
    decompress_directory(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)
    assert not (out / "sub").exists() and not (out / "notes.txt").exists()


def test_another_spelling_of_the_path_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    killed_run(source, out, shard.codec, "encode_words", 2 * TENSORS)
    encoded: list[str] = []
    encode = shard.codec.encode_words
    monkeypatch.setattr(shard.codec, "encode_words", lambda *args: encoded.append(args[2]) or encode(*args))
    monkeypatch.chdir(tmp_path)
    compress_directory(Path("source"), Path("out"))
    assert len(set(encoded)) <= 3 * TENSORS - 5, encoded


def test_a_second_full_disk_keeps_what_the_first_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    killed_run(source, out, shard.codec, "encode_words", TENSORS + 4)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(container.SafetensorsWriter, "append", full)
        patch.setattr(stages.os, "fsync", full)
        with pytest.raises(CheckpointError, match="run the same command again"):
            compress_directory(source, out)
    assert (tmp_path / ".out.partial" / "model-0.safetensors").exists()
    encoded: list[str] = []
    encode = shard.codec.encode_words
    monkeypatch.setattr(shard.codec, "encode_words", lambda *args: encoded.append(args[2]) or encode(*args))
    compress_directory(source, out)
    assert len(set(encoded)) <= 2 * TENSORS, encoded


def test_a_source_that_cannot_be_read_is_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"

    def refuse(*args: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source / "model-1.safetensors"))

    monkeypatch.setattr(shard.codec, "encode_words", refuse)
    with pytest.raises(CheckpointError, match=r"cannot use \S+model-1\.safetensors: Permission denied"):
        compress_directory(source, out)


def test_a_lock_that_was_removed_while_it_was_opened_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process before ends between the opening and the locking: its lock file is gone, a new one is made."""
    notes = tmp_path / ".out.progress"
    lockf, opened = resumable.fcntl.lockf, []

    def lock(stream: Any, how: int) -> None:
        opened.append(os.fstat(stream.fileno()).st_ino)
        if len(opened) == 1:
            shutil.rmtree(notes)
        lockf(stream, how)

    monkeypatch.setattr(resumable.fcntl, "lockf", lock)
    with resumable._locked(notes, tmp_path / "out"):
        assert len(opened) == 2 and (notes / "lock").stat().st_ino == opened[1]


def test_a_damaged_leftover_is_noticed_and_made_anew(tmp_path: Path) -> None:
    """What an earlier run wrote is verified like everything else; when it is wrong, that file begins anew."""
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    killed_run(source, out, container.SafetensorsWriter, "finish", 1)
    left = tmp_path / ".out.partial" / "model-0.safetensors"
    content = bytearray(left.read_bytes())
    content[-100] ^= 1
    left.write_bytes(bytes(content))
    with pytest.raises(FormatError):
        compress_directory(source, out)
    compress_directory(source, out)
    decompress_directory(out, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    with resumable.resumable_output(out, "compress", {}, []):
        child = os.fork()  # a lock of this kind does not stop the process that holds it
        if child == 0:
            try:
                compress_directory(source, out)
            except CheckpointError as error:
                os._exit(0 if "another process" in str(error) else 4)
            finally:
                os._exit(3)
        assert os.waitpid(child, 0)[1] == 0
