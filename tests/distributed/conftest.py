"""Inputs that the killed runs share: made once, by a run that nobody disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import pretrain_runs as runs

STEPS, EVERY = 24, 3
WHOLE = ("--training.steps", str(STEPS), "--training.checkpoint-every", str(EVERY))


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Two ranks, STEPS steps of the debug preset, a checkpoint every EVERY steps."""
    run_dir = tmp_path_factory.mktemp("kill") / "whole"
    runs.finish(run_dir, *WHOLE)
    return run_dir
