"""Check the kernels on a GPU and measure them: `python scripts/gpu_check.py [--quick] [--device cuda] [--out DIR]`.

Runs the kernel tests with real dtypes; when they pass, the GPU benchmark; and writes gpu-<name>-<date>.md and .json
with hardware, versions and commit. Exit code 2 without a GPU, 1 when a test fails (then nothing is written).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]


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


def run_tests(device: str) -> str:
    """Run tests/kernels on the device, compiled; the last line of pytest. Exits with code 1 when a test fails."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    index = torch.device(device).index
    if index is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(index)
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
        print("gpu_check: error: kernel tests fail, see above; nothing was measured or written", file=sys.stderr)
        raise SystemExit(1)
    return done.stdout.strip().splitlines()[-1].strip("= ")


def measure(quick: bool) -> tuple[dict[str, Any], str]:
    """The benchmark's JSON object and its table."""
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    from bench import common, gpu_kernels

    rows = gpu_kernels.run(quick)
    return common.report("gpu_kernels", rows), common.table(rows)


def write_report(out: Path, name: str, tests: str, found: dict[str, Any], table: str) -> Path:
    """Write the Markdown and JSON files atomically; the path of the Markdown."""
    from ernie_elastic import stages

    today = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = out / f"gpu-{slug}-{today}.md"
    lines = [
        f"# Kernels on {name}, {today}",
        "",
        f"Commit {found['commit']}; {found['hardware']}; CUDA {torch.version.cuda}; Triton {triton.__version__}.",
        f"Kernel tests on this GPU: {tests}.",
        "",
        "In brackets: ours relative to the peer, above 1 is better. Made by `python scripts/gpu_check.py`.",
        "",
        "```",
        table,
        "```",
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    stages.write_atomic(path.with_suffix(".json"), json.dumps({**found, "tests": tests}, indent=2) + "\n")
    stages.write_atomic(path, "\n".join(lines))
    return path


def main() -> int:
    """Parse, check, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape and few batches")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    arguments = parser.parse_args()
    name = use_device(arguments.device)
    tests = run_tests(arguments.device)
    found, table = measure(arguments.quick)
    path = write_report(arguments.out, name, tests, found, table)
    print(f"{table}\n\ntests: {tests}\nwrote {path} and {path.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
