"""ctypes front of zip_gemv.cpp: the same functions as reference.py, natively, on CPU tensors.

Contract: weights bit-exact; fused products bit-identical to `bf16_matmul`, our plain BF16 twin of the same sum order. A
row of x gives the same bits whatever stands beside it, except that with AMX two rows and more take another sum order
than one row. Every call releases the GIL and uses up to `torch.get_num_threads()` threads where each has enough to do.

Legend: R rows, C columns, M rows of the activations, N number of rows asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError
from ernie_elastic.kernels.native import NativeLibrary, load_library, openmp_parallel
from ernie_elastic.kernels.zip_gemv import reference
from ernie_elastic.kernels.zip_gemv.reference import PackedMatrix

ABI = 5
# Above this many rows of x, decoding a block and multiplying by torch is faster where there is no AMX
# (scripts/bench/zip_gemv_cpu.py); with AMX the fused product is faster for any number of rows.
FUSED_MAX_ROWS = 32
# Bytes of float32 weights decoded at once when the product is not fused: a buffer that stays in the last-level cache.
DECODE_BLOCK_BYTES = 4 << 20
# Tiles of 4096 weights below which packing on one more thread costs more than it saves.
PACK_TILES = 32
LEVELS = ("portable loops", "AVX2 + FMA", "AVX-512", "AVX-512 and AMX")
AVX512, AMX = 2, 3
_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Matrix(ctypes.Structure):
    """zip::Matrix of layout.h: addresses of the arrays, R, C, highest LEVELS index to use."""

    _fields_ = (*((name, _P) for name in reference.DTYPES), *((name, _I64) for name in ("rows", "columns", "level")))


@functools.cache
def load() -> NativeLibrary:
    """Build (first use of the machine), load and declare the library; resolved once a process."""
    return load_library(Path(__file__).with_name("zip_gemv.cpp"), ("zip_abi", ABI), _declare)


def _declare(library: ctypes.CDLL) -> str:
    library.zip_use_openmp.argtypes = (_P,)
    parallel = openmp_parallel()
    library.zip_use_openmp(parallel)
    library.zip_advise_large_pages.argtypes = (_P, _I64)
    library.zip_advise_large_pages.restype = None
    library.zip_count_exponents.argtypes = (_P, _I64, _I64, _P)
    library.zip_pack.argtypes = (_P, _I64, _I64, _I64, *[_P] * 6)
    library.zip_check.argtypes = (_P, _I64, _INT)
    library.zip_unpack.argtypes = (_P, _I64, _I64, _INT, _INT, _P)
    library.zip_unpack_rows.argtypes = (_P, _P, _I64, _INT, _INT, _P)
    library.zip_matmul.argtypes = (_P, _P, _I64, _I64, _I64, _INT, _P)
    library.zip_experts.argtypes = (_P, _P, _I64, _P, _I64, _P, _P, _I64, _INT, _P)
    library.zip_bf16_matmul.argtypes = (_P, _I64, _I64, _I64, _P, _I64, _INT, _P)
    library.zip_read.argtypes = (_P, _I64, _INT)
    library.zip_read.restype = ctypes.c_uint64
    threads = "torch's OpenMP threads" if parallel else "own threads"
    return f"{LEVELS[library.zip_level()]}, {threads}"


@functools.cache
def _library() -> ctypes.CDLL:
    native = load()
    if native.library is None:
        raise ConfigError(f"zip_gemv: backend 'native' cannot run here: {native.reason}; choose reference")
    return native.library


def advise_large_pages(fresh: Tensor) -> None:
    """Ask for large pages behind a contiguous tensor of any shape that was never written: it is read faster then."""
    _library().zip_advise_large_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())


def pack(weight_RC: Tensor, level: int = len(LEVELS) - 1) -> PackedMatrix:
    """As `reference.pack`, the same bits, for a weight [R, C] on the CPU. level: the highest index of LEVELS to use."""
    sizes = reference.check_weight(weight_RC)
    weight_RC = weight_RC.detach().contiguous()
    count, tiles = weight_RC.numel(), sizes["offsets"] - 1
    parts = max(1, min(torch.get_num_threads(), tiles // PACK_TILES))
    counts_P256 = torch.empty(parts, 256, dtype=torch.int64)
    _library().zip_count_exponents(weight_RC.data_ptr(), count, parts, counts_P256.data_ptr())
    table_8, code_256 = reference.choose_codes(counts_P256.sum(0))
    missing_P = (counts_P256 * (code_256 == 0)).sum(1)
    before_P = missing_P.cumsum(0) - missing_P
    total = int(missing_P.sum())
    streams = {name: torch.empty(sizes[name], dtype=reference.DTYPES[name]) for name in ("low", "codes", "offsets")}
    for name in ("low", "codes"):
        advise_large_pages(streams[name])
    streams["fallbacks"] = torch.zeros(total + reference.SLACK, dtype=torch.uint8)
    streams["offsets"][-1] = total
    places = [streams[name].data_ptr() for name in ("low", "codes", "offsets", "fallbacks")]
    _library().zip_pack(weight_RC.data_ptr(), count, parts, level, code_256.data_ptr(), before_P.data_ptr(), *places)
    rows, columns = weight_RC.shape
    return PackedMatrix((rows, columns), {name: streams.get(name, table_8) for name in reference.DTYPES})


def prepare(packed: PackedMatrix, level: int = len(LEVELS) - 1) -> int:
    """Address of the matrix as C++ sees it, made at the first call and kept with the matrix and its arrays.

    level: the highest index of LEVELS that the first call allows (tests compare them). Raises ConfigError for arrays
    that C++ cannot read as they are, FormatError for offsets that disagree with the codes.
    """
    kept = packed.prepared.get("native")
    if kept is None:
        arrays = [packed.tensors[name] for name in reference.DTYPES]
        if any(array.device.type != "cpu" or not array.is_contiguous() for array in arrays):
            raise ConfigError(f"zip_gemv: packed matrix {packed.shape} is not contiguous on cpu; pack it anew there")
        streams = (packed.tensors["table"], packed.tensors["fallbacks"])
        if level > AVX512 and any((stream == 255).any() for stream in streams):
            level = AVX512  # tiles cannot take infinite weights and NaN
        matrix = Matrix(*[array.data_ptr() for array in arrays], *packed.shape, level)
        address = ctypes.addressof(matrix)
        if _library().zip_check(address, packed.tensors["fallbacks"].numel(), torch.get_num_threads()):
            raise FormatError(
                f"packed matrix {packed.shape}: its fallback offsets are out of range or disagree with its codes; "
                "pack it anew"
            )
        kept = packed.prepared["native"] = (matrix, address, arrays)
    return kept[1]


def uses_tiles(packed: PackedMatrix) -> bool:
    """Whether products with two rows of x and more go through the tiles of AMX."""
    prepare(packed)
    matrix: Matrix = packed.prepared["native"][0]
    return matrix.level == _library().zip_level() == AMX and packed.shape[1] % 64 == 0


def unpack(
    packed: PackedMatrix, dtype: torch.dtype, start: int = 0, stop: int | None = None, out_NC: Tensor | None = None
) -> Tensor:
    """Rows start..stop as [stop - start, C] BF16 or float32; arguments and errors as in `reference.unpack`."""
    reference.check_dtype(dtype)
    start, stop = reference.check_range(packed, start, stop)
    out_NC = reference.check_out(packed, dtype, stop - start, out_NC)
    wide, threads = int(dtype == torch.float32), torch.get_num_threads()
    _library().zip_unpack(prepare(packed), start, stop, wide, threads, out_NC.data_ptr())
    return out_NC


def unpack_rows(packed: PackedMatrix, rows_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows named by int64 [N] as [N, C] BF16 or float32; errors as in `reference.unpack_rows`."""
    reference.check_dtype(dtype)
    rows_N = reference.check_rows(packed, rows_N)
    out_NC = torch.empty(rows_N.numel(), packed.shape[1], dtype=dtype)
    wide, threads = int(dtype == torch.float32), torch.get_num_threads()
    _library().zip_unpack_rows(prepare(packed), rows_N.data_ptr(), rows_N.numel(), wide, threads, out_NC.data_ptr())
    return out_NC


