"""Back ends of the experts and of attention, by name or by what runs best here."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from ernie_elastic.errors import ConfigError

log = logging.getLogger(__name__)
EXPERTS = ("auto", "eager", "grouped_mm", "sorted_experts")


def choose_experts_back_end(model: PreTrainedModel, name: str = "auto") -> None:
    """Set the back end of the experts: "eager" (the per-expert loop, the definition), "grouped_mm", "sorted_experts".

    auto is sorted_experts on a CPU, grouped_mm on a GPU, and sorted_experts on one of compute capability 10 or 11,
    where torch's grouped product leaves the gradients of experts without tokens unwritten (its issue 172439); it is
    logged. Raises ConfigError for another name.
    """
    if name not in EXPERTS:
        raise ConfigError(f"experts {name!r} is not one of {', '.join(EXPERTS)}")
    if name == "auto":
        name, why = "sorted_experts", "the faster one on CPUs"
        if torch.cuda.is_available():
            wrong = torch.cuda.get_device_capability()[0] in (10, 11)
            why = "grouped_mm is wrong for experts without tokens here" if wrong else "the usual one on GPUs"
            name = "sorted_experts" if wrong else "grouped_mm"
        log.info("experts: auto is %s, %s", name, why)
    model.config._experts_implementation = name


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """Set the back end of attention for training: "sdpa", or "flex_attention" on a GPU.

    Raises ConfigError for another name, and for flex_attention without a GPU: torch has no backward of it on CPUs.
    """
    if name not in ("sdpa", "flex_attention"):
        raise ConfigError(f"attention {name!r} is not one of sdpa, flex_attention")
    if name == "flex_attention" and not torch.cuda.is_available():
        raise ConfigError("attention flex_attention trains on a GPU only, and torch sees none; choose sdpa")
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
