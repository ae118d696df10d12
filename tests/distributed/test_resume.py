"""A run that is stopped goes on, on as many ranks bit for bit, on another number of ranks as if it had not stopped."""

from __future__ import annotations

import json

import pytest
import torch

from ernie_elastic.errors import CheckpointError
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import TorchEngine
from ernie_elastic.training.engines.state import saved_ranks
from ernie_elastic.training.engines.torch_engine import STATE_FILE
from tests.distributed.running import train
from tests.modeling.common import tiny_model

pytestmark = pytest.mark.timeout(900)
slow = pytest.mark.slow


def in_three_parts(tmp_path, training, ranks) -> list[dict]:
    """Steps 0-1, 2-3 and 4-5, each in processes of their own on ranks[i] ranks."""
    results, state = [], ""
    for part, count in enumerate(ranks):
        save = str(tmp_path / f"step-{part}" / "optimizer")
        job = {"start": 2 * part, "steps": 2 * part + 2, "load": state, "save": save}
        results.append(train(tmp_path / f"part{part}", count, training, **job))
        state = save
    return results


def check(parts, whole, tolerance) -> None:
    for key in ("losses", "norms"):
        got = torch.tensor([value for part in parts for value in part[key]])
        torch.testing.assert_close(got, torch.tensor(whole[key]), rtol=tolerance, atol=tolerance)
    assert [spec for part in parts for spec in part["specs"]] == whole["specs"] and len(set(whole["specs"])) > 1
    assert parts[-1]["bias"] == whole["bias"]
    for name, value in whole["weights"].items():
        torch.testing.assert_close(parts[-1]["weights"][name], value, rtol=0, atol=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "training",
    [{"zero_stage": 1}, *(pytest.param(options, marks=slow) for options in (
        {"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"engine": "torch"},
        {"zero_stage": 1, "offload": "optimizer", "optimizer": "cpu_adam"},
    ))],
)  # fmt: skip
def test_two_ranks_then_one_then_two_continue_the_run(training, tmp_path):
    whole = train(tmp_path / "whole", 2, training, steps=6)
    parts = in_three_parts(tmp_path, {**training, "resume_other_world_size": True}, (2, 1, 2))
    assert [part["ranks"] for part in parts] == [2, 1, 2]
    check(parts, whole, 1e-3)
    assert not list(tmp_path.rglob("*.universal.tmp")), "the universal form is kept while it is read, no longer"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        ({"zero_stage": 1}, 0.0), ({"zero_stage": 2}, 0.0), ({"engine": "torch"}, 0.0),
        ({"zero_stage": 1, "precision": "bf16"}, 0.0), ({"zero_stage": 1, "expert_parallel": 2}, 0.0),
        ({"zero_stage": 3}, 1e-3),  # its reduction order follows a trace that a new process starts anew
    ],
)  # fmt: skip
def test_as_many_ranks_go_on_bit_for_bit(training, tolerance, tmp_path):
    check(in_three_parts(tmp_path, training, (2, 2, 2)), train(tmp_path / "whole", 2, training, steps=6), tolerance)


def saved(tmp_path, **table):
    (tmp_path / "engine.json").write_text(json.dumps({"engine": "torch", "ranks": 1, "expert_parallel": 1, **table}))
    return tmp_path


def test_another_number_of_ranks_needs_the_flag(tmp_path):
    state = saved(tmp_path, ranks=2)
    with pytest.raises(
        CheckpointError, match=r"by 2 ranks, now there are 1; start 2 ranks, or .*resume-other-world-size"
    ):
        saved_ranks(state, TrainingConfig(engine="torch"))
    assert saved_ranks(state, TrainingConfig(engine="torch", resume_other_world_size=True)) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"engine": "deepspeed"}, "not written by the torch engine; pass --training.engine deepspeed"),
        ({"expert_parallel": 2, "ranks": 2}, "expert_parallel 2, now it is 1"),
    ],
)
def test_a_state_of_another_engine_is_refused(table, message, tmp_path):
    engine = TorchEngine(tiny_model(), TrainingConfig(engine="torch"))
    with pytest.raises(CheckpointError, match=message):
        engine.load_state(saved(tmp_path, **table))
    (tmp_path / "engine.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no engine\.json"):
        engine.load_state(tmp_path)


def test_the_form_of_the_optimizer_is_this_machines_not_the_states(tmp_path):
    engine = TorchEngine(tiny_model(), TrainingConfig(engine="torch"))
    engine.save_state(tmp_path)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group |= {"fused": True, "foreach": False, "weight_decay": 0.25}  # as a GPU would have written it
    torch.save(state, tmp_path / STATE_FILE)
    engine.load_state(tmp_path)
    groups = engine.optimizer.param_groups
    assert [(group["fused"], group["foreach"]) for group in groups] == [(False, True)] * len(groups)
    assert all(group["weight_decay"] == 0.25 for group in groups), "what is of the run comes from the state"
