"""The GPU benchmarks on the CPU: interpreted kernels and a clock of the test's own stand in for the GPU."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ernie_elastic.errors import ConfigError
from tests.support import ROOT

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter"
)
SMALL = {"QUICK_SHAPES": ((3, 64, 64),), "QUICK_TOKENS": (1, 4), "TOP_K": 2, "ROUTES": 2}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports modules of scripts/bench by name. The GPU's clock is replaced: a call takes a second, when tuning two."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    gpu = importlib.import_module("bench.gpu")

    def seconds(variants: dict[str, Callable[[int], Any]], turns: int, repeats: int = 0) -> dict[str, float]:
        for call in variants.values():
            call(turns - 1)
        return dict.fromkeys(variants, 2.0 if repeats else 1.0)

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "seconds_per_call", seconds)
    monkeypatch.setattr(gpu, "require_gpu", lambda name: None)
    monkeypatch.setattr(gpu, "copies", lambda size: 2)
    return lambda name: importlib.import_module(f"bench.{name}")


@interpreted
def test_zip_moe_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zip_moe = bench("zip_moe")
    for name, value in SMALL.items():
        monkeypatch.setattr(zip_moe, name, value)
    grid = zip_moe.zip_moe.tile_choices
    monkeypatch.setattr(zip_moe.zip_moe, "tile_choices", lambda *sizes: grid(*sizes)[:2])
    size, *layers, mean = zip_moe.run(True)
    assert size.theirs == {"bf16": 16.0} and 11 < size.ours < 12
    assert [row.case.split(" (")[0] for row in layers] == ["3 experts, 1 tokens", "3 experts, 4 tokens"]
    for row in layers:
        assert set(row.theirs) == set(zip_moe.PEERS) - {"bf16"} and set(row.ratio.values()) == {1.0}
    assert layers[0].case.endswith("(2 routed)") and layers[0].ours == pytest.approx(2 * 3 * 64 * 64 * 2 / 1e9)
    assert mean.case == "3 experts: geometric mean of 2"
    assert mean.ours == pytest.approx((layers[0].ours * layers[1].ours) ** 0.5)


@interpreted
def test_tbe_decode_rows(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tbe_decode = bench("tbe_decode")
    monkeypatch.setattr(tbe_decode, "QUICK_SHAPES", ((128, 192),))
    rows = tbe_decode.run(True)
    assert [row.case for row in rows] == ["128x192: dense_plane", "128x192: tca_tbe"]
    for row in rows:
        assert set(row.theirs) == set(tbe_decode.PEERS)
        assert row.theirs["copy"] == pytest.approx(4 * 128 * 192 / 1e9) and row.ours < row.theirs["copy"] * 1.3
    real = tbe_decode.tbe_decode.decode
    monkeypatch.setattr(tbe_decode.tbe_decode, "decode", lambda packed: -real(packed))
    with pytest.raises(RuntimeError, match="the bits differ"):
        tbe_decode.run(True)


@interpreted
def test_wrong_experts_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zip_moe = bench("zip_moe")
    for name, value in SMALL.items():
        monkeypatch.setattr(zip_moe, name, value)
    grid = zip_moe.zip_moe.tile_choices
    monkeypatch.setattr(zip_moe.zip_moe, "tile_choices", lambda *sizes: grid(*sizes)[:1])
    layer = zip_moe.make_layer(3, 64, 64)
    plain = zip_moe.zip_moe.experts_plain
    monkeypatch.setattr(zip_moe.zip_moe, "experts_plain", lambda *rest: -plain(*rest))
    with pytest.raises(RuntimeError, match="against its twin: the bits differ; nothing is measured"):
        zip_moe.layer_row(layer, 1)
    monkeypatch.setattr(zip_moe.zip_moe, "experts_fused", lambda *rest: -plain(*rest[:1], *wrong, *rest[2:]))
    wrong = (layer.gate_up_E2IH, layer.down_EHI)
    with pytest.raises(RuntimeError, match=r"zip_moe, ours: relative error 2\.\d+e\+00"):
        zip_moe.layer_row(layer, 1)


@pytest.fixture
def training(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench.training_gpu at a size and with back ends that a CPU trains."""
    module = bench("training_gpu")
    monkeypatch.setenv("LOCAL_RANK", "0")  # it is set for the engine
    monkeypatch.setattr(module, "VARIANTS", {"ours": ("sdpa", "sorted_experts"), "grouped_mm": ("sdpa", "grouped_mm")})
    model = dataclasses.replace(
        module.SMALL.model, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, moe_intermediate_size=32, num_experts=8,
    )  # fmt: skip
    monkeypatch.setattr(module, "SMALL", module.Size("tiny", model, 512, 4, 64, 2, 1.0))
    return module


