"""One rank dies or stands still: the whole job ends within a minute, and what it prints names that rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from ernie_elastic.training.checkpoints.checkpoint import checkpoint_problem, latest_checkpoint, list_steps
from ernie_elastic.training.configuration import TrainingConfig
from tests.support import pretrain_runs as runs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
ENDLESS = ("--training.steps", "100000", "--training.checkpoint-every", "0", "--training.rank-limit-s", "6")
MINUTE = 60.0


def start(whole: Path, tmp_path: Path, starts=runs.start, **how) -> tuple[Path, Sequence[runs.Process]]:
    run_dir = runs.copy_inputs(whole, tmp_path / "run")
    processes = starts(run_dir, *ENDLESS, **how)
    assert runs.wait_until(lambda: runs.num_lines(run_dir) >= 3, processes)
    return run_dir, processes


def test_the_usual_limit_keeps_the_promise_of_a_minute():
    # Silence is certain after the limit and two polls of a sixth of it each.
    assert TrainingConfig().rank_limit_s * 8 / 6 <= MINUTE


def test_under_torchrun_a_killed_rank_ends_the_job(whole, tmp_path):
    run_dir, agents = start(whole, tmp_path, runs.start_interpreters)
    try:
        victim = runs.worker(agents[0], 1)
        others = [child for child in psutil.Process(agents[0].pid).children(recursive=True) if child.pid != victim.pid]
        victim.kill()
        assert agents[0].wait(MINUTE) != 0
        assert not psutil.wait_procs(others, MINUTE)[1], "no rank outlives the job"
    finally:
        runs.kill_all(agents)
    printed = run_dir.with_suffix(".log").read_text()
    assert "rank      : 1 (local_rank: 1)" in printed and f"Signal 9 (SIGKILL) received by PID {victim.pid}" in printed


@pytest.mark.parametrize(
    ("rank", "name", "said"),
    [
        (1, "SIGKILL", "rank 1 (process {pid} on "), (1, "SIGSTOP", "rank 1 (process {pid} on "),
        pytest.param(0, "SIGKILL", "rank 0 that hosts its store", marks=pytest.mark.slow),
        pytest.param(0, "SIGSTOP", "rank 0", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_without_an_agent_the_survivor_ends_and_names_the_rank(whole, tmp_path, rank, name, said):
    run_dir, processes = start(whole, tmp_path, torchrun=False)
    try:
        os.kill(processes[rank].pid, getattr(signal, name))
        assert processes[1 - rank].wait(MINUTE) != 0
    finally:
        runs.kill_all(processes)
    printed = run_dir.with_name(f"run-{1 - rank}.log").read_text()
    assert said.format(pid=processes[rank].pid) in printed and "start the same command again" in printed, printed


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_agent(whole, tmp_path):
    _, agents = start(whole, tmp_path, runs.start_interpreters)
    orphans = psutil.Process(agents[0].pid).children(recursive=True)
    try:
        agents[0].kill()
        agents[0].wait(10)
        assert not psutil.wait_procs(orphans, MINUTE)[1]
    finally:
        for orphan in orphans:
            if orphan.is_running():
                orphan.kill()


@pytest.mark.parametrize("launcher", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_that_cannot_write_its_part_ends_the_job_and_leaves_the_last_checkpoint(whole, tmp_path, launcher):
    run_dir = runs.copy_inputs(whole, tmp_path / "run")
    arguments = ("--training.checkpoint-every", "4", "--training.rank-limit-s", "6")
    endless = ("--training.steps", "100000", *arguments)
    if launcher:
        processes = runs.start_interpreters(run_dir, *endless)
    else:
        processes = runs.start(run_dir, *endless, torchrun=False)
    root = run_dir / "checkpoints"
    try:
        assert runs.wait_until(lambda: (root / "latest").exists(), processes)
        victim = runs.worker(processes[0], 1) if launcher else psutil.Process(processes[1].pid)
        # Files above this size fail as on a full disk; the rank's part of the optimizer state is larger.
        victim.rlimit(psutil.RLIMIT_FSIZE, (100_000, 100_000))
        assert all(process.wait(MINUTE) != 0 for process in processes)
    finally:
        runs.kill_all(processes)
    printed = "".join(log.read_text() for log in sorted(tmp_path.glob("run*.log")))
    assert "error: rank 1: cannot write" in printed and "File too large" in printed, printed[-3000:]
    assert launcher or "another rank failed; its message says why" in (tmp_path / "run-0.log").read_text()
    steps = list_steps(root)
    assert steps and all(checkpoint_problem(root / f"step-{step}") is None for step in steps)
    # A launcher ends the other rank when one has failed, in the middle of its cleaning up at worst.
    names = sorted(path.name for path in root.iterdir() if not (launcher and path.name.startswith(".step-")))
    assert names == ["latest", *(f"step-{step}" for step in steps)]
    last = latest_checkpoint(run_dir)
    assert last is not None
    goal = int(last.name[5:]) + 2
    assert f"going on from {last}" in runs.finish(run_dir, "--training.steps", str(goal), *arguments)
    assert not list(root.glob(".*"))
