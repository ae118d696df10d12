"""Check the kernels on a GPU and measure them: `python scripts/gpu_check.py [--quick] [--device cuda] [--out DIR]`.

Runs the kernel tests with real dtypes, then the GPU benchmarks, and writes gpu-<name>-<date>.md and .json with
hardware, versions, commit, every row and every loss. No row starts that would not end in time (--minutes; 8.5, or 2.7
with --quick); what was left out is named. Exit code 2 without a GPU, 1 when something failed (it is in the report).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("zip_gemm", "zip_moe", "tbe_decode", "training_gpu")
QUICK_TESTS = ("test_tbe_decode.py", "test_zip_gemm.py", "test_zip_moe.py", "test_sorted_experts_grouped.py")
NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis", "numpy")
# Tests of whole models on a GPU, and what each file needs besides.
MODEL_TESTS = {
    "tests/compression/test_packed.py": ("transformers", "safetensors", "xxhash", "zstandard", "tqdm"),
    "tests/compression/test_quantizer.py": ("transformers", "safetensors", "xxhash", "zstandard", "tqdm"),
    "tests/modeling/test_training_on_gpu.py": ("transformers", "einops", "jinja2", "PIL", "regex", "tqdm"),
}
NEEDED_BY_BENCHMARKS = ("numpy", "safetensors", "tqdm")
# What a benchmark needs besides.
NEEDED_BY = {
    "training_gpu": ("transformers", "einops", "jinja2", "PIL", "regex", "soundfile", "tyro", "xxhash", "zstandard")
}
TESTS_SHARE = 0.45  # of the time at most for the tests


@dataclass
class Found:
    """What the run found. problems: failures; skipped: what was left out and why."""

    tests: str = "not run"
    rows: list[tuple[str, Any]] = field(default_factory=list)  # (benchmark, bench.common.Row)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, line: str) -> None:
        """Leave something out, aloud."""
        self.skipped.append(line)
        print(f"gpu_check: left out: {line}", file=sys.stderr, flush=True)

    def fail(self, line: str) -> None:
        """Note a failure, aloud."""
        self.problems.append(line)
        print(f"gpu_check: FAILED: {line}", file=sys.stderr, flush=True)


class Clock:
    """The time that is left of `minutes` since the program began."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds; negative when the time is over."""
        return self.end - time.monotonic()


def use_device(name: str) -> str:
    """Make `name` the current CUDA device and give its name; exits with code 2 and one line when it cannot be used."""
    try:
        device = torch.device(name)
        if device.type != "cuda":
            raise RuntimeError(f"--device {name} is no CUDA device")
        torch.empty(0, device=device)
        torch.cuda.set_device(device if device.index is not None else 0)
        return torch.cuda.get_device_name()
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        print(f"gpu_check: error: no usable GPU ({first}); run it on a machine with a CUDA device", file=sys.stderr)
        raise SystemExit(2) from error


