"""A Hugging Face directory in, a compressed Hugging Face directory out (docs/formats.md section 3).

Contract: at most two tensors in memory; every tensor is decoded from the written file and compared with the source
before the directory gets its final name; the result appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ernie_elastic.compression import codec
from ernie_elastic.compression.config import MODEL_TYPE, ORIGINAL_KEY, SHIM_MODULE, SHIM_TEXT, outer_config
from ernie_elastic.compression.container import (
    STREAM_PREFIX,
    Entry,
    SafetensorsFile,
    Stored,
    read_index,
    weight_files,
    write_safetensors,
)
from ernie_elastic.compression.format import LAYOUTS, VERSION
from ernie_elastic.errors import CheckpointError, ConfigError, FormatError
from ernie_elastic.stages import MANIFEST_NAME, progress, read_manifest, sha256_file, stage_output, write_json

STAGE = "compress"
ORIGINAL_DIR = "tbe_original"
FILES_NAME = "files.json"
# ours: below this a stream's own header eats what it saves.
MIN_WEIGHTS = 512


@dataclass
class Tally:
    """What a compression found: counts, bytes, and names by file."""

    names: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> stream key -> tensor name
    sizes: dict[str, int] = field(default_factory=dict)  # file -> bytes of its tensors
    streams: int = 0
    stream_bytes: int = 0
    weights: int = 0
    entropy_bits: float = 0.0  # summed over weights
    kept: Counter[str] = field(default_factory=Counter)
    total_weights: int = 0


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory. CheckpointError when it is missing or damaged."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; expected a Hugging Face model directory")
    if not path.is_file():
        hint = "check the path"
        if (directory / MANIFEST_NAME).is_file():
            hint = f"it is the output of {read_manifest(directory).stage!r}"
        raise CheckpointError(f"{directory} has no config.json, so it is no Hugging Face model directory; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it must hold an object")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch {directory} anew") from error
    return config


def is_compressed(directory: Path | str) -> bool:
    """True when `compress` wrote this directory."""
    directory = Path(directory)
    return (directory / ORIGINAL_DIR).is_dir() or read_config(directory).get("model_type") == MODEL_TYPE


def is_candidate(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is worth a stream: BF16, two dimensions or more, MIN_WEIGHTS or more."""
    return dtype == "BF16" and len(shape) >= 2 and math.prod(shape) >= MIN_WEIGHTS


def compress_directory(
    source: Path | str, out: Path | str, layout: str = codec.DEFAULT_LAYOUT, overwrite: bool = False
) -> dict[str, Any]:
    """Compress a Hugging Face model directory without loss; returns what `compress` prints, JSON-able.

    source: safetensors at its top level, sharded or not; BF16 tensors are compressed, all else is copied. layout: see
    docs/formats.md. Report: out, tensors, compressed, kept (dtype -> count), parameters, source_bytes, model_bytes,
    ratio, bits_per_weight and entropy_bits (of the compressed tensors), seconds. Raises ConfigError for an unknown
    layout or a quantised source, CheckpointError for a missing, damaged or already compressed one or a full disk,
    FormatError for a damaged safetensors file. source: ours.
    """
    source, out, started = Path(source), Path(out), time.monotonic()
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is not known; choose {' or '.join(LAYOUTS)}")
    config = read_config(source)
    check_source(source, config)
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"--out {out} lies in the source {source}; choose a directory outside of it")
    files = weight_files(source)
    if (source / MANIFEST_NAME).is_file():
        read_manifest(source)
    tally = Tally()
    settings = {"source": str(source), "layout": layout, "format_version": VERSION}
    report: dict[str, Any] = {}
    with stage_output(out, STAGE, settings, parent=source, overwrite=overwrite, extra=report) as temporary:
        copy_other_files(source, temporary, files)
        total = sum(path.stat().st_size for path in files)
        with progress(total=2 * total, desc="compress", unit="B") as bar:
            for path in files:
                _compress_file(path, temporary, layout, tally, bar.update)
                _verify_file(path, temporary / path.name, tally, bar.update)
        _write_small_files(source, temporary, config, layout, tally)
        report.update(_report(files, temporary, tally))
    return {"out": str(out), **report, "seconds": round(time.monotonic() - started, 3)}


