"""Which tensor of a compressed checkpoint fills which weight of a model, decided before anything is loaded.

Contract: a stream is packed here only when its whole target is known to be made of streams; everything else is left to
Transformers' own loader, which gets it decoded. Nothing is guessed: shapes must match exactly.

Legend: E experts, R rows, C columns.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ernie_elastic.compression.container import Entry, SafetensorsFile
from ernie_elastic.compression.format import Header, read_header
from ernie_elastic.compression.packed import PackedTensor, packable
from ernie_elastic.compression.tensors import decode
from ernie_elastic.errors import FormatError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """One compressed tensor of a checkpoint and where its bytes are."""

    file: SafetensorsFile
    entry: Entry
    header: Header

    def decode(self) -> torch.Tensor:
        """The BF16 tensor in its stored shape, checksum verified. Raises FormatError."""
        return decode(self.file.raw(self.entry), f"{self.file.path}: {self.entry.name}", self.header.name)


@dataclass(frozen=True)
class Part:
    """The checkpoint tensor `name` is rows start..stop of expert `expert` of a target; None = the whole target."""

    name: str
    expert: int | None = None
    start: int = 0
    stop: int = 0


@dataclass
class Checkpoint:
    """Every tensor of the checkpoint files: streams by their real names, and the names of the others."""

    files: list[SafetensorsFile]
    streams: dict[str, Stream] = field(default_factory=dict)
    others: dict[str, tuple[SafetensorsFile, Entry]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Real names of all tensors."""
        return [*self.streams, *self.others]


def read_checkpoint(paths: list[str]) -> Checkpoint:
    """Headers of all tensors of safetensors files; streams are checked when they are decoded. Raises FormatError."""
    found = Checkpoint([SafetensorsFile(Path(path)) for path in paths])
    for file in found.files:
        for entry in file.entries:
            if not entry.is_stream:
                found.others[entry.name] = (file, entry)
                continue
            header = read_header(file.raw(entry), f"{file.path}: {entry.name}", verify=False)
            if header.name in found.streams:
                raise FormatError(f"{file.path}: {header.name!r} is there twice; fetch the directory anew")
            found.streams[header.name] = Stream(file, entry, header)
    return found


@dataclass
class Resolution:
    """Where the loader puts checkpoint names: targets[name] is a model key; parts[key] how several make one."""

    targets: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)


def resolve(model: nn.Module, checkpoint: Checkpoint) -> Resolution:
    """Follow Transformers' renamings and per-expert merges for every checkpoint name.

    A key made by any other conversion has no `parts`: the loader makes it. When Transformers' conversion functions are
    not where this expects them, plain names (with or without the base model's prefix) are used, and that is logged.
    """
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    result = Resolution()
    merged: dict[str, list[tuple[str, str, Any]]] = {}
    rename = _renamer(model)
    for name in checkpoint.names:
        key, pattern, converter = rename(name)
        if key not in state:
            continue
        result.targets[name] = key
        merged.setdefault(key, []).append((name, pattern, converter))
    shapes = {name: stream.header.shape for name, stream in checkpoint.streams.items()}
    shapes.update({name: entry.shape for name, (_, entry) in checkpoint.others.items()})
    for key, sources in merged.items():
        name, _, converter = sources[0]
        if converter is None:
            if len(sources) == 1 and shapes[name] == state[key]:
                result.parts[key] = [Part(name)]
        else:
            parts = _merged_parts(sources, converter, shapes, state[key])
            if parts:
                result.parts[key] = parts
    return result


def _renamer(model: nn.Module) -> Any:
    """A function name -> (model key, source pattern, converter)."""
    prefix = getattr(model, "base_model_prefix", "")
    state = model.state_dict()

    def plain(name: str) -> tuple[str, None, None]:
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((key for key in candidates if key in state), name), None, None

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    except (ImportError, TypeError) as error:
        logger.warning("compressed checkpoint: Transformers' conversions are unknown (%s); plain names only", error)
        return plain
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}

    def rename(name: str) -> tuple[str, str | None, Any]:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        return key, pattern, by_pattern.get(pattern) if pattern else None

    return rename


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _merged_parts(
    sources: list[tuple[str, str, Any]], converter: Any, shapes: dict[str, tuple[int, ...]], target: tuple[int, ...]
) -> list[Part] | None:
    """Parts of a stack [E, R, C] merged from one tensor per expert, or None for any other conversion."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or len(target) != 3:
        return None
    parts, row = [], 0
    for pattern in converter.source_patterns:
        names = sorted((name for name, found, _ in sources if found == pattern), key=_natural)
        if len(names) != target[0] or len({shapes[name] for name in names}) != 1:
            return None
        rows, *columns = shapes[names[0]]
        if columns != [target[2]]:
            return None
        parts += [Part(name, expert, row, row + rows) for expert, name in enumerate(names)]
        row += rows
    return parts if row == target[1] and len(parts) == len(sources) else None


@dataclass
class Planned:
    """One packed weight to be filled: its place in the model and its parts in the checkpoint."""

    key: str
    packed: PackedTensor
    parts: list[Part]

    def dense(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The BF16 weight of the target's shape, decoded part by part. Raises FormatError."""
        if self.parts[0].expert is None:
            return checkpoint.streams[self.parts[0].name].decode()
        weight = torch.empty(self.packed.stack_shape, dtype=torch.bfloat16)
        for part in self.parts:
            weight[part.expert, part.start : part.stop] = checkpoint.streams[part.name].decode()
        return weight


def ties_of(model: nn.Module) -> dict[str, set[str]]:
    """Every tied key -> all keys of its group."""
    groups: dict[str, set[str]] = {}
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = groups.get(source, {source}) | groups.get(target, {target})
        groups.update(dict.fromkeys(group, group))
    return groups


def choose(
    model: nn.Module, checkpoint: Checkpoint, resolution: Resolution, skip: list[str]
) -> list[tuple[list[str], list[Part]]]:
    """The keys to pack, each with the keys tied to it, and their parts.

    A key qualifies when all its parts are streams, its module can hold it packed together with everything tied to it,
    the module's other parameters come from the checkpoint, and no pattern in `skip` (kept in float32) matches.
    """
    modules = dict(model.named_modules())
    ties = ties_of(model)
    keys = set(resolution.parts)

    def can(key: str) -> bool:
        path, _, attribute = key.rpartition(".")
        module = modules.get(path)
        if module is None or not packable(module, attribute) or any(pattern in key for pattern in skip):
            return False
        others = [name for name, item in module._parameters.items() if item is not None and name != attribute]
        if type(module) is nn.Linear:
            return all(f"{path}.{name}" in keys for name in others)
        # A stack's module gets no initialiser any more, so that nothing of it may be left to one.
        return all(packable(module, name) and streams_only(f"{path}.{name}") for name in others)

    def streams_only(key: str) -> bool:
        return key in keys and all(part.name in checkpoint.streams for part in resolution.parts[key])

    chosen = []
    for key, parts in resolution.parts.items():
        group = ties.get(key, {key})
        # Two stored tensors behind one tie: whether they are equal is for Transformers to judge.
        alone = not (group - {key}) & set(resolution.targets.values())
        if streams_only(key) and alone and all(can(name) for name in group):
            chosen.append(([key, *sorted(group - {key})], parts))
    return chosen