def missing(modules: tuple[str, ...]) -> list[str]:
    """Those modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def run_tests(found: Found, device: str, quick: bool, seconds: float) -> None:
    """Run tests/kernels on the device, compiled; the last line of pytest goes to found.tests, failures to problems."""
    absent = missing(NEEDED_BY_TESTS)
    if absent:
        return found.skip(f"kernel tests: {', '.join(absent)} not installed")
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    index = torch.device(device).index
    if index is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(index)
    files = [f"tests/kernels/{name}" for name in QUICK_TESTS if (ROOT / "tests/kernels" / name).exists()]
    # The offline compilation needs no GPU and runs on every change; it would only take time here.
    whole = ["tests/kernels", "--ignore=tests/kernels/test_compile.py"]
    command = [sys.executable, "-m", "pytest", *(files if quick else whole), "-q", "-p", "no:cacheprovider"]
    for file, needed in () if quick else MODEL_TESTS.items():
        if absent := missing(needed):
            found.skip(f"{file}: {', '.join(absent)} not installed")
        else:
            command.append(file)
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=output, stderr=output, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        text = output.read()
    last = (text.strip().splitlines() or [""])[-1].strip("= ")
    found.tests = f"stopped after {seconds:.0f} s" if code is None else last
    if code is None:
        found.fail(f"kernel tests: stopped after {seconds:.0f} s; the last line was {last!r}")
    elif code:
        print(text[-6000:], file=sys.stderr)
        names = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        found.fail(f"kernel tests: {last}: {', '.join(names[:20]) or 'see the output'}")


def measure(found: Found, quick: bool, clock: Clock, save: Callable[[], Any]) -> None:
    """Run the tasks of the benchmarks in turn, one of each, as long as the time lasts; `save` after each."""
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    absent = missing(NEEDED_BY_BENCHMARKS)
    if absent:
        return found.skip(f"benchmarks: {', '.join(absent)} not installed")
    queues: dict[str, Iterator[Any]] = {}
    for name in BENCHMARKS:
        if absent := missing(NEEDED_BY.get(name, ())):
            found.skip(f"{name}: {', '.join(absent)} not installed")
            continue
        try:
            queues[name] = iter(importlib.import_module(f"bench.{name}").tasks(quick))
        except Exception as error:  # one benchmark must not take the other's rows with it
            found.fail(f"{name}: {type(error).__name__}: {error}")
    while queues:
        for name in list(queues):
            task = next(queues[name], None)
            if task is None:
                del queues[name]
            elif task.seconds > clock.left():
                found.skip(
                    f"{name}, {task.name}: takes about {task.seconds:.0f} s, {max(0, clock.left()):.0f} s are left"
                )
            else:
                run_task(found, name, task)
                save()


def run_task(found: Found, name: str, task: Any) -> None:
    """Run one task; its rows, or its failure, go to found."""
    begin = time.monotonic()
    print(f"gpu_check: {name}, {task.name} (about {task.seconds:.0f} s)", file=sys.stderr, flush=True)
    try:
        found.rows += [(name, row) for row in task.work()]
    except Exception as error:  # the other rows are still worth having
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0][:200]
        found.fail(f"{name}, {task.name}: {type(error).__name__}: {first}")
        torch.cuda.empty_cache()
    print(f"gpu_check: took {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def git_commit() -> str:
    """The commit of this checkout, "-dirty" when tracked files differ; "unknown" outside of git."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def describe(name: str) -> dict[str, str]:
    """Hardware and versions."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        driver = []
    return {
        "gpu": name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver, clocks, power": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def losses(rows: list[tuple[str, Any]]) -> list[str]:
    """A line for every row and peer that ours loses against."""
    return [
        f"{benchmark}, {row.case}: {ratio:.2f}x of {peer}"
        for benchmark, row in rows
        for peer, ratio in row.ratio.items()
        if ratio < 1
    ]


def report(found: Found, facts: dict[str, str], today: str) -> str:
    """The Markdown report."""
    lines = [f"# Kernels on {facts['gpu']}, {today}", "", "Made by `python scripts/gpu_check.py`.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- kernel tests on this GPU: {found.tests}", ""]
    for title, items in (("Failed", found.problems), ("Left out", found.skipped)):
        lines += [f"## {title}", "", *(f"- {item}" for item in items), ""] if items else []
    if found.rows:
        from bench import common

        lines += [
            "In brackets: ours relative to the peer, above 1 is better. Medians; kernels as CUDA graph replays.",
            "",
        ]
        for benchmark in BENCHMARKS:
            rows = [row for name, row in found.rows if name == benchmark]
            lines += [f"## {benchmark}", "", "```", common.table(rows), "```", ""] if rows else []
        lost = losses(found.rows)
        lines += ["## Where ours loses", "", *(f"- {line}" for line in lost or ["nowhere in these rows"]), ""]
    return "\n".join(lines)


def write_report(out: Path, found: Found, facts: dict[str, str]) -> Path:
    """Write the Markdown and the JSON, each whole or not at all; the path of the Markdown."""
    today = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    path = out / f"gpu-{slug}-{today}.md"
    rows = [{"benchmark": name, **row.to_json()} for name, row in found.rows]
    whole = {
        "name": "gpu_check",
        "hardware": ", ".join(f"{key} {value}" for key, value in facts.items() if key != "commit"),
        "commit": facts["commit"],
        "rows": rows,
        "facts": facts,
        "tests": found.tests,
        "problems": found.problems,
        "skipped": found.skipped,
        "losses": losses(found.rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    for file, text in (
        (path.with_suffix(".json"), json.dumps(whole, indent=2) + "\n"),
        (path, report(found, facts, today)),
    ):
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text(text)
        os.replace(temporary, file)
    return path


def main() -> int:
    """Parse, check, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shapes and batches, under 3 minutes")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    parser.add_argument("--minutes", type=float, help="time for everything (default: 8.5; 2.7 with --quick)")
    arguments = parser.parse_args()
    minutes = arguments.minutes or (2.7 if arguments.quick else 8.5)
    clock = Clock(minutes)
    facts = describe(use_device(arguments.device))
    found = Found()
    run_tests(found, arguments.device, arguments.quick, TESTS_SHARE * clock.left())
    write_report(arguments.out, found, facts)  # again after every row: what was found outlives a crash
    measure(found, arguments.quick, clock, lambda: write_report(arguments.out, found, facts))
    path = write_report(arguments.out, found, facts)
    print(f"{path.read_text()}\nwrote {path} and {path.with_suffix('.json')}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
