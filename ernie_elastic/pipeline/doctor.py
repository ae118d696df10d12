"""`ernie-elastic doctor`: what this machine can run, and why not.

Each probe answers one row and never raises: a probe that fails becomes a row that says so. DeepSpeed is looked for but
not imported, and nothing is downloaded, so the check takes about as long as importing torch; the first one on a machine
with a compiler takes some seconds more, since it builds the packed CPU kernel, which is then kept for every later run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# ours: room below which the demo is likely to fail; the installation itself is not in it.
DEMO_MEMORY_BYTES = 3 * GIB
DEMO_DISK_BYTES = 1 * GIB
MIN_PYTHON = (3, 11)
CPU_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Row:
    """One line of the check. ok: True = usable here. value: what was found. meaning: what follows, or how to fix it."""

    name: str
    ok: bool
    value: str
    meaning: str


def doctor(directory: Path | str = ".") -> list[Row]:
    """Check this machine; `directory` is where output would go (its free disk is measured). Never raises."""
    directory = Path(directory)
    probes: list[tuple[str, Callable[[], Row]]] = [
        ("python", _python),
        ("torch", _torch),
        ("CPU", _cpu),
        ("memory", _memory),
        ("disk", lambda: _disk(directory)),
        ("compiler", _compiler),
        ("GPU", _gpu),
        ("Triton", _triton),
        ("packed CPU kernel", _cpu_kernel),
        ("DeepSpeed", _deepspeed),
        ("wandb", _wandb),
    ]
    rows = [_guarded(name, probe) for name, probe in probes]
    return rows + _verdicts({row.name: row for row in rows})


def print_doctor(directory: Path | str = ".") -> list[Row]:
    """Print the check as a table that fits the terminal, a verdict at the end, and return its rows."""
    rows = doctor(directory)
    print("\n".join(format_rows(rows, shutil.get_terminal_size((120, 24)).columns)))
    return rows


def format_rows(rows: Sequence[Row], width: int) -> list[str]:
    """The rows as lines of at most `width` characters where words allow it: ok/no, name and value, then the meaning."""
    import textwrap

    names = max((len(row.name) for row in rows), default=0)
    lines = []
    for row in rows:
        head = f"{'ok' if row.ok else 'no':<3} {row.name:<{names}}  {row.value}"
        lines += textwrap.wrap(head, max(40, width), subsequent_indent=" " * (names + 6), break_long_words=False)
        indent = " " * (names + 6)
        lines += textwrap.wrap(
            row.meaning, max(40, width), initial_indent=indent, subsequent_indent=indent, break_long_words=False
        )
    return lines


def _guarded(name: str, probe: Callable[[], Row]) -> Row:
    try:
        return probe()
    except Exception as error:  # a broken driver or package must not hide the other rows
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Row(name, False, "could not be checked", reason)


def _version(package: str) -> str | None:
    """Installed version of a distribution; None when it cannot be imported here."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _python() -> Row:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        return Row("python", False, found, f"Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is needed")
    return Row("python", True, found, sys.executable)


def _torch() -> Row:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    value = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    return Row("torch", True, value, f"{usable_cores()} cores may be used; OMP_NUM_THREADS sets the threads")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, lowered by a container's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _read(path: str) -> str:
    """Text of a small system file; empty when there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu() -> Row:
    import torch

    text = _read("/proc/cpuinfo")
    entries = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    flags = set(entries.get("flags", "").split())
    capability = torch.backends.cpu.get_cpu_capability()
    listed = [flag for flag in CPU_FLAGS if flag in flags]
    value = f"{entries.get('model name', platform.processor() or platform.machine())}, {usable_cores()} cores"
    if capability == "DEFAULT" and "avx2" not in flags:
        return Row("CPU", False, value, "neither AVX2 nor AVX-512: everything runs, but several times slower")
    return Row("CPU", True, value, f"vector units: {' '.join(listed) or 'not listed'}; torch uses {capability}")


def _memory() -> Row:
    total, free = memory_bytes()
    value = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < DEMO_MEMORY_BYTES:
        return Row(
            "memory", False, value, f"the demo wants about {DEMO_MEMORY_BYTES / GIB:.0f} GiB: close other programs"
        )
    return Row("memory", True, value, f"the demo wants about {DEMO_MEMORY_BYTES / GIB:.0f} GiB")


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of main memory, lowered by a container's limit where there is one."""
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" in fields and "MemAvailable" in fields:
        total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
        free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), max(0, min(free, int(limit) - int(used)))
    return total, free


