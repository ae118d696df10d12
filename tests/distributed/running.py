"""Starts a worker's ranks, and compares what `train_worker.py` wrote."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import train_worker
from tests.support.warm_ranks import launch

WORKER = Path(train_worker.__file__)


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
