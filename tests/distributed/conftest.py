"""Inputs that the killed runs share: made once, by a run that nobody disturbs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support import pretrain_runs as runs

STEPS, EVERY = 24, 3
WHOLE = ("--training.steps", str(STEPS), "--training.checkpoint-every", str(EVERY))


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Two ranks, STEPS steps of the debug preset, a checkpoint every EVERY; one for all processes of a session."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run_dir, done = root / "kill" / "whole", root / "kill-done"
    with FileLock(root / "kill.lock"):
        if not done.exists():
            run_dir.parent.mkdir(exist_ok=True)
            runs.finish(run_dir, *WHOLE)
            done.touch()
    return run_dir
