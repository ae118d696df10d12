"""Builds a C++ file and its headers into a shared library at first use, when a compiler is there; loads it.

Contract: the library goes to a user cache directory under a name made of the sources' hash, the compiler's version,
the flags and the processor, and appears whole or not at all, so processes may race. Nothing links against torch. When
it cannot be built or loaded, `NativeLibrary.library` is None and `reason` says why in one line; nothing is raised but
for a wrong environment.

`CXX` names the compiler (default: the first of g++, clang++, c++ on PATH); `XDG_CACHE_HOME` moves the cache.
`ERNIE_ELASTIC_CPU` (avx2 or portable; unset: what the processor has) caps the instruction sets of all our native code,
so that a processor runs what a lesser one would. The cap is compiled in (`cpu_level.h`): nothing decides it twice.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ernie_elastic.errors import ConfigError

logger = logging.getLogger(__name__)
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
BUILD_TIMEOUT_SECONDS = 300
CPU_VARIABLE = "ERNIE_ELASTIC_CPU"
CPU_LEVELS = {"portable": 0, "avx2": 1}  # as cpu_level.h numbers them
CLONE_LEVELS = ("portable loops", "AVX2", "AVX-512")  # of code that cpu_level.h's FOR_EVERY_CPU multiplies


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


@functools.cache
def cpu_cap() -> int | None:
    """The highest level that our native code may use, by ERNIE_ELASTIC_CPU; None: any. Read once a process.

    Raises ConfigError for a value that is not known.
    """
    name = os.environ.get(CPU_VARIABLE)
    if not name:
        return None
    if name not in CPU_LEVELS:
        choices = " or ".join(sorted(CPU_LEVELS))
        raise ConfigError(f"{CPU_VARIABLE}={name!r} is not known; set it to {choices}, or unset it")
    return CPU_LEVELS[name]


def num_threads() -> int:
    """Threads for native code: torch's number where torch is loaded, else OMP_NUM_THREADS, else the usable cores.

    source: ours: the same number that torch would choose, without the seconds that importing it takes.
    """
    of_torch = getattr(sys.modules.get("torch"), "get_num_threads", None)
    if of_torch is not None:
        return int(of_torch())
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list: one number a nesting level
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openmp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; None where there is none to be found.

    Torch's idle threads spin for a while after each of its operations: threads of our own would fight them for cores.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = sorted({match.group() for line in lines if (match := re.search(r"/\S*lib(?:gomp|iomp5|omp)\b.*", line))})
    for path in sorted(loaded, key=lambda path: "torch" not in Path(path).parts):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def load_library(source: Path, abi: tuple[str, int], declare: Callable[[ctypes.CDLL], str]) -> NativeLibrary:
    """Build and load `source`, compare its ABI, declare its functions.

    abi: the function that returns the library's number, and the number that this package needs. declare: sets types
    and what else the library needs before its first call; returns what `reason` adds to the compiler, such as the
    instruction set in use. Raises ConfigError as `cpu_cap` does.
    """
    native = build_and_load(source)
    library = native.library
    if library is None:
        return native
    symbol, needed = abi
    found = getattr(library, symbol)()
    if found != needed:
        return NativeLibrary(None, f"the built library has ABI {found}, this package needs {needed}")
    capped = "" if cpu_cap() is None else f" (capped by {CPU_VARIABLE})"
    return NativeLibrary(library, f"{native.reason}, {declare(library)}{capped}")


def build_and_load(source: Path) -> NativeLibrary:
    """Compile `source` unless the cache has it, and load it with ctypes. Raises ConfigError as `cpu_cap` does.

    It may include the *.h beside it and those beside this file.
    """
    cap, here = cpu_cap(), Path(__file__).parent
    flags = (*FLAGS, f"-I{here}", *(() if cap is None else (f"-DERNIE_ELASTIC_CPU_CAP={cap}",)))
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        looked = f"CXX={named} is not there" if named else "no g++, clang++ or c++ on PATH"
        return NativeLibrary(None, f"no C++ compiler: {looked}")
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout.splitlines()[0]
        files = (source, *sorted(source.parent.glob("*.h")), *sorted(here.glob("*.h")))
        texts = [file.read_text() for file in files]
        key = "\n".join((*texts, compiler, version, " ".join(FLAGS), f"{cap}", platform.machine(), cpu_flags()))
        target = cache_directory() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
        if not target.exists():
            logger.info("building %s with %s (once, a few seconds)", source.name, version)
            _compile(compiler, flags, source, target)
        return NativeLibrary(ctypes.CDLL(str(target)), f"built with {version}")
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line] or ["no message"]
        return NativeLibrary(None, f"{compiler} failed with code {error.returncode}: {lines[0]}")
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        return NativeLibrary(None, f"cannot build or load {source.name}: {error}")


def _compile(compiler: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile into a temporary sibling of `target`, then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *flags, str(source), "-o", temporary]
        subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_SECONDS, check=True)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
