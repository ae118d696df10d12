"""The stored formats against zipnn, zstd and safetensors: bits a weight, speed in memory, and of a whole file.

Speeds are MB/s of BF16 bytes with torch's threads (zipnn and zstd get as many), to and from memory, checksum included;
the row `checksum` is the verification alone. Seeded weights: `normal` has one scale, `scaled` a log-normal scale for
each row (what trained layers look like), `experts` is a stack of experts. `--weights DIR` measures every BF16 tensor of
1 M weights or more of any directory in their place. Each codec's output is decoded and compared bit for bit before it
is timed. The file is compressed by `compress`: read, encoded, verified, hashed and written, page cache warm; the wait
for the disk (fsync) is included in `ours` and printed as a peer of its own.

Peers that are no programs: `bound` is 8 + the entropy of the exponents, `payload` 11 + 8 (1 - share inside the window),
`memory` what the weight takes packed for the CPU's kernels.

Legend: E experts, R rows, C columns.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bench.common import Row, interleave, skip_peer
from ernie_elastic import compression
from ernie_elastic.compression import codec, compress_directory
from ernie_elastic.compression.container import SafetensorsFile, weight_files
from ernie_elastic.compression.format import LAYOUTS, checksum_of
from ernie_elastic.compression.tensors import read_tensor
from ernie_elastic.kernels import zip_gemv

PEERS = ("bound", "payload", "memory", *(name for name in LAYOUTS if name != codec.DEFAULT_LAYOUT), "zipnn", "zstd",
         "safetensors", "fsync")  # fmt: skip
Pair = tuple[Callable[[Tensor], Any], Callable[[Any], Any]]
MIN_WEIGHTS = 1_000_000


def cases(quick: bool) -> dict[str, Tensor]:
    """BF16 tensors by name: two of shape [R, C] and one of shape [E, R, C]."""
    generator = torch.Generator().manual_seed(0)
    rows = 512 if quick else 8192
    normal_RC = torch.randn(rows, 4096, generator=generator) * 0.02
    scale_R1 = torch.exp2(0.5 * torch.randn(rows, 1, generator=generator))
    experts_ERC = torch.randn(16 if quick else 256, 64, 128, generator=generator) * 0.05
    return {
        f"normal {rows}x4096": normal_RC.bfloat16(),
        f"scaled {rows}x4096": (normal_RC * scale_R1).bfloat16(),
        f"experts {experts_ERC.shape[0]}x64x128": experts_ERC.bfloat16(),
    }


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every BF16 tensor of MIN_WEIGHTS or more of a directory, by name."""
    found = {}
    for path in weight_files(directory):
        file = SafetensorsFile(path)
        for entry in file.entries:
            if entry.dtype == "BF16" and entry.end - entry.begin >= 2 * MIN_WEIGHTS:
                found[entry.name] = read_tensor(file, entry)
    return found


def raw_bytes(weight: Tensor) -> bytes:
    """The tensor's bytes in row order, whatever its shape."""
    return weight.contiguous().view(torch.uint8).numpy().tobytes()


def _layout(name: str) -> Pair:
    return (lambda weight: compression.encode(weight, layout=name).stream, compression.decode)


def codecs() -> dict[str, Pair]:
    """(encode, decode) of ours in every layout, and of every peer that is installed."""
    threads = torch.get_num_threads()
    found = {"ours": _layout(codec.DEFAULT_LAYOUT)}
    found |= {name: _layout(name) for name in LAYOUTS if name != codec.DEFAULT_LAYOUT}
    if importlib.util.find_spec("zipnn") is None:
        skip_peer("codec", "zipnn", "not installed; pip install zipnn")
    else:
        import zipnn

        # zipnn keeps state per object and may reorder its input in place: a new object and a copy for each call.
        def new() -> Any:
            return zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=threads)

        found["zipnn"] = (
            lambda weight: new().compress(bytearray(raw_bytes(weight))),
            lambda stream: new().decompress(stream),
        )
    import zstandard

    found["zstd"] = (
        lambda weight: zstandard.ZstdCompressor(level=3, threads=threads).compress(raw_bytes(weight)),
        lambda stream: zstandard.ZstdDecompressor().decompress(stream),
    )
    found["safetensors"] = (
        lambda weight: safetensors.torch.save({"w": weight}),
        lambda stream: safetensors.torch.load(stream)["w"],
    )
    return found


