"""How a tokenizer of pictures or sounds is kept: `config.json`, which names its architecture, and its weights.

Contract: `load_saved` of what `write_saved` wrote gives the same fields and bit-equal tensors, or raises
CheckpointError; each architecture's own class makes a tokenizer of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from ernie_elastic.errors import CheckpointError
from ernie_elastic.stages import to_jsonable, write_atomic, write_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "tokenizer.safetensors"
Fields = Mapping[str, Any]
Tensors = Mapping[str, torch.Tensor]


def write_saved(directory: Path | str, architecture: str, config: Any, module: nn.Module) -> None:
    """Write a tokenizer's config (a dataclass) with its architecture, and its weights."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG_NAME, {"architecture": architecture, **to_jsonable(config)})
    tensors = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    write_atomic(directory / WEIGHTS_NAME, save(tensors))


def load_saved(directory: Path | str, kind: str, default: str, classes: Mapping[str, str]) -> Any:
    """The tokenizer that `directory` holds, made by the class of its architecture.

    kind: "visual" or "audio", for errors. default: the architecture of directories that name none. classes:
    architecture to "module:Class", whose classmethod `_read(directory, config fields)` makes it; modules are imported
    when they are needed. Raises CheckpointError when a file is missing or damaged, or of an unknown architecture.
    """
    directory = Path(directory)
    try:
        fields = json.loads((directory / CONFIG_NAME).read_text())
        name = fields.get("architecture", default)
        if name not in classes:
            raise CheckpointError(
                f"{directory / CONFIG_NAME} has architecture {name!r}; this package reads {', '.join(sorted(classes))}:"
                " install a newer ernie_elastic, or check the path"
            )
        module, _, class_name = classes[name].partition(":")
        return getattr(importlib.import_module(module), class_name)._read(directory, fields)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} does not exist; run train-tokenizer {kind}") from error
    except Exception as error:  # JSON, safetensors and torch each raise their own kind
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{directory} holds no whole {kind} tokenizer ({first}); run train-tokenizer {kind}"
        ) from error


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors that `write_saved` wrote, by name, each of any shape [...].

    Raises FileNotFoundError, or what safetensors raises for damage.
    """
    return load((directory / WEIGHTS_NAME).read_bytes())


def known_fields(config_class: type, fields: Fields) -> dict[str, Any]:
    """The fields of a dataclass out of config.json's, lists as tuples. Raises KeyError for one that is missing."""
    names = [item.name for item in dataclasses.fields(config_class)]
    return {name: _tuples(fields[name]) for name in names}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
