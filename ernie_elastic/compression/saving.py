"""`save_pretrained` of a model that was loaded from a compressed directory: the stored form again, byte for byte.

Contract: weights are taken from the model as it is in memory and encoded anew; file names, shards and the record for
`decompress` are those of the directory that was loaded. What cannot be written back exactly is an error, never a guess.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ernie_elastic.compression.container import Entry, SafetensorsWriter, Stored, largest_stream
from ernie_elastic.compression.directory import FILES_NAME, ORIGINAL_DIR
from ernie_elastic.compression.packed import PackedEmbedding, PackedLinear, PackedTensor
from ernie_elastic.compression.plan import Checkpoint, Part, Resolution
from ernie_elastic.compression.tensors import TORCH_DTYPES, encode
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.stages import disk_error, progress


@dataclass(frozen=True)
class SavedTensor:
    """How one tensor was stored: its entry, real name, layout and weights (None and 0 when it was left alone)."""

    entry: Entry
    name: str
    layout: str | None
    weights: int


@dataclass(frozen=True)
class Layout:
    """What a save needs of the loaded directory: tensors per file in order, and the small files beside them."""

    tensors: dict[str, list[SavedTensor]]
    small: dict[str, bytes]
    resolution: Resolution


def saver(checkpoint: Checkpoint, resolution: Resolution) -> Callable[..., None]:
    """The `save_pretrained` for a model loaded from `checkpoint`; it keeps names and small files, no weights."""
    names = {(stream.file.path, stream.entry.name): stream for stream in checkpoint.streams.values()}
    tensors: dict[str, list[SavedTensor]] = {}
    for file in checkpoint.files:
        rows = tensors.setdefault(file.path.name, [])
        for entry in file.entries:
            stream = names.get((file.path, entry.name))
            header = stream.header if stream else None
            saved = (header.name, header.layout, header.weights) if header else (entry.name, None, 0)
            rows.append(SavedTensor(entry, *saved))
    folder = checkpoint.files[0].path.parent
    wanted = [*folder.glob("*.py"), *folder.glob("*.safetensors.index.json"), folder / "config.json"]
    wanted += list(folder.glob(f"{ORIGINAL_DIR}/*"))
    small = {str(path.relative_to(folder)): path.read_bytes() for path in wanted if path.is_file()}
    layout = Layout(tensors, small, resolution)

    def save_pretrained(self: nn.Module, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the compressed directory again: same shards, same bytes.

        kwargs that Transformers' own method takes are accepted, but shards stay as they were. Raises ConfigError for
        state_dict and push_to_hub, CheckpointError when a weight cannot be written back exactly or the disk is full.
        """
        refused = [name for name in ("state_dict", "push_to_hub") if kwargs.get(name)]
        if refused:
            raise ConfigError(f"save_pretrained: {refused[0]} does not go with a compressed model; decompress it first")
        if kwargs.get("is_main_process", True):
            save_model(self, Path(save_directory), layout)

    return save_pretrained


def save_model(model: nn.Module, out: Path, layout: Layout) -> None:
    """Write `model` into `out` in the stored form that `layout` describes; files appear only when all are written."""
    if f"{ORIGINAL_DIR}/{FILES_NAME}" not in layout.small:
        raise CheckpointError(
            f"cannot save to {out}: the model was loaded without {ORIGINAL_DIR}/{FILES_NAME}; load it from a whole copy"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=out.parent) as folder:
            temporary = Path(folder)
            (temporary / ORIGINAL_DIR).mkdir()
            for name, tensors in layout.tensors.items():
                _write_file(model, temporary / name, tensors, layout.resolution)
            for name, content in layout.small.items():
                (temporary / name).write_bytes(content)
            if isinstance(model, PreTrainedModel) and model.can_generate():
                model.generation_config.save_pretrained(temporary)
            for path in sorted(temporary.rglob("*")):
                place = out / path.relative_to(temporary)
                if path.is_file():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.move(path, place)
    except OSError as error:
        raise disk_error(error, out) from error


def _write_file(model: nn.Module, path: Path, tensors: list[SavedTensor], resolution: Resolution) -> None:
    kept: list[Stored] = []
    largest: list[Stored] = []
    for item in tensors:
        if item.layout is None:
            weight = fetch(model, item, resolution)
            raw = weight.reshape(-1).view(torch.uint8).numpy() if weight.numel() else np.empty(0, np.uint8)
            kept.append(Stored(item.entry.name, item.entry.dtype, item.entry.shape, raw.size, raw))
        else:
            largest.append(largest_stream(item.entry.name, item.weights))
    with SafetensorsWriter(path, kept, largest) as writer:
        for item in progress(tensors, desc=f"saving {path.name}", unit="tensor"):
            if item.layout is not None:
                stream = encode(fetch(model, item, resolution), item.name, item.layout).stream
                writer.append(Stored(item.entry.name, "U8", (stream.size,), stream.size), stream)
        writer.finish()


def fetch(model: nn.Module, item: SavedTensor, resolution: Resolution) -> torch.Tensor:
    """The weight of one stored tensor, in its stored shape and dtype, on the CPU.

    Raises CheckpointError when the model does not hold it as it was stored, or not exactly.
    """
    key = resolution.targets.get(item.name)
    part = next((part for part in resolution.parts.get(key or "", []) if part.name == item.name), None)
    if key is None or part is None:
        raise CheckpointError(
            f"cannot save: {item.name!r} is not held by this model as it was stored (another class, or converted while "
            "loading); copy the compressed directory instead"
        )
    dtype = torch.bfloat16 if item.layout else TORCH_DTYPES[item.entry.dtype]
    holder = _holder(model, key)
    if isinstance(holder, PackedTensor):
        return _cut(holder.decode(part.expert, torch.bfloat16), part, done=True).cpu().contiguous()
    weight = _cut(holder.detach(), part, done=False)
    exact = _narrowed(weight, dtype)
    lost = torch.promote_types(weight.dtype, dtype) != weight.dtype
    back, held = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (exact.to(weight.dtype), weight))
    if lost or not torch.equal(back, held):  # bits, since NaN is not equal to itself
        raise CheckpointError(
            f"cannot save: {item.name!r} is {weight.dtype} in memory and was stored as {dtype}, which cannot hold it "
            "exactly; load the model with dtype=float32, or copy the compressed directory"
        )
    return exact.cpu().contiguous()


def _narrowed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` in `dtype`; from float32 to BF16 by its upper half, since a conversion makes one NaN of all."""
    if (weight.dtype, dtype) != (torch.float32, torch.bfloat16):
        return weight.to(dtype)
    upper = (weight.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(weight.isnan(), upper, weight.to(dtype))


def _cut(weight: torch.Tensor, part: Part, done: bool) -> torch.Tensor:
    """The rows of one part; done: the expert has been taken already."""
    if part.expert is None:
        return weight
    return (weight if done else weight[part.expert])[part.start : part.stop]


def _holder(model: nn.Module, key: str) -> torch.Tensor | PackedTensor:
    """What holds a model key: its packed weight, or the parameter or buffer."""
    path, _, attribute = key.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, PackedLinear | PackedEmbedding) and attribute == "weight":
        return module.packed
    return getattr(module, attribute)
