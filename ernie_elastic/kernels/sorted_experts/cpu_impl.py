"""ctypes front of sorted_experts.cpp: torch_impl's functions for float32 on the CPU, in two parallel regions each way.

Built at first use. It multiplies by the BLAS and runs on the OpenMP threads that torch has loaded; where either cannot
be found, or there is no compiler, `load().reason` says so and torch_impl runs. Every call releases the GIL.

Letters: N tokens, K chosen, S = N * K pairs sorted by expert, E experts, H hidden, I width.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from pathlib import Path

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.native import CLONE_LEVELS, NativeLibrary, load_library, openmp_parallel
from ernie_elastic.kernels.sorted_experts.torch_impl import Order, Target

ABI = 1
# The largest workspace that a thread keeps between calls.
WORKSPACE_BYTES = 128 << 20
_local = threading.local()
_P, _I64 = ctypes.c_void_p, ctypes.c_int64


class Call(ctypes.Structure):
    """The C++ struct of the same name: addresses, then numbers."""

    _fields_ = (
        *((name, _P) for name in ("hidden", "gate_up", "down", "weights", "pair", "counts")),
        *((name, _P) for name in ("kept", "rows", "scratch", "output")),
        *((name, _P) for name in ("grad", "gate_up_grad", "down_grad", "weights_grad")),
        *((name, _I64) for name in ("gate_up_beta", "down_beta")),
        *((name, _I64) for name in ("tokens", "top_k", "experts", "hidden_size", "width", "threads")),
    )


def blas_sgemm() -> int | None:
    """Address of sgemm_ in the libraries that torch has loaded (MKL inside libtorch_cpu on x86); None elsewhere."""
    if not torch.backends.mkl.is_available():
        return None  # other BLAS libraries may start threads of their own inside ours
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        path = next(match.group() for line in lines if (match := re.search(r"/\S*libtorch_cpu\.so", line)))
        return ctypes.cast(ctypes.CDLL(path).sgemm_, _P).value
    except (OSError, StopIteration, AttributeError):
        return None


@functools.cache
def load() -> NativeLibrary:
    """Build (first use of the machine), load and declare the library; resolved once a process."""
    sgemm, parallel = blas_sgemm(), openmp_parallel()
    if sgemm is None or parallel is None:
        missing = "MKL's sgemm_" if sgemm is None else "GOMP_parallel"
        return NativeLibrary(None, f"no {missing} among the libraries that torch has loaded")

    def declare(library: ctypes.CDLL) -> str:
        library.experts_use.argtypes = (_P, _P)
        library.experts_use(sgemm, parallel)
        _declare(library)
        return f"{CLONE_LEVELS[library.experts_level()]}, torch's BLAS and OpenMP threads"

    return load_library(Path(__file__).with_name("sorted_experts.cpp"), ("experts_abi", ABI), declare)


def _declare(library: ctypes.CDLL) -> None:
    library.experts_scratch.argtypes, library.experts_scratch.restype = (_I64, _I64), _I64
    library.experts_sort.argtypes = (_P, _I64, _I64, _P, _P)
    for function in (library.experts_forward, library.experts_backward):
        function.argtypes, function.restype = (ctypes.POINTER(Call),), None


def fits(hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> bool:
    """Whether hidden [N, H] and the projections are float32 on the CPU and the projections contiguous."""
    tensors = (hidden_NH, gate_up_E2IH, down_EHI)
    return all(item.device.type == "cpu" and item.dtype == torch.float32 for item in tensors) and (
        gate_up_E2IH.is_contiguous() and down_EHI.is_contiguous()
    )


def _library() -> ctypes.CDLL:
    native = load()
    if native.library is None:
        raise ConfigError(f"sorted_experts: backend 'native' cannot run here: {native.reason}; choose torch")
    return native.library


def sort_pairs(ids_NK: Tensor, num_experts: int) -> Order:
    """As torch_impl's: a stable sort of the pairs of int64 [N, K] by expert."""
    ids_NK = ids_NK.contiguous()
    order = Order(torch.empty(ids_NK.numel(), dtype=torch.int64), torch.empty(num_experts, dtype=torch.int64))
    code = _library().experts_sort(
        ids_NK.data_ptr(), ids_NK.numel(), num_experts, order.pair_S.data_ptr(), order.counts_E.data_ptr()
    )
    if code:
        raise ConfigError(f"sorted_experts: an id is not among the {num_experts} experts")
    return order


