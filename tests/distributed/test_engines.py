"""DeepSpeed on two ranks, ZeRO 0 to 3, trains as plain torch on one rank does, elastic steps included."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.running import assert_same, train
from tests.modeling.common import tiny_model

pytestmark = pytest.mark.timeout(600)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of (ranks, training options), each run once."""
    folder, results = tmp_path_factory.mktemp("trained"), {}

    def get(ranks, **training):
        key = (ranks, *sorted(training.items()))
        if key not in results:
            results[key] = train(folder / f"run{len(results)}", ranks, training)
        return results[key]

    return get


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=slow) for stage in (0, 2, 3))])
def test_deepspeed_on_two_ranks_equals_torch_on_one(stage, trained):
    assert_same(trained(2, zero_stage=stage), trained(1, engine="torch"))


@pytest.mark.distributed
def test_stage_3_equals_stage_1_and_plain_deepspeed_would_not(trained, tmp_path):
    """Layers that a spec leaves out have a zero gradient. Without `_touch_unused` stage 3 applies their last real
    gradient again, silently; stage 1 takes the missing one as zero by itself."""
    stage_1 = trained(2, zero_stage=1)
    assert_same(trained(2, zero_stage=3), stage_1)
    plain_1 = train(tmp_path / "plain1", 2, {"zero_stage": 1}, touch_unused=False)
    assert_same(plain_1, stage_1)
    plain_3 = train(tmp_path / "plain3", 2, {"zero_stage": 3}, touch_unused=False)
    assert plain_3["specs"] == stage_1["specs"]
    apart = [float((plain_3["weights"][name] - value).abs().max()) for name, value in stage_1["weights"].items()]
    assert max(apart) > 1e-2 and abs(plain_3["norms"][-1] / stage_1["norms"][-1] - 1) > 0.05


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_stage_3_takes_a_back_end_whose_calls_depend_on_the_tokens(experts, trained):
    assert_same(trained(2, zero_stage=3, experts=experts), trained(1, engine="torch"))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"zero_stage": 3}, {"zero_stage": 2}, {"zero_stage": 0}])
def test_gradient_accumulation_means_the_same_under_every_stage(options, trained):
    assert_same(trained(2, micro_batches=2, **options), trained(2, micro_batches=2, zero_stage=1))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_changes_nothing(stage, trained, tmp_path):
    assert_same(train(tmp_path / "out", 2, {"zero_stage": stage}, checkpointing=True), trained(1, engine="torch"))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_router_losses_mean_the_same_under_stage_3(stage, tmp_path):
    model = {"router_z_loss": 0.01, "router_orthogonal_loss": 0.1}
    expected = train(tmp_path / "torch", 2, {"engine": "torch"}, model=model)
    assert_same(train(tmp_path / "out", 2, {"zero_stage": stage}, model=model), expected)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "cpu_adam"])
def test_an_offloaded_optimizer_takes_the_same_steps(stage, optimizer, trained):
    assert_same(trained(2, zero_stage=stage, offload="optimizer", optimizer=optimizer), trained(1, engine="torch"))


POISONED = [
    {"zero_stage": 1}, *(pytest.param(options, marks=slow) for options in (
        {"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"engine": "torch"},
        {"zero_stage": 1, "precision": "bf16"}, {"zero_stage": 3, "precision": "bf16"},
        {"zero_stage": 2, "offload": "optimizer"}, {"zero_stage": 0, "expert_parallel": 2},
        {"zero_stage": 1, "expert_parallel": 2}, {"engine": "torch", "expert_parallel": 2},
    )),
]  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("options", POISONED)
def test_a_gradient_that_is_no_number_on_one_rank_changes_no_weight_on_any(options, tmp_path):
    result = train(tmp_path / "out", 2, options, steps=3, poisoned=1)
    assert len(result["losses"]) == 2 and min(result["norms"]) > 0
    assert torch.tensor(result["losses"]).isfinite().all(), "the step after the poisoned one is a usual one"


@pytest.mark.distributed
def test_two_ranks_that_share_each_sequence_equal_one(trained):
    assert_same(trained(2, zero_stage=1, sequence_parallel=2), trained(1, engine="torch"))


@pytest.mark.slow
@pytest.mark.distributed
def test_muon_on_two_ranks_equals_one(trained):
    assert_same(trained(2, zero_stage=0, optimizer="muon"), trained(1, engine="torch", optimizer="muon"), weights=5e-3)


@pytest.mark.distributed
@pytest.mark.slow
def test_torch_engine_on_two_ranks_equals_one(trained):
    assert_same(trained(2, engine="torch"), trained(1, engine="torch"))


BF16 = [({"engine": "torch"}, 1), *(pytest.param({"zero_stage": stage}, 2, marks=slow) for stage in (1, 2, 3))]


@pytest.mark.distributed
@pytest.mark.parametrize(("options", "ranks"), BF16)
def test_bf16_follows_the_fp32_losses(options, ranks, trained):
    result, expected = trained(ranks, precision="bf16", **options), trained(1, engine="torch")
    assert result["specs"] == expected["specs"]
    losses = [torch.tensor(each["losses"]) for each in (result, expected)]
    assert 1e-5 < (losses[0] - losses[1]).abs().max() < 0.05, "rounded, and no more than that"
    biases = [torch.tensor(each["bias"][0]) for each in (result, expected)]
    assert (biases[0] - biases[1]).abs().max() < 0.01, "balance biases move by 0.001 a step and stay fp32"
    bias = torch.tensor(result["bias"])
    assert (bias != bias.bfloat16().float()).float().mean() > 0.5, "BF16 would not hold them"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("options", "ranks"), BF16)
def test_bf16_steps_below_its_own_resolution_add_up_in_fp32_masters(options, ranks, tmp_path):
    """A step of 1e-4 is below half a unit of a weight of 0.07 (2.4e-4): rounded at once it would be lost."""
    job = {"lr": 1e-4, "model": {"initializer_range": 0.2}}
    first, last = (train(tmp_path / f"{n}", ranks, {"precision": "bf16", **options}, steps=n, **job) for n in (1, 12))
    name = "model.layers.0.self_attn.q_proj.weight"
    large = first["weights"][name].abs() > 0.07  # BF16 there has steps of 2^-11 and more
    moved = (first["weights"][name] != last["weights"][name])[large].float().mean()
    assert large.sum() > 100 and moved > 0.02, f"{moved:.0%} of the large weights moved"


def test_every_parameter_gets_a_gradient_whatever_the_batch_holds():
    from ernie_elastic.data.groups.grouping import build_document
    from ernie_elastic.data.packed.packing import collate
    from ernie_elastic.modeling.document_layout import layout_of
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
