"""DeepSpeed on two ranks, ZeRO 0 to 2, trains as plain torch on one rank does, elastic steps included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import train_worker
from tests.modeling.common import tiny_model

WORKER = Path(train_worker.__file__)
STEPS = 4


def run(tmp_path: Path, ranks: int, *arguments: str) -> dict:
    out = tmp_path / "result.json"
    command = [sys.executable]
    if ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        [*command, str(WORKER), str(out), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("single"), 1, "torch", "0", str(STEPS))


def close(result: dict, expected: dict) -> None:
    assert result["specs"] == expected["specs"]
    assert len(set(result["specs"])) > 1, "elastic steps must occur"
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-3) and min(expected["norms"]) > 0
    assert result["bias"] == expected["bias"]
    for name, value in expected["weights"].items():
        assert result["weights"][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage", ["1", pytest.param("0", marks=pytest.mark.slow), pytest.param("2", marks=pytest.mark.slow)]
)
def test_deepspeed_on_two_ranks_equals_torch_on_one(stage, single, tmp_path):
    close(run(tmp_path, 2, "deepspeed", stage, str(STEPS)), single)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "stage"),
    [("deepspeed", "1"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in
     (("deepspeed", "0"), ("deepspeed", "2"), ("torch", "0")))],
)  # fmt: skip
def test_a_gradient_that_is_no_number_on_one_rank_changes_no_weight_on_any(engine, stage, tmp_path):
    result = run(tmp_path, 2, engine, stage, "3", "adamw", "1", "1")
    assert len(result["losses"]) == 2 and min(result["norms"]) > 0
    assert torch.tensor(result["losses"]).isfinite().all(), "the step after the poisoned one is a usual one"


@pytest.mark.distributed
def test_two_ranks_that_share_each_sequence_equal_one(single, tmp_path):
    close(run(tmp_path, 2, "deepspeed", "1", str(STEPS), "adamw", "2"), single)


@pytest.mark.distributed
def test_muon_on_two_ranks_equals_one(tmp_path):
    single = run(tmp_path, 1, "torch", "0", str(STEPS), "muon")
    close(run(tmp_path, 2, "deepspeed", "0", str(STEPS), "muon"), single)


@pytest.mark.distributed
@pytest.mark.slow
def test_torch_engine_on_two_ranks_equals_one(single, tmp_path):
    two = run(tmp_path, 2, "torch", "0", str(STEPS))
    close(two, single)


def test_every_parameter_gets_a_gradient_whatever_the_batch_holds():
    from ernie_elastic.data.grouping import build_document
    from ernie_elastic.data.packing import collate
    from ernie_elastic.modeling.generation import layout_of
    from ernie_elastic.modeling.losses import modality_sums
    from ernie_elastic.schema import SubModelSpec
    from tests.modeling.common import random_parts

    model = tiny_model().train()
    document = build_document(random_parts("text", 0, model.config), layout_of(model.config))
    batch = collate([[document]])
    spec = SubModelSpec((0, 3, 4, 5), ((0, 1, 2),) * 4, 1)
    sums, _ = modality_sums(model.forward_packed(batch, submodel=spec), batch)
    sums.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    dropped = [p.grad.abs().max() for name, p in model.named_parameters() if name.startswith("model.layers.1.")]
    assert max(dropped) == 0
    experts = model.model.layers[0].mlp.experts.gate_up_proj.grad
    assert experts[3:].abs().max() == 0 and experts[:3].abs().max() > 0