def check_source(source: Path, config: dict[str, Any]) -> None:
    """CheckpointError when `source` is compressed already, ConfigError when it is quantised."""
    if (source / ORIGINAL_DIR).exists() or config.get("model_type") == MODEL_TYPE:
        raise CheckpointError(
            f"{source} is compressed already; restore it with `ernie-elastic decompress {source} --out DIR` first"
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ConfigError(
            f"{source} is quantised with {method!r}, expected plain BF16 weights; lossless coding saves nothing there"
        )
    if config.get(ORIGINAL_KEY) is not None or (source / f"{SHIM_MODULE}.py").exists():
        raise CheckpointError(f"{source} holds files of a compressed directory; compress a clean copy of the model")


def copy_other_files(source: Path, target: Path, files: list[Path]) -> None:
    """Copy everything but the weights byte for byte; what will be replaced goes to `tbe_original/`."""
    replaced = {"config.json", MANIFEST_NAME, *(path.name for path in source.glob("*.safetensors.index.json"))}
    (target / ORIGINAL_DIR).mkdir()
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path in files or not path.is_file():
            continue
        place = target / ORIGINAL_DIR / relative if str(relative) in replaced else target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _compress_file(path: Path, target: Path, layout: str, tally: Tally, step: Callable[[int], Any]) -> None:
    """Write the compressed twin of one safetensors file and its verbatim header."""
    file = SafetensorsFile(path)
    if any(entry.is_stream for entry in file.entries):
        raise CheckpointError(f"{path} holds names that begin with {STREAM_PREFIX!r}; rename those tensors first")
    with tempfile.TemporaryFile(dir=target) as spool:
        kept, streams = _spool_streams(file, layout, spool, tally, step)
        write_safetensors(target / path.name, kept, spool, streams)
    (target / ORIGINAL_DIR / f"{path.name}.header").write_bytes(file.header)
    tally.sizes[path.name] = sum(item.size for item in (*kept, *streams))


def _spool_streams(
    file: SafetensorsFile, layout: str, spool: BinaryIO, tally: Tally, step: Callable[[int], Any]
) -> tuple[list[Stored], list[Stored]]:
    """Encode what gets smaller into `spool`; returns the kept tensors and the streams."""
    kept: list[Stored] = []
    streams: list[Stored] = []
    names = tally.names.setdefault(file.path.name, {})
    for entry in file.entries:
        raw = file.raw(entry)
        stream = None
        tally.total_weights += math.prod(entry.shape)
        if is_candidate(entry.dtype, entry.shape):
            encoded = codec.encode(file.tensor(entry), entry.name, layout)
            stream = encoded.stream if encoded.stream.size < raw.size else None
        if stream is None:
            kept.append(Stored(entry.name, entry.dtype, entry.shape, raw.size, raw))
            tally.kept[entry.dtype] += 1
        else:
            key = f"{STREAM_PREFIX}{tally.streams}"
            names[key] = entry.name
            streams.append(Stored(key, "U8", (stream.size,), stream.size))
            spool.write(stream.data)
            tally.streams += 1
            tally.stream_bytes += stream.size
            tally.weights += encoded.weights
            tally.entropy_bits += encoded.entropy_bits * encoded.weights
        step(raw.size)
    return kept, streams


def _verify_file(source: Path, written: Path, tally: Tally, step: Callable[[int], Any]) -> None:
    """Decode every tensor of the written file and compare it with the source; FormatError when one differs."""
    before, after = SafetensorsFile(source), SafetensorsFile(written)
    names = tally.names[source.name]
    found: dict[str, Entry] = {names.get(entry.name, entry.name): entry for entry in after.entries}
    for entry in before.entries:
        twin = found.pop(entry.name, None)
        if twin is None:
            raise FormatError(f"{written}: {entry.name!r} was not written; please report this defect")
        raw = after.raw(twin)
        if twin.is_stream:
            raw = codec.decode(raw, str(written), entry.name).reshape(-1).view(torch.uint8).numpy()
        if not np.array_equal(raw, before.raw(entry)):
            raise FormatError(f"{written}: {entry.name!r} does not decode to its source; please report this defect")
        step(raw.size)
    if found:
        raise FormatError(f"{written}: {sorted(found)[0]!r} is not in the source; please report this defect")


def _write_small_files(source: Path, target: Path, config: dict[str, Any], layout: str, tally: Tally) -> None:
    """config.json, shim, index and files.json of a compressed directory."""
    write_json(target / "config.json", outer_config(config, layout))
    (target / f"{SHIM_MODULE}.py").write_text(SHIM_TEXT, encoding="utf-8")
    for path in sorted(source.glob("*.safetensors.index.json")):
        write_json(target / path.name, renamed_index(read_index(path), tally.names, tally.sizes))
    replaced = [*sorted(source.glob("*.safetensors")), *sorted(source.glob("*.safetensors.index.json"))]
    replaced += [path for path in (source / "config.json", source / MANIFEST_NAME) if path.is_file()]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in replaced}
    info = {"format_version": VERSION, "layout": layout, "files": files, "streams": tally.names}
    write_json(target / ORIGINAL_DIR / FILES_NAME, info)


def renamed_index(index: dict[str, Any], names: dict[str, dict[str, str]], sizes: dict[str, int]) -> dict[str, Any]:
    """An index with stream keys in place of the names of compressed tensors, and the new total size."""
    keys = {(file, name): key for file, table in names.items() for key, name in table.items()}
    weight_map = {keys.get((file, name), name): file for name, file in index["weight_map"].items()}
    total = sum(sizes[file] for file in set(weight_map.values()))
    return {"metadata": {**index.get("metadata", {}), "total_size": total}, "weight_map": weight_map}


def _report(files: list[Path], target: Path, tally: Tally) -> dict[str, Any]:
    source_bytes = sum(path.stat().st_size for path in files)
    stored = sum((target / path.name).stat().st_size for path in files)
    return {
        "tensors": tally.streams + sum(tally.kept.values()),
        "compressed": tally.streams,
        "kept": dict(sorted(tally.kept.items())),
        "parameters": tally.total_weights,
        "source_bytes": source_bytes,
        "model_bytes": stored,
        "ratio": round(stored / source_bytes, 5),
        "bits_per_weight": round(8 * tally.stream_bytes / tally.weights, 4) if tally.weights else None,
        "entropy_bits": round(tally.entropy_bits / tally.weights, 4) if tally.weights else None,
    }
