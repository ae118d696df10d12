"""The benchmark runner and gpu_check: what they print and write, and how they fail."""

from __future__ import annotations

import ast
import importlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie_elastic.errors import ConfigError
from tests.support import ROOT

RUN = ROOT / "scripts" / "bench" / "run.py"
REQUIRED = {
    "codec": {"bound", "payload", "memory", "tca_tbe", "entropy_coded", "zipnn", "zstd", "safetensors", "fsync"},
    "compressed_decode": {"bf16", "fp32"},
    "symbol_codes": {
        "frequent_7",
        "window_15",
        "pairs_6",
        "triples_8",
        "triples_9",
        "two_levels",
        "row_windows",
        "entropy",
        "pair_entropy",
    },
    "startup": {"torch", "transformers"},
    "training_gpu": {"transformers", "sdpa", "grouped_mm"},
    "tokenizers": {"utf8_bpe", "transformers_janus", "transformers_mimi"},
    "zip_gemv_cpu": {"bf16_gemv", "torch_bf16", "torch_fp32", "memory_read", "reference"},
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports modules of scripts/bench by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"bench.{name}")


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this checkout from another folder."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=120)


def check_rows(rows: list[dict[str, Any]], peers: set[str]) -> None:
    """Rows as the JSON promises them: positive numbers, a ratio for each peer that ran."""
    assert rows
    for row in rows:
        assert list(row) == ["case", "ours", "theirs", "unit", "ratio"]
        assert row["ours"] > 0 and all(value > 0 for value in row["theirs"].values())
        assert set(row["theirs"]) == set(row["ratio"]) <= peers
        for peer, value in row["theirs"].items():
            better = row["ours"] / value if row["unit"] not in ("bits/weight", "s") else value / row["ours"]
            assert row["ratio"][peer] == pytest.approx(better)


