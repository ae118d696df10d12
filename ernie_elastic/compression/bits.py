"""The fields of BF16 words, and the window of exponents that covers most weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ernie_elastic.kernels.tbe_codec.reference import WINDOW, Words, exponents, join_words, low_bytes

__all__ = ["Words", "best_window", "exponents", "join_words", "low_bytes"]


def best_window(counts: npt.NDArray[np.int64]) -> int:
    """First of the 7 consecutive exponents that cover most of a histogram [256]; the lowest on a tie.

    paper: ZipServ, Alg. 1; by sliding sum, which finds the maximum where taking the 7 most frequent need not.
    """
    sums = np.cumsum(np.concatenate([[0], counts]))
    return int(np.argmax(sums[WINDOW:] - sums[:-WINDOW]))
