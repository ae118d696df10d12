"""The optimizers of the backbone and the parameter groups that they step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ernie_elastic.training.configuration import TrainingConfig
from ernie_elastic.training.engines.muon import MuonAdamW, is_matrix_of_the_stack


def parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """Groups by optimizer and weight decay; "scale" times the scheduled learning rate is a group's own.

    Weight decay is on matrices only; norms, biases and embeddings are left alone (ours: the field's habit).
    """
    muon_scale = training.muon_learning_rate / training.learning_rate
    groups: dict[str, dict[str, Any]] = {
        "gate_up": {"muon": True, "split": 2, "scale": muon_scale, "weight_decay": training.weight_decay},
        "muon": {"muon": True, "scale": muon_scale, "weight_decay": training.weight_decay},
        "decay": {"scale": 1.0, "weight_decay": training.weight_decay},
        "plain": {"scale": 1.0, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and "embed" not in name and "position" not in name
        kind = "decay" if matrix else "plain"
        if training.optimizer == "muon" and is_matrix_of_the_stack(name, parameter):
            kind = "gate_up" if "gate_up" in name else "muon"
        members[kind].append(parameter)
    return [{"params": members[name], **group} for name, group in groups.items() if members[name]]


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """torch's AdamW, or Muon with AdamW for what is no matrix of the stack.

    A model on a GPU gets the fused form: one pass over weights, moments and gradients, no temporaries of their size.
    """
    groups, betas = parameter_groups(model, training), (training.beta1, training.beta2)
    if training.optimizer == "muon":
        return MuonAdamW(groups, betas)
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, foreach=not fused, fused=fused)


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Give every group its share of the scheduled learning rate."""
    for group in groups:
        group["lr"] = lr * group["scale"]
