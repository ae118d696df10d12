"""Two ranks that are killed at random moments: nothing half valid is left, and the run goes on bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from ernie_elastic.stages import sha256_file
from ernie_elastic.training.checkpoints.checkpoint import checkpoint_problem, list_steps
from tests.distributed.conftest import STEPS
from tests.distributed.conftest import WHOLE as ARGUMENTS
from tests.support import pretrain_runs as runs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]


def check_what_is_left(run_dir: Path) -> int:
    """Every checkpoint under its final name is whole, `latest` names one of them; returns its step."""
    root = run_dir / "checkpoints"
    steps = list_steps(root) if root.exists() else []
    for step in steps:
        assert checkpoint_problem(root / f"step-{step}") is None
    if not (root / "latest").exists():
        return 0
    named = int((root / "latest").read_text().removeprefix("step-"))
    assert named in steps
    return named


def kill_at(run_dir: Path, reached: int, delay: float, writing: bool) -> bool:
    """Start; kill after so many records (writing: then inside a checkpoint). False when the run ended before that."""
    agents = runs.start(run_dir, *ARGUMENTS)
    root = run_dir / "checkpoints"
    try:
        going = runs.wait_until(lambda: runs.num_lines(run_dir) >= reached, agents)
        if going and writing:
            going = runs.wait_until(lambda: any(root.glob(".step-*")), agents)
        time.sleep(delay)
        return going and agents[0].poll() is None
    finally:
        runs.kill_all(agents)


def test_killed_at_random_moments_it_goes_on_bit_for_bit(whole, tmp_path, stress):
    expected, rng = runs.records(whole), random.Random(4)
    kills, writing, goal = 0, 0, 3 if stress == 1 else 20
    for attempt in range(2 * goal):  # a run may end before its moment comes
        if kills == goal:
            break
        run_dir = tmp_path / "run"
        if not run_dir.exists():
            runs.copy_inputs(whole, run_dir)
        done = check_what_is_left(run_dir)
        middle = attempt % 3 == 1
        if not kill_at(run_dir, min(done + rng.randint(0, 5), STEPS - 2), rng.uniform(0, 0.05), middle):
            run_dir.rename(tmp_path / f"ended-{attempt}")
            continue
        kills, writing = kills + 1, writing + middle
        check_what_is_left(run_dir)
        left = runs.records(run_dir) if runs.num_lines(run_dir) else []
        assert left == expected[: len(left)]
    assert kills == goal and writing >= goal // 4
    print(f"{kills} kills, {writing} of them inside a checkpoint")
    if not (tmp_path / "run").exists():
        runs.copy_inputs(whole, tmp_path / "run")
    printed = runs.finish(tmp_path / "run", *ARGUMENTS)
    assert "damaged" not in printed
    for run_dir in (tmp_path / "run", *tmp_path.glob("ended-*")):
        if run_dir.is_dir():
            assert runs.records(run_dir) == expected
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "no leftovers"
    weights = [path / f"checkpoints/step-{STEPS}/model/model.safetensors" for path in (whole, tmp_path / "run")]
    assert sha256_file(weights[0]) == sha256_file(weights[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "stage", "more", "preset"),
    [("deepspeed", "0", ("--training.optimizer", "muon"), "debug"), ("deepspeed", "2", (), "debug"),
     ("torch", "0", (), "debug"), ("deepspeed", "1", (), "debug_stages"),
     ("deepspeed", "1", ("--training.micro-batches", "2", "--training.no-async-checkpoint"), "debug"),
     ("deepspeed", "1", ("--training.micro-batches", "4", "--elastic.sandwich"), "debug")],
)  # fmt: skip
def test_every_engine_goes_on_bit_for_bit(whole, tmp_path, engine, stage, more, preset):
    arguments = ("--training.steps", "8", "--training.engine", engine, "--training.zero-stage", stage, *more)
    for name in ("whole", "parts"):
        runs.copy_inputs(whole, tmp_path / name)
    runs.finish(tmp_path / "whole", *arguments, preset=preset)
    runs.finish(tmp_path / "parts", *arguments, "--training.stop-after", "5", preset=preset)
    runs.finish(tmp_path / "parts", *arguments, preset=preset)
    assert runs.records(tmp_path / "parts") == runs.records(tmp_path / "whole")
    weights = [tmp_path / name / "checkpoints/step-8/model/model.safetensors" for name in ("whole", "parts")]
    assert sha256_file(weights[0]) == sha256_file(weights[1])
