"""Starts `train_worker.py` alone, under torchrun or under another launcher, and compares what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import train_worker

WORKER = Path(train_worker.__file__)
TORCHRUN = ("-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")


def launch(ranks: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks."""
    command = [sys.executable, *(() if ranks == 1 else (*TORCHRUN, f"--nproc_per_node={ranks}"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    return subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


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
