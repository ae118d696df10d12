"""ctypes front of tbe_codec.cpp: the functions of reference.py, natively and on several threads.

Every call releases the GIL. Legend: reference.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from ernie_elastic.kernels.native import NativeLibrary, load_library, num_threads
from ernie_elastic.kernels.tbe_codec.reference import Bytes, Counts, Fields, Words

ABI = 2
LEVELS = ("portable loops", "AVX2", "AVX-512")
_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@functools.cache
def load() -> NativeLibrary:
    """Build (first use of the machine), load and declare the library; resolved once a process."""
    return load_library(Path(__file__).with_name("tbe_codec.cpp"), ("tbe_abi", ABI), _declare)


def _declare(library: ctypes.CDLL) -> str:
    library.tbe_count.argtypes = (_P, _I64, _I64, _INT, _P)
    library.tbe_count.restype = None
    library.tbe_encode.argtypes = (_P, _I64, _I64, _P, _I64, _INT, _P, _P, _P, _P, _I64)
    library.tbe_decode.argtypes = (_P, _P, _P, _P, _P, _I64, _I64, _I64, _I64, _INT, _P)
    library.tbe_encode_ranks.argtypes = (_P, _I64, _P, _P, _P, _P)
    library.tbe_encode_ranks.restype = _I64
    library.tbe_decode_ranks.argtypes = (_P, _P, _I64, _P, _P, _I64, _P)
    return LEVELS[library.tbe_level()]


def _address(array: np.ndarray) -> int:
    """Address of an array that C++ reads or writes as it lies; a mistake in the caller is an AssertionError."""
    assert array.flags.c_contiguous and array.flags.aligned
    return array.ctypes.data


def count_exponents(library: ctypes.CDLL, words_En: Words) -> Counts:
    """As reference.count_exponents."""
    counts_E = np.zeros((words_En.shape[0], 256), dtype=np.int64)
    library.tbe_count(_address(words_En), *words_En.shape, num_threads(), _address(counts_E))
    return counts_E


def encode(library: ctypes.CDLL, words_En: Words, fields: Fields, level: int = len(LEVELS) - 1) -> bool:
    """As reference.encode. level: the highest index of LEVELS to use; tests compare them."""
    out = [_address(array) for array in (fields.ends_T, fields.low_En, fields.planes_E3P, fields.fallback_F)]
    matrices, count = words_En.shape
    first, threads = _address(fields.first_E), num_threads()
    size = fields.fallback_F.size
    code = library.tbe_encode(_address(words_En), matrices, count, first, level, threads, *out, size)
    if code == -2:
        raise MemoryError(f"encoding {words_En.size} weights: no memory is left; use fewer threads")
    np.cumsum(fields.ends_T, out=fields.ends_T)
    return code == 0


def decode(library: ctypes.CDLL, fields: Fields, out_En: Words, level: int = len(LEVELS) - 1) -> bool:
    """As reference.decode. level: the highest index of LEVELS to use; tests compare them."""
    parts = (fields.ends_T, fields.low_En, fields.planes_E3P, fields.first_E, fields.fallback_F)
    threads, size = num_threads(), fields.fallback_F.size
    code = library.tbe_decode(
        *[_address(part) for part in parts], size, *out_En.shape, level, threads, _address(out_En)
    )
    return code == 0


def encode_ranks(library: ctypes.CDLL, words_N: Words, table: Bytes, low_N: Bytes) -> tuple[Bytes, Bytes]:
    """As reference.encode_ranks."""
    pairs = np.empty(-(-words_N.size // 2), dtype=np.uint8)
    room = np.empty(words_N.size + 1, dtype=np.uint8)  # one more: see ranks.h
    arrays = [_address(array) for array in (table, low_N, pairs, room)]
    number = library.tbe_encode_ranks(_address(words_N), words_N.size, *arrays)
    return pairs, room[:number].copy()


def decode_ranks(library: ctypes.CDLL, pairs: Bytes, low_N: Bytes, table: Bytes, escape_X: Bytes, out_N: Words) -> bool:
    """As reference.decode_ranks."""
    first = [_address(array) for array in (pairs, low_N)]
    last = [_address(array) for array in (table, escape_X)]
    code = library.tbe_decode_ranks(*first, out_N.size, *last, escape_X.size, _address(out_N))
    return code == 0
