"""Models and tokenizers of a directory of any stage, loaded for inference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ernie_elastic.compression import is_compressed
from ernie_elastic.data.prepare.tokenise import Tokenizers
from ernie_elastic.errors import CheckpointError
from ernie_elastic.generation.causal_lm import ErnieElasticForCausalLM
from ernie_elastic.model_directories import resolve_model_dir
from ernie_elastic.modeling.back_ends import choose_experts_back_end
from ernie_elastic.modeling.configuration import ErnieElasticConfig

if not torch.cuda.is_available():
    # Transformers imports DeepSpeed when a model is saved, which otherwise warns that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def compute_dtype() -> torch.dtype:
    """fp32 on a CPU, BF16 on a GPU (design: precision)."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


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
