"""The builder of native code: built once, atomically, keyed by what it is made from; reasons when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_elastic.kernels import native
from tests.support import ROOT

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A one-function library with a header, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "answer.h").write_text("constexpr int kAnswer = 41;\n")
    file = tmp_path / "answer.cpp"
    file.write_text('#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n')
    return file


@needs_compiler
def test_library_is_built_once_and_again_when_a_header_changes(source: Path) -> None:
    first = native.build_and_load(source)
    assert first.library is not None and first.library.answer() == 41
    (built,) = native.cache_directory().iterdir()
    stamp = built.stat().st_mtime_ns
    assert native.build_and_load(source).library is not None
    assert [path.stat().st_mtime_ns for path in native.cache_directory().iterdir()] == [stamp]
    source.with_name("answer.h").write_text("constexpr int kAnswer = 42;\n")
    second = native.build_and_load(source)
    assert second.library is not None and second.library.answer() == 42
    assert len(list(native.cache_directory().iterdir())) == 2


@needs_compiler
def test_source_that_does_not_compile_is_a_reason_and_leaves_nothing(source: Path) -> None:
    source.write_text("not C++\n")
    found = native.build_and_load(source)
    assert found.library is None
    assert "failed with code" in found.reason and "error" in found.reason
    assert list(native.cache_directory().iterdir()) == []


def test_missing_compiler_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.build_and_load(source) == native.NativeLibrary(
        None, "no C++ compiler: CXX=no-such-compiler is not there"
    )


@needs_compiler
def test_cache_that_cannot_be_made_is_a_reason(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = native.build_and_load(source)
    assert found.library is None and "cannot build or load answer.cpp" in found.reason


def test_process_without_a_compiler_runs_the_reference(tmp_path: Path) -> None:
    code = (
        "import torch\nfrom ernie_elastic.errors import ConfigError\nfrom ernie_elastic.kernels import zip_gemv\n"
        "assert zip_gemv.available_backends() == ('reference',)\n"
        "assert 'no C++ compiler' in zip_gemv.backend_reason()\n"
        "w = torch.randn(9, 33).bfloat16()\np = zip_gemv.pack(w)\nassert torch.equal(zip_gemv.unpack(p), w)\n"
        "try:\n    zip_gemv.unpack(p, backend='native')\nexcept ConfigError as error:\n    print(error)\n"
    )
    variables = {key: value for key, value in os.environ.items() if key != "CXX"}
    variables |= {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler: no g++, clang++ or c++ on PATH; choose reference" in done.stdout
