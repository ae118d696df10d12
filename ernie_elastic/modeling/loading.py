"""Model directories of every stage, found and loaded for inference: a run, a step, a sub-model, a compressed one."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import ernie_elastic.compression  # noqa: F401 - registers the loader of compressed directories
from ernie_elastic.data.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.modeling.configuration import ErnieElasticConfig
from ernie_elastic.modeling.model import ErnieElasticForCausalLM

log = logging.getLogger(__name__)
RUNS = Path("runs")
EXPERTS = ("auto", "eager", "grouped_mm", "sorted_experts")
if not torch.cuda.is_available():
    # Transformers imports DeepSpeed while loading, which otherwise warns that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def newest_run(root: Path = RUNS) -> Path:
    """The run below `root` whose `latest` pointer moved last; CheckpointError when there is none."""
    pointers = sorted(root.glob("*/checkpoints/latest"), key=lambda path: path.stat().st_mtime)
    if not pointers:
        raise CheckpointError(f"{root.absolute()} holds no run with a checkpoint; name the source, or train one first")
    return pointers[-1].parent.parent


def resolve_model_dir(source: Path | str | None) -> Path:
    """The model directory that a user means: a run, a step, a sub-model, a compressed or any Hugging Face directory.

    Raises CheckpointError when nothing of the kind is there.
    """
    path = newest_run() if source is None else Path(source)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; expected a run, a checkpoint step or a model directory")
    pointer = path / "checkpoints" / "latest"
    if pointer.exists():
        path = path / "checkpoints" / pointer.read_text().strip()
    if (path / "model" / "config.json").exists():
        path = path / "model"
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} holds no config.json; expected a run, a checkpoint step or a model directory")
    return path


def is_compressed(directory: Path) -> bool:
    """True for a directory that `compress` wrote."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} cannot be read ({error}); make the directory anew"
        ) from error
    return config.get("model_type") == "ernie_elastic_compressed"


def compute_dtype() -> torch.dtype:
    """fp32 on a CPU, BF16 on a GPU (design: precision)."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def choose_experts_back_end(model: ErnieElasticForCausalLM, name: str = "auto") -> None:
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


def choose_attention(model: ErnieElasticForCausalLM, name: str) -> None:
    """Set the back end of attention for training: "sdpa", or "flex_attention" on a GPU.

    Raises ConfigError for another name, and for flex_attention without a GPU: torch has no backward of it on CPUs.
    """
    if name not in ("sdpa", "flex_attention"):
        raise ConfigError(f"attention {name!r} is not one of sdpa, flex_attention")
    if name == "flex_attention" and not torch.cuda.is_available():
        raise ConfigError("attention flex_attention trains on a GPU only, and torch sees none; choose sdpa")
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def load_model(source: Path | str | None, experts: str | None = None) -> ErnieElasticForCausalLM:
    """The model of a directory, ready for inference, in `compute_dtype`.

    experts: back end of the experts, as `choose_experts_back_end` takes it (compressed experts have their own). Raises
    CheckpointError when the directory is missing, damaged or not one of ours.
    """
    directory = resolve_model_dir(source)
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=compute_dtype(), output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    model, report = loaded
    problems = {name: keys for name, keys in report.items() if keys}
    if problems:
        raise CheckpointError(f"{directory} is damaged: its loading report is not empty: {problems}")
    if not isinstance(model.config, ErnieElasticConfig):
        raise CheckpointError(
            f"{directory} holds a {model.config.model_type!r} model; this command needs an ernie_elastic one"
        )
    if not is_compressed(directory):
        choose_experts_back_end(model, experts or "auto")
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


def load_tokenizers(source: Path | str | None) -> Tokenizers:
    """The tokenizers that travel with a model directory."""
    return Tokenizers.load(resolve_model_dir(source) / "tokenizers")
