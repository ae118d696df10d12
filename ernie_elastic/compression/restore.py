"""The way back and the look inside: identical files from a compressed directory, and a table of its tensors.

Contract: `decompress_directory` gives back every file of the source with its bytes; each restored file is compared with
the SHA-256 that `compress` recorded before the output gets its final name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ernie_elastic.compression import codec
from ernie_elastic.compression.config_file import SHIM_MODULE
from ernie_elastic.compression.container import BITS, SafetensorsFile, parse_header, weight_files
from ernie_elastic.compression.directory import FILES_NAME, ORIGINAL_DIR, STAGE, is_compressed
from ernie_elastic.compression.format import VERSION, read_header
from ernie_elastic.errors import CheckpointError, ConfigError, FormatError
from ernie_elastic.kernels import tbe_codec
from ernie_elastic.stages import MANIFEST_NAME, disk_error, progress, publish_directory, read_manifest, sha256_file


def read_files_table(directory: Path) -> dict[str, Any]:
    """`tbe_original/files.json`. CheckpointError for a directory that is not compressed, FormatError when damaged."""
    path = directory / ORIGINAL_DIR / FILES_NAME
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; expected the output of `ernie-elastic compress`")
    if not path.is_file():
        raise CheckpointError(f"{directory} is not compressed (no {ORIGINAL_DIR}/{FILES_NAME}); nothing to restore")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version, files, streams = table["format_version"], table["files"], table["streams"]
        newer = isinstance(version, int) and version > VERSION
        valid = isinstance(version, int) and version >= 1 and all(_is_file_entry(item) for item in files.values())
        valid = valid and all(_is_name_table(item) for item in streams.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is damaged ({error}); fetch {directory} anew") from error
    if newer:
        raise FormatError(f"{path} has format version {version}, this package reads {VERSION}; install a newer one")
    if not valid or not set(streams) <= set(files):
        raise FormatError(f"{path} is damaged (a field is missing or not of its kind); fetch {directory} anew")
    if any(Path(name).name != name or name in ("", ".", "..") for name in files):
        raise FormatError(f"{path} is damaged (it names a file outside of the directory); fetch {directory} anew")
    return table


def _is_file_entry(item: Any) -> bool:
    size = item["bytes"]
    return isinstance(item["sha256"], str) and isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _is_name_table(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(name, str) for name in item.values())


def decompress_directory(directory: Path | str, out: Path | str, overwrite: bool = False) -> dict[str, Any]:
    """Restore the source of a compressed directory, byte for byte.

    Report: out, files, bytes, streams (decoded, by their checksums), verified (files whose SHA-256 is the recorded
    one), manifest (whether there is one; then every file was compared with it). Raises CheckpointError for a
    missing, damaged or uncompressed directory or a full disk, ConfigError when `out` lies in `directory`, FormatError
    when a stream, a header or a restored file is not what was recorded.
    """
    directory, out = Path(directory), Path(out)
    table = read_files_table(directory)
    manifest = (directory / MANIFEST_NAME).is_file()
    if manifest:
        read_manifest(directory, (STAGE,), verify=True)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; pass --overwrite to replace it, or choose another --out")
    if directory.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"--out {out} lies in {directory}; choose a directory outside of it")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _restore(directory, temporary, table)
        restored = [path for path in temporary.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in restored)
        publish_directory(temporary, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "out": str(out),
        "files": len(restored),
        "bytes": size,
        "streams": sum(len(names) for names in table["streams"].values()),
        "verified": len(table["files"]),
        "manifest": manifest,
    }


def _restore(directory: Path, target: Path, table: dict[str, Any]) -> None:
    """Fill `target` with the source's files and check those that were replaced."""
    weights = sorted(table["streams"])
    ours = {"config.json", MANIFEST_NAME, f"{SHIM_MODULE}.py", *weights, *table["files"]}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_file() and relative.parts[0] != ORIGINAL_DIR and str(relative) not in ours:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
    total = sum(int(table["files"][name]["bytes"]) for name in weights)
    with progress(total=total, desc="decompress", unit="B") as bar:
        for name in weights:
            _restore_weights(directory, target, name, table["streams"][name], bar.update)
    for name, entry in sorted(table["files"].items()):
        if name not in weights:
            place = directory / ORIGINAL_DIR / name
            if not place.is_file():
                raise CheckpointError(f"{directory} is damaged: {ORIGINAL_DIR}/{name} is missing; fetch it anew")
            shutil.copyfile(place, target / name)
        if sha256_file(target / name) != entry["sha256"]:
            raise FormatError(f"{directory}: {name} is not restored to the file that was compressed; fetch it anew")


