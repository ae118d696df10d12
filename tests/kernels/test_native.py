"""The builder of native code: built once, atomically, keyed by what it is made from; reasons when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels import native, rms_norm, sorted_experts, tbe_codec, zip_gemv
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


# Prints a line a kernel: what its back end says, and a hash of its results.
LEVELS = """
import hashlib, torch
from ernie_elastic import compression
from ernie_elastic.kernels import rms_norm, sorted_experts, tbe_codec, zip_gemv
torch.manual_seed(0)
def out(module, *tensors):
    content = b"".join(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    print(module.backend_reason(), hashlib.sha256(content).hexdigest(), sep=" = ")
w = torch.randn(130, 200).bfloat16()
stream = compression.encode(w).stream
out(tbe_codec, torch.from_numpy(stream), compression.decode(stream))
out(zip_gemv, zip_gemv.unpack(zip_gemv.pack(w), backend="native"))
x, scale = torch.randn(9, 77, requires_grad=True), torch.randn(77, requires_grad=True)
y = rms_norm.rms_norm(x, scale, 1e-6)
y.square().sum().backward()
out(rms_norm, y, x.grad, scale.grad)
hidden, gate_up, down = (torch.randn(*s, requires_grad=True) for s in ((11, 24), (3, 2 * 37, 24), (3, 24, 37)))
y = sorted_experts.sorted_experts(hidden, gate_up, down, torch.randint(3, (11, 2)), torch.rand(11, 2))
y.square().sum().backward()
out(sorted_experts, y, hidden.grad, gate_up.grad, down.grad)
"""


def levels(cap: str | None) -> tuple[list[str], list[str]]:
    """What the back ends of a fresh process say under a cap, and hashes of their results."""
    variables = {key: value for key, value in os.environ.items() if key != native.CPU_VARIABLE}
    variables |= {"PYTHONPATH": str(ROOT)} | ({} if cap is None else {native.CPU_VARIABLE: cap})
    done = subprocess.run(
        [sys.executable, "-c", LEVELS], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    said, hashes = zip(*(line.rsplit(" = ", 1) for line in done.stdout.splitlines()), strict=True)
    return list(said), list(hashes)


@needs_compiler
@pytest.mark.parametrize(("cap", "allowed"), [("portable", ("portable loops",)), ("avx2", ("portable loops", "AVX2"))])
def test_a_cap_on_the_processor_changes_levels_and_no_bit(cap: str, allowed: tuple[str, ...]) -> None:
    said, hashes = levels(None)
    capped, found = levels(cap)
    assert hashes == found and len(found) == 4
    for module, before, after in zip((tbe_codec, zip_gemv, rms_norm, sorted_experts), said, capped, strict=True):
        if "native" not in before:
            continue  # no OpenMP runtime or BLAS here: the reason says so
        assert f"capped by {native.CPU_VARIABLE}" in after and native.CPU_VARIABLE not in before, module
        assert any(f", {level}" in after for level in allowed) and "AVX-512" not in after, (module, after)
        assert cap != "portable" or "AVX2" not in after
        if cap == "portable" and "AVX2" in native.cpu_flags().upper().split():
            assert "AVX" in before, (module, before)


def test_an_unknown_processor_is_an_error_that_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CPU_VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match="'avx1024' is not known; set it to avx2 or portable"):
        native.cpu_cap.__wrapped__()
    monkeypatch.setenv(native.CPU_VARIABLE, "")
    assert native.cpu_cap.__wrapped__() is None


def test_threads_are_those_of_torch_or_of_the_environment_or_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.num_threads() == torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert native.num_threads() == 3
    for not_a_number in ("0", "many", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", not_a_number)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5, 9, 11}, raising=False)
        assert native.num_threads() == 5


@needs_compiler
def test_a_library_of_another_abi_is_a_reason(source: Path) -> None:
    found = native.load_library(source, ("answer", 3), lambda library: "never asked")
    assert found == native.NativeLibrary(None, "the built library has ABI 41, this package needs 3")
    found = native.load_library(source, ("answer", 41), lambda library: "declared")
    assert found.library is not None and found.reason.endswith(", declared")