def _disk(directory: Path) -> Row:
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    value = f"{free / GIB:.1f} GiB free at {directory}"
    if not os.access(place, os.W_OK):
        return Row("disk", False, value, f"{place} cannot be written; run from another folder or pass --out")
    if free < DEMO_DISK_BYTES:
        return Row("disk", False, value, f"the demo writes up to {DEMO_DISK_BYTES / GIB:.0f} GiB: free some space")
    return Row("disk", True, value, f"the demo writes up to {DEMO_DISK_BYTES / GIB:.0f} GiB")


def _compiler() -> Row:
    from ernie_elastic.kernels.native import find_compiler

    found = find_compiler()
    if found is None:
        return Row(
            "compiler", False, "none", "not needed; with g++ or clang++ packed weights run through a native kernel"
        )
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10)
    lines = (done.stdout or done.stderr).splitlines()
    return Row("compiler", done.returncode == 0, lines[0] if lines else found, f"{found}; faster paths may use it")


def _gpu() -> Row:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        return Row("GPU", False, "none", f"{why}; every command runs on the CPU, in float32")
    properties = torch.cuda.get_device_properties(0)
    value = f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / GIB:.0f} GiB"
    major, minor = properties.major, properties.minor
    return Row("GPU", True, value, f"compute capability {major}.{minor}; BF16 {'native' if major >= 8 else 'emulated'}")


def _triton() -> Row:
    import torch

    version = _version("triton")
    if version is None:
        return Row(
            "Triton", False, "not installed", "the plain torch kernels are used; Triton is published for Linux only"
        )
    if not torch.cuda.is_available():
        return Row(
            "Triton", False, version, "installed, but there is no GPU: its kernels run in tests only, interpreted"
        )
    return Row("Triton", True, version, "GPU kernels can be used")


def _cpu_kernel() -> Row:
    from ernie_elastic.kernels import zip_gemv

    found = tuple(zip_gemv.available_backends())
    reason = str(zip_gemv.backend_reason())
    native = any(name not in ("reference", "torch") for name in found)
    return Row("packed CPU kernel", native, ", ".join(found) or "none", reason)


def _deepspeed() -> Row:
    version = _version("deepspeed")
    if version is None:
        return Row(
            "DeepSpeed", False, "not installed", "pip install deepspeed; until then training uses the plain engine"
        )
    return Row("DeepSpeed", True, version, "ZeRO training under torchrun (over gloo on a CPU)")


def _wandb() -> Row:
    version = _version("wandb")
    if version is None:
        return Row(
            "wandb",
            False,
            "not installed",
            "optional: pip install 'ernie-elastic[wandb]'; metrics.jsonl is always written",
        )
    return Row("wandb", True, version, "optional, off unless asked for; metrics.jsonl is always written")


def _verdicts(rows: dict[str, Row]) -> list[Row]:
    """What follows for the things that a user does."""
    lacking = [name for name in ("python", "torch", "memory", "disk") if not rows[name].ok]
    blocked = f"see {', '.join(lacking)} above"
    demo = Row(
        "-> make demo", not lacking, "yes" if not lacking else "no", "on this CPU, minutes" if not lacking else blocked
    )
    trains = rows["DeepSpeed"].ok and rows["torch"].ok
    zero = Row("-> ZeRO training", trains, "yes" if trains else "no", rows["DeepSpeed"].meaning)
    native = rows["packed CPU kernel"].ok or rows["GPU"].ok
    where = (
        "fused decode + matmul"
        if native
        else f"through the reference path, slower: {rows['packed CPU kernel'].meaning}"
    )
    packed = Row("-> compressed models", rows["torch"].ok, "yes, fused" if native else "yes, unfused", where)
    gpu = rows["GPU"].ok and rows["Triton"].ok
    missing = next((rows[name].meaning for name in ("GPU", "Triton") if not rows[name].ok), "GPU kernels can be used")
    return [demo, zero, packed, Row("-> GPU kernels", gpu, "yes" if gpu else "no", missing)]
