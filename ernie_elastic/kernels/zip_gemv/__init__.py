"""Losslessly compressed BF16 matrices on the CPU: pack, unpack, and a fused decode + GEMV / small-M GEMM.

Contract: weights are bit-exact (`reference.py` is the definition). `native` is C++ built at first use when a compiler
is found; `backend="auto"` takes it when it is there and logs once what was chosen and why; asking for a back end that
is not there raises ConfigError with the reason. Outputs of `native` are bit-identical to our plain BF16 GEMV of the
same sum order (tests/kernels/test_zip_gemv.py).

Legend: R rows, C columns, M rows of the activations, N number of rows asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.zip_gemv import cpu_impl, reference
from ernie_elastic.kernels.zip_gemv.reference import PackedMatrix

__all__ = [
    "FUSED_MAX_ROWS",
    "PackedMatrix",
    "available_backends",
    "backend_reason",
    "bind",
    "experts",
    "matmul",
    "pack",
    "unpack",
    "unpack_rows",
]
Backend = Literal["auto", "native", "reference"]
FUSED_MAX_ROWS = cpu_impl.FUSED_MAX_ROWS
logger = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """The back ends that can run here: ("reference",) or ("native", "reference")."""
    return ("native", "reference") if cpu_impl.load().library is not None else ("reference",)


def backend_reason() -> str:
    """One line: which back end `auto` takes and why."""
    return f"zip_gemv: auto = {available_backends()[0]} ({cpu_impl.load().reason})"


@functools.cache
def _auto_is_native() -> bool:
    """What `auto` means for matrices on the CPU; resolved and logged once a process."""
    logger.info(backend_reason())
    return available_backends()[0] == "native"


def _native(backend: str, device: torch.device) -> bool:
    """Whether a call runs natively. Raises ConfigError for an unknown back end or one that cannot run."""
    if backend == "reference":
        return False
    if backend == "auto":
        return device.type == "cpu" and _auto_is_native()
    if backend != "native":
        raise ConfigError(f"zip_gemv: backend {backend!r} is not known; choose auto, native or reference")
    if "native" not in available_backends():
        raise ConfigError(f"zip_gemv: backend 'native' cannot run here: {cpu_impl.load().reason}; choose reference")
    if device.type != "cpu":
        raise ConfigError(
            f"zip_gemv: backend 'native' runs on cpu, the matrix is on {device}; move it to cpu or choose reference"
        )
    return True


def _native_for(backend: str, packed: PackedMatrix) -> bool:
    """`_native` for a packed matrix: one that was prepared natively needs no look."""
    known = backend == "auto" and "native" in packed.prepared
    return known or _native(backend, packed.tensors["low"].device)


def _check_device(name: str, tensor: Tensor, packed: PackedMatrix) -> None:
    """ConfigError unless the tensor lies where the matrix lies: C++ reads addresses."""
    device = packed.tensors["low"].device
    if tensor.device != device:
        raise ConfigError(f"zip_gemv: {name} is on {tensor.device}, the packed matrix on {device}; move one of them")


def pack(weight_RC: Tensor, backend: Backend = "auto") -> PackedMatrix:
    """BF16 [R, C] (any strides, any device) -> PackedMatrix on the same device; every back end gives the same bits.

    Raises ConfigError for other inputs or a back end that cannot run.
    """
    if _native(backend, weight_RC.device):
        return cpu_impl.pack(weight_RC)
    return reference.pack(weight_RC)


def unpack(
    packed: PackedMatrix,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
    *,
    start: int = 0,
    stop: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows start..stop (default: all) as [stop - start, C], bit-exact BF16 or its exact float32 widening.

    out: a contiguous tensor of that shape and dtype to write and return; reusing one avoids the page faults of a
    large new tensor. Raises ConfigError for another dtype, rows outside the matrix, an `out` that does not fit or a
    back end that cannot run.
    """
    if _native_for(backend, packed):
        return cpu_impl.unpack(packed, dtype, start, stop, out)
    return reference.unpack(packed, dtype, start=start, stop=stop, out_NC=out)


