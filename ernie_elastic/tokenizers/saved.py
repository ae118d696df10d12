"""How a tokenizer of pictures or sounds, or the refiner, is kept: `config.json`, which names it, and its weights.

Contract: what `SavedModule.save` wrote gives, read again, the same fields and bit-equal tensors, or CheckpointError.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load, save
from torch import nn

from ernie_elastic.errors import CheckpointError
from ernie_elastic.stages import to_jsonable, write_atomic, write_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "tokenizer.safetensors"
Fields = Mapping[str, Any]


class SavedModule(nn.Module):
    """A module made of a `config` (a frozen dataclass of config_class) and its weights, kept in a directory.

    architecture: its name in `config.json`.
    """

    architecture = ""
    weights_name = WEIGHTS_NAME
    config_class: ClassVar[type]
    config: Any

    def _called(self) -> dict[str, str]:
        """What `config.json` calls the module, before the fields of its config."""
        return {"architecture": self.architecture}

    def _write_config(self, directory: Path | str) -> Path:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / CONFIG_NAME, {**self._called(), **to_jsonable(self.config)})
        return directory

    def save(self, directory: Path | str) -> None:
        """Write `config.json` and the weights; `load` gives back the same bits."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomic(self._write_config(directory) / self.weights_name, save(tensors))

    @classmethod
    def _read(cls, directory: Path, fields: Fields) -> Self:
        """The module of config.json's fields and the weights. Raises FileNotFoundError, or what damage raises."""
        module = cls(cls.config_class(**known_fields(cls.config_class, fields)))
        module.load_state_dict(load((directory / cls.weights_name).read_bytes()))
        return module.eval()


@contextmanager
def reading(directory: Path, what: str, kind: str) -> Iterator[None]:
    """Reading a saved module: whatever goes wrong inside is a CheckpointError that names `train-tokenizer kind`."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} does not exist; run train-tokenizer {kind}") from error
    except Exception as error:  # JSON, safetensors and torch each raise their own kind
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{directory} holds no whole {what} ({first}); run train-tokenizer {kind}") from error


def load_saved(directory: Path | str, kind: str, default: str, classes: Mapping[str, str]) -> Any:
    """The tokenizer that `directory` holds, made by the class of its architecture.

    kind: "visual" or "audio", for errors. default: the architecture of directories that name none. classes:
    architecture to "module:Class", whose classmethod `_read(directory, config fields)` makes it; modules are imported
    when they are needed. Raises CheckpointError when a file is missing or damaged, or of an unknown architecture.
    """
    directory = Path(directory)
    with reading(directory, f"{kind} tokenizer", kind):
        fields = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        name = fields.get("architecture", default)
        if name not in classes:
            raise CheckpointError(
                f"{directory / CONFIG_NAME} has architecture {name!r}; this package reads {', '.join(sorted(classes))}:"
                " install a newer ernie_elastic, or check the path"
            )
        module, _, class_name = classes[name].partition(":")
        return getattr(importlib.import_module(module), class_name)._read(directory, fields)


def known_fields(config_class: type, fields: Fields) -> dict[str, Any]:
    """The fields of a dataclass out of config.json's, lists as tuples. Raises KeyError for one that is missing."""
    names = [item.name for item in dataclasses.fields(config_class)]
    return {name: _tuples(fields[name]) for name in names}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
