"""Checkpoints of a run: `checkpoints/step-N/{model,optimizer}` and the pointer `latest`, moved last.

`model` is a Transformers directory (BF16 safetensors, shim, tokenizers); `optimizer` is the engine's own state with
fp32 masters, whose SHA-256 are compared before it is read.
"""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from ernie_elastic.data.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError
from ernie_elastic.modeling import ErnieElasticForCausalLM
from ernie_elastic.stages import (
    directory_hash,
    disk_error,
    publish_directory,
    read_manifest,
    sha256_file,
    system_error,
    write_atomic,
    write_json,
    write_manifest,
)
from ernie_elastic.training.balance import RoutingLedger
from ernie_elastic.training.engine import Engine
from ernie_elastic.training.losses import LossBalance
from ernie_elastic.training.ranks import barrier, rank

log = logging.getLogger(__name__)
MODEL_STAGE = "pretrain"
LEDGER_FILE = "routed_mass.safetensors"
STATE_FILE = "trainer_state.json"


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
    with torch.device("meta"):
        skeleton = ErnieElasticForCausalLM(copy.deepcopy(model.config))
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() and name in parameters else tensor.dtype)
        for name, tensor in (model.state_dict() if whole is None else whole).items()
    }
    for parameter in skeleton.parameters():
        parameter.data = parameter.data.to(dtype)
    skeleton.load_state_dict(state, assign=True)
    skeleton.tie_weights()
    transformers_logging.disable_progress_bar()
    skeleton.save_pretrained(directory)
    if tokenizers is not None:
        tokenizers.save(directory / "tokenizers")
        tokenizers.text.hf.save_pretrained(directory)


def save_checkpoint(
    run_dir: Path,
    step: int,
    engine: Engine,
    state: tuple[RoutingLedger, LossBalance],
    tokenizers: Tokenizers | None,
    config: Any,
    keep: int,
) -> Path:
    """Write `step-N` as a whole, then move `latest`. Every rank calls it; returns the directory.

    Raises CheckpointError on a full disk; the checkpoints before stay as they are.
    """
    root = run_dir / "checkpoints"
    final, temporary = root / f"step-{step}", root / f".step-{step}.tmp"
    try:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        engine.save_state(temporary / "optimizer")
        whole = engine.full_state_dict()
        if rank() == 0:
            _write_rank0(temporary, step, engine, state, tokenizers, config, whole)
            publish_directory(temporary, final)
            write_atomic(root / "latest", f"step-{step}\n")
            _remove_old(root, keep)
        barrier()
    except (OSError, SafetensorError, RuntimeError) as error:
        if (cause := system_error(error, root)) is None:
            raise
        message = disk_error(cause, final)
        shutil.rmtree(temporary, ignore_errors=True)
        raise message from error
    return final


def _write_rank0(
    temporary: Path,
    step: int,
    engine: Engine,
    state: tuple[RoutingLedger, LossBalance],
    tokenizers: Tokenizers | None,
    config: Any,
    whole: dict[str, torch.Tensor],
) -> None:
    ledger, balance = state
    optimizer = temporary / "optimizer"
    save_file({"mass_LE": ledger.mass_LE}, optimizer / LEDGER_FILE)
    write_json(optimizer / STATE_FILE, {"step": step, "loss_ema": balance.ema})
    table = {
        str(file.relative_to(optimizer)): sha256_file(file) for file in sorted(optimizer.rglob("*")) if file.is_file()
    }
    write_json(optimizer / "checksums.json", table)
    model_dir = temporary / "model"
    export_model(engine.model, model_dir, tokenizers, whole=whole)
    save_file({"mass_LE": ledger.mass_LE}, model_dir / LEDGER_FILE)
    write_manifest(model_dir, MODEL_STAGE, config, extra={"step": step})


def _remove_old(root: Path, keep: int) -> None:
    for step in list_steps(root)[: -max(1, keep)]:
        shutil.rmtree(root / f"step-{step}", ignore_errors=True)


def list_steps(root: Path) -> list[int]:
    """Steps of the finished checkpoints below `root`, increasing."""
    return sorted(int(path.name[5:]) for path in root.glob("step-*") if path.name[5:].isdigit())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names; None for a run without one. A damaged one falls back to the one before."""
    root = run_dir / "checkpoints"
    if not (root / "latest").exists():
        return None
    named = (root / "latest").read_text().strip()
    candidates = [named, *(f"step-{step}" for step in reversed(list_steps(root)))]
    for name in dict.fromkeys(candidates):
        if (problem := checkpoint_problem(root / name)) is None:
            return root / name
        log.warning("checkpoint %s is damaged (%s); trying the one before", root / name, problem)
    raise CheckpointError(f"{root} holds no undamaged checkpoint; start the run anew with --overwrite")


def checkpoint_problem(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    import json

    try:
        read_manifest(directory / "model", (MODEL_STAGE,))
        table = json.loads((directory / "optimizer" / "checksums.json").read_text())
    except (CheckpointError, OSError, ValueError) as error:
        return str(error)
    for name, digest in table.items():
        path = directory / "optimizer" / name
        if not path.is_file() or sha256_file(path) != digest:
            return f"optimizer/{name} is missing or its SHA-256 is not the recorded one"
    return None


def load_checkpoint(directory: Path, engine: Engine, ledger: RoutingLedger, balance: LossBalance) -> int:
    """Load a checked checkpoint into the engine and the trainer's state; returns the number of finished steps."""
    import json

    engine.load_state(directory / "optimizer")
    ledger.mass_LE.copy_(load_file(directory / "optimizer" / LEDGER_FILE)["mass_LE"])
    state = json.loads((directory / "optimizer" / STATE_FILE).read_text())
    balance.ema = {name: float(value) for name, value in state.get("loss_ema", {}).items()}
    return int(state["step"])


__all__ = [
    "MODEL_STAGE",
    "checkpoint_problem",
    "directory_hash",
    "export_model",
    "latest_checkpoint",
    "list_steps",
    "load_checkpoint",
    "save_checkpoint",
]
