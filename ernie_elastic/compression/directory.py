"""A Hugging Face directory in, a compressed Hugging Face directory out (docs/formats.md section 3).

Contract: at most two tensors in memory; every tensor is decoded from the written file and compared with the source
before the directory gets its final name; the result appears whole or not at all; a run that was cut off goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ernie_elastic.compression import codec
from ernie_elastic.compression.config_file import MODEL_TYPE, ORIGINAL_KEY, SHIM_MODULE, SHIM_TEXT, outer_config
from ernie_elastic.compression.container import SafetensorsFile, read_index, weight_files
from ernie_elastic.compression.format import LAYOUTS, VERSION
from ernie_elastic.compression.shard import Shard, compress_shard
from ernie_elastic.errors import CheckpointError, ConfigError
from ernie_elastic.resumable import PartialOutput, resumable_output
from ernie_elastic.stages import MANIFEST_NAME, progress, read_manifest, sha256_file, write_json

STAGE = "compress"
ORIGINAL_DIR = "tbe_original"
FILES_NAME = "files.json"


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


def compress_directory(
    source: Path | str, out: Path | str, layout: str = codec.DEFAULT_LAYOUT, overwrite: bool = False
) -> dict[str, Any]:
    """Compress a Hugging Face model directory without loss; returns what `compress` prints, JSON-able.

    source: safetensors at its top level, sharded or not; BF16 tensors are compressed, all else is copied. layout: see
    docs/formats.md. Report: out, tensors, compressed, kept (dtype -> count), not_smaller (of the kept, those whose
    streams would be no smaller), parameters, source_bytes, model_bytes, ratio, bits_per_weight and entropy_bits (of the
    compressed tensors), seconds. Raises ConfigError for an unknown layout or a quantised source, CheckpointError for a
    missing, damaged or already compressed one or a full disk, FormatError for a damaged safetensors file. source: ours.
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
    settings = {"source": str(source.resolve()), "layout": layout, "format_version": VERSION}
    inputs = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    report: dict[str, Any] = {}
    with resumable_output(out, STAGE, settings, inputs, parent=source, overwrite=overwrite, extra=report) as partial:
        shards = _compress_files(files, partial, layout)
        copy_other_files(source, partial.target, files)
        _write_small_files(source, partial.target, config, layout, shards)
        report.update(_report(files, partial.target, shards))
    fsync = sum(shard.fsync_seconds for shard in shards.values())
    return {
        "out": str(out),
        **report,
        "seconds": round(time.monotonic() - started, 3),
        "fsync_seconds": round(fsync, 3),
    }


def _compress_files(files: list[Path], partial: PartialOutput, layout: str) -> dict[str, Shard]:
    """The compressed twins of all safetensors files and the headers of their sources, in `partial`; one ETA for all."""
    shards: dict[str, Shard] = {}
    (partial.target / ORIGINAL_DIR).mkdir(exist_ok=True)
    first, total = 0, sum(SafetensorsFile(path).data.size for path in files)
    with ThreadPoolExecutor(2) as hashing, progress(total=2 * total, desc="compress", unit="B") as bar:
        for path in files:
            written = partial.target / path.name
            shard = compress_shard(path, written, partial.notes, layout, first, hashing, bar.update)
            (partial.target / ORIGINAL_DIR / f"{path.name}.header").write_bytes(SafetensorsFile(path).header)
            shards[path.name] = shard
            partial.hashes[path.name] = shard.sha256
            first += len(shard.names)
    return shards


def check_source(source: Path, config: dict[str, Any]) -> None:
    """CheckpointError when `source` is compressed already, ConfigError when it is quantised."""
    if (source / ORIGINAL_DIR).exists() or config.get("model_type") == MODEL_TYPE:
        raise CheckpointError(
            f"{source} is compressed already; restore it with `ernie-elastic decompress {source} --out DIR` first"
        )
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method:
        raise ConfigError(
            f"{source} is quantised with {method!r}, expected plain BF16 weights; lossless coding saves nothing there"
        )
    if config.get(ORIGINAL_KEY) is not None or (source / f"{SHIM_MODULE}.py").exists():
        raise CheckpointError(f"{source} holds files of a compressed directory; compress a clean copy of the model")


