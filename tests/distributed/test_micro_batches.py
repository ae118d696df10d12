"""A sub-model for each micro-batch, and batches that grow and shrink: two ranks under ZeRO equal one without."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed import micro_worker
from tests.support.warm_ranks import launch

WORKER = Path(micro_worker.__file__)
pytestmark = pytest.mark.distributed


def run(out: Path, ranks: int, *arguments: str) -> dict:
    done = launch(ranks, WORKER, str(out), *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def close(result: dict, expected: dict) -> None:
    """The same specs, losses, norms, balance biases and weights, but for the rounding of other orders of sums."""
    assert result["specs"] == expected["specs"] and len(set(result["specs"])) > 1, "elastic steps must occur"
    # Scores below 1 round at 1e-7 an operation: no router comes near enough to a tie for that to choose its expert.
    assert expected["margin"] > 5e-6, "the comparison needs other data: a router is at a tie"
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-3) and min(expected["norms"]) > 0
    assert result["bias"] == expected["bias"]
    for name, value in expected["weights"].items():
        # A step moves an element by up to 1e-2; what rounding moves it by was 1e-6 after all five.
        got = torch.tensor(result["weights"][name])
        torch.testing.assert_close(got, torch.tensor(value), rtol=0, atol=1e-4, msg=partial("{} {}".format, name))


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("single") / "one.json", 1, "torch", "0")


@pytest.mark.parametrize(
    ("engine", "stage"),
    [("deepspeed", "1"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in
     (("deepspeed", "0"), ("deepspeed", "2"), ("torch", "0")))],
)  # fmt: skip
def test_two_ranks_equal_one_whatever_the_number_of_micro_batches(engine, stage, single, tmp_path):
    close(run(tmp_path / "two.json", 2, engine, stage), single)