def workspace(size: int) -> Tensor:
    """At least `size` floats, [size]: the thread's own buffer, which the next call overwrites, or a new one if large.

    A buffer of tens of megabytes that is new in every call costs as much in page faults as a fifth of the products.
    """
    if 4 * size > WORKSPACE_BYTES:
        return torch.empty(size)
    kept: Tensor | None = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = _local.workspace = torch.empty(size)
    return kept


def _call(
    library: ctypes.CDLL, hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, order: Order
) -> tuple[Call, list[Tensor]]:
    """The call with what forward and backward share, and the tensors that must outlive it."""
    (tokens, hidden_size), top_k, (experts, _, width) = hidden_NH.shape, weights_NK.shape[1], down_EHI.shape
    threads, pairs = torch.get_num_threads(), tokens * top_k
    scratch = workspace(threads * library.experts_scratch(hidden_size, width) + pairs * hidden_size)
    alive = [hidden_NH, gate_up_E2IH, down_EHI, weights_NK, order.pair_S, order.counts_E, scratch]
    names = ("hidden", "gate_up", "down", "weights", "pair", "counts", "rows")
    call = Call(
        **{name: tensor.data_ptr() for name, tensor in zip(names, alive, strict=True)},
        tokens=tokens,
        top_k=top_k,
        experts=experts,
        hidden_size=hidden_size,
        width=width,
        threads=threads,
        scratch=scratch[pairs * hidden_size :].data_ptr(),
    )
    return call, alive


def forward(
    hidden_NH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, weights_NK: Tensor, order: Order, keep: bool
) -> tuple[Tensor, Tensor]:
    """As torch_impl's: output [N, H] and the pre-activations [S, 2I] (only if `keep`; else [0, 2I])."""
    library = _library()
    hidden_NH, weights_NK = hidden_NH.contiguous(), weights_NK.float().contiguous()
    call, _alive = _call(library, hidden_NH, gate_up_E2IH, down_EHI, weights_NK, order)
    output_NH = torch.empty_like(hidden_NH)
    kept_S2I = hidden_NH.new_empty(weights_NK.numel() if keep else 0, gate_up_E2IH.shape[1])
    call.output = output_NH.data_ptr()
    call.kept = kept_S2I.data_ptr() if keep else None
    library.experts_forward(call)
    return output_NH, kept_S2I


def new_target(projection: Tensor, counts_E: Tensor) -> Target:
    """A dense gradient [E, ...] to be written; `backward` zeroes the blocks of experts without a pair."""
    return Target(torch.empty_like(projection), 0)


def backward(
    grad_NH: Tensor,
    hidden_NH: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    weights_NK: Tensor,
    kept_S2I: Tensor,
    order: Order,
    gate_up_target: Target | None,
    down_target: Target | None,
) -> tuple[Tensor, Tensor]:
    """As torch_impl's: gradients of hidden [N, H] and weights [N, K]; the projections' go into the targets."""
    library = _library()
    grad_NH, hidden_NH = grad_NH.contiguous(), hidden_NH.contiguous()
    weights = weights_NK.float().contiguous()
    call, _alive = _call(library, hidden_NH, gate_up_E2IH, down_EHI, weights, order)
    hidden_grad_NH, weights_grad_NK = torch.empty_like(hidden_NH), torch.empty_like(weights)
    call.grad, call.kept = grad_NH.data_ptr(), kept_S2I.data_ptr()
    call.output, call.weights_grad = hidden_grad_NH.data_ptr(), weights_grad_NK.data_ptr()
    if gate_up_target is not None:
        call.gate_up_grad, call.gate_up_beta = gate_up_target.grad.data_ptr(), gate_up_target.beta
    if down_target is not None:
        call.down_grad, call.down_beta = down_target.grad.data_ptr(), down_target.beta
    library.experts_backward(call)
    return hidden_grad_NH, weights_grad_NK.to(weights_NK.dtype)
