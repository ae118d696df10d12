"""Directories: what is compressed, what is copied, identical files on the way back, and one line for bad input."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ernie_elastic.compression import compress_directory, is_compressed, model_bytes, shard
from ernie_elastic.compression.config_file import SHIM_MODULE
from ernie_elastic.compression.container import SafetensorsFile
from ernie_elastic.compression.restore import decompress_directory, directory_info
from ernie_elastic.errors import CheckpointError, ConfigError, FormatError
from ernie_elastic.stages import read_manifest
from tests.compression.conftest import CONFIGS, Pair, hashes

Pairs = Callable[[str], Pair]


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_gives_identical_files_and_the_ratio(pairs: Pairs, name: str, tmp_path: Path) -> None:
    pair = pairs(name)
    decompress_directory(pair.compressed, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(pair.source)
    print(name, pair.report)
    assert pair.report["ratio"] <= 0.725
    assert pair.report["model_bytes"] == model_bytes(pair.compressed) <= 0.725 * model_bytes(pair.source)
    assert pair.report["compressed"] + sum(pair.report["kept"].values()) == pair.report["tensors"]


def test_other_files_are_copied_and_the_manifest_is_ours(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    source, compressed = hashes(pair.source), hashes(pair.compressed)
    for name in ("generation_config.json", "tokenizers/visual/manifest.json", "tokenizers/visual/model.safetensors"):
        assert compressed[name] == source[name]
    manifest = read_manifest(pair.compressed, ("compress",), verify=True)
    assert manifest.config["layout"] == "dense_plane" and manifest.parent is not None
    assert manifest.extra["model_bytes"] == pair.report["model_bytes"]
    assert is_compressed(pair.compressed) and not is_compressed(pair.source)
    assert "pip install ernie-elastic" in (pair.compressed / f"{SHIM_MODULE}.py").read_text()


def test_the_written_files_are_plain_safetensors_with_a_right_index(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    index = json.loads((pair.compressed / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(pair.compressed / file, framework="pt") as opened:
            names = set(opened.keys())
            total += sum(opened.get_tensor(name).nbytes for name in names)
        assert names == {name for name, place in index["weight_map"].items() if place == file}
    assert index["metadata"]["total_size"] == total
    assert all(key.removeprefix("tbe__").isdigit() or "weight" in key for key in index["weight_map"])


def test_same_source_same_bytes(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("tiny_moe")
    compress_directory(pair.source, tmp_path / "again")
    ignored = ("manifest.json",)
    assert {k: v for k, v in hashes(tmp_path / "again").items() if k not in ignored} == {
        k: v for k, v in hashes(pair.compressed).items() if k not in ignored
    }


def make_source(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "made": "by a test"})
    return folder


def odd_tensors() -> dict[str, torch.Tensor]:
    return {
        "z.weight": (torch.randn(65, 37) * 0.02).to(torch.bfloat16),
        "noise": torch.randint(0, 65536, (40, 40), dtype=torch.int32).to(torch.uint16).view(torch.bfloat16),
        "a.scale": torch.rand(3, dtype=torch.float64),
        "half": torch.randn(30, 30).half(),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 5, dtype=torch.bfloat16),
        "vector": torch.randn(5000).to(torch.bfloat16),
        "small": torch.randn(10, 10).to(torch.bfloat16),
        "e4m3": torch.randn(8, 8).to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("layout", ["dense_plane", "tca_tbe", "entropy_coded"])
def test_other_dtypes_and_what_does_not_shrink_stay_as_they_are(tmp_path: Path, layout: str) -> None:
    tensors = odd_tensors()
    if layout == "tca_tbe":
        tensors["z.weight"] = (torch.randn(128, 128) * 0.02).to(torch.bfloat16)  # it pads sides to multiples of 64
    source = make_source(tmp_path / "source", tensors)
    (source / "manifest.json").write_text(
        json.dumps({
            "stage": "extract", "format_version": 1, "config": {}, "fingerprint": "", "parent": None, "extra": {},
            "package_version": "0", "git_commit": "", "created_at": "",
            "files": {"model.safetensors": {"bytes": (source / "model.safetensors").stat().st_size, "sha256": "-"}},
        })
    )  # fmt: skip
    report = compress_directory(source, tmp_path / "out", layout=layout)
    assert report["compressed"] == 1
    assert report["kept"] == {"BF16": 4, "BOOL": 1, "F16": 1, "F64": 1, "F8_E4M3": 1, "I64": 1}
    rows = {row["name"]: row for row in directory_info(tmp_path / "out")}
    assert set(rows) == set(tensors)
    assert rows["z.weight"]["layout"] == layout and rows["z.weight"]["checksum"]
    assert rows["z.weight"]["shape"] == list(tensors["z.weight"].shape)
    assert 10 < rows["z.weight"]["entropy_bits"] < rows["z.weight"]["bits_per_weight"] < 11.7
    assert rows["noise"]["layout"] == "stored" and rows["noise"]["bits_per_weight"] == 16
    decompress_directory(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("half"), tensors["half"])


def test_info_of_a_plain_directory_names_the_bound(pairs: Pairs) -> None:
    rows = directory_info(pairs("llama").source)
    big = [row for row in rows if row["weights"] > 5000]
    assert big and all(row["layout"] == "stored" and 10.4 < row["entropy_bits"] < 10.7 for row in big)


def test_compressing_twice_names_decompress(pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="decompress"):
        compress_directory(pairs("llama").compressed, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not compressed"):
        decompress_directory(pairs("llama").source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_sources_are_named_in_one_line(tmp_path: Path, pairs: Pairs) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="not a directory"):
        compress_directory(tmp_path / "absent", out)
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        compress_directory(tmp_path / "none", out)
    (tmp_path / "none" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        compress_directory(tmp_path / "none", out)
    (tmp_path / "none" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="safetensors"):
        compress_directory(tmp_path / "none", out)
    shutil.copytree(pairs("qwen3_moe").source, tmp_path / "half")
    next((tmp_path / "half").glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        compress_directory(tmp_path / "half", out)
    quantised = make_source(tmp_path / "q", {"w": torch.zeros(4)}, quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match="awq"):
        compress_directory(quantised, out)
    with pytest.raises(ConfigError, match="layout"):
        compress_directory(pairs("llama").source, out, layout="zip")
    with pytest.raises(ConfigError, match="lies in"):
        compress_directory(pairs("llama").source, pairs("llama").source / "out")
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_an_existing_output_is_kept_unless_overwrite(pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="overwrite"):
        compress_directory(pairs("llama_tied").source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    compress_directory(pairs("llama_tied").source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize("damage", ["cut", "header", "hole", "length"])
def test_damaged_safetensors_are_refused(tmp_path: Path, damage: str) -> None:
    source = make_source(tmp_path / "source", {"w": torch.randn(40, 40).to(torch.bfloat16), "v": torch.zeros(3)})
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-5:]
    elif damage == "header":
        content[20] ^= 0xFF
    elif damage == "length":
        content[7] = 0x7F
    else:
        content = bytearray(bytes(content).replace(b"[12,3212]", b"[14,3214]").replace(b"[0,3200]", b"[2,3202]"))
    path.write_bytes(bytes(content))
    with pytest.raises(FormatError):
        compress_directory(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_codec_that_is_wrong_is_caught_before_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode check is real: a stream of other weights under the same name never becomes an output."""
    source = make_source(tmp_path / "source", {"w": torch.randn(40, 40).to(torch.bfloat16)})
    encode = shard.codec.encode_words
    monkeypatch.setattr(shard.codec, "encode_words", lambda words, *rest: encode(words ^ 1, *rest))
    with pytest.raises(FormatError, match="does not decode"):
        compress_directory(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_compressed_directory_is_never_restored(pairs: Pairs, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pairs("llama_tied").compressed, folder)
    weights = next(folder.glob("*.safetensors"))
    file = SafetensorsFile(weights)
    stream = next(entry for entry in file.entries if entry.is_stream)
    start = weights.stat().st_size - file.data.size
    change_byte(weights, start + (stream.begin + stream.end) // 2)
    with pytest.raises(CheckpointError, match="SHA-256"):
        decompress_directory(folder, tmp_path / "back")
    (folder / "manifest.json").unlink()  # the streams' own checksums remain
    with pytest.raises(FormatError, match="checksum"):
        decompress_directory(folder, tmp_path / "back")
    with pytest.raises(FormatError, match="checksum"):
        directory_info(folder)
    change_byte(weights, start + (stream.begin + stream.end) // 2)
    norm = next(entry for entry in file.entries if not entry.is_stream)
    change_byte(weights, start + norm.begin)  # a tensor without a checksum of its own
    with pytest.raises(FormatError, match="not restored"):
        decompress_directory(folder, tmp_path / "back")
    change_byte(weights, start + norm.begin)
    files = folder / "tbe_original" / "files.json"
    original = files.read_text()
    files.write_text(original.replace("model.safetensors", "../model.safetensors"))
    with pytest.raises(FormatError, match="outside"):
        decompress_directory(folder, tmp_path / "back")
    files.write_text(original.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(FormatError, match="version"):
        decompress_directory(folder, tmp_path / "back")
    files.write_text(original)
    decompress_directory(folder, tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(pairs("llama_tied").source)


def test_no_more_than_two_tensors_are_in_memory(tmp_path: Path) -> None:
    tensors = {f"w{k}": (torch.randn(1024, 2048) * 0.02).to(torch.bfloat16) for k in range(8)}
    source = make_source(tmp_path / "source", tensors)
    size = 2 * 1024 * 2048
    tracemalloc.start()  # sees numpy's arrays; torch's working copy of one tensor comes on top
    compress_directory(source, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size + (10 << 20) < 8 * size, f"{peak} bytes for tensors of {size}"


def raw_safetensors(path: Path, entries: list[tuple[str, str, list[int], bytes]], odd: bool = False) -> None:
    """A safetensors file of these (name, dtype, shape, bytes); odd: with a header of odd length."""
    header, begin = {}, 0
    for name, dtype, shape, content in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(content)]}
        begin += len(content)
    text = json.dumps(header).encode()
    text += b" " * ((len(text) + odd) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for *_, content in entries))


def test_weights_that_lie_at_odd_addresses_are_like_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    words = (torch.randn(40, 50) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    entries = [("byte", "U8", [1], b"x"), ("weight", "BF16", [40, 50], words), ("small", "BF16", [3], words[:6])]
    raw_safetensors(source / "model.safetensors", entries, odd=True)
    found = {row["name"]: row for row in directory_info(source)}
    assert found["weight"]["entropy_bits"] < 11.5 and found["small"]["weights"] == 3
    assert compress_directory(source, tmp_path / "out")["compressed"] == 1
    decompress_directory(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)


def test_tensors_beyond_the_limits_of_a_stream_stay_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    words = (torch.randn(40, 50) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    entries = [("deep", "BF16", [1] * 8 + [40, 50], words), ("weight", "BF16", [40, 50], words)]
    raw_safetensors(source / "model.safetensors", entries)
    report = compress_directory(source, tmp_path / "out")
    assert report["compressed"] == 1 and report["kept"] == {"BF16": 1}
    decompress_directory(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(source)
    raw_safetensors(source / "model.safetensors", [("half \ud800", "BF16", [40, 50], words)])
    with pytest.raises(FormatError, match="surrogates"):
        compress_directory(source, tmp_path / "other")


DAMAGES = {
    "version": lambda table: table.update(format_version="2"),
    "no bytes": lambda table: next(iter(table["files"].values())).pop("bytes"),
    "bytes": lambda table: next(iter(table["files"].values())).update(bytes="x"),
    "streams": lambda table: table["streams"].update({next(iter(table["streams"])): []}),
    "stream file": lambda table: table["streams"].update(other={}),
    "outside": lambda table: table["files"].update({"..": {"bytes": 1, "sha256": ""}}),
    "list": lambda table: table.update(files=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_of_files_is_named(pairs: Pairs, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(pairs("llama").compressed, tmp_path / "copy")
    path = folder / "tbe_original" / "files.json"
    table = json.loads(path.read_text())
    DAMAGES[damage](table)
    path.write_text(json.dumps(table))
    (folder / "manifest.json").unlink()
    with pytest.raises(FormatError, match=r"files\.json is damaged"):
        decompress_directory(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_strange_quantization_config_and_an_index_without_metadata(pairs: Pairs, tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("qwen3_moe").source, tmp_path / "copy")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": None}))
    compress_directory(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": "gptq"}))
    with pytest.raises(ConfigError, match="quantised with 'gptq'"):
        compress_directory(folder, tmp_path / "other")


def test_a_file_without_anything_to_compress(pairs: Pairs, tmp_path: Path) -> None:
    folder = shutil.copytree(pairs("llama").source, tmp_path / "source")
    save_file({"mass": torch.rand(3, 4, dtype=torch.float64)}, folder / "routed_mass.safetensors")
    report = compress_directory(folder, tmp_path / "out")
    assert report["kept"]["F64"] == 1
    decompress_directory(tmp_path / "out", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(folder)
