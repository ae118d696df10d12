"""Packed shards on disk: tokenised documents as flat arrays, and which of them share a row.

One shard is a safetensors file: `ids` int32, `pixels` uint8 [frames, H, W, 3], `latents` float16 [frames, h, w, D],
`codes` int16 [steps, Q], `features` float16 [frames, h, w, D] (frozen CNN features, frame by frame beside `pixels`),
`sound_features` float16 [steps, C] (beside `codes`, when asked for), `speakers` float32 [n, size] with
`speaker_segments` int64 [n] (rows of the index), and an index `segments` int64 [segments, 5]: document, kind, role,
start, length.
Rows are listed in `rows.safetensors`: `documents` int64 (numbers over all shards) and `offsets` int64 [rows + 1].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from ernie_elastic.data.groups.tokens import Tokens
from ernie_elastic.data.packed.order import rows_of_step
from ernie_elastic.errors import DataError
from ernie_elastic.stages import write_atomic

STAGE = "prepare-data"
KINDS = ("text", "image", "video", "audio")
ROLES = ("input", "target")
DTYPES = {"U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}
ROWS_FILE = "rows.safetensors"


def write_shard(path: Path, documents: list[list[Tokens]], sound_features: bool = False) -> None:
    """Write tokenised documents as one shard; sound_features: with the features of sounds."""
    write_atomic(path, shard_bytes(documents, sound_features))


def shard_bytes(documents: list[list[Tokens]], sound_features: bool = False) -> bytes:
    """The file of one shard; the same documents are the same bytes."""
    speakers: list[tuple[int, np.ndarray]] = []
    parts: dict[str, list[np.ndarray]] = {
        "ids": [],
        "pixels": [],
        "latents": [],
        "codes": [],
        "features": [],
        "sound_features": [],
    }
    totals = dict.fromkeys(parts, 0)
    index: list[tuple[int, ...]] = []
    for number, document in enumerate(documents):
        for segment in document:
            name = _array_name(segment)
            array = segment.array()
            if segment.speaker is not None:
                speakers.append((len(index), segment.speaker))
            index.append((number, KINDS.index(segment.kind), ROLES.index(segment.role), totals[name], len(array)))
            parts[name].append(array)
            if name == "pixels" and segment.latents is not None:
                parts["features"].append(segment.latents)
            if name == "codes" and sound_features:
                parts["sound_features"].append(_sound_features(segment))
            totals[name] += len(array)
    tensors = {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
    if speakers:
        tensors["speakers"] = np.stack([vector for _, vector in speakers]).astype(np.float32)
        tensors["speaker_segments"] = np.asarray([row for row, _ in speakers], dtype=np.int64)
    tensors["segments"] = np.asarray(index, dtype=np.int64).reshape(-1, 5)
    return save(tensors)


def _sound_features(segment: Tokens) -> np.ndarray:
    if segment.features is None:
        raise DataError("a sound carries no features; tokenise it with the model's audio tokenizer")
    return segment.features.astype(np.float16)


def _array_name(segment: Tokens) -> str:
    if segment.kind == "text":
        return "ids"
    if segment.kind == "audio":
        return "codes"
    return "pixels" if segment.role == "input" else "latents"


def write_rows(path: Path, rows: list[list[int]]) -> None:
    """Write which documents share a row."""
    offsets = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    flat = np.asarray([document for row in rows for document in row], dtype=np.int64)
    write_atomic(path, save({"documents": flat, "offsets": offsets}))


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, mapped read-only. Raises DataError for a damaged one."""
    try:
        with safe_open(path, "numpy"):  # checks the header against the file's size
            pass
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            begin = file.tell()
        whole = np.memmap(path, dtype=np.uint8, mode="r")
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a shard ({error}); prepare the data anew") from error
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            arrays[name] = whole[begin + start : begin + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


class PackedCorpus:
    """Random access to the rows of a packed directory.

    Shards are mapped, not read: the ranks of a machine share their pages, and a corpus may be larger than the memory.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        paths = sorted(directory.glob("shard-*.safetensors"))
        if not paths or not (directory / ROWS_FILE).exists():
            raise DataError(f"{directory} holds no packed shards; make them with `ernie-elastic prepare-data`")
        self.shards = [self._load(path) for path in paths]
        self.first = np.cumsum([0, *(shard["num_documents"] for shard in self.shards)])
        rows = load_file(directory / ROWS_FILE)
        self.offsets, self.documents = rows["offsets"], rows["documents"]

    @staticmethod
    def _load(path: Path) -> dict:
        arrays = _mapped(path)
        segments = np.array(arrays["segments"])
        count = int(segments[-1, 0]) + 1 if len(segments) else 0
        speaker_of = {int(row): place for place, row in enumerate(arrays.get("speaker_segments", ()))}
        starts = np.searchsorted(segments[:, 0], np.arange(count + 1))
        return {**arrays, "segments": segments, "num_documents": count, "starts": starts, "speaker_of": speaker_of}

    @property
    def num_rows(self) -> int:
        """Rows in the whole directory."""
        return len(self.offsets) - 1

    @property
    def num_documents(self) -> int:
        """Documents in the whole directory."""
        return int(self.first[-1])

    def rows_of_step(
        self, seed: int, step: int, rows_per_step: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[int, int]]:
        """(row, draw number) that `rank` reads at optimizer step `step`, as `order.rows_of_step` gives them."""
        return rows_of_step(seed, step, rows_per_step, self.num_rows, rank, world_size)

    def row(self, index: int) -> list[int]:
        """Document numbers of one row."""
        return [int(number) for number in self.documents[self.offsets[index] : self.offsets[index + 1]]]

    def document(self, number: int) -> list[Tokens]:
        """Token segments of one document."""
        shard_id = int(np.searchsorted(self.first, number, side="right")) - 1
        shard, local = self.shards[shard_id], number - int(self.first[shard_id])
        parts = []
        offset, end = int(shard["starts"][local]), int(shard["starts"][local + 1])
        for local_row, row in enumerate(shard["segments"][offset:end]):
            _, kind, role, start, length = (int(value) for value in row)
            empty = Tokens(KINDS[kind], ROLES[role])
            name = _array_name(empty)
            arrays: dict[str, Any] = {name: np.array(shard[name][start : start + length])}
            if name == "pixels" and "features" in shard:
                arrays["latents"] = np.array(shard["features"][start : start + length])
            if name == "codes" and "sound_features" in shard:
                arrays["features"] = np.array(shard["sound_features"][start : start + length])
            if offset + local_row in shard["speaker_of"]:
                arrays["speaker"] = np.array(shard["speakers"][shard["speaker_of"][offset + local_row]])
            parts.append(Tokens(empty.kind, empty.role, **arrays))
        return parts
