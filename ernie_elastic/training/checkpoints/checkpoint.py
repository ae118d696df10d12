"""Checkpoints of a run: `checkpoints/step-N/{model,optimizer}` and the pointer `latest`, moved last.

`model` is a Transformers directory (BF16 safetensors, shim, tokenizers); `optimizer` is the engine's own state with
fp32 masters, whose SHA-256 are compared before it is read.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.stages import directory_hash, read_manifest, sha256_file
from ernie_elastic.training.balance import RoutingLedger
from ernie_elastic.training.engines.choice import Engine
from ernie_elastic.training.guards.skip import StepGuard
from ernie_elastic.training.guards.spikes import SpikeConfig, SpikeWatch
from ernie_elastic.training.losses import LossBalance
from ernie_elastic.training.ranks import from_rank0

log = logging.getLogger(__name__)
MODEL_STAGE = "pretrain"
LEDGER_FILE = "routed_mass.safetensors"
STATE_FILE = "trainer_state.json"
CHECKSUM_FILE = "checksums.json"


@dataclass
class TrainerState:
    """What a run remembers beside its engine: routed mass, loss weights, and the guards' counters."""

    ledger: RoutingLedger
    balance: LossBalance
    guard: StepGuard
    spikes: SpikeWatch = field(default_factory=lambda: SpikeWatch(SpikeConfig()))

    def to_json(self, step: int) -> dict[str, Any]:
        """What `trainer_state.json` holds after `step` finished steps."""
        return {
            "step": step,
            "loss_ema": dict(self.balance.ema),
            "guard": self.guard.to_json(),
            "spikes": self.spikes.to_json(),
        }

    def load(self, state: dict[str, Any], mass_LE: torch.Tensor) -> int:
        """Take over a checkpoint's state and its routed mass float64 [L, E]; returns the finished steps."""
        self.ledger.mass_LE.copy_(mass_LE)
        self.balance.ema = {name: float(value) for name, value in state.get("loss_ema", {}).items()}
        self.guard.load_json(state.get("guard", {}))
        self.spikes.load_json(state.get("spikes", {}))
        return int(state["step"])


def export_dtype(
    name: str, tensor: torch.Tensor, parameters: Collection[str], dtype: torch.dtype = torch.bfloat16
) -> torch.dtype:
    """The dtype in which a tensor of any shape is stored: `dtype` for parameters, its own for buffers (the balance bias
    stays fp32)."""
    return dtype if tensor.is_floating_point() and name in parameters else tensor.dtype


def export_model(
    model: ErnieElasticForCausalLM,
    directory: Path,
    tokenizers: Tokenizers | None,
    dtype: torch.dtype = torch.bfloat16,
    whole: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a Transformers directory with weights rounded to `dtype` (the balance bias stays fp32).

    whole: every tensor of the model by its name, each of its own shape [...], where the model itself holds a part of
    them (`Engine.full_state_dict`).
    """
    parameters = parameter_names(model.config)
    state = {
        name: tensor.detach().to("cpu", export_dtype(name, tensor, parameters, dtype))
        for name, tensor in (model.state_dict() if whole is None else whole).items()
    }
    write_model(model.config, state, directory, tokenizers, dtype)


def parameter_names(config: Any) -> set[str]:
    """Names of all parameters of a config's model, tied ones too, wherever their tensors lie."""
    with torch.device("meta"):
        skeleton = ErnieElasticForCausalLM(copy.deepcopy(config))
    return {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}


def write_model(
    config: Any,
    state: dict[str, torch.Tensor],
    directory: Path,
    tokenizers: Tokenizers | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a Transformers directory of a config and its state dict, whose tensors have any shape and their dtype."""
    with torch.device("meta"):
        skeleton = ErnieElasticForCausalLM(copy.deepcopy(config))
    for parameter in skeleton.parameters():
        parameter.data = parameter.data.to(dtype)
    skeleton.load_state_dict(state, assign=True)
    skeleton.tie_weights()
    transformers_logging.disable_progress_bar()
    skeleton.save_pretrained(directory)
    if tokenizers is not None:
        tokenizers.save(directory / "tokenizers")
        tokenizers.text.hf.save_pretrained(directory)


def list_steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints below `root`, increasing."""
    return sorted(int(path.name[5:]) for path in root.glob("step-*") if path.name[5:].isdigit())


def latest_checkpoint(run_dir: Path, at_most: int | None = None) -> Path | None:
    """The newest whole checkpoint, beginning with the one that `latest` names; None for a run without one.

    Every rank calls it: rank 0 reads and compares all files' SHA-256, the others are told. A damaged checkpoint falls
    back to the one before, with a warning. at_most: no step beyond this one.
    """
    return from_rank0(lambda: _newest_whole(run_dir / "checkpoints", at_most))


def _newest_whole(root: Path, at_most: int | None) -> Path | None:
    if not (root / "latest").exists():
        return None
    named = (root / "latest").read_text().strip()
    names = dict.fromkeys([named, *(f"step-{step}" for step in reversed(list_steps(root)))])
    usable = [name for name in names if at_most is None or int(name[5:]) <= at_most]
    for name in usable:
        if (problem := checkpoint_problem(root / name)) is None:
            return root / name
        log.warning("checkpoint %s is damaged (%s); trying the one before", root / name, problem)
    if at_most is not None:
        return None
    raise CheckpointError(f"{root} holds no undamaged checkpoint; remove {root} to start the run anew")


def checkpoint_problem(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of it is read and compared with its recorded SHA-256."""
    try:
        read_manifest(directory / "model", (MODEL_STAGE,), verify=True)
        table = json.loads((directory / "optimizer" / CHECKSUM_FILE).read_text())
    except (CheckpointError, OSError, ValueError) as error:
        return str(error)
    for name, digest in table.items():
        path = directory / "optimizer" / name
        if not path.is_file() or sha256_file(path) != digest:
            return f"optimizer/{name} is missing or its SHA-256 is not the recorded one"
    return None


def load_checkpoint(directory: Path, engine: Engine, state: TrainerState) -> int:
    """Load a checked checkpoint into the engine and the trainer's state; returns the number of finished steps."""
    engine.load_state(directory / "optimizer")
    mass_LE = load_file(directory / "optimizer" / LEDGER_FILE)["mass_LE"]
    return state.load(json.loads((directory / "optimizer" / STATE_FILE).read_text()), mass_LE)


__all__ = [
    "MODEL_STAGE",
    "TrainerState",
    "checkpoint_problem",
    "directory_hash",
    "export_model",
    "latest_checkpoint",
    "list_steps",
    "load_checkpoint",
    "write_model",
]
