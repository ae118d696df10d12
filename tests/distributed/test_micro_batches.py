"""A sub-model for each micro-batch, and batches that grow and shrink: two ranks under ZeRO equal one without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import micro_worker
from tests.distributed.test_engines import close

WORKER = Path(micro_worker.__file__)
pytestmark = pytest.mark.distributed


def run(out: Path, ranks: int, *arguments: str) -> dict:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--rdzv_backend=c10d"]
    command = [sys.executable, *([*launcher, "--rdzv_endpoint=localhost:0"] if ranks > 1 else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        [*command, str(WORKER), str(out), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


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
