"""Mutated streams and files: each decodes to the same bits or is refused; never a crash, a hang or a huge allocation.

2,000 mutations, 100,000 with STRESS=full. They run in forked children, so that a crash of the native decoder is a
failure that names its seed. Half of the mutations get a new checksum, so that the decoders' own checks are met: then
another tensor may come out, but only the one that the definition reads from the stream.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ernie_elastic.compression import compress_directory, decode, encode
from ernie_elastic.compression.container import SafetensorsFile
from ernie_elastic.compression.format import CHECKSUM_AT, CHECKSUM_BYTES, LAYOUTS, Bytes, checksum_of, read_header
from ernie_elastic.errors import FormatError
from ernie_elastic.kernels import tbe_codec
from tests.conftest import is_full

CHUNK = 250  # mutations a child
HUGE = (2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)
MEMORY = 1 << 30  # more than a child may take beside what it has; no stream here is larger than 64 KiB


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(70, 90, generator=generator) * 0.02).to(torch.bfloat16)
    words = torch.randint(0, 65536, (2, 40, 40), generator=generator, dtype=torch.int32).to(torch.uint16)
    return [
        normal,
        words.view(torch.bfloat16),
        torch.zeros(3, 5).bfloat16(),
        normal.reshape(3, 2100)[:, :2099],
        normal[0],
    ]


def version_1(stream: Bytes) -> Bytes:
    old = stream.copy()
    old[4] = 1
    return sealed(old)


def sealed(stream: Bytes) -> Bytes:
    """A copy with the checksum that its bytes ask for, where there is room for one and the version has one."""
    stream = stream.copy()
    if stream.size >= CHECKSUM_AT + CHECKSUM_BYTES:
        stream[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = np.frombuffer(checksum_of(stream), dtype=np.uint8)
    return stream


def mutated(stream: Bytes, others: list[Bytes], chance: random.Random) -> Bytes:
    """One to three changes of one kind each."""
    stream = stream.copy()
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        kind, size = chance.randrange(8), stream.size
        at = chance.randrange(size)
        if kind == 0:
            stream[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            stream[at] = chance.randrange(256)
        elif kind == 2:
            stream = stream[:at] if at else stream[:1]
        elif kind == 3:
            extra = np.frombuffer(chance.randbytes(chance.randint(1, 40)), dtype=np.uint8)
            stream = np.concatenate([stream[:at], extra, stream[at:]])
        elif kind == 4:
            other = chance.choice(others)
            stream = np.concatenate([stream[:at], other[chance.randrange(other.size) :]])
        elif kind == 5 and size > 64:
            place = 32 + 8 * chance.randrange(4)
            stream[place : place + 8] = np.frombuffer(struct.pack("<Q", chance.choice(HUGE)), dtype=np.uint8)
        elif kind == 6 and size > 32:
            stream[chance.randrange(32)] = chance.randrange(256)
        elif kind == 7 and size > 80:
            place = chance.randrange(32, size - 8)
            value = chance.choice((0, 1, 255, 2**31, 2**63, 2**64 - 1, size))
            stream[place : place + 8] = np.frombuffer(struct.pack("<Q", value), dtype=np.uint8)
        if not stream.size:
            break
    return stream


def one_stream(originals: list[tuple[Bytes, torch.Tensor]], chance: random.Random) -> str:
    """Mutate a stream and decode it; what came of it."""
    stream, tensor = chance.choice(originals)
    damaged = mutated(stream, [other for other, _ in originals], chance)
    resealed = chance.random() < 0.5
    if resealed:
        damaged = sealed(damaged)
    try:
        decoded = decode(damaged)
    except FormatError:
        return "refused"
    if not resealed:
        assert decoded.shape == tensor.shape and torch.equal(decoded.view(torch.int16), tensor.view(torch.int16))
        return "same"
    header = read_header(damaged)
    assert decoded.dtype == torch.bfloat16 and tuple(decoded.shape) == header.shape
    # What the stream says is what the definition in numpy reads from it.
    with mock.patch.object(tbe_codec, "_library", lambda backend: None):
        defined = decode(damaged)
    assert torch.equal(defined.view(torch.int16), decoded.view(torch.int16))
    return "another"


def one_file(content: bytes, plain: dict[str, bytes], folder: Path, chance: random.Random) -> str:
    """Mutate a whole safetensors file, its header more than chance would, and read every tensor of it."""
    (length,) = struct.unpack("<Q", content[:8])
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(8 + length if chance.random() < 0.7 else len(changed))
        if chance.random() < 0.6:
            digits = [k for k in range(8, 8 + length) if k < len(changed) and chr(changed[k]).isdigit()]
            place = chance.choice(digits) if digits else min(at, len(changed) - 1)
            changed[place] = ord(chance.choice("0123456789"))
        elif chance.random() < 0.2:
            del changed[at:]
        else:
            changed[min(at, len(changed) - 1)] = chance.randrange(256)
        if len(changed) < 16:
            break
    path = folder / f"{os.getpid()}.safetensors"
    path.write_bytes(bytes(changed))
    try:
        file = SafetensorsFile(path)
        for entry in file.entries:
            raw = file.raw(entry)
            if entry.is_stream:
                decoded = decode(raw)
                name = read_header(raw).name
                assert decoded.reshape(-1).view(torch.uint8).numpy().tobytes() == plain[name]
        return "same"
    except FormatError:
        return "refused"
    finally:
        path.unlink()


def in_child(work: Callable[[random.Random], str], seed: int, report: Path) -> dict[str, int]:
    """CHUNK mutations in a child with little memory; fails with the seed when it crashes, hangs or finds a fault."""
    child = os.fork()
    if child == 0:
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
            torch.set_num_threads(1)
            counts: dict[str, int] = {}
            for k in range(CHUNK):
                report.write_text(f"seed {seed}, mutation {k}")
                found = work(random.Random(seed * 1_000_003 + k))
                counts[found] = counts.get(found, 0) + 1
            report.write_text(json.dumps(counts))
            os._exit(0)
        except BaseException:
            report.write_text(f"{report.read_text()}: {traceback.format_exc()}")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a child ended with status {status}: {report.read_text()}"
    found: dict[str, int] = json.loads(report.read_text())
    return found


@pytest.mark.timeout(600)
def test_no_mutation_of_a_stream_does_harm(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    originals = [(encode(t, f"t{k}", layout).stream, t) for k, t in enumerate(tensors()) for layout in LAYOUTS]
    originals += [(version_1(stream), tensor) for stream, tensor in originals[:3]]
    total: dict[str, int] = {}
    for seed in range(300 if is_full(request.config) else 6):
        for name, count in in_child(lambda chance: one_stream(originals, chance), seed, tmp_path / "report").items():
            total[name] = total.get(name, 0) + count
    print(total)
    assert total["refused"] > sum(total.values()) // 2 and total["another"] > 0


@pytest.mark.timeout(600)
def test_no_mutation_of_a_file_does_harm(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    known = {f"w{k}": (torch.randn(40, 50) * 0.02).to(torch.bfloat16) for k in range(3)} | {"norm": torch.ones(40)}
    save_file(known, source / "model.safetensors")
    plain = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in known.items()}
    total: dict[str, int] = {}
    for layout in LAYOUTS:
        compress_directory(source, tmp_path / layout, layout=layout)
    contents = [(tmp_path / layout / "model.safetensors").read_bytes() for layout in LAYOUTS]
    for seed in range(100 if is_full(request.config) else 2):
        work: Callable[[random.Random], str] = lambda chance: one_file(chance.choice(contents), plain, tmp_path, chance)
        for name, count in in_child(work, seed, tmp_path / "report").items():
            total[name] = total.get(name, 0) + count
    print(total)
    assert total["refused"] > 0 and total.get("same", 0) > 0
