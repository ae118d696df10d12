"""Bits a weight of other symbol codes for the exponents: can one beat 3-bit windows at the same decode cost?

`ours` is the code of the formats: 3 bits for 7 consecutive exponents, 8 more for a fallback. The others, each with
what it needs beside the codes (8 bits for every exponent that is stored apart): `frequent_7` the 7 most frequent
exponents, by table; `window_15` 4 bits for 15 consecutive ones; `pairs_6` 6 bits for the 63 most frequent pairs of
neighbours, both stored apart else; `triples_8` and `triples_9` 8 or 9 bits for the 255 or 511 most frequent triples;
`two_levels` 2 bits for the 3 most frequent, then 3 more for the next 7; `row_windows` a window for each row;
`entropy` the bound of one symbol at a time, `pair_entropy` of two. Offsets of tiles are left out: all need them
alike. Tensors are those of the benchmark `codec`; `--weights DIR` measures a directory in their place.

Legend: R rows, C columns, N weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench import codec as codec_bench
from bench.common import Row
from ernie_elastic.compression.bits import best_windows, exponents

PEERS = ("frequent_7", "window_15", "pairs_6", "triples_8", "triples_9", "two_levels", "row_windows", "entropy",
         "pair_entropy")  # fmt: skip
Counts = npt.NDArray[np.int64]


def covered_by(counts: Counts, symbols: int) -> float:
    """Share (0..1) of the most frequent `symbols` of a histogram."""
    return float(np.sort(counts)[::-1][:symbols].sum() / counts.sum())


def entropy(counts: Counts) -> float:
    """Bits of a histogram."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def joint(exponent_N: npt.NDArray[np.uint8], size: int) -> Counts:
    """Histogram of runs of `size` neighbouring exponents u8 [N]."""
    runs = exponent_N[: exponent_N.size // size * size].reshape(-1, size).astype(np.int64)
    keys = (runs * 256 ** np.arange(size)).sum(1)
    return np.unique(keys, return_counts=True)[1].astype(np.int64)


def window(counts: Counts, size: int) -> float:
    """Largest share (0..1) that `size` consecutive exponents of a histogram [256] cover."""
    sums = np.cumsum(np.concatenate([[0], counts]))
    return float((sums[size:] - sums[:-size]).max() / counts.sum())


def sizes(weight: Tensor) -> dict[str, float]:
    """Bits a weight of every code for a BF16 tensor of any shape; "ours" first."""
    matrix_RC = weight.reshape(-1, weight.shape[-1])
    exponent_RC = exponents(matrix_RC.contiguous().view(torch.int16).numpy().view(np.uint16))
    exponent_N = exponent_RC.reshape(-1)
    counts = np.bincount(exponent_N, minlength=256).astype(np.int64)
    rows = np.stack([np.bincount(row, minlength=256) for row in exponent_RC]).astype(np.int64)
    by_row = float(best_windows(rows)[1].sum() / exponent_N.size)
    pairs, triples = joint(exponent_N, 2), joint(exponent_N, 3)
    first, both = covered_by(counts, 3), covered_by(counts, 10)
    return {
        "ours": 11 + 8 * (1 - window(counts, 7)),
        "frequent_7": 11 + 8 * (1 - covered_by(counts, 7)),
        "window_15": 12 + 8 * (1 - window(counts, 15)),
        "pairs_6": 8 + 3 + 8 * (1 - covered_by(pairs, 63)),
        "triples_8": 8 + 8 / 3 + 8 * (1 - covered_by(triples, 255)),
        "triples_9": 8 + 9 / 3 + 8 * (1 - covered_by(triples, 511)),
        "two_levels": 8 + 2 + 3 * (1 - first) + 8 * (1 - both),
        "row_windows": 11 + 8 * (1 - by_row) + 8 / exponent_RC.shape[1],
        "entropy": 8 + entropy(counts),
        "pair_entropy": 8 + entropy(pairs) / 2,
    }


def run(quick: bool, weights: Path | None = None) -> list[Row]:
    """A row of sizes for each tensor."""
    tensors = codec_bench.cases(quick) if weights is None else codec_bench.tensors_of(weights)
    rows = []
    for case, weight in tensors.items():
        found = sizes(weight)
        assert all(math.isfinite(bits) for bits in found.values())
        rows.append(Row(case, found.pop("ours"), found, "bits/weight", higher_is_better=False))
    return rows