def unpack_rows(
    packed: PackedMatrix, rows_N: Tensor, dtype: torch.dtype = torch.bfloat16, backend: Backend = "auto"
) -> Tensor:
    """The rows named by int64 [N], repeats allowed, as [N, C] in `dtype` (an embedding look-up), bit-exact.

    Raises ConfigError for an index outside the matrix, another dtype or a back end that cannot run.
    """
    _check_device("rows", rows_N, packed)
    if _native_for(backend, packed):
        return cpu_impl.unpack_rows(packed, rows_N, dtype)
    return reference.unpack_rows(packed, rows_N, dtype)


def matmul(
    x_MC: Tensor, packed: PackedMatrix, backend: Backend = "auto", *, start: int = 0, stop: int | None = None
) -> Tensor:
    """x [M, C] float32 times the transpose of rows start..stop (default: all): float32 [M, stop - start].

    Native: fused decode, with AMX for any number of rows of x, else up to `cpu_impl.FUSED_MAX_ROWS`; beyond that decode
    a block of rows and multiply.
    Raises ConfigError for another dtype or width of x, rows outside the matrix or a back end that cannot run.
    """
    if x_MC.dtype != torch.float32 or x_MC.ndim != 2 or x_MC.shape[1] != packed.shape[1]:
        raise ConfigError(
            f"zip_gemv: x is {x_MC.dtype} {tuple(x_MC.shape)}, the matrix {packed.shape} needs torch.float32 "
            f"[M, {packed.shape[1]}]; convert x"
        )
    _check_device("x", x_MC, packed)
    if _native_for(backend, packed):
        return cpu_impl.matmul(x_MC, packed, start, stop)
    return reference.matmul(x_MC, packed, start=start, stop=stop)


def bind(packed: PackedMatrix) -> Callable[[Tensor], Tensor] | None:
    """The native product of the whole matrix as a function of contiguous float32 [..., C] with at most FUSED_MAX_ROWS
    rows, which the caller checks: -> [..., R]. None where there is no native back end. ours: reason: a decoding step
    has dozens of small products, and checking costs as much as they do.
    """
    kept: Callable[[Tensor], Tensor] | None = packed.prepared.get("product")
    if kept is None and _native_for("auto", packed):
        kept = packed.prepared["product"] = cpu_impl.bind(packed)
    return kept


def experts(
    x_MC: Tensor, gate_up: PackedMatrix, down: PackedMatrix, ids_MK: Tensor, weights_MK: Tensor
) -> Tensor | None:
    """One mixture-of-experts layer in one native call: sum over k of weights_MK * down(silu(gate) * up) -> [M, C].

    x float32 [M, C]; gate_up holds the experts' [2I, C] below each other, gate half first, down their [C, I]; ids int64
    [M, K], those beyond the last expert are left out; weights float32 [M, K]. Not differentiable. The products are
    `matmul`'s, the experts are added in increasing order; the gate's exponential is the C library's, so the last bits
    may differ from a loop of torch operations. None where it cannot run (another dtype or device, gradients wanted, no
    native back end, more rows than a fused product takes): the caller goes expert by expert. Raises ConfigError for
    shapes that do not fit together. ours: reason: a small expert costs less than two calls from Python.
    """
    wanted = torch.is_grad_enabled() and (x_MC.requires_grad or weights_MK.requires_grad)
    if wanted or not x_MC.dtype == weights_MK.dtype == torch.float32 or ids_MK.dtype != torch.int64:
        return None
    if not (x_MC.is_cpu and ids_MK.is_cpu and weights_MK.is_cpu):
        return None
    columns, width = gate_up.shape[1], down.shape[1]
    count = gate_up.shape[0] // max(1, 2 * width)
    if (
        x_MC.ndim != 2
        or x_MC.shape[1] != columns
        or ids_MK.shape != weights_MK.shape
        or ids_MK.shape[:1] != x_MC.shape[:1]
        or (gate_up.shape[0], down.shape[0]) != (2 * width * count, columns * count)
    ):
        raise ConfigError(
            f"zip_gemv: x {tuple(x_MC.shape)}, ids {tuple(ids_MK.shape)}, weights {tuple(weights_MK.shape)}, gate_up "
            f"{gate_up.shape} and down {down.shape} do not fit; pass [M, C], [M, K], [M, K], [E * 2I, C] and [E * C, I]"
        )
    if x_MC.shape[0] > cpu_impl.FUSED_MAX_ROWS or not (_native_for("auto", gate_up) and _native_for("auto", down)):
        return None
    return cpu_impl.experts(x_MC, gate_up, down, ids_MK, weights_MK)