def test_list_names_every_benchmark_and_unknown_names_are_one_line() -> None:
    listed = run_process(str(RUN), "--list")
    assert listed.returncode == 0, listed.stderr
    assert set(REQUIRED) <= {line.split()[0] for line in listed.stdout.splitlines()}
    assert all(len(line.split()) > 3 for line in listed.stdout.splitlines())
    unknown = run_process(str(RUN), "no-such")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("bench: error: benchmark 'no-such' is not known; choose codec")
    assert len(unknown.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", REQUIRED)
def test_benchmark_declares_its_peers(bench: Any, name: str) -> None:
    assert set(bench(name).PEERS) == REQUIRED[name]


def test_codec_writes_its_rows(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec: ModuleType = bench("codec")
    weight = (torch.randn(64, 80) * 0.02).bfloat16()
    monkeypatch.setattr(codec, "cases", lambda quick: {"tiny": weight})
    monkeypatch.setattr(codec, "file_row", lambda mebibytes, file_row=codec.file_row: file_row(8))
    file = tmp_path / "codec.json"
    bench("run").run("codec", True, file)
    found = json.loads(file.read_text())
    assert list(found) == ["name", "hardware", "commit", "rows"] and found["name"] == "codec"
    check_rows(found["rows"], REQUIRED["codec"])
    cases = ["tiny size", "tiny encode", "tiny decode", "tiny checksum", "compress a file of 8 MiB"]
    assert [row["case"] for row in found["rows"]] == cases
    first = found["rows"][0]
    assert 10 < first["theirs"]["bound"] < first["theirs"]["payload"] < first["ours"] < 13
    printed = capsys.readouterr()
    assert "tiny size" in printed.out and f"wrote {file}" in printed.out
    assert {"tca_tbe", "zstd", "safetensors"} <= set(found["rows"][1]["theirs"])
    assert ("zipnn" in first["theirs"]) != ("peer zipnn is left out: not installed" in printed.err)


def test_codec_measures_any_directory(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench("codec"), "MIN_WEIGHTS", 1000)
    weights = {
        "big.weight": (torch.randn(40, 50) * 0.02).bfloat16(),
        "norm": torch.ones(40),
        "small": torch.ones(3, 3).bfloat16(),
    }
    save_file(weights, tmp_path / "model.safetensors")
    bench("run").run("codec", True, None, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("big.weight") == 4 and "norm" not in printed and "small" not in printed
    with pytest.raises(ConfigError, match="makes its own weights"):
        bench("run").run("zip_gemv_cpu", True, None, tmp_path)


def test_codec_that_loses_bits_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec: ModuleType = bench("codec")
    monkeypatch.setattr(codec.compression, "decode", lambda stream: torch.zeros(8, 8, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="ours does not give back the bits of tiny"):
        codec.measure("tiny", torch.randn(8, 8).bfloat16(), 1)


def test_symbol_codes_of_known_weights(bench: Any) -> None:
    sizes = bench("symbol_codes").sizes
    # Two exponents in turn: one bit of entropy each, none for a pair of them; every code holds all of them.
    found = sizes(torch.tensor([1.0, 2.0] * 96).reshape(4, 48).bfloat16())
    assert found["entropy"] == 9 and found["pair_entropy"] == 8 and found["ours"] == 11 and found["two_levels"] == 10
    assert found["triples_8"] == pytest.approx(8 + 8 / 3) and found["row_windows"] == pytest.approx(11 + 8 / 48)
    # Every exponent once: 7, 15, 3 and 10 of 256 are held.
    every = (torch.arange(256, dtype=torch.int32) << 7).to(torch.uint16).view(torch.bfloat16).reshape(1, 256)
    found = sizes(every)
    assert found["entropy"] == 16 and found["ours"] == found["frequent_7"] == 11 + 8 * 249 / 256
    assert found["window_15"] == 12 + 8 * 241 / 256 and found["two_levels"] == 10 + 3 * 253 / 256 + 8 * 246 / 256


def test_compressed_decode_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode: ModuleType = bench("compressed_decode")
    makers = decode.models(True)
    monkeypatch.setattr(decode, "models", lambda quick: {"ernie_elastic": makers["ernie_elastic"]})
    monkeypatch.setattr(decode, "NEW_TOKENS", 3)
    rows = [row.to_json() for row in decode.run(True)]
    speed, size = rows
    assert speed["unit"] == "tokens/s" and size["unit"] == "MB" and all(row["ours"] > 0 for row in rows)
    assert set(speed["theirs"]) == REQUIRED["compressed_decode"] and "decode" in speed["case"]
    assert 1.3 < size["ratio"]["bf16"] < 1.5 and size["theirs"]["fp32"] == pytest.approx(
        2 * size["theirs"]["bf16"], rel=1e-3
    )


def test_zip_gemv_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gemv: ModuleType = bench("zip_gemv_cpu")
    if "native" not in gemv.zip_gemv.available_backends():
        with pytest.raises(ConfigError, match="zip_gemv: auto = reference"):
            gemv.run(True)
        return
    monkeypatch.setattr(gemv, "QUICK_SHAPES", ((64, 96),))
    monkeypatch.setattr(gemv, "QUICK_EXPERTS", ((4, 32, 64, 2),))
    monkeypatch.setattr(gemv, "QUICK_BYTES", 1)
    rows = [row.to_json() for row in gemv.run(True)]
    check_rows(rows, REQUIRED["zip_gemv_cpu"])
    products = ["64x96 M=1", "64x96 M=4"]
    layers = ["4 experts 2x32x64, top-2, M=1", "4 experts 2x32x64, top-2, M=4"]
    assert [row["case"].split(" (")[0] for row in rows] == [*products, "64x96 pack", "64x96 unpack", *layers]
    assert all(set(row["theirs"]) == REQUIRED["zip_gemv_cpu"] - {"reference"} for row in rows[:2])


def test_startup_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    startup: ModuleType = bench("startup")
    monkeypatch.setattr(startup, "IMPORTS", {"torch": "import json", "transformers": "import decimal"})
    monkeypatch.setattr(startup, "WORK", {"doctor": ("ernie_elastic.pipeline.doctor:print_doctor", "")})
    monkeypatch.setattr(startup, "WHOLE", ())
    monkeypatch.setattr(startup, "make_inputs", lambda folder: folder)
    rows = [row.to_json() for row in startup.run(True)]
    check_rows(rows, REQUIRED["startup"])
    assert [row["case"] for row in rows] == ["doctor, work begins"]
    assert set(rows[0]["theirs"]) == REQUIRED["startup"] and rows[0]["unit"] == "s"


def test_startup_that_never_reaches_its_work_is_not_timed(bench: Any, tmp_path: Path) -> None:
    startup: ModuleType = bench("startup")
    never = [sys.executable, str(startup.UNTIL_WORK), "ernie_elastic.pipeline.doctor:doctor", "generate"]
    with pytest.raises(RuntimeError, match=r"ended with 3: (?s:.*)generate ended with 2 and never called"):
        startup.process(never, tmp_path)


def write_catalog(file: Path, messages: dict[str, str]) -> None:
    """A compiled gettext catalog of these messages."""
    file.parent.mkdir(parents=True)
    strings = [text.encode() for text in (*messages, *messages.values())]
    begin = 28 + 8 * len(strings)
    starts = [begin + sum(len(text) + 1 for text in strings[:k]) for k in range(len(strings))]
    head = struct.pack("<7I", 0x950412DE, 0, len(messages), 28, 28 + 4 * len(strings), 0, begin)
    table = b"".join(struct.pack("<2I", len(text), start) for text, start in zip(strings, starts, strict=True))
    file.write_bytes(head + table + b"".join(text + b"\0" for text in strings))


def test_tokenizers_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers: ModuleType = bench("tokenizers")
    texts = [f"Слово {k} и ещё {k * 7} слов" for k in range(200)]
    monkeypatch.setattr(
        tokenizers, "corpus", lambda quick: [tokenizers.Texts("Cyrillic (ru)", texts[:150], texts[150:])]
    )
    monkeypatch.setattr(tokenizers, "QUICK_VOCABULARIES", (300,))
    monkeypatch.setattr(tokenizers, "VISUAL", {"tiny": tokenizers.presets.DEMO_CODE})
    monkeypatch.setattr(tokenizers, "BATCHES", (2,))
    monkeypatch.setattr(tokenizers, "SOUNDS", ((1, 0.2),))
    monkeypatch.setattr(tokenizers.neural_tokenizers, "SIDE", 32)
    monkeypatch.setattr(tokenizers.neural_tokenizers, "SECONDS", 0.2)
    rows = [row.to_json() for row in tokenizers.run(True)]
    check_rows(rows, REQUIRED["tokenizers"])
    units = ["tokens/s", "pictures/s", "s of sound/s"]
    assert [row["unit"] for row in rows] == ["bytes/token"] + [unit for unit in units + units[1:] for _ in range(2)]
    assert rows[0]["case"].startswith("300 ids: Cyrillic (ru), ") and rows[0]["ours"] > 1
    assert [set(row["theirs"]) for row in rows] == [{"utf8_bpe"}] * 3 + [set()] * 4 + [
        {"transformers_janus"}, {"transformers_janus"}, {"transformers_mimi"}, {"transformers_mimi"}
    ]  # fmt: skip
    assert [row["case"] for row in rows[3:5]] == ["tiny, batch 2, encode", "tiny, batch 2, decode"]


def test_tokenizers_find_texts_and_say_what_is_missing(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers: ModuleType = bench("tokenizers")
    english = [f"{chr(97 + k % 26) * (k // 26 + 1)} is a message that is long enough to be taken" for k in range(400)]
    greek = {f"context\4{text}": f"μήνυμα {text}" for text in english}
    write_catalog(tmp_path / "el" / "LC_MESSAGES" / "a.mo", {"short": "σύντομο", **greek})
    write_catalog(tmp_path / "ru" / "LC_MESSAGES" / "a.mo", {text: f"сообщение {text}" for text in english})
    (tmp_path / "ka" / "LC_MESSAGES").mkdir(parents=True)
    (tmp_path / "ka" / "LC_MESSAGES" / "a.mo").write_bytes(b"\xde\x12\x04\x95 damaged")
    monkeypatch.setattr(tokenizers, "locale_folders", lambda: [tmp_path])
    monkeypatch.setattr(tokenizers, "MIN_TRAIN_BYTES", 1000)
    monkeypatch.setattr(tokenizers, "MIN_HELD_OUT_BYTES", 100)
    found = {item.name: item for item in tokenizers.corpus(True)}
    assert set(found) - {"English (Python's documentation)"} == {"Cyrillic (ru)", "Greek (el)"}
    sides = [
        {
            text.partition(" ")[2]
            for item in found.values()
            for text in getattr(item, side)
            if "μ" in text or "щ" in text
        }
        for side in ("train", "held_out")
    ]
    assert all(sides) and not sides[0] & sides[1]
    assert "script Georgian is left out: 0 + 0 bytes found" in capsys.readouterr().err


def test_tokenizers_that_lose_text_are_not_timed(bench: Any) -> None:
    with pytest.raises(RuntimeError, match="ours does not give back 'two'"):
        bench("tokenizers").encode_all({"ours": (lambda text: [len(text)], lambda ids: "one")}, ["one", "two"])


def test_interleave_runs_variants_in_turn_and_takes_medians(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common: ModuleType = bench("common")
    clock = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    calls: list[tuple[str, int]] = []
    costs = {"a": iter([100, 1, 9, 2]), "b": iter([100, 5, 5, 50])}

    def variant(name: str) -> Any:
        def work(turn: int) -> None:
            calls.append((name, turn))
            clock[0] += next(costs[name])

        return work

    assert common.interleave({"a": variant("a"), "b": variant("b")}, repeats=3, warmup=1) == {"a": 2, "b": 5}
    assert calls == [(name, turn) for turn, name in enumerate("abababab")]


def test_ratio_is_above_one_when_ours_is_better(bench: Any) -> None:
    row = bench("common").Row
    assert row("speed", 6.0, {"x": 3.0}, "MB/s", higher_is_better=True).ratio == {"x": 2.0}
    assert row("size", 6.0, {"x": 3.0}, "bits", higher_is_better=False).ratio == {"x": 0.5}


def test_json_path_that_cannot_be_is_named_before_the_work(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory; make it first"):
        bench("run").run("codec", True, tmp_path / "no" / "x.json")


def test_gpu_check_imports_little_before_the_device_call() -> None:
    tree = ast.parse((ROOT / "scripts" / "gpu_check.py").read_text())
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert {"torch", "triton"} <= found
    assert found - {"torch", "triton"} <= sys.stdlib_module_names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    done = run_process(str(ROOT / "scripts" / "gpu_check.py"), "--quick", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("gpu_check: error: no usable GPU (")
    assert not (tmp_path / "out").exists()


def test_pairs_of_steps_take_means_over_specs_of_medians_over_rounds(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = bench("training")
    clock, calls = [0.0], []

    def step(spec: str) -> None:
        calls.append(spec)
        disturbed = len(calls) < 5 or len(calls) == 9  # the first round, and one step of a later one
        clock[0] += 100.0 if disturbed else {"a": 1.0, "b": 3.0, "full": 4.0}[spec]

    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    assert training.in_pairs(step, ["a", "b"], "full", 3) == {"elastic": 2.0, "full": 4.0}
    assert sorted(calls) == ["a"] * 4 + ["b"] * 4 + ["full"] * 8
    assert calls[:4] == ["full", "a", "b", "full"], "neither side always comes first"
