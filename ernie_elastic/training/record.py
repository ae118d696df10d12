"""What a run says: one record a step for metrics.jsonl and the trackers, and at the start what really runs."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ernie_elastic.elastic.space import ElasticConfig
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.modeling.losses import LOSSES
from ernie_elastic.schema import SubModelSpec
from ernie_elastic.training.balance import load_max_over_mean, routers
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.choice import Engine, MicroResult
from ernie_elastic.training.flops import Peak, StepFlops
from ernie_elastic.training.ranks import world_size

BUCKETS = ("full", "depth", "width", "sparsity", "mixed")


@dataclass(frozen=True)
class Clock:
    """Seconds of one step: all of it, waiting for data, and for the checkpoint that the step before began."""

    seconds: float
    data_wait_s: float
    checkpoint_stall_s: float


def mean_losses(results: list[MicroResult]) -> dict[str, float]:
    """Mean loss of each kind that had targets, over all ranks and micro-batches."""
    sums = torch.stack([result.sums for result in results]).sum(0)
    counts = torch.stack([result.counts for result in results]).sum(0)
    return {name: float(sums[i] / counts[i]) for i, name in enumerate(LOSSES) if float(counts[i]) > 0}


def bucket_of(specs: Sequence[SubModelSpec], full: SubModelSpec) -> str:
    """Which axes a step shrinks: full, depth, width, sparsity, or mixed (several axes, or different micro-batches)."""
    if len(set(specs)) > 1:
        return "mixed"
    spec = specs[0]
    shrunk = {
        "depth": len(spec.layers) < len(full.layers),
        "width": spec.num_experts < full.num_experts,
        "sparsity": any(k < full.top_ks[layer] for layer, k in zip(spec.layers, spec.top_ks, strict=True)),
    }
    names = [name for name, smaller in shrunk.items() if smaller]
    return "full" if not names else names[0] if len(names) == 1 else "mixed"


def spec_record(specs: Sequence[SubModelSpec], full: SubModelSpec) -> dict[str, Any]:
    """A step's sub-model; those of the other micro-batches under `others` when they differ."""
    spec = specs[0]
    record: dict[str, Any] = {
        "label": spec.label(),
        "bucket": bucket_of(specs, full),
        "num_layers": len(spec.layers),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layers": list(spec.layers),
    }
    if spec.top_k_per_layer is not None:
        record["top_k_per_layer"] = list(spec.top_k_per_layer)
    if len(set(specs)) > 1:
        record["others"] = [other.label() for other in specs[1:]]
    return record


def routing_record(
    model: ErnieElasticForCausalLM, counts_LE: torch.Tensor, specs: Sequence[SubModelSpec], full: SubModelSpec
) -> dict[str, Any]:
    """Balance of a step from its counts [L, E]; only full steps, where all could be used, have dead experts."""
    bias = torch.stack([gate.e_score_correction_bias for gate in routers(model).values()])
    whole = all(spec == full for spec in specs)
    return {
        "load_max_over_mean": load_max_over_mean(counts_LE, specs),
        "dead_experts": int((counts_LE[list(full.layers)] == 0).sum()) if whole else None,
        "bias_range": float(bias.max() - bias.min()),
    }


class SpeedRecord:
    """Speed of the steps against a stated peak, and the time that is left."""

    def __init__(self, flops: StepFlops, peak: Peak, steps: int) -> None:
        self.flops, self.peak, self.steps = flops, peak, steps
        self._mean_s = 0.0

    def of(self, step: int, positions: float, specs: Sequence[SubModelSpec], clock: Clock) -> dict[str, Any]:
        """positions: of all ranks, spread evenly over the specs of the micro-batches."""
        whole = clock.seconds + clock.data_wait_s + clock.checkpoint_stall_s
        self._mean_s = whole if self._mean_s == 0 else 0.9 * self._mean_s + 0.1 * whole
        work = positions * sum(self.flops.per_position(spec) for spec in specs) / len(specs)
        return {
            "tokens_per_s": positions / clock.seconds,
            "positions": int(positions),
            "seconds": clock.seconds,
            "mfu": work / clock.seconds / (self.peak.flops * world_size()),
            "memory_gib": memory_gib(),
            "data_wait_s": clock.data_wait_s,
            "data_wait_share": clock.data_wait_s / whole,
            "checkpoint_stall_s": clock.checkpoint_stall_s,
            "eta_s": self._mean_s * (self.steps - step - 1),
        }


def memory_gib() -> float:
    """Most memory that this process has held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def line_of(record: dict[str, Any], steps: int) -> str:
    """One line for people."""
    head = f"step {record['step'] + 1}/{steps}"
    if record.get("skipped"):
        return f"{head} skipped: its loss or gradient is not finite"
    losses = " ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
    worst = max((value for value in record["load_max_over_mean"] if value is not None), default=0.0)
    dead = "" if not record["dead_experts"] else f", {record['dead_experts']} dead"
    stage = f"{record['stage']} | " if "stage" in record else ""
    return (
        f"{head} | {stage}loss {record['loss']:.3f} ({losses}) | {record['spec']['label']} | lr {record['lr']:.2e} "
        f"norm {record['grad_norm']:.2f} | load {worst:.2f}{dead} bias {record['bias_range']:.4f} | "
        f"{record['tokens_per_s']:.0f} tok/s MFU {record['mfu']:.1%} data {record['data_wait_share']:.1%} "
        f"{record['memory_gib']:.2f} GiB | {duration(record['eta_s'])} left"
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def setup_line(run_dir: Any, engine: Engine, training: TrainingConfig, elastic: ElasticConfig, peak: Peak) -> str:
    """What really runs: engine, ZeRO, precision, back ends, elastic distribution, checkpoints, peak."""
    config = engine.model.config
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in engine.model.parameters()}))
    stages = " -> ".join(stage.name for stage in training.stages)
    return (
        f"pretrain: {run_dir} | engine {training.engine}, ZeRO {training.zero_stage}, "
        f"{training.optimizer}, {world_size()} rank(s) on {engine.device}, {training.precision} (weights {dtypes}) | "
        f"{engine.num_parameters():,} parameters, {config.num_hidden_layers} layers, {config.num_experts} experts, "
        f"top-{config.num_experts_per_tok} | attention {config._attn_implementation}, experts "
        f"{config._experts_implementation} | elastic {elastic_words(elastic, training.steps)} | "
        f"{training.rows_per_step} rows in {training.micro_batches} micro-batch(es) a step"
        + (f", stages {stages}" if stages else "")
        + f" | checkpoints {'beside the training' if training.async_checkpoint else 'at once'} | peak of a rank "
        f"{peak.source}"
    )


def elastic_words(elastic: ElasticConfig, steps: int) -> str:
    """The distribution of sub-models in words."""
    if not elastic.enabled:
        return "off"
    shares = f"{elastic.full_depth:.0%}/{elastic.full_width:.0%}/{elastic.full_sparsity:.0%}"
    every = "micro-batches" if elastic.per_micro_batch else "steps"
    kind = "full, smallest and random in every step" if elastic.sandwich else f"full on {shares} of the {every}"
    return (
        f"{kind} (depth/width/sparsity) from step {elastic.start_share * steps:.0f} on, layers {elastic.layer_policy}"
    )