def copy_other_files(source: Path, target: Path, files: list[Path]) -> None:
    """Copy everything but the weights byte for byte; what will be replaced goes to `tbe_original/`.

    Whatever an earlier run left beside the weights goes first: the source may hold it no longer.
    """
    made = {target / path.name for path in files} | {target / ORIGINAL_DIR / f"{path.name}.header" for path in files}
    for path in sorted(target.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()) and path != target / ORIGINAL_DIR:
            path.rmdir()
        elif not path.is_dir() and path not in made:
            path.unlink()
    replaced = {"config.json", MANIFEST_NAME, *(path.name for path in source.glob("*.safetensors.index.json"))}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path in files or not path.is_file():
            continue
        place = target / ORIGINAL_DIR / relative if str(relative) in replaced else target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _write_small_files(
    source: Path, target: Path, config: dict[str, Any], layout: str, shards: dict[str, Shard]
) -> None:
    """config.json, shim, index and files.json of a compressed directory."""
    names = {name: shard.names for name, shard in shards.items()}
    known = {name: shard.source_sha256 for name, shard in shards.items()}
    write_json(target / "config.json", outer_config(config, layout))
    (target / f"{SHIM_MODULE}.py").write_text(SHIM_TEXT, encoding="utf-8")
    for path in sorted(source.glob("*.safetensors.index.json")):
        sizes = {name: shard.tensor_bytes for name, shard in shards.items()}
        write_json(target / path.name, renamed_index(read_index(path), names, sizes))
    replaced = [*sorted(source.glob("*.safetensors")), *sorted(source.glob("*.safetensors.index.json"))]
    replaced += [path for path in (source / "config.json", source / MANIFEST_NAME) if path.is_file()]
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256_file(path)}
        for path in replaced
    }
    info = {"format_version": VERSION, "layout": layout, "files": files, "streams": names}
    write_json(target / ORIGINAL_DIR / FILES_NAME, info)


def renamed_index(index: dict[str, Any], names: dict[str, dict[str, str]], sizes: dict[str, int]) -> dict[str, Any]:
    """An index with stream keys in place of the names of compressed tensors, and the new total size."""
    keys = {(file, name): key for file, table in names.items() for key, name in table.items()}
    weight_map = {keys.get((file, name), name): file for name, file in index["weight_map"].items()}
    total = sum(sizes[file] for file in set(weight_map.values()))
    return {"metadata": {**(index.get("metadata") or {}), "total_size": total}, "weight_map": weight_map}


def _report(files: list[Path], target: Path, shards: dict[str, Shard]) -> dict[str, Any]:
    source_bytes = sum(path.stat().st_size for path in files)
    stored = sum((target / path.name).stat().st_size for path in files)
    kept: Counter[str] = Counter()
    for shard in shards.values():
        kept.update(shard.kept)
    streams = sum(len(shard.names) for shard in shards.values())
    weights = sum(shard.weights for shard in shards.values())
    stream_bits = 8 * sum(shard.stream_bytes for shard in shards.values())
    entropy_bits = sum(shard.entropy_bits for shard in shards.values())
    return {
        "tensors": streams + sum(kept.values()),
        "compressed": streams,
        "kept": dict(sorted(kept.items())),
        "not_smaller": sum(shard.not_smaller for shard in shards.values()),
        "parameters": sum(shard.total_weights for shard in shards.values()),
        "source_bytes": source_bytes,
        "model_bytes": stored,
        "ratio": round(stored / source_bytes, 5),
        "bits_per_weight": round(stream_bits / weights, 4) if weights else None,
        "entropy_bits": round(entropy_bits / weights, 4) if weights else None,
    }