def _restore_weights(
    directory: Path, target: Path, name: str, names: dict[str, str], step: Callable[[int], Any]
) -> None:
    """Rebuild one safetensors file from its verbatim header and the decoded tensors."""
    header_path = directory / ORIGINAL_DIR / f"{name}.header"
    for path in (header_path, directory / name):
        if not path.is_file():
            raise CheckpointError(f"{directory} is damaged: {path.relative_to(directory)} is missing; fetch it anew")
    header = header_path.read_bytes()
    compressed = SafetensorsFile(directory / name)
    _, entries = parse_header(header[8:], None, str(header_path))
    found = {names.get(entry.name, entry.name): entry for entry in compressed.entries}
    with open(target / name, "wb") as out:
        out.write(header)
        for entry in entries:
            twin = found.get(entry.name)
            if twin is None:
                raise FormatError(f"{directory / name}: {entry.name!r} is missing; fetch {directory} anew")
            raw = compressed.raw(twin)
            if twin.is_stream:
                raw = codec.decode_words(raw, str(directory / name), entry.name)[0].view(np.uint8)
            if raw.size != entry.end - entry.begin:
                raise FormatError(
                    f"{directory / name}: {entry.name!r} has {raw.size} bytes, expected {entry.end - entry.begin}; "
                    f"fetch {directory} anew"
                )
            out.write(np.ascontiguousarray(raw).data)
            step(raw.size)


def directory_info(directory: Path | str) -> list[dict[str, Any]]:
    """One row per tensor of a directory, compressed or not; every stream is decoded, so its checksum is verified.

    Row: name, file, layout ("stored" for a tensor that was left alone), dtype, shape, weights, bytes, bits_per_weight,
    entropy_bits (8 + the entropy of the exponents: the bound of this kind of coding; None unless BF16), checksum (of
    the stream; None when stored). Raises CheckpointError and FormatError as loading does.
    """
    directory = Path(directory)
    files = weight_files(directory)
    if is_compressed(directory):
        read_files_table(directory)
    rows = []
    with progress(total=sum(path.stat().st_size for path in files), desc="info", unit="B") as bar:
        for path in files:
            file = SafetensorsFile(path)
            for entry in file.entries:
                rows.append(_row(file, entry))
                bar.update(entry.end - entry.begin)
    return rows


def _row(file: SafetensorsFile, entry: Any) -> dict[str, Any]:
    raw = file.raw(entry)
    weights = raw.size * 8 // BITS[entry.dtype]
    row: dict[str, Any] = {
        "name": entry.name, "file": file.path.name, "layout": "stored", "dtype": entry.dtype,
        "shape": list(entry.shape), "weights": weights, "bytes": raw.size,
        "bits_per_weight": None, "entropy_bits": None, "checksum": None,
    }  # fmt: skip
    if entry.is_stream:
        header = read_header(raw, f"{file.path}: {entry.name}")
        words, _ = codec.decode_words(raw, str(file.path))
        row.update(name=header.name, layout=header.layout, dtype="BF16", shape=list(header.shape))
        row.update(weights=header.weights, checksum=header.checksum)
    elif entry.dtype == "BF16":
        words = file.words(entry)
    else:
        words = None
    if words is not None:
        row["entropy_bits"] = round(8 + codec.entropy(tbe_codec.count_exponents(words.reshape(1, -1))[0]), 4)
    row["bits_per_weight"] = round(8 * raw.size / row["weights"], 4) if row["weights"] else None
    return row
