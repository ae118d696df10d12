"""Runs of the debug preset in processes of their own, to be killed: start, watch, kill, compare."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support import ROOT, warm_ranks

PRETRAIN = ROOT / "scripts" / "pretrain.py"
Process = subprocess.Popen[str] | warm_ranks.Forked
# What a machine's speed decides; every other value of a record is a pure function of the configuration.
TIMED = {
    "seconds", "tokens_per_s", "mfu", "eta_s", "data_wait_s", "data_wait_share", "memory_gib", "checkpoint_stall_s",
}  # fmt: skip


def start(
    run_dir: Path, *arguments: str, ranks: int = 2, torchrun: bool = True, preset: str = "debug"
) -> Sequence[Process]:
    """The processes of a run: torchrun's agent, or with torchrun=False the ranks themselves.

    What they print is in `<run_dir>.log`, with `-RANK` before the suffix for ranks without an agent.
    """
    command = [preset, "--run-dir", str(run_dir), *arguments]
    if torchrun:
        return [warm_ranks.torchrun(ranks, PRETRAIN, *command, log=run_dir.with_suffix(".log"))]
    logs = [run_dir.with_name(f"{run_dir.name}-{rank}.log") for rank in range(ranks)]
    return warm_ranks.ranks_of(ranks, PRETRAIN, command, logs)


def start_interpreters(run_dir: Path, *arguments: str, ranks: int = 2) -> Sequence[Process]:
    """`start` with torchrun as a user types it, every process an interpreter of its own."""
    command = [str(PRETRAIN), "debug", "--run-dir", str(run_dir), *arguments]
    launcher = ["-m", warm_ranks.TORCHRUN, f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
    with open(run_dir.with_suffix(".log"), "a") as stream:
        return [
            subprocess.Popen(
                [sys.executable, *launcher, "--rdzv_endpoint=localhost:0", *command],
                stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **warm_ranks.SHARED}, text=True,
            )
        ]  # fmt: skip


def finish(run_dir: Path, *arguments: str, ranks: int = 2, preset: str = "debug", limit_s: float = 200.0) -> str:
    """Run to the end; returns what was printed, fails on any exit code but 0."""
    log = run_dir.with_suffix(".log")
    log.unlink(missing_ok=True)
    (agent,) = start(run_dir, *arguments, ranks=ranks, preset=preset)
    try:
        code = agent.wait(limit_s)
    finally:
        kill_all([agent])
    assert code == 0, log.read_text()[-3000:]
    return log.read_text()


def kill_all(processes: Sequence[Process]) -> None:
    """SIGKILL to the processes and all that they started, as a machine that goes down does."""
    doomed = []
    for process in processes:
        try:
            parent = psutil.Process(process.pid)
            doomed += [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for victim in doomed:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        process.wait(30)
    psutil.wait_procs(doomed, 30)


def worker(agent: Process, rank: int) -> psutil.Process:
    """The process of a rank below torchrun's agent, which starts one after the other."""
    ranks = sorted(psutil.Process(agent.pid).children(), key=lambda child: (child.create_time(), child.pid))
    assert len(ranks) > rank, f"rank {rank} is not running"
    return ranks[rank]


def wait_until(ready: Callable[[], bool], processes: Sequence[Process], limit_s: float = 90.0) -> bool:
    """Wait for a condition; False when a process ended first, an AssertionError at the limit."""
    begun = time.monotonic()
    while not ready():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() - begun < limit_s, "the condition did not come about"
        time.sleep(0.002)
    return True


def num_lines(run_dir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records without what a clock measured; a line cut short is left out."""
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def copy_inputs(source: Path, run_dir: Path) -> Path:
    """A new run directory with the tokenizers and packed data of another one."""
    for name in ("tokenizers", "packed"):
        shutil.copytree(source / name, run_dir / name)
    return run_dir
