"""Safetensors files: order and alignment of what is written, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ernie_elastic.compression.container import (
    SafetensorsFile,
    SafetensorsWriter,
    Stored,
    largest_stream,
    model_bytes,
    parse_header,
    weight_files,
)
from ernie_elastic.errors import CheckpointError, FormatError


def stored(name: str, tensor: torch.Tensor, dtype: str) -> Stored:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return Stored(name, dtype, tuple(tensor.shape), raw.size, raw)


def test_tensors_are_aligned_whatever_order_they_come_in(tmp_path: Path) -> None:
    flags, wide = torch.tensor([True, False, True]), torch.rand(2, 3, dtype=torch.float64)
    brief = torch.randn(5).to(torch.bfloat16)
    stream = np.arange(7, dtype=np.uint8)
    kept = [stored("flags", flags, "BOOL"), stored("brief", brief, "BF16"), stored("wide", wide, "F64")]
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, kept, [largest_stream("tbe__0", 4000)]) as writer:
        writer.append(Stored("tbe__0", "U8", (7,), 7), stream)
        writer.finish()
    with safe_open(path, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("flags"), flags) and torch.equal(opened.get_tensor("wide"), wide)
        assert torch.equal(opened.get_tensor("brief"), brief)
        assert opened.get_tensor("tbe__0").tolist() == list(range(7))
    file = SafetensorsFile(path)
    assert len(file.header) % 8 == 0 and [entry.name for entry in file.entries] == ["wide", "brief", "flags", "tbe__0"]
    assert file.metadata == {"format": "pt"} and model_bytes(tmp_path) == path.stat().st_size
    assert all(entry.begin % 8 == 0 for entry in file.entries if entry.dtype == "F64")


def header(**entries: object) -> bytes:
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        header(w={"dtype": "BF16", "shape": [2]}),
        header(w={"dtype": "BF17", "shape": [2], "data_offsets": [0, 4]}),
        header(w={"dtype": "BF16", "shape": [2], "data_offsets": [0, 5]}),
        header(w={"dtype": "BF16", "shape": [-2], "data_offsets": [0, -4]}),
        header(w={"dtype": "BF16", "shape": [2], "data_offsets": [1, 5]}),
        header(a={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
               b={"dtype": "U8", "shape": [3], "data_offsets": [2, 5]}),
        header(w={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}),
        header(w={"dtype": "U8", "shape": [5.0], "data_offsets": [0, 5]}),
        b'{"w":{"dtype":"U8","shape":[5],"data_offsets":[0,1e999]}}',
        b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_headers_that_do_not_fill_the_data_are_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        parse_header(text, 5, "file")


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 0)])
def test_files_that_are_no_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json"):
        weight_files(tmp_path)
