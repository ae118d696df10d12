"""Experts split over two ranks: the losses, gradients, steps and checkpoints of a model that has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ernie_elastic.errors import ConfigError
from ernie_elastic.generation.loading import load_model
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import TorchEngine
from tests.distributed import expert_worker
from tests.distributed.running import assert_same, train
from tests.modeling.common import tiny_model
from tests.support.warm_ranks import launch

pytestmark = pytest.mark.timeout(600)
slow = pytest.mark.slow
SPLIT = {"expert_parallel": 2}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("single") / "out", 1, {"engine": "torch"})


@pytest.mark.distributed
@pytest.mark.parametrize(
    "experts", ["sorted_experts", pytest.param("eager", marks=slow), pytest.param("grouped_mm", marks=slow)]
)
def test_gradients_of_split_experts_equal_those_of_whole_ones(experts):
    done = launch(2, Path(expert_worker.__file__), experts)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [{"zero_stage": 1}, *(pytest.param(options, marks=slow) for options in (
        {"zero_stage": 0}, {"zero_stage": 2}, {"engine": "torch"}, {"zero_stage": 1, "experts": "eager"},
        {"zero_stage": 1, "sequence_parallel": 2},
    ))],
)  # fmt: skip
def test_two_ranks_with_half_the_experts_each_equal_one(options, single, tmp_path):
    assert_same(train(tmp_path / "out", 2, {**SPLIT, **options}), single)


@pytest.mark.distributed
@pytest.mark.slow
def test_split_experts_accumulate_and_recompute_as_whole_ones_do(single, tmp_path):
    options = {"zero_stage": 1, "micro_batches": 2}
    expected = train(tmp_path / "whole", 2, options)
    assert_same(train(tmp_path / "split", 2, {**SPLIT, **options}), expected)
    assert_same(train(tmp_path / "recomputed", 2, {**SPLIT, "zero_stage": 1}, checkpointing=True), single)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        {"zero_stage": 1, **SPLIT},
        *(pytest.param(options, marks=slow) for options in ({"zero_stage": 3}, {"engine": "torch", **SPLIT})),
    ],
)
def test_a_checkpoint_holds_the_whole_model_and_the_run_goes_on_from_it(options, single, tmp_path):
    first = train(tmp_path / "first", 2, options, steps=2, run_dir=str(tmp_path / "run"))
    model = load_model(tmp_path / "run")
    state = model.state_dict()
    assert set(state) == set(first["weights"])
    for name, value in first["weights"].items():
        kept = value if "correction_bias" in name else value.bfloat16()
        assert torch.equal(state[name].to(kept.dtype), kept), name
    optimizer = tmp_path / "run" / "checkpoints" / "step-2" / "optimizer"
    second = train(tmp_path / "second", 2, options, start=2, load=str(optimizer))
    for key in ("specs", "losses", "norms"):
        second[key] = first[key] + second[key]
    assert_same(second, single)


@pytest.mark.distributed
@pytest.mark.slow
def test_split_experts_follow_whole_ones_in_bf16(single, tmp_path):
    result = train(tmp_path / "out", 2, {**SPLIT, "zero_stage": 2, "precision": "bf16"})
    difference = (torch.tensor(result["losses"]) - torch.tensor(single["losses"])).abs().max()
    assert 1e-5 < difference < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 3}, "works with zero_stage 0 or 1 or 2, not 3"),
        ({"zero_stage": 0, "optimizer": "muon"}, "works with optimizer adamw, not muon"),
        ({"offload": "optimizer"}, "works with offload none"),
        ({"resume_other_world_size": True}, "works with resume_other_world_size False"),
        ({"expert_parallel": 0}, "expert_parallel 0 must be at least 1"),
    ],
)
def test_what_split_experts_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**{**SPLIT, **changes})


def test_experts_are_split_over_all_ranks_or_none():
    with pytest.raises(ConfigError, match=r"expert_parallel 2 must be 1 or the number of ranks 1; pass .*parallel 1"):
        TorchEngine(tiny_model(), TrainingConfig(engine="torch", **SPLIT))


def test_ranks_must_divide_the_experts(monkeypatch):
    from ernie_elastic.training.engines import expert_parallel

    monkeypatch.setattr(expert_parallel, "world_size", lambda: 4)
    with pytest.raises(ConfigError, match="6 experts cannot be split over 4 ranks"):
        expert_parallel.ExpertParallel(
            tiny_model(), TrainingConfig(engine="torch", expert_parallel=4), torch.device("cpu")
        )
