"""The stored format against zipnn and zstd: bits a weight, encode and decode speed of BF16 tensors.

Speeds are MB/s of BF16 bytes on one core, to and from memory; zstd at level 3 on the raw bytes. Weights are seeded:
`normal` has one scale, `scaled` a log-normal scale for each row (what trained layers look like), `experts` is a small
stack of experts. Each codec's output is decoded and compared bit for bit before it is timed.

Legend: E experts, R rows, C columns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import Row, interleave, skip_peer
from ernie_elastic.compression import codec

PEERS = ("zipnn", "zstd")
Pair = tuple[Callable[[Tensor], Any], Callable[[Any], Any]]


def cases(quick: bool) -> dict[str, Tensor]:
    """BF16 tensors by name: two of shape [R, C] and one of shape [E, R, C]."""
    generator = torch.Generator().manual_seed(0)
    rows = 512 if quick else 4096
    normal_RC = torch.randn(rows, 4096, generator=generator) * 0.02
    scale_R1 = torch.exp2(0.5 * torch.randn(rows, 1, generator=generator))
    experts_ERC = torch.randn(16, 64, 128, generator=generator) * 0.05
    return {
        f"normal {rows}x4096": normal_RC.bfloat16(),
        f"scaled {rows}x4096": (normal_RC * scale_R1).bfloat16(),
        "experts 16x64x128": experts_ERC.bfloat16(),
    }


def raw_bytes(weight: Tensor) -> bytes:
    """The tensor's bytes in row order, whatever its shape."""
    return weight.contiguous().view(torch.uint8).numpy().tobytes()


def codecs() -> dict[str, Pair]:
    """(encode, decode) of ours and of every peer that is installed."""
    found: dict[str, Pair] = {"ours": (lambda weight: codec.encode(weight).stream, codec.decode)}
    if importlib.util.find_spec("zipnn") is None:
        skip_peer("codec", "zipnn", "not installed; pip install zipnn")
    else:
        import zipnn

        # zipnn keeps state per object and may reorder its input in place: a new object and a copy for each call.
        def new() -> Any:
            return zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

        found["zipnn"] = (
            lambda weight: new().compress(bytearray(raw_bytes(weight))),
            lambda stream: new().decompress(stream),
        )
    if importlib.util.find_spec("zstandard") is None:
        skip_peer("codec", "zstd", "not installed; pip install zstandard")
    else:
        import zstandard

        found["zstd"] = (
            lambda weight: zstandard.ZstdCompressor(level=3).compress(raw_bytes(weight)),
            lambda stream: zstandard.ZstdDecompressor().decompress(stream),
        )
    return found


def size_of(stream: Any) -> int:
    """Bytes of an encoded stream: a u8 array or a bytes-like object."""
    return int(stream.nbytes) if hasattr(stream, "nbytes") else len(stream)


def variant(pair: Pair, action: str, weight: Tensor, stream: Any) -> Callable[[int], Any]:
    """What is timed: encoding `weight` (any shape) or decoding `stream` by the codec `pair`."""
    encode, decode = pair
    return (lambda _: encode(weight)) if action == "encode" else (lambda _: decode(stream))


def run(quick: bool) -> list[Row]:
    """Three rows per tensor: bits/weight, encode and decode speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for case, weight in cases(quick).items() for row in measure(case, weight, 3 if quick else 5)]
    finally:
        torch.set_num_threads(threads)


def measure(case: str, weight: Tensor, repeats: int) -> list[Row]:
    """The rows of one BF16 tensor of any shape. Raises RuntimeError when a codec does not give back its bits."""
    pairs = codecs()
    streams = {name: encode(weight) for name, (encode, _) in pairs.items()}
    for name, (_, decode) in pairs.items():
        back = decode(streams[name])
        if (raw_bytes(back) if isinstance(back, Tensor) else bytes(back)) != raw_bytes(weight):
            raise RuntimeError(f"codec: {name} does not give back the bits of {case}")
    bits = {name: 8 * size_of(stream) / weight.numel() for name, stream in streams.items()}
    rows = [Row(f"{case} size", bits.pop("ours"), bits, "bits/weight", higher_is_better=False)]
    for action in ("encode", "decode"):
        variants = {name: variant(pair, action, weight, streams[name]) for name, pair in pairs.items()}
        speed = {name: 2 * weight.numel() / value / 1e6 for name, value in interleave(variants, repeats).items()}
        rows.append(Row(f"{case} {action}", speed.pop("ours"), speed, "MB/s", higher_is_better=True))
    return rows
