"""The fields of BF16 words: exponent, sign-and-mantissa byte, and the window of exponents that covers most weights.

Legend: N weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ernie_elastic.compression.format import WINDOW, Bytes

Words = npt.NDArray[np.uint16]


def exponents(words_N: Words) -> Bytes:
    """Exponent byte of each BF16 word, u8 of the same shape."""
    return (words_N >> 7).astype(np.uint8)


def low_bytes(words_N: Words) -> Bytes:
    """Sign in bit 7 and mantissa in bits 6..0 of each word, u8 of the same shape."""
    return (((words_N >> 8) & 0x80) | (words_N & 0x7F)).astype(np.uint8)


def join_words(low_N: Bytes, exponent_N: Bytes) -> Words:
    """Inverse of `low_bytes` and `exponents`: BF16 words of the same shape."""
    words_N = low_N.astype(np.uint16)
    words_N += (words_N & 0x80) * np.uint16(0xFF)  # moves the sign from bit 7 to bit 15
    words_N += exponent_N.astype(np.uint16) << np.uint16(7)
    return words_N


def best_window(counts: npt.NDArray[np.int64]) -> int:
    """First of the 7 consecutive exponents that cover most of a histogram [256]; the lowest on a tie.

    paper: ZipServ, Alg. 1; by sliding sum, which finds the maximum where taking the 7 most frequent need not.
    """
    sums = np.cumsum(np.concatenate([[0], counts]))
    return int(np.argmax(sums[WINDOW:] - sums[:-WINDOW]))