def size_of(stream: Any) -> int:
    """Bytes of an encoded stream: a u8 array or a bytes-like object."""
    return int(stream.nbytes) if hasattr(stream, "nbytes") else len(stream)


def variant(pair: Pair, action: str, weight: Tensor, stream: Any) -> Callable[[int], Any]:
    """What is timed: encoding `weight` (any shape) or decoding `stream` by the codec `pair`."""
    encode, decode = pair
    return (lambda _: encode(weight)) if action == "encode" else (lambda _: decode(stream))


def run(quick: bool, weights: Path | None = None) -> list[Row]:
    """Four rows per tensor (bits/weight, encode, decode, checksum), and the file's; weights: a directory to measure."""
    tensors = cases(quick) if weights is None else tensors_of(weights)
    rows = [row for case, weight in tensors.items() for row in measure(case, weight, 3 if quick else 5)]
    return rows if weights is not None else [*rows, file_row(8 if quick else 1024)]


def sizes(weight: Tensor, streams: dict[str, Any]) -> dict[str, float]:
    """Bits a weight of every stream, and of the peers that are no programs."""
    encoded = compression.encode(weight)
    bits = {name: 8 * size_of(stream) / weight.numel() for name, stream in streams.items() if name != "safetensors"}
    packed = zip_gemv.pack(weight.reshape(-1, weight.shape[-1]))
    share = encoded.fallbacks / encoded.weights
    return {
        "bound": encoded.entropy_bits,
        "payload": 11 + 8 * share,
        "memory": 8 * packed.nbytes / weight.numel(),
        **bits,
    }


def measure(case: str, weight: Tensor, repeats: int) -> list[Row]:
    """The rows of one BF16 tensor of any shape. Raises RuntimeError when a codec does not give back its bits."""
    pairs = codecs()
    streams = {name: encode(weight) for name, (encode, _) in pairs.items()}
    for name, (_, decode) in pairs.items():
        back = decode(streams[name])
        if (raw_bytes(back) if isinstance(back, Tensor) else bytes(back)) != raw_bytes(weight):
            raise RuntimeError(f"codec: {name} does not give back the bits of {case}")
    bits = sizes(weight, streams)
    rows = [Row(f"{case} size", bits.pop("ours"), bits, "bits/weight", higher_is_better=False)]
    for action in ("encode", "decode"):
        variants = {name: variant(pair, action, weight, streams[name]) for name, pair in pairs.items()}
        speed = {name: 2 * weight.numel() / value / 1e6 for name, value in interleave(variants, repeats).items()}
        rows.append(Row(f"{case} {action}", speed.pop("ours"), speed, "MB/s", higher_is_better=True))
    seconds = interleave({"ours": lambda _: checksum_of(streams["ours"])}, repeats)["ours"]
    return [*rows, Row(f"{case} checksum", 2 * weight.numel() / seconds / 1e6, {}, "MB/s", higher_is_better=True)]


def file_row(mebibytes: int) -> Row:
    """Seconds that `compress` takes for one safetensors file of so many MiB of BF16 [R, C] matrices; median of 3."""
    rows = 8192 if mebibytes >= 64 else 512
    generator = torch.Generator().manual_seed(1)
    with tempfile.TemporaryDirectory(prefix="codec_bench_") as folder:
        source = Path(folder) / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
        count = mebibytes * 2**20 // (2 * rows * 4096)
        tensors = {f"w{k}": (torch.randn(rows, 4096, generator=generator) * 0.02).bfloat16() for k in range(count)}
        safetensors.torch.save_file(tensors, source / "model.safetensors")
        del tensors
        reports = []
        for _ in range(4):
            started = time.perf_counter()
            found = compress_directory(source, Path(folder) / "out", overwrite=True)
            reports.append((time.perf_counter() - started, found["fsync_seconds"]))
        seconds, fsync = sorted(reports[1:])[1]
    return Row(f"compress a file of {mebibytes} MiB", seconds, {"fsync": max(fsync, 1e-3)}, "s", higher_is_better=False)
