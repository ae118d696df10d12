"""The Triton kernels compile for GPUs that are not here, and use their tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton")
SHARED_LIMIT = 99 * 1024  # what a block may use on the smallest of these chips


def compiled(*arguments: str) -> list[dict[str, object]]:
    """Run compile_offline in a process of its own: interpreted and compiled kernels cannot live in one."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_offline", *arguments],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(found: list[dict[str, object]]) -> None:
    """Hardly a register spilled; products on tensor cores."""
    for item in found:
        assert isinstance(item["cubin_bytes"], int) and item["cubin_bytes"] > 1000
        assert isinstance(item["shared_bytes"], int) and item["shared_bytes"] <= SHARED_LIMIT
        assert isinstance(item["stack_bytes"], int) and item["stack_bytes"] <= 16, item  # 4 registers, seen on sm_89
        assert item["has_mma"] == item["products"]


KERNELS = {"tbe_decode", "tbe_decode_bitmaps", "lane_tiles_unpack", "zip_gemm_b16", "zip_gemm_sum",
           "zip_moe_gate_up", "zip_moe_down", "zip_moe_plan", "zip_moe_combine",
           "weighted_swiglu", "weighted_swiglu_backward", "zero_unused"}  # fmt: skip
TWINS = {"zip_gemm_b64", "bf16_gemm_b16", "bf16_gemm_b64", "bf16_moe_gate_up", "bf16_moe_down"}


ARCHITECTURES = {80, 89, 90, 120}


def test_every_kernel_compiles_and_for_every_architecture_some() -> None:
    found = compiled("--sampled")
    check(found)
    assert sorted(str(item["kernel"]) for item in found) == sorted(KERNELS)
    assert {item["arch"] for item in found} == ARCHITECTURES
    assert len({item["arch"] for item in found if item["products"]}) == 3, "products differ most between them"


@pytest.mark.slow
def test_all_variants_compile_for_every_architecture() -> None:
    found = compiled("--all")
    check(found)
    expected = {(kernel, arch) for kernel in KERNELS | TWINS for arch in ARCHITECTURES}
    assert {(item["kernel"], item["arch"]) for item in found} == expected