def test_training_rows(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, use = training.run(True)
    case = "tiny, 256 tokens a step, sdpa and sorted_experts"
    assert speed.case == case and use.case == f"{case}: MFU"
    for row in (speed, use):
        assert set(row.theirs) == {"transformers", "grouped_mm"} < set(training.PEERS) and row.ours > 0
    assert use.ratio == pytest.approx(speed.ratio) and speed.unit == "tokens/s" and use.unit == "%"
    monkeypatch.setattr(training.Ernie4_5_MoeForCausalLM, "forward", lambda *a, **k: SimpleNamespace(loss=2 * nothing))
    nothing = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"transformers: the first loss is 2\.000, not about 6\.238"):
        training.run(True)


def test_a_variant_that_cannot_run_is_left_out_aloud(
    training: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # FlexAttention has no backward on a CPU: as a compiler that fails on a GPU.
    variants = {"ours": ("flex_attention", "sorted_experts"), "sdpa": ("sdpa", "sorted_experts")}
    monkeypatch.setattr(training, "VARIANTS", variants)
    speed, _ = training.run(True)
    assert "training_gpu: peer ours is left out: NotImplementedError: FlexAttention" in capsys.readouterr().err
    assert speed.case == "tiny, 256 tokens a step, sdpa and sorted_experts" and set(speed.theirs) == {"transformers"}

    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 99 GiB")

    monkeypatch.setattr(training, "measure_theirs", too_large)
    assert [row.theirs for row in training.run(True)] == [{}, {}]
    assert "training_gpu: peer transformers is left out: out of memory" in capsys.readouterr().err
    monkeypatch.setattr(training, "VARIANTS", {"ours": variants["ours"]})
    with pytest.raises(RuntimeError, match="none of our variants"):
        training.run(True)


def test_training_sizes_are_those_of_the_issue_and_equal_on_both_sides(training: Any) -> None:
    size = training.ABLATION
    assert size.tokens >= 32_768 and 3.1e9 < training.parameters(size) < 3.3e9
    with torch.device("meta"):
        theirs = training.Ernie4_5_MoeForCausalLM(training.their_config(size))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == pytest.approx(training.parameters(size), rel=1e-4)
    assert [task.name for task in training.tasks(False)] == ["ablation_3b", "tiny"]
    ids = np.full((4, 64), 11, np.int32)
    batches = training.batches_of(training.SMALL, training.our_config(training.SMALL), ids)
    assert [tuple(batch.document_BT.shape) for batch in batches] == [(2, 64), (2, 64)]
    assert all(bool((batch.document_BT == 0).all()) for batch in batches), "one document fills a row"


def test_training_on_a_gpu_that_is_too_small_is_left_out_aloud(
    training: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(total_memory=24 << 30))
    assert training.rows_of(training.ABLATION, 1) == []
    assert "training_gpu: ablation_3b is left out: needs 97 GiB, the GPU has 24" in capsys.readouterr().err


def test_gpu_check_names_all_that_the_training_rows_import() -> None:
    code = (
        "import sys; sys.path[:0] = [%r, %r]; import bench.training_gpu; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('ernie_elastic') and m.__file__))"
    )
    done = run_python(code % (str(ROOT), str(ROOT / "scripts")))
    files = [Path(name) for name in done.split()]
    assert len(files) > 60
    found = set()
    for node in (node for file in files for node in ast.parse(file.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    tree = ast.parse((ROOT / "scripts" / "gpu_check.py").read_text())
    values = {getattr(node.targets[0], "id", ""): node.value for node in tree.body if isinstance(node, ast.Assign)}
    needed = set(ast.literal_eval(values["NEEDED_BY"])["training_gpu"])
    needed |= set(ast.literal_eval(values["NEEDED_BY_BENCHMARKS"]))
    come_along = {"torch", "triton", "typing_extensions", "huggingface_hub", "tokenizers"}  # torch, Transformers
    assert found - sys.stdlib_module_names - {"ernie_elastic"} - come_along <= needed


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_a_gpu_each_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("zip_gemm", "zip_moe", "training_gpu"):
        module = importlib.import_module(f"bench.{name}")
        with pytest.raises(ConfigError, match=f"{name} needs a CUDA device and torch sees none; run it on"):
            module.run(True)
        assert module.PEERS and all(task.seconds >= 0 for task in module.tasks(False))


def test_tuning_takes_the_fastest_and_leaves_out_what_cannot_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    gpu = importlib.import_module("bench.gpu")
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "seconds_per_call", lambda variants, turns, repeats: {"ours": variants["ours"](0)})

    def large(k: int) -> float:
        raise RuntimeError("out of resource: shared memory")

    assert gpu.fastest({"slow": lambda k: 3.0, "large": large, "fast": lambda k: 1.0}, 1) == "fast"
    assert "tuning: large is left out: out of resource" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no candidate"):
        gpu.fastest({"large": large}, 1)
    assert sys.modules["bench.gpu"] is gpu
