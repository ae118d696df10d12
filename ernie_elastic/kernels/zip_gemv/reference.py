"""The CPU run-time layout of a losslessly compressed BF16 matrix, in plain torch: the definition of `zip_gemv`.

Contract: `unpack(pack(w))` has the bits of `w` for every BF16 pattern (NaN payloads, infinities, -0, denormals) and
every shape [R, C] with R, C >= 1. The layout (ours: the stored dense plane, its codes packed so that a shuffle
spreads them) works on the matrix flattened in row order, N = R * C weights, with no padding per row:

    low        u8  [N]               sign (bit 7) and the 7 mantissa bits
    codes      u8  [3 * ceil(N/8)]   3-bit codes, weight i at bits 3*(i%8).. of the little-endian 24-bit word i//8
    table      u8  [8]               code -> exponent: the 7 most frequent exponents at 1..7; entry 0 is 0
    offsets    i64 [ceil(N/4096)+1]  fallbacks before each tile of 4096 weights; the last entry is F
    fallbacks  u8  [F + 64]          the exponents of the weights of code 0, in order; then 64 zeros, which may be read

No position is stored: a code of 0 is a fallback, and its place among the fallbacks is a count of zeros.

Legend: R rows, C columns, N weights, F fallbacks, M rows of the activations, K tiles of 4096 weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ernie_elastic.errors import ConfigError, FormatError

TILE = 4096
# Bytes behind the fallbacks that a vector load may touch.
SLACK = 64
# Weights handled at once, so that temporaries stay small beside the matrix; a multiple of TILE.
CHUNK = 1 << 20
DTYPES = {
    "low": torch.uint8,
    "codes": torch.uint8,
    "table": torch.uint8,
    "offsets": torch.int64,
    "fallbacks": torch.uint8,
}


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A BF16 matrix [R, C] in the CPU run-time layout: integer tensors only, so no dtype cast can touch them.

    shape: (R, C). tensors: the five arrays of the module docstring by name; neither the dictionary nor the arrays'
    storage may be exchanged afterwards. Raises FormatError when a tensor is missing, has another dtype or another
    size than `shape` asks for.
    """

    shape: tuple[int, int]
    tensors: dict[str, Tensor]
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # what a back end keeps per matrix

    def __post_init__(self) -> None:
        sizes = stream_sizes(*self.shape)
        for name, dtype in DTYPES.items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.dtype != dtype or tensor.numel() != sizes.get(name, tensor.numel()):
                found = "nothing" if tensor is None else f"{tensor.numel()} of {tensor.dtype}"
                raise FormatError(
                    f"packed matrix {self.shape}: {name} is {found}, expected {sizes.get(name, 'F')} of {dtype}; "
                    "pack the matrix anew"
                )
        if self.tensors["fallbacks"].numel() < SLACK:
            raise FormatError(
                f"packed matrix {self.shape}: fallbacks has {self.tensors['fallbacks'].numel()} bytes, expected at "
                f"least {SLACK}; pack the matrix anew"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the arrays alone, never the addresses in `prepared`."""
        return PackedMatrix, (self.shape, self.tensors)

    @property
    def nbytes(self) -> int:
        """Resident bytes of all arrays together, padding and side lists included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Resident bits a weight; plain BF16 has 16."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def num_fallbacks(self) -> int:
        """Weights whose exponent is outside the table."""
        return self.tensors["fallbacks"].numel() - SLACK


def stream_sizes(rows: int, columns: int) -> dict[str, int]:
    """Elements of each array of fixed size for a matrix [rows, columns]; ConfigError when a side is below 1."""
    if rows < 1 or columns < 1:
        raise ConfigError(f"packed matrix: shape ({rows}, {columns}) has a side below 1; pass a matrix with weights")
    count = rows * columns
    return {"low": count, "codes": 3 * -(-count // 8), "table": 8, "offsets": -(-count // TILE) + 1}


def choose_codes(counts_256: Tensor) -> tuple[Tensor, Tensor]:
    """How often each exponent occurs, int64 [256] -> (table u8 [8], code of each exponent u8 [256], 0 for fallbacks).

    The seven codes go to the most frequent exponents, most frequent first, ties by value: maximal coverage.
    """
    table_8 = torch.zeros(8, dtype=torch.uint8, device=counts_256.device)
    table_8[1:] = torch.sort(counts_256, descending=True, stable=True).indices[:7].to(torch.uint8)
    code_256 = torch.zeros(256, dtype=torch.uint8, device=counts_256.device)
    code_256[table_8[1:].long()] = torch.arange(1, 8, dtype=torch.uint8, device=counts_256.device)
    return table_8, code_256


def check_weight(weight_RC: Tensor) -> dict[str, int]:
    """`stream_sizes` of a weight that can be packed; ConfigError for another dtype or number of dimensions."""
    if weight_RC.dtype != torch.bfloat16 or weight_RC.ndim != 2:
        raise ConfigError(
            f"pack: got {weight_RC.dtype} of shape {tuple(weight_RC.shape)}, expected torch.bfloat16 [R, C]; "
            "convert or reshape the weight"
        )
    return stream_sizes(*weight_RC.shape)


def pack(weight_RC: Tensor) -> PackedMatrix:
    """BF16 [R, C] (any strides, any device) -> PackedMatrix on the same device. ConfigError for other inputs."""
    sizes = check_weight(weight_RC)
    word_N = weight_RC.detach().contiguous().view(torch.int16).reshape(-1)
    device = weight_RC.device
    counts_256 = torch.zeros(256, dtype=torch.int64, device=device)
    for part_N in word_N.split(CHUNK):
        counts_256 += torch.bincount(_exponents(part_N), minlength=256)
    table_8, code_256 = choose_codes(counts_256)
    low, codes, fallbacks, counts_K = [], [], [], []
    for part_N in word_N.split(CHUNK):
        exponent_N = _exponents(part_N)
        code_N = code_256[exponent_N]
        low.append((part_N >> 8 & 0x80 | part_N & 0x7F).to(torch.uint8))
        codes.append(_pack_codes(code_N))
        missing_F = (code_N == 0).nonzero().squeeze(1)
        fallbacks.append(exponent_N[missing_F].to(torch.uint8))
        counts_K.append(torch.bincount(missing_F // TILE, minlength=-(-part_N.numel() // TILE)))
    offsets = torch.zeros(sizes["offsets"], dtype=torch.int64, device=device)
    offsets[1:] = torch.cat(counts_K).cumsum(0)
    fallbacks.append(torch.zeros(SLACK, dtype=torch.uint8, device=device))
    streams = {"low": torch.cat(low), "codes": torch.cat(codes), "table": table_8}
    rows, columns = weight_RC.shape
    return PackedMatrix((rows, columns), {**streams, "offsets": offsets, "fallbacks": torch.cat(fallbacks)})


def _exponents(word_N: Tensor) -> Tensor:
    """int16 BF16 words [N] -> int32 exponents [N]."""
    return word_N.int() >> 7 & 0xFF


def _pack_codes(code_N: Tensor) -> Tensor:
    """u8 codes [N] -> u8 [3 * ceil(N / 8)]; the codes of missing weights at the end are 0."""
    padded_8 = torch.nn.functional.pad(code_N, (0, -code_N.numel() % 8)).reshape(-1, 8).int()
    word = (padded_8 << (3 * torch.arange(8, device=code_N.device, dtype=torch.int32))).sum(1, dtype=torch.int32)
    return word.view(torch.uint8).reshape(-1, 4)[:, :3].reshape(-1)


def _words_of_range(packed: PackedMatrix, begin: int, end: int) -> Tensor:
    """BF16 words (int16 [end - begin]) of the flat weights begin..end; begin is a multiple of TILE."""
    tensors = packed.tensors
    triple = tensors["codes"][3 * (begin // 8) : 3 * -(-end // 8)].reshape(-1, 3).int()
    word = triple[:, 0] | triple[:, 1] << 8 | triple[:, 2] << 16
    shifts_8 = 3 * torch.arange(8, device=word.device, dtype=torch.int32)
    code_N = ((word[:, None] >> shifts_8) & 7).reshape(-1)[: end - begin]
    exponent_N = tensors["table"][code_N].int()
    missing_F = (code_N == 0).nonzero().squeeze(1)
    first = int(tensors["offsets"][begin // TILE])
    if not 0 <= first <= packed.num_fallbacks - missing_F.numel():
        raise FormatError(f"packed matrix {packed.shape}: its fallback offsets are out of range; pack it anew")
    exponent_N[missing_F] = tensors["fallbacks"][first : first + missing_F.numel()].int()
    low_N = tensors["low"][begin:end].int()
    word_N = (low_N & 0x80) << 8 | exponent_N << 7 | low_N & 0x7F
    # From -32768 on, so that the sign fits int16 exactly.
    return ((word_N ^ 0x8000) - 0x8000).to(torch.int16)


def check_dtype(dtype: torch.dtype) -> None:
    """ConfigError unless `dtype` is one that `unpack` can give."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"unpack: dtype {dtype} is not known; choose torch.bfloat16 or torch.float32")


def check_range(packed: PackedMatrix, start: int, stop: int | None) -> tuple[int, int]:
    """(start, stop) with stop filled in; ConfigError unless 0 <= start <= stop <= R."""
    rows = packed.shape[0]
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ConfigError(f"packed matrix {packed.shape}: rows {start}..{stop} asked for; choose within 0..{rows}")
    return start, stop


def check_out(packed: PackedMatrix, dtype: torch.dtype, count: int, out_NC: Tensor | None) -> Tensor:
    """`out_NC`, or a new tensor when it is None; ConfigError unless it is a contiguous [count, C] of `dtype`."""
    shape, device = (count, packed.shape[1]), packed.tensors["low"].device
    if out_NC is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out_NC.shape != shape or out_NC.dtype != dtype or not out_NC.is_contiguous() or out_NC.device != device:
        raise ConfigError(
            f"unpack: out is {out_NC.dtype} {tuple(out_NC.shape)} on {out_NC.device}, expected a contiguous {dtype} "
            f"{shape} on {device}"
        )
    return out_NC


def _to_values(word_N: Tensor, dtype: torch.dtype) -> Tensor:
    """int16 words [N] -> BF16 [N], or float32 [N] whose upper 16 bits they are (exact, NaN payloads too)."""
    return word_N.view(torch.bfloat16) if dtype == torch.bfloat16 else (word_N.int() << 16).view(torch.float32)


def unpack(
    packed: PackedMatrix,
    dtype: torch.dtype = torch.bfloat16,
    *,
    start: int = 0,
    stop: int | None = None,
    out_NC: Tensor | None = None,
) -> Tensor:
    """Rows start..stop of the matrix, bit-exact: [stop - start, C] in BF16, or widened exactly to float32.

    out_NC: written and returned when given. Raises ConfigError for another dtype, rows outside of the matrix or an
    `out_NC` of another shape, dtype or device.
    """
    check_dtype(dtype)
    start, stop = check_range(packed, start, stop)
    columns = packed.shape[1]
    out_NC = check_out(packed, dtype, stop - start, out_NC)
    out_N = out_NC.view(-1)
    first, last = start * columns, stop * columns
    for begin in range(first // TILE * TILE, last, CHUNK):
        end = min(begin + CHUNK, last)
        values_N = _to_values(_words_of_range(packed, begin, end), dtype)
        skip = max(first - begin, 0)
        out_N[begin + skip - first : end - first] = values_N[skip:]
    return out_NC


def unpack_rows(packed: PackedMatrix, rows_N: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The rows named by int64 [N] (repeats allowed, order kept): [N, C] in `dtype`, bit-exact.

    Raises ConfigError when an index is outside 0..R-1.
    """
    check_dtype(dtype)
    rows_N = check_rows(packed, rows_N)
    out_NC = torch.empty(rows_N.numel(), packed.shape[1], dtype=dtype, device=packed.tensors["low"].device)
    for place, row in enumerate(rows_N.tolist()):
        out_NC[place] = unpack(packed, dtype, start=row, stop=row + 1)[0]
    return out_NC


def check_rows(packed: PackedMatrix, rows_N: Tensor) -> Tensor:
    """`rows_N` as contiguous int64 [N]; ConfigError when one is outside the matrix."""
    rows_N = rows_N.reshape(-1).to(torch.int64).contiguous()
    if rows_N.numel() and not (int(rows_N.min()) >= 0 and int(rows_N.max()) < packed.shape[0]):
        raise ConfigError(
            f"packed matrix {packed.shape}: row {int(rows_N.min())} or {int(rows_N.max())} is outside "
            f"0..{packed.shape[0] - 1}; pass indices of existing rows"
        )
    return rows_N


def matmul(x_MC: Tensor, packed: PackedMatrix, *, start: int = 0, stop: int | None = None) -> Tensor:
    """x [M, C] float32 times the transpose of rows start..stop: float32 [M, stop - start]."""
    return x_MC @ unpack(packed, torch.float32, start=start, stop=stop).T
