"""What a run says: operations of sub-models, buckets, trackers, lines."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from ernie_elastic.elastic.extract import extract_model
from ernie_elastic.errors import ConfigError
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.training.accumulation import one_or_all, specs_of
from ernie_elastic.training.balance import eligible_load, load_max_over_mean, update_bias
from ernie_elastic.training.flops import Peak, StepFlops, device_peak
from ernie_elastic.training.metrics import MetricsWriter, read_metrics, scalars
from ernie_elastic.training.record import Clock, SpeedRecord, bucket_of, duration, line_of, spec_record
from tests.modeling.common import tiny_model

EXPERTS = tuple(range(6))
FULL = SubModelSpec.full(6, 6, 2)
SHALLOW = SubModelSpec((0, 3, 4, 5), (EXPERTS,) * 4, 2)
NARROW = SubModelSpec(FULL.layers, ((0, 1, 2),) * 6, 2)
SPARSE = SubModelSpec(FULL.layers, FULL.experts_per_layer, 1)
UNEVEN = SubModelSpec.of(FULL.layers, FULL.experts_per_layer, (2, 1, 1, 2, 1, 1))


def test_active_parameters_are_those_of_the_extracted_model():
    model = tiny_model()
    flops = StepFlops(model.config, 128)
    assert model.config.tie_word_embeddings, "so the text head is the table of text, which multiplies"
    tables = sum(p.numel() for name, p in model.named_parameters() if "embed" in name and "embed_tokens" not in name)
    for spec in (FULL, SHALLOW, NARROW, SPARSE, UNEVEN):
        cut = extract_model(model, spec)
        experts = sum(p.numel() for name, p in cut.named_parameters() if ".mlp.experts." in name)
        gates = sum(p.numel() for name, p in cut.named_parameters() if name.endswith("mlp.gate.weight"))
        rest = sum(p.numel() for p in cut.parameters()) - experts - gates - tables
        rest += gates * 6 // spec.num_experts  # every expert's score counts
        top_k = sum(spec.top_ks) / len(spec.top_ks)
        assert flops.active(spec) == rest + experts * top_k / spec.num_experts
    attention = 12 * 128 * model.config.num_attention_heads * model.config.head_dim
    assert flops.per_position(FULL) == 6 * flops.active(FULL) + 6 * attention


def test_speed_is_counted_against_the_peak_and_the_rest_of_the_run(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flops = StepFlops(tiny_model().config, 128)
    speed = SpeedRecord(flops, Peak(1e9, "made up"), 11)
    record = speed.of(0, 1000.0, [FULL, SPARSE], Clock(2.0, 0.5, 1.5))
    mean = (flops.per_position(FULL) + flops.per_position(SPARSE)) / 2
    assert record["mfu"] == pytest.approx(1000 * mean / 2.0 / 2e9) and record["tokens_per_s"] == 500
    assert record["eta_s"] == pytest.approx(40.0) and record["data_wait_share"] == pytest.approx(0.125)
    assert record["checkpoint_stall_s"] == 1.5 and record["memory_gib"] > 0.05
    assert duration(3725.2) == "1:02:05"


def test_a_cpu_peak_is_measured_and_says_so():
    peak = device_peak(torch.device("cpu"))
    assert 1e8 < peak.flops < 1e14 and "measured" in peak.source


def test_steps_fall_into_buckets_by_what_they_shrink():
    both = SubModelSpec(SHALLOW.layers, SHALLOW.experts_per_layer, 1)
    found = [bucket_of([spec], FULL) for spec in (FULL, SHALLOW, NARROW, SPARSE, UNEVEN, both)]
    assert (
        found == ["full", "depth", "width", "sparsity", "sparsity", "mixed"]
        and bucket_of([FULL, SPARSE], FULL) == "mixed"
    )
    record = spec_record([FULL, SPARSE], FULL)
    assert record["label"] == "d6-e6-k2" and record["others"] == ["d6-e6-k1"]
    assert "top_k_per_layer" not in record and spec_record([UNEVEN], FULL)["top_k_per_layer"] == [2, 1, 1, 2, 1, 1]


def test_a_tracker_draws_losses_by_modality_and_by_bucket():
    record = {"step": 3, "loss": 2.0, "losses": {"text": 1.5}, "spec": {"bucket": "depth"}, "stage": "stage-1",
              "load_max_over_mean": [1.5, None, 2.5]}  # fmt: skip
    assert scalars(record) == {
        "loss": 2.0, "loss/text": 1.5, "loss_by_spec/depth/text": 1.5, "load_max_over_mean": 2.5,
    }  # fmt: skip


def test_tensorboard_gets_every_scalar_or_is_named_when_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="needs the package tensorboard"):
        MetricsWriter(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    seen: list[tuple] = []

    class Recorder:
        def __init__(self, folder: str) -> None:
            seen.append(("folder", folder))

        def add_scalar(self, *scalar) -> None:
            seen.append(scalar)

        def close(self) -> None:
            seen.append(("closed",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    writer.write({"step": 4, "loss": 2.0, "losses": {"text": 1.0}})
    writer.close()
    assert seen == [("folder", str(tmp_path / "tensorboard")), ("loss", 2.0, 4), ("loss/text", 1.0, 4), ("closed",)]


def test_events_stay_while_steps_that_run_again_go(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 0)
    for step in range(5):
        writer.write({"step": step})
    writer.go_back(2)
    writer.write({"step": 2, "event": "rollback"})
    writer.write({"step": 2})
    writer.close()
    MetricsWriter(tmp_path / "metrics.jsonl", 2).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}, {"step": 2, "event": "rollback"}]
    MetricsWriter(tmp_path / "metrics.jsonl", 1).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]


def test_a_line_says_what_a_step_did():
    record = {
        "step": 4, "stage": "stage-1", "loss": 3.0, "losses": {"text": 2.0, "image": 0.5}, "lr": 1e-3,
        "grad_norm": 1.25,
        "spec": {"label": "d6-e6-k2"}, "load_max_over_mean": [None, 2.5], "dead_experts": 3, "bias_range": 0.004,
        "tokens_per_s": 1234.4, "mfu": 0.31, "data_wait_share": 0.01, "memory_gib": 1.5, "eta_s": 61.0,
    }  # fmt: skip
    assert line_of(record, 9) == (
        "step 5/9 | stage-1 | loss 3.000 (text 2.000 image 0.500) | d6-e6-k2 | lr 1.00e-03 norm 1.25 | "
        "load 2.50, 3 dead bias 0.0040 | 1234 tok/s MFU 31.0% data 1.0% 1.50 GiB | 0:01:01 left"
    )
    assert line_of({"step": 4, "skipped": True}, 9) == "step 5/9 skipped: its loss or gradient is not finite"


def test_a_step_takes_one_spec_or_one_for_each_micro_batch():
    assert specs_of(FULL, 2) == [FULL, FULL] and specs_of([FULL, SPARSE], 2) == [FULL, SPARSE]
    assert one_or_all([FULL, FULL]) == FULL and one_or_all([FULL, SPARSE]) == [FULL, SPARSE]
    with pytest.raises(ConfigError, match="2 sub-model specs for 3 micro-batches"):
        specs_of([FULL, SPARSE], 3)


def test_load_of_an_expert_is_its_mean_over_the_micro_batches_that_had_it():
    counts = torch.zeros(6, 6, dtype=torch.float64)
    counts[0] = torch.tensor([8.0, 8, 8, 2, 4, 6])
    load, eligible = eligible_load(counts, [FULL, NARROW])
    assert load[0].tolist() == [4, 4, 4, 2, 4, 6] and eligible.all()
    assert load_max_over_mean(counts, [FULL, NARROW])[0] == pytest.approx(1.5)
    load, eligible = eligible_load(counts, [SHALLOW, SHALLOW])
    assert load[0].tolist() == counts[0].tolist() and not eligible[1].any()
    model = tiny_model()
    gate = model.model.layers[0].mlp.gate.e_score_correction_bias
    gate.zero_()
    update_bias(model, counts, [FULL, NARROW], 1.0)
    assert gate.tolist() == [0, 0, 0, 1, 0, -1]
