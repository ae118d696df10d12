"""Builds a C++ file and its headers into a shared library at first use, when a compiler is there; loads it.

Contract: the library goes to a user cache directory under a name made of the sources' hash, the compiler's version,
the flags and the processor, and appears whole or not at all, so processes may race. Nothing links against torch. When
it cannot be built or loaded, `NativeLibrary.library` is None and `reason` says why in one line; nothing is raised.

`CXX` names the compiler (default: the first of g++, clang++, c++ on PATH); `XDG_CACHE_HOME` moves the cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
BUILD_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class NativeLibrary:
    """library: the loaded shared object, or None. reason: why it is there, or why it is not."""

    library: ctypes.CDLL | None
    reason: str


def find_compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    named = os.environ.get("CXX")
    candidates = (named,) if named else ("g++", "clang++", "c++")
    return next((path for name in candidates if (path := shutil.which(name))), None)


def cache_directory() -> Path:
    """Where built libraries live: $XDG_CACHE_HOME (default ~/.cache) / ernie_elastic / native."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "ernie_elastic" / "native"


def cpu_flags() -> str:
    """The processor's feature flags, sorted; its name where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join(sorted(flags.partition(":")[2].split())) or platform.processor()


def build_and_load(source: Path) -> NativeLibrary:
    """Compile `source` (which may include the *.h beside it) unless the cache has it, and load it with ctypes."""
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        looked = f"CXX={named} is not there" if named else "no g++, clang++ or c++ on PATH"
        return NativeLibrary(None, f"no C++ compiler: {looked}")
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout.splitlines()[0]
        texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
        key = "\n".join((*texts, compiler, version, " ".join(FLAGS), platform.machine(), cpu_flags()))
        target = cache_directory() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
        if not target.exists():
            logger.info("building %s with %s (once, a few seconds)", source.name, version)
            _compile(compiler, source, target)
        return NativeLibrary(ctypes.CDLL(str(target)), f"built with {version}")
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line] or ["no message"]
        return NativeLibrary(None, f"{compiler} failed with code {error.returncode}: {lines[0]}")
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        return NativeLibrary(None, f"cannot build or load {source.name}: {error}")


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Compile into a temporary sibling of `target`, then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(source), "-o", temporary]
        subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_SECONDS, check=True)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
