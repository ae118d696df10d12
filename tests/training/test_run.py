"""Configuration, schedules, balance, checkpoints: what a run must hold to."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from ernie_elastic.data.groups.grouping import build_document
from ernie_elastic.data.packed.packing import collate
from ernie_elastic.errors import CheckpointError, ConfigError, TrainingError
from ernie_elastic.generation.loading import load_model
from ernie_elastic.modeling.document_layout import layout_of
from ernie_elastic.presets import PRESETS
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.training.balance import RoutingLedger, load_max_over_mean, update_bias
from ernie_elastic.training.checkpoints.checkpoint import TrainerState, checkpoint_problem, latest_checkpoint
from ernie_elastic.training.checkpoints.writer import CheckpointWriter
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines import base as engine_module
from ernie_elastic.training.engines.choice import TorchEngine, deepspeed_config
from ernie_elastic.training.guards.skip import StepGuard
from ernie_elastic.training.losses import LossBalance, LossWeights, PosteriorWeights, combine
from ernie_elastic.training.metrics import MetricsWriter
from ernie_elastic.training.schedules import Schedule
from tests.modeling.common import DOCUMENTS, random_parts, tiny_model


def test_deepspeed_config_is_pure_and_names_clipping():
    config = deepspeed_config(TrainingConfig(rows_per_step=16, micro_batches=2, gradient_clip=0.0), 2)
    assert config == {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 1, "contiguous_gradients": True, "overlap_comm": False, "reduce_scatter": True,
        },
        "steps_per_print": 10**9, "wall_clock_breakdown": False,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="rows_per_step 16 is no multiple of 3 ranks that read data x 1"):
        deepspeed_config(TrainingConfig(rows_per_step=16), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps 0"), ({"zero_stage": 4}, "zero_stage 4"),
        ({"optimizer": "muon"}, "zero_stage 1 flattens"), ({"optimizer": "sgd"}, "not one of adamw, cpu_adam, muon"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"muon_learning_rate": 0.0}, "muon_learning_rate 0.0"),
        ({"engine": "jax"}, "engine 'jax'"),
    ],
)  # fmt: skip
def test_training_values_are_checked_at_once(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)


def test_schedule_warms_up_holds_and_decays():
    schedule = Schedule(warmup_steps=10, decay_share=0.5, min_ratio=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and set(factors[9:50]) == {1.0}
    assert factors[50:] == sorted(factors[50:], reverse=True) and factors[-1] == pytest.approx(0.1, abs=0.01)


def test_bias_moves_against_load_for_eligible_experts_of_layers_that_ran():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    counts = torch.zeros(6, 6, dtype=torch.float64)
    counts[0] = torch.tensor([10.0, 0, 5, 7, 0, 0])
    spec = SubModelSpec((0, 3, 4, 5), ((0, 1, 2),) * 4, 1)
    update_bias(model, counts, spec, 0.5)
    bias = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in model.model.layers]
    assert bias[0] == [-0.5, 0.5, 0.0, 0, 0, 0], "mean load of the eligible ones is 5; expert 3 was not eligible"
    assert bias[1] == [0] * 6 and bias[3] == [0] * 6
    assert load_max_over_mean(counts, spec)[:2] == [pytest.approx(2.0), None]


def test_mass_is_kept_on_full_steps_only():
    ledger = RoutingLedger(2, 3)
    ledger.step_mass_LE += 1.0
    ledger.finish_step(lambda tensor: tensor, full_spec=False)
    assert ledger.mass_LE.sum() == 0
    ledger.step_mass_LE += 1.0
    ledger.finish_step(lambda tensor: 2 * tensor, full_spec=True)
    assert ledger.mass_LE.sum() == 12


def test_loss_is_the_mean_over_all_ranks():
    # Two ranks with 1 and 3 text targets: DeepSpeed averages the two scaled losses.
    local = [(torch.tensor([2.0, 0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0, 0])),
             (torch.tensor([9.0, 0, 0, 0, 0]), torch.tensor([3.0, 0, 0, 0, 0]))]  # fmt: skip
    total = torch.cat([local[0][0] + local[1][0], local[0][1] + local[1][1]])
    losses = [combine(s, c, LossWeights().vector(), lambda _: total, 2)[0] for s, c in local]
    assert sum(losses) / 2 == pytest.approx((2.0 + 9.0) / 4)


def test_a_row_of_skipped_steps_ends_the_run_with_its_rows():
    guard = StepGuard(3)
    rows = {step: list(range(10 * step, 10 * step + 10)) for step in range(9)}
    nan, inf = float("nan"), float("inf")
    assert [guard.applied(step, norm, rows.get) for step, norm in enumerate([1.0, nan, inf, 0.5, nan, -inf])] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to step 6 .limit 3.*step 4: rows 40, 41.*10 in all"):
        guard.applied(6, nan, rows.get)
    assert guard.skipped == 5
    endless = StepGuard(0)
    assert not any(endless.applied(step, nan, rows.get) for step in range(50))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(value, monkeypatch):
    model = tiny_model(0)
    engine = TorchEngine(model, TrainingConfig(engine="torch", rows_per_step=1))
    parts = [random_parts(name, 1, model.config) for name in DOCUMENTS]
    batch = collate([[build_document(part, layout_of(model.config)) for part in parts]], 512)
    spec = model.config.full_spec()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    combined = engine_module.modality_sums

    def spoiled(output, batch, power):
        sums, counts = combined(output, batch, power)
        return sums.index_fill(0, torch.tensor([0]), value), counts  # a constant: its gradient is finite

    monkeypatch.setattr(engine_module, "modality_sums", spoiled)
    _, norm = engine.train_step([batch], spec, 1e-2)
    assert not math.isfinite(norm)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    monkeypatch.undo()
    _, norm = engine.train_step([batch], spec, 1e-2)
    assert norm > 0 and not all(torch.equal(before[name], p) for name, p in model.named_parameters())


def make_checkpoint(run_dir, step, seed=0):
    model = tiny_model(seed)
    engine = TorchEngine(model, TrainingConfig(engine="torch", rows_per_step=1))
    state = TrainerState(RoutingLedger(6, 6), LossBalance(LossWeights(), PosteriorWeights()), StepGuard(3))
    writer = CheckpointWriter(run_dir, None, {"seed": seed}, keep=3)
    checkpoint = writer.save(step, engine, state)
    writer.wait()
    return checkpoint, model


def test_a_checkpoint_loads_bit_equal_with_an_empty_report(tmp_path):
    checkpoint, model = make_checkpoint(tmp_path, 1)
    first, second = load_model(tmp_path), load_model(checkpoint)
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
        original = model.state_dict()[name]
        rounded = original if "correction_bias" in name else original.to(torch.bfloat16).float()
        assert torch.equal(ours, rounded), name
    assert first.model.layers[0].mlp.gate.e_score_correction_bias.abs().sum() > 0


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    before, _ = make_checkpoint(tmp_path, 1)
    newest, _ = make_checkpoint(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == newest and checkpoint_problem(newest) is None
    state = newest / "optimizer" / "torch_engine.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert "SHA-256" in checkpoint_problem(newest)
    assert latest_checkpoint(tmp_path) == before and "damaged" in caplog.text
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        latest_checkpoint(tmp_path)


def test_metrics_of_steps_that_run_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)) + '{"step": 5, "lo')
    writer = MetricsWriter(path, start_step=3)
    writer.write({"step": 3, "loss": 1.0})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_wandb_offline_writes_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 0, "offline", "test")
    writer.write({"step": 0, "loss": 2.0, "losses": {"text": 2.0}})
    writer.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_on_the_meta_device(name):
    from ernie_elastic.elastic.extract import parameter_counts
    from ernie_elastic.elastic.space import check_space
    from ernie_elastic.modeling import ErnieElasticForCausalLM
    from tests.support.fake_tokenizers import fake_tokenizers

    config = PRESETS[name]().model.to_config(fake_tokenizers())
    check_space(config)
    with torch.device("meta"):
        model = ErnieElasticForCausalLM(config)
    total, active = parameter_counts(model)
    assert active < total
    if name == "ablation_3b":  # paper: 3.2 B total, 454 M active; ours counts embeddings and heads too
        assert 3.0e9 < total < 3.5e9 and 0.4e9 < active < 0.6e9
    if name == "ultra_sparse":
        assert config.num_experts == 512 and config.num_experts_per_tok == 8 and active / total < 0.03
