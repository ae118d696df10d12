"""ctypes front of rms_norm.cpp: float32 on the CPU, forward and backward in one pass over memory each.

Built at first use; where there is no compiler or no OpenMP runtime, `load().reason` says so and torch_impl runs.
Every call releases the GIL.

Letters: B rows, T positions, A heads, C head width, P = C / 2 rotary pairs.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ernie_elastic.kernels.native import CLONE_LEVELS, NativeLibrary, load_library, openmp_parallel

ABI = 2
# Numbers that a thread takes at once; below one chunk no thread is woken.
CHUNK_NUMBERS = 1 << 15
_P, _I64 = ctypes.c_void_p, ctypes.c_int64
Turn = tuple[Tensor, Tensor]


@functools.cache
def load() -> NativeLibrary:
    """Build (first use of the machine), load and declare the library; resolved once a process."""
    parallel = openmp_parallel()
    if parallel is None:
        return NativeLibrary(None, "no GOMP_parallel among the libraries that torch has loaded")

    def declare(library: ctypes.CDLL) -> str:
        library.norm_use.argtypes = (_P,)
        library.norm_use(parallel)
        _declare(library)
        return f"{CLONE_LEVELS[library.norm_level()]}, torch's OpenMP threads"

    return load_library(Path(__file__).with_name("rms_norm.cpp"), ("norm_abi", ABI), declare)


def _declare(library: ctypes.CDLL) -> None:
    library.norm_forward.argtypes = (*(_P,) * 6, *(_I64,) * 4, ctypes.c_float, _I64, _I64)
    library.norm_backward.argtypes = (*(_P,) * 9, *(_I64,) * 6)
    library.norm_forward.restype = library.norm_backward.restype = None


def _chunk(size: int) -> int:
    return max(1, CHUNK_NUMBERS // size)


def forward(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float, keep: bool, turn: Turn | None = None
) -> tuple[Tensor, Tensor | None]:
    """Contiguous x [..., size] and weight [size] -> the result, and 1 / rms [rows] if `keep`.

    turn: cos and sin, contiguous float32 [B, T, P], of x [B, T, A, C]; the result is then [B, A, T, C].
    """
    size = x.shape[-1]
    rows = x.numel() // size
    scale = x.new_empty(rows) if keep else None
    address = None if scale is None else scale.data_ptr()
    cos = sin = None
    positions = heads = 1
    if turn is None:
        out = torch.empty_like(x)
    else:
        batch, positions, heads, _ = x.shape
        cos, sin = turn[0].data_ptr(), turn[1].data_ptr()
        out = x.new_empty(batch, heads, positions, size)
    chunk, threads = _chunk(size), torch.get_num_threads()
    tensors = (x.data_ptr(), weight.data_ptr(), address, out.data_ptr(), cos, sin)
    library.norm_forward(*tensors, rows, size, chunk, threads, eps, positions, heads)
    return out, scale


def backward(
    library: ctypes.CDLL, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, turn: Turn | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the result, of its shape -> those of x and weight."""
    size, rows = x.shape[-1], scale.numel()
    chunk, grad = _chunk(size), grad.contiguous()
    x_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    partial = x.new_empty(-(-rows // chunk) * size)
    tensors: list[int | None] = [t.data_ptr() for t in (grad, x, weight, scale, x_grad, partial, weight_grad)]
    tensors += [None, None] if turn is None else [t.data_ptr() for t in turn]
    positions, heads = (1, 1) if turn is None else x.shape[1:3]
    library.norm_backward(*tensors, rows, size, chunk, torch.get_num_threads(), positions, heads)
    return x_grad, weight_grad
