"""Encodes and decodes the stored layouts `dense_plane` and `entropy_coded` on the CPU (docs/formats.md 2.1, 2.3).

Contract: `reference.py` is the definition; `native` is C++ built at first use when a compiler is found and gives the
same bytes. `backend="auto"` takes it when it is there and logs once what was chosen and why.

Legend: E matrices, n weights of a matrix, N weights of a frame, X escapes.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Literal

from ernie_elastic.errors import ConfigError
from ernie_elastic.kernels.tbe_codec import cpu_impl, reference
from ernie_elastic.kernels.tbe_codec.reference import Bytes, Counts, Fields, Words

__all__ = ["Fields", "backend_reason", "count_exponents", "decode", "decode_ranks", "encode", "encode_ranks"]
Backend = Literal["auto", "native", "reference"]
logger = logging.getLogger(__name__)


def backend_reason() -> str:
    """One line: which back end `auto` takes and why."""
    native = cpu_impl.load()
    return f"tbe_codec: auto = {'reference' if native.library is None else 'native'} ({native.reason})"


@functools.cache
def _log_choice() -> None:
    logger.info(backend_reason())


def _library(backend: str) -> ctypes.CDLL | None:
    """The native library, or None for the reference. ConfigError for a back end that is unknown or cannot run."""
    if backend not in ("auto", "native", "reference"):
        raise ConfigError(f"tbe_codec: backend {backend!r} is not known; choose auto, native or reference")
    if backend == "reference":
        return None
    native = cpu_impl.load()
    if backend == "native" and native.library is None:
        raise ConfigError(f"tbe_codec: backend 'native' cannot run here: {native.reason}; choose reference")
    if backend == "auto":
        _log_choice()
    return native.library


def count_exponents(words_En: Words, backend: Backend = "auto") -> Counts:
    """Histograms int64 [E, 256] of the exponents of contiguous BF16 words uint16 [E, n].

    Raises ConfigError for a back end that cannot run. source: ours: every window is chosen from it.
    """
    library = _library(backend)
    if library is None:
        return reference.count_exponents(words_En)
    return cpu_impl.count_exponents(library, words_En)


def encode(words_En: Words, fields: Fields, backend: Backend = "auto") -> bool:
    """Fill the arrays of `fields` but first_E, which is given, from contiguous BF16 words uint16 [E, n].

    False when the words have another number of fallbacks than fields.fallback_F u8 [F] holds. Raises ConfigError for a
    back end that cannot run. source: paper: ZipServ, Alg. 1; ours: the layout.
    """
    library = _library(backend)
    return reference.encode(words_En, fields) if library is None else cpu_impl.encode(library, words_En, fields)


def decode(fields: Fields, out_En: Words, backend: Backend = "auto") -> bool:
    """Write the BF16 words of `fields` into uint16 [E, n]; False when the fields disagree with each other.

    Any content of the arrays is safe: nothing outside of them is read or written. Raises ConfigError for a back end
    that cannot run. source: ours: see `encode`.
    """
    library = _library(backend)
    return reference.decode(fields, out_En) if library is None else cpu_impl.decode(library, fields, out_En)


def encode_ranks(words_N: Words, table: Bytes, low_N: Bytes, backend: Backend = "auto") -> tuple[Bytes, Bytes]:
    """Contiguous BF16 words uint16 [N] of a frame -> pairs of ranks u8 [ceil(N / 2)] and escapes u8 [X].

    table u8 [15]: exponents by rank, all different. low_N u8 [N] receives the low bytes. Raises ConfigError for a back
    end that cannot run. source: ours: see compression/entropy_coded.py.
    """
    library = _library(backend)
    if library is None:
        return reference.encode_ranks(words_N, table, low_N)
    return cpu_impl.encode_ranks(library, words_N, table, low_N)


def decode_ranks(
    pairs: Bytes, low_N: Bytes, table: Bytes, escape_X: Bytes, out_N: Words, backend: Backend = "auto"
) -> bool:
    """The way back: write uint16 [N]; False when the ranks ask for another number of escapes than X.

    Raises ConfigError for a back end that cannot run. source: ours: see `encode_ranks`.
    """
    library = _library(backend)
    if library is None:
        return reference.decode_ranks(pairs, low_N, table, escape_X, out_N)
    return cpu_impl.decode_ranks(library, pairs, low_N, table, escape_X, out_N)
