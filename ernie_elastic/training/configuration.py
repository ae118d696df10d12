"""Configuration of a pre-training run: frozen, checked at once, overridable from the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ernie_elastic.data.groups.augmentation import Augmentation
from ernie_elastic.errors import ConfigError
from ernie_elastic.training.curriculum import TrainingStage
from ernie_elastic.training.guards.spikes import SpikeConfig
from ernie_elastic.training.losses import LossWeights, PosteriorWeights
from ernie_elastic.training.schedules import Schedule


@dataclass(frozen=True)
class TrainingConfig:
    """One run of the backbone.

    steps: optimizer steps. rows_per_step: packed rows of a step over all ranks. micro_batches: gradient accumulation.
    learning_rate, weight_decay, beta1, beta2: AdamW (paper: silent; ours). optimizer "muon" moves the matrices of the
    stack by Muon (experimental) at muon_learning_rate, on the same schedule, and the rest by AdamW; it needs zero_stage
    0, since ZeRO's other stages flatten what Muon needs whole. "cpu_adam" is DeepSpeed's AdamW in C++ for offload
    "optimizer", where ZeRO keeps optimizer state and masters in CPU memory. gradient_clip: 0 switches clipping off.
    bias_speed: step of the balance bias (paper: 1e-4; ours larger, since a demo has few steps). engine: "deepspeed", or
    "torch" for machines without it. zero_stage: 0 to 3. precision: of the forward and backward; optimizer and masters
    are fp32 in both (bf16 rounds the working weights alone). expert_parallel: ranks over which
    every layer's experts are split, 1 or all of them. resume_other_world_size: a checkpoint of another number of ranks
    may be read (through DeepSpeed's universal form). checkpoint_every: steps, 0 = only at the end.
    augmentation: history flips, dropped frames and conditions. bit_schedule: (share of the run, bits): from that share
    on only so many visual bits are predicted; empty = all (paper: section 2.2, counts and switch points silent).
    loss_weights times posterior: the weight of each modality's mean loss. sequence_parallel: ranks that share each
    row, by attention heads (DeepSpeed-Ulysses); 1 = none.
    stop_after: end this session after so many steps, with a checkpoint; the same command goes on from there (0 = no
    limit). experts: back end of the experts; auto is sorted_experts on a CPU and grouped_mm on most GPUs. attention:
    its back end; flex_attention needs a GPU. keep_checkpoints: older ones are removed.
    skip_limit: a step whose loss or gradient is not finite is skipped and counted; so many in a row end the run with
    the rows they read (0 = never). wandb: offline or online tracking beside metrics.jsonl.
    rank_limit_s: a rank without a sign of life for so long ends the job, by name (0 = no watch). async_checkpoint:
    write checkpoints in a thread while training goes on, for the state once more in host memory; False: at once.
    spikes: loss-spike rollback. stages: replace schedule and set batch, RoPE base, bias speed and MTP weight for
    parts of the run; chosen by presets. log_every: steps between printed lines, 0 = none (metrics.jsonl has every
    step). tensorboard: event files beside metrics.jsonl.
    """

    steps: int = 1000
    rows_per_step: int = 16
    micro_batches: int = 1
    optimizer: Literal["adamw", "cpu_adam", "muon"] = "adamw"
    learning_rate: float = 2e-3
    muon_learning_rate: float = 1.2e-2
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    posterior: PosteriorWeights = field(default_factory=PosteriorWeights)
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(frame_drop=0.1, condition_dropout=0.1))
    bit_schedule: tuple[tuple[float, int], ...] = ()
    bias_speed: float = 1e-3
    seed: int = 0
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    offload: Literal["none", "optimizer"] = "none"
    expert_parallel: int = 1
    resume_other_world_size: bool = False
    experts: Literal["auto", "eager", "grouped_mm", "sorted_experts"] = "auto"
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    gradient_checkpointing: bool = False
    sequence_parallel: int = 1
    checkpoint_every: int = 0
    stop_after: int = 0
    keep_checkpoints: int = 2
    skip_limit: int = 10
    log_every: int = 1
    wandb: Literal["off", "offline", "online"] = "off"
    step_limit_s: float = 600.0
    # What keeps a run safe and says how it goes.
    rank_limit_s: float = 45.0
    async_checkpoint: bool = True
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    stages: Annotated[tuple[TrainingStage, ...], tyro.conf.Suppress] = ()
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.skip_limit < 0:
            raise ConfigError(f"training: skip_limit {self.skip_limit} must be 0 (never stop) or more")
        if self.steps < 1 or self.rows_per_step < 1 or self.micro_batches < 1:
            raise ConfigError(
                f"training: steps {self.steps}, rows_per_step {self.rows_per_step} and micro_batches "
                f"{self.micro_batches} must all be at least 1"
            )
        shares = [share for share, _ in self.bit_schedule]
        if shares != sorted(set(shares)) or any(not 0 <= share <= 1 or bits < 1 for share, bits in self.bit_schedule):
            raise ConfigError(
                f"training: bit_schedule {self.bit_schedule} must hold (share of the run in 0..1, bits above 0) with "
                "growing shares"
            )
        if self.learning_rate <= 0 or self.muon_learning_rate <= 0:
            raise ConfigError(
                f"training: learning_rate {self.learning_rate} and muon_learning_rate {self.muon_learning_rate} must "
                "be above 0"
            )
        self._check_engine()
        self._check_optimizer()
        self._check_expert_parallel()

    def _check_engine(self) -> None:
        for name, choices in (
            ("engine", ("deepspeed", "torch")),
            ("optimizer", ("adamw", "cpu_adam", "muon")),
            ("precision", ("fp32", "bf16")),
            ("attention", ("sdpa", "flex_attention")),
            ("offload", ("none", "optimizer")),
            ("zero_stage", (0, 1, 2, 3)),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise ConfigError(f"training: {name} {getattr(self, name)!r} is not one of {listed}")
        if self.sequence_parallel < 1 or (self.sequence_parallel > 1 and self.engine != "deepspeed"):
            raise ConfigError(
                f"training: sequence_parallel {self.sequence_parallel} must be at least 1, and above 1 it needs "
                f"--training.engine deepspeed (it is {self.engine})"
            )
        if self.precision == "bf16" and self.engine == "deepspeed" and self.zero_stage == 0:
            raise ConfigError(
                "training: precision bf16 with zero_stage 0 would keep no fp32 masters apart; pass "
                "--training.zero-stage 1, 2 or 3, or --training.precision fp32"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer == "muon" and self.engine == "deepspeed" and self.zero_stage:
            raise ConfigError(
                f"training: optimizer muon needs whole matrices, and zero_stage {self.zero_stage} flattens them; pass "
                "--training.zero-stage 0, or --training.optimizer adamw"
            )
        if self.offload == "optimizer" and (self.engine != "deepspeed" or self.zero_stage == 0):
            raise ConfigError(
                f"training: offload optimizer is ZeRO's: it needs --training.engine deepspeed (it is {self.engine}) "
                f"and --training.zero-stage 1, 2 or 3 (it is {self.zero_stage})"
            )
        if self.optimizer == "cpu_adam" and self.offload != "optimizer":
            raise ConfigError(
                f"training: optimizer cpu_adam steps on the CPU and offload is {self.offload}; pass --training.offload "
                "optimizer, or --training.optimizer adamw"
            )

    def _check_expert_parallel(self) -> None:
        if self.expert_parallel < 1:
            raise ConfigError(f"training: expert_parallel {self.expert_parallel} must be at least 1")
        if self.expert_parallel == 1:
            return
        for name, value, allowed in (
            ("zero_stage", self.zero_stage, (0, 1, 2)),
            ("optimizer", self.optimizer, ("adamw",)),
            ("offload", self.offload, ("none",)),
            ("resume_other_world_size", self.resume_other_world_size, (False,)),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"training: expert_parallel {self.expert_parallel} works with {name} "
                    f"{' or '.join(map(str, allowed))}, not {value}; change it, or pass --training.expert-parallel 1"
                )

    def active_bits(self, step: int) -> int | None:
        """Visual bits in use at a step; None = all."""
        reached = [bits for share, bits in self.bit_schedule if step >= share * self.steps]
        return reached[-1] if reached else None
