"""Every Triton kernel of the package, compiled for GPUs that are not here; prints what came out, as JSON.

Runs without TRITON_INTERPRET. `--all` adds the plain twins and the larger batch, `--sampled` compiles each kernel for
one architecture, the next kernel for the next one. One object per kernel and architecture: {"kernel", "arch",
"cubin_bytes", "shared_bytes", "has_mma", "stack_bytes", "products"}.
scripts/kernel_instructions.py counts the same cases.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ernie_elastic.kernels.lane_tiles import triton_impl as lanes
from ernie_elastic.kernels.sorted_experts import triton_impl as experts
from ernie_elastic.kernels.tbe_decode import triton_bitmap_tiles as bitmaps
from ernie_elastic.kernels.tbe_decode import triton_impl as tbe
from ernie_elastic.kernels.zip_gemm import triton_impl as gemm
from ernie_elastic.kernels.zip_moe import triton_impl as moe

ARCHITECTURES = (80, 89, 90, 120)
BITS = 11.23  # of a normal weight in lane_tiles; a plain one has 16
PACKED = {"low": "*u32", "planes": "*u32", "tables": "*u32", "fallbacks": "*u32", "offsets": "*i32",
          "raw_index": "*i32", "raw_warps": "*i32", "raw": "*u32"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel to compile and the weights that one program of it handles per turn of its loop (0: none)."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    weights_per_step: int = 0
    bits_per_weight: float = 16.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[Any, Any]:
        """What Triton finds out at a launch: pointers and usual sizes are multiples of 16."""
        known = {name for name, kind in self.signature.items() if kind.startswith("*")}
        known |= {"rows", "columns", "hidden", "width"} & set(self.signature)
        names = list(self.signature)
        return {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in known}

    def compile(self, arch: int) -> Any:
        """The kernel compiled for sm_`arch`."""
        types = {**self.signature, **dict.fromkeys(self.constants, "constexpr")}
        source = ASTSource(fn=self.function, signature=types, constexprs=dict(self.constants), attrs=self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(self.options))


def weights(packed: bool) -> dict[str, str]:
    """The arguments that hold weights: packed arrays, or plain words in place of each of them."""
    return PACKED if packed else dict.fromkeys(PACKED, "*i16")


def gemm_case(packed: bool, batch: int) -> Case:
    """The product for that many rows of x, packed or plain."""
    signature = {"x": "*bf16", **weights(packed), "out": "*fp32", "rows": "i32", "columns": "i32", "batch": "i32"}
    constants = {"BM": batch, "SPLITS": 4, "PACKED": packed, "INTERP": False}
    name, bits = ("zip_gemm", BITS) if packed else ("bf16_gemm", 16.0)
    return Case(f"{name}_b{batch}", gemm.gemm_kernel, signature, constants, 4096, bits, {"num_stages": 3})


def moe_cases(packed: bool) -> list[Case]:
    """Gate and up with SwiGLU, and down, of a mixture of experts, packed or plain."""
    slots = {"pair_of_slot": "*i32", "expert_of_block": "*i32"}
    tiles = {"BR": 64, "BC": 64, "BM": 16}
    kind = {"PACKED": packed, "INTERP": False}
    prefix, bits = ("zip_moe", BITS) if packed else ("bf16_moe", 16.0)
    gate_up = {"x": "*bf16", **weights(packed), **slots, "active": "*bf16"}
    gate_up |= {"pairs": "i32", "top_k": "i32", "width": "i32", "hidden": "i32"}
    down = {"active": "*bf16", **weights(packed), **slots, "weights": "*fp32", "out": "*fp32"}
    down |= {"pairs": "i32", "hidden": "i32", "width": "i32"}
    options = {"num_stages": 3}
    return [
        Case(f"{prefix}_gate_up", moe.gate_up_kernel, gate_up, {**tiles, **kind}, 8192, bits, options),
        Case(f"{prefix}_down", moe.down_kernel, down, {**tiles, "SPLITS": 2, **kind}, 4096, bits, options),
    ]


def decode_cases() -> list[Case]:
    """Decoding to a buffer: both stored layouts, and tiles of lanes."""
    dense = {"low": "*u8", "planes": "*u8", "fallbacks": "*u8", "offsets": "*i64", "out": "*i16"}
    dense |= {"count": "i64", "plane_bytes": "i64", "base": "i32"}
    blocks = {"low": "*u8", "bitmaps": "*u8", "full": "*i16", "ends": "*i64", "first": "*u8", "out": "*i16"}
    blocks |= {"rows": "i32", "columns": "i32", "across": "i32", "blocks_of_a_matrix": "i32", "plane_bytes": "i64"}
    sizes = {"PLACES": bitmaps.WEIGHTS, "EDGE": bitmaps.SIDE}
    tiles = {**PACKED, "matrices": "*i32", "out": "*u16", "rows": "i32", "columns": "i32"}
    return [
        Case("tbe_decode", tbe.decode_kernel, dense, {"TILE_SIZE": tbe.TILE}, tbe.TILE, 11.34),
        Case("tbe_decode_bitmaps", bitmaps.bitmap_tiles_kernel, blocks, sizes, bitmaps.WEIGHTS, 11.34),
        Case("lane_tiles_unpack", lanes.unpack_kernel, tiles, {"INTERP": False}, 4096, BITS),
    ]


def small_cases() -> list[Case]:
    """Kernels that touch no weights."""
    plan = {"ids": "*i64", "pair_of_slot": "*i32", "expert_of_block": "*i32", "pairs": "i32", "experts": "i32"}
    combine = {"rows": "*fp32", "ids": "*i64", "out": "*bf16", "tokens": "i32", "hidden": "i32", "experts": "i32"}
    sizes = {"BE": 256, "BS": moe.PLAN_PAIRS, "BM": 16}
    parts = {"SPLITS": 2, "BH": moe.COMBINE_COLUMNS, "INTERP": False}
    swiglu = {"fused": "*bf16", "weight": "*fp32", "active": "*bf16"}
    swiglu_backward = {**swiglu, "fused_grad": "*bf16", "weight_grad": "*fp32", "units": "i32"}
    tiles = {"UNIT": 8, "BI": experts.COLUMNS}
    unused = {"grad": "*bf16", "counts": "*i64", "size": "i32"}
    return [
        Case("zip_moe_plan", moe.plan_kernel, {**plan, "blocks": "i32"}, sizes, options={"num_warps": 8}),
        Case("zip_moe_combine", moe.combine_kernel, {**combine, "top_k": "i32"}, parts),
        Case("zip_gemm_sum", gemm.sum_kernel, {"parts": "*fp32", "out": "*fp32", "count": "i32"},
             {"SPLITS": 4, "BLOCK": gemm.SUM_COLUMNS}),
        Case("weighted_swiglu", experts.weighted_swiglu_kernel, {**swiglu, "units": "i32"}, tiles),
        Case("weighted_swiglu_backward", experts.weighted_swiglu_backward_kernel, swiglu_backward,
             tiles),
        Case("zero_unused", experts.zero_unused_kernel, unused, {"BLOCK": experts.BLOCK}),
    ]  # fmt: skip


def cases(every: bool = True) -> list[Case]:
    """All kernels; every=False leaves out the plain twins and the larger batch."""
    found = [*decode_cases(), gemm_case(True, 16), *moe_cases(True), *small_cases()]
    if every:
        found += [gemm_case(True, 64), *(gemm_case(False, batch) for batch in (16, 64)), *moe_cases(False)]
    return found


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory that a thread needs, where registers spill to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", usage.stdout)[-1])


def main() -> None:
    """Compile and print one JSON list."""
    found = []
    for number, case in enumerate(cases("--all" in sys.argv[1:])):
        one = ARCHITECTURES[number % len(ARCHITECTURES)]
        for arch in (one,) if "--sampled" in sys.argv[1:] else ARCHITECTURES:
            kernel = case.compile(arch)
            found.append(
                {
                    "kernel": case.name,
                    "arch": arch,
                    "cubin_bytes": len(kernel.asm["cubin"]),
                    "shared_bytes": kernel.metadata.shared,
                    "has_mma": "mma" in kernel.asm["ptx"],
                    "stack_bytes": stack_bytes(kernel.asm["cubin"]),
                    "products": "gemm_b" in case.name or case.name.endswith(("_gate_up", "_down")),
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
