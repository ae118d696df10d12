"""Output directories appear whole or not at all, and a full disk is named whatever library met it."""

import errno
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from ernie_elastic import stages
from ernie_elastic.errors import CheckpointError


@pytest.mark.parametrize(
    ("error", "free", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), 0, errno.ENOSPC),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 0, errno.ENOSPC),
        (SafetensorError("I/O error: Permission denied (os error 13)"), 0, errno.EACCES),
        (SafetensorError("Error while deserializing header"), 0, None),
        (RuntimeError("basic_ios::clear: iostream error"), 0, errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 2**30, errno.EIO),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0, None),
        (ValueError("(os error 28)"), 0, None),
    ],
)
def test_the_system_error_behind_an_exception(error, free, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    found = stages.system_error(error, tmp_path)
    assert (None if found is None else found.errno) == expected


@pytest.mark.parametrize("error", [OSError(28, "full"), SafetensorError("(os error 28)")], ids=["os", "safetensors"])
def test_a_stage_that_meets_a_full_disk_leaves_what_was_there(error, tmp_path):
    out = tmp_path / "out"
    with stages.stage_output(out, "test", {}) as directory:
        (directory / "a").write_text("first")
    with (
        pytest.raises(CheckpointError, match=r"disk full while writing .*out"),
        stages.stage_output(out, "test", {}, overwrite=True) as directory,
    ):
        (directory / "a").write_text("second")
        raise error
    assert (out / "a").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_errors_of_other_kinds_pass_through(tmp_path):
    with pytest.raises(SafetensorError, match="header"), stages.stage_output(tmp_path / "out", "test", {}):
        raise SafetensorError("header")
    assert list(tmp_path.iterdir()) == []
