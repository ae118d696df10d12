"""DeepSpeed's JSON, made of the training configuration by one pure function."""

from __future__ import annotations

from typing import Any

from ernie_elastic.errors import ConfigError
from ernie_elastic.training.configuration import TrainingConfig

EXPERTS_CLASS = "ernie_elastic.modeling.model.ErnieElasticExperts"


def deepspeed_config(training: TrainingConfig, ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; a pure function. Clipping is always named, since its default is not 0."""
    groups = ranks // training.sequence_parallel
    if groups * training.sequence_parallel != ranks:
        raise ConfigError(f"training: {ranks} ranks are no multiple of sequence_parallel {training.sequence_parallel}")
    micro_rows = training.rows_per_step // (groups * training.micro_batches)
    if micro_rows < 1 or micro_rows * groups * training.micro_batches != training.rows_per_step:
        raise ConfigError(
            f"training: rows_per_step {training.rows_per_step} is no multiple of {groups} ranks that read data x "
            f"{training.micro_batches} micro-batches; change --training.rows-per-step"
        )
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
    }
    if training.zero_stage == 3:
        # A leaf is gathered whole: the loop back end calls the activation once per expert that has tokens, and stage 3
        # counts the modules that are called.
        zero["leaf_module"] = {"classes": [EXPERTS_CLASS], "names": [], "name_suffixes": []}
    if training.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        # DeepSpeed counts every rank; the ranks of a sequence group share their rows.
        "train_batch_size": micro_rows * training.micro_batches * ranks,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": training.micro_batches,
        # Stage 0 would clip by the norm of the dense part alone; the engine clips there.
        "gradient_clipping": 0.0 if own_clipping(training) else training.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if training.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if training.offload == "optimizer" and training.optimizer != "cpu_adam":
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def own_clipping(training: TrainingConfig) -> bool:
    """True where the engine clips itself, since DeepSpeed does not see every parameter and keeps no norm."""
    return training.expert_parallel > 1 and training.zero_stage == 0
