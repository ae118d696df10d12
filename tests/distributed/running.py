"""Starts a worker's ranks, and compares what `train_worker.py` wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import train_worker
from tests.support.pretrain_runs import free_port, kill_all

WORKER = Path(train_worker.__file__)
LIMIT_S = 280


def launch(ranks: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks; what all of them printed is in `stderr`.

    Without torchrun's agent, which would take as long to start as a rank: tests of launchers start real ones.
    """
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    if ranks == 1:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile("w+") as printed:
        processes = [
            subprocess.Popen(
                command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=printed, stderr=printed
            )
            for rank in range(ranks)
        ]
        try:
            code = _end_of(processes)
        finally:
            kill_all(processes)
        printed.seek(0)
        return subprocess.CompletedProcess(command, code, "", printed.read())


def _end_of(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all, or for the first that fails; its exit code."""
    begun = time.monotonic()
    while time.monotonic() - begun < LIMIT_S:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(0.05)
    raise AssertionError(f"the ranks did not end within {LIMIT_S} s")


def train(out: Path, ranks: int, training: dict[str, Any], **job: Any) -> dict[str, Any]:
    """Run the worker's job; returns its JSON, and its weights under "weights"."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = launch(ranks, WORKER, str(out), json.dumps({"training": training, **job}))
    assert done.returncode == 0, done.stderr[-3000:]
    return read(out)


def read(out: Path) -> dict[str, Any]:
    """What the worker wrote at `out`."""
    return {**json.loads(out.with_suffix(".json").read_text()), "weights": torch.load(out.with_suffix(".pt"))}


def assert_same(result: dict[str, Any], expected: dict[str, Any], weights: float = 1e-3) -> None:
    """The same specs, losses, norms, balance bias and weights (each element, absolutely; AdamW moves one by up to 0.01
    a step, and by the sign alone where its gradient is nearly zero)."""
    assert result["specs"] == expected["specs"]
    assert len(set(result["specs"])) > 1, "elastic steps must occur"
    losses = [torch.tensor(each["losses"]) for each in (result, expected)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-3) and min(expected["norms"]) > 0
    assert result["bias"] == expected["bias"]
    assert set(result["weights"]) == set(expected["weights"])
    for name, value in expected["weights"].items():
        got = result["weights"][name]
        torch.testing.assert_close(got, value, rtol=0, atol=weights, msg=partial("{} {}".format, name))
