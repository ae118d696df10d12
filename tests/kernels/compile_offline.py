"""Compiles the Triton kernels for GPUs that are not here and prints what came out, as JSON.

Runs without TRITON_INTERPRET. `--all` adds the plain twins and the larger batch. One object per kernel and
architecture: {"kernel", "arch", "cubin_bytes", "shared_bytes", "has_mma"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ernie_elastic.kernels.tbe_decode import triton_impl as tbe
from ernie_elastic.kernels.zip_gemm import triton_impl as gemm

ARCHITECTURES = (80, 89, 90, 120)
SIZES = {"rows": "i32", "columns": "i32", "batch": "i32", "plane_bytes": "i32", "base": "i32"}


def gemm_case(packed: bool, batch: int) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The GEMM kernel for that many rows of x, packed or plain: (function, signature, constants)."""
    weight, plane = ("*u8", "*u8") if packed else ("*i16", "*i16")
    pointers = {"x": "*bf16", "weight": weight, "planes": plane, "fallbacks": plane}
    pointers["row_offsets"] = "*i64" if packed else "*i16"
    constants = {**gemm.tile_sizes(batch), "PACKED": packed, "INTERP": False}
    return gemm.gemm_kernel, {**pointers, "y": "*fp32", **SIZES}, constants


def decode_case() -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The decode kernel: (function, signature, constants)."""
    signature = {"low": "*u8", "planes": "*u8", "fallbacks": "*u8", "offsets": "*i64", "out": "*i16"}
    signature |= {"count": "i64", "plane_bytes": "i64", "base": "i32"}
    return tbe.decode_kernel, signature, {"TILE_SIZE": tbe.TILE}


def main() -> None:
    """Compile and print one JSON list."""
    cases = {"tbe_decode": decode_case(), "zip_gemm_b16": gemm_case(True, 16)}
    if "--all" in sys.argv[1:]:
        cases["zip_gemm_b64"] = gemm_case(True, 64)
        cases |= {f"bf16_gemm_b{batch}": gemm_case(False, batch) for batch in (16, 64)}
    found = []
    for name, (function, signature, constants) in cases.items():
        for arch in ARCHITECTURES:
            types = signature | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=function, signature=types, constexprs=constants)
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            found.append(
                {
                    "kernel": name,
                    "arch": arch,
                    "cubin_bytes": len(kernel.asm["cubin"]),
                    "shared_bytes": kernel.metadata.shared,
                    "has_mma": "mma" in kernel.asm["ptx"],
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
