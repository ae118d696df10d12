"""The fields of BF16 words, and the windows of exponents that cover most weights. Legend: E matrices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ernie_elastic.kernels.tbe_codec.reference import WINDOW, Bytes, Words, exponents, join_words, low_bytes

__all__ = ["Words", "best_windows", "exponents", "join_words", "low_bytes"]


def best_windows(counts_E: npt.NDArray[np.int64]) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """For each histogram of [E, 256] the first of the 7 consecutive exponents that cover most, u8 [E], and how many
    they cover, int64 [E]; the lowest window on a tie.

    paper: ZipServ, Alg. 1; by sliding sum, which finds the maximum where taking the 7 most frequent need not.
    """
    sums = np.cumsum(np.pad(counts_E, ((0, 0), (1, 0))), axis=1)
    covered = sums[:, WINDOW:] - sums[:, :-WINDOW]
    return np.argmax(covered, axis=1).astype(np.uint8), covered.max(axis=1, initial=0)