def matmul(x_MC: Tensor, packed: PackedMatrix, start: int = 0, stop: int | None = None) -> Tensor:
    """x float32 [M, C] times the transpose of rows start..stop: float32 [M, stop - start]."""
    start, stop = reference.check_range(packed, start, stop)
    if x_MC.shape[0] > FUSED_MAX_ROWS and not uses_tiles(packed):
        return _decode_then_multiply(x_MC, packed, start, stop)
    x_MC = x_MC.detach().contiguous()
    y_MR = torch.empty(x_MC.shape[0], stop - start)
    _library().zip_matmul(
        prepare(packed), x_MC.data_ptr(), x_MC.shape[0], start, stop, torch.get_num_threads(), y_MR.data_ptr()
    )
    return y_MR


def bind(packed: PackedMatrix) -> Callable[[Tensor], Tensor]:
    """The product of the whole matrix with what does not change between calls found out once.

    It maps contiguous float32 [..., C] with at most FUSED_MAX_ROWS rows, which it does not check, to [..., R].
    """
    call, (rows, columns) = _library().zip_matmul, packed.shape
    prepare(packed)
    kept = packed.prepared["native"]  # held by the function: its second item is the address of the first

    def product(x: Tensor) -> Tensor:
        y = torch.empty(*x.shape[:-1], rows)
        call(kept[1], x.data_ptr(), x.numel() // columns, 0, rows, torch.get_num_threads(), y.data_ptr())
        return y

    return product


def experts(x_MC: Tensor, gate_up: PackedMatrix, down: PackedMatrix, ids_MK: Tensor, weights_MK: Tensor) -> Tensor:
    """As `zip_gemv.experts`, for at most FUSED_MAX_ROWS rows of x."""
    x_MC, weights_MK, ids_MK = x_MC.detach().contiguous(), weights_MK.detach().contiguous(), ids_MK.contiguous()
    y_MC = torch.empty_like(x_MC)
    code = _library().zip_experts(
        prepare(gate_up),
        prepare(down),
        down.shape[0] // gate_up.shape[1],
        x_MC.data_ptr(),
        x_MC.shape[0],
        ids_MK.data_ptr(),
        weights_MK.data_ptr(),
        ids_MK.shape[1],
        torch.get_num_threads(),
        y_MC.data_ptr(),
    )
    if code:
        raise ConfigError(f"zip_gemv: an expert's id is negative (the lowest is {int(ids_MK.min())}); ids start at 0")
    return y_MC


def _decode_then_multiply(x_MC: Tensor, packed: PackedMatrix, start: int, stop: int) -> Tensor:
    """Decode a block of rows to float32 into one buffer and multiply it, block by block."""
    y_MR = torch.empty(x_MC.shape[0], stop - start)
    step = max(1, min(stop - start, DECODE_BLOCK_BYTES // (4 * packed.shape[1])))
    buffer_RC = torch.empty(step, packed.shape[1])
    for first in range(start, stop, step):
        last = min(first + step, stop)
        weight_RC = unpack(packed, torch.float32, first, last, buffer_RC[: last - first])
        y_MR[:, first - start : last - start] = x_MC @ weight_RC.T
    return y_MR


def bf16_matmul(x_MC: Tensor, weight_RC: Tensor, level: int = len(LEVELS) - 1) -> Tensor:
    """The plain twin: float32 [M, C] times the transpose of BF16 [R, C], in the fused product's sum order: [M, R]."""
    x_MC, weight_RC = x_MC.detach().contiguous(), weight_RC.detach().contiguous()
    if weight_RC.dtype != torch.bfloat16 or x_MC.dtype != torch.float32 or x_MC.shape[1] != weight_RC.shape[1]:
        raise ConfigError(
            f"bf16_matmul: x {x_MC.dtype} {tuple(x_MC.shape)} and weight {weight_RC.dtype} {tuple(weight_RC.shape)}; "
            "pass float32 [M, C] and bfloat16 [R, C]"
        )
    rows, columns = weight_RC.shape
    y_MR = torch.empty(x_MC.shape[0], rows)
    count, threads = x_MC.shape[0], torch.get_num_threads()
    _library().zip_bf16_matmul(
        weight_RC.data_ptr(), rows, columns, level, x_MC.data_ptr(), count, threads, y_MR.data_ptr()
    )
    return y_MR


def read(data: Tensor) -> int:
    """Read all bytes of a contiguous tensor of any shape with all threads, as fast as a product could: a sum."""
    total: int = _library().zip_read(data.data_ptr(), data.numel() * data.element_size(), torch.get_num_threads())
    return total
