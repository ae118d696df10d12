"""The engines behind one interface: DeepSpeed (`deepspeed_engine`, which alone imports it) and plain torch.

Both take a step over micro-batches of (PackedBatch, SubModelSpec), average gradients over ranks, clip, and step.
"""

from __future__ import annotations

from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.base import Engine, LossModule, MicroResult, seed_everything
from ernie_elastic.training.engines.deepspeed_engine import DeepSpeedEngine
from ernie_elastic.training.engines.deepspeed_json import deepspeed_config
from ernie_elastic.training.engines.optimizers import make_optimizer, parameter_groups
from ernie_elastic.training.engines.torch_engine import TorchEngine


def make_engine(model: ErnieElasticForCausalLM, training: TrainingConfig) -> Engine:
    """The engine that the configuration names; raises ConfigError when DeepSpeed is asked for and missing."""
    return TorchEngine(model, training) if training.engine == "torch" else DeepSpeedEngine(model, training)


__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "LossModule",
    "MicroResult",
    "TorchEngine",
    "deepspeed_config",
    "make_engine",
    "make_optimizer",
    "parameter_groups",
    "seed_everything",
]
