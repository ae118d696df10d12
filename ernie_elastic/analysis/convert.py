"""Traces of inference engines, and counts of cut models, in the form that the statistics compare.

Shape letters: L layers with a router, K experts chosen per token, M tasks, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ernie_elastic.analysis.trace import RoutingCounts, RoutingTrace, TraceHeader, check_names
from ernie_elastic.errors import DataError


def trace_from_arrays(arrays: Sequence[np.ndarray], tasks: Sequence[str], header: TraceHeader) -> RoutingTrace:
    """One trace from one integer array [tokens, L, K] per request, as inference engines return them.

    tasks: the task of each request. Task names appear in order of first use. Raises DataError.
    ours: this is the shape of the routed-experts output of vLLM and SGLang.
    """
    if len(arrays) != len(tasks) or not arrays:
        raise DataError(
            f"routing trace: {len(arrays)} arrays for {len(tasks)} tasks; pass one task for each, at least one"
        )
    names = tuple(dict.fromkeys(tasks))
    check_names(names)
    dtype = np.uint8 if header.num_experts <= 256 else np.uint16
    parts = []
    for index, array in enumerate(arrays):
        if array.ndim != 3 or array.shape[1:] != (len(header.layers), header.top_k):
            raise DataError(
                f"routing trace: request {index} has shape {list(array.shape)}, expected "
                f"[tokens, {len(header.layers)}, {header.top_k}]"
            )
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < header.num_experts:
            raise DataError(
                f"routing trace: request {index} has expert ids {int(array.min())}..{int(array.max())}, expected "
                f"0..{header.num_experts - 1}"
            )
        parts.append(array.astype(dtype))
    task = np.repeat([names.index(name) for name in tasks], [len(part) for part in parts]).astype(np.int8)
    return RoutingTrace(np.concatenate(parts), task, names, header)


def in_parent_numbering(
    counts: RoutingCounts, kept_experts: Sequence[Sequence[int]], num_experts: int, layers: Sequence[int] | None = None
) -> RoutingCounts:
    """Counts of an extracted sub-model under the expert ids and layer numbers of the model that it was cut from.

    kept_experts: for each layer of `counts`, the parent's ids of its experts, in the sub-model's order; num_experts and
    layers: the parent's. Needed to compare the two. Raises DataError when the lists do not fit.
    """
    own = counts.header.num_experts
    if len(kept_experts) != len(counts.header.layers) or any(len(kept) != own for kept in kept_experts):
        raise DataError(
            f"routing counts: kept_experts has lists of {[len(kept) for kept in kept_experts]} ids, expected "
            f"{len(counts.header.layers)} lists of {own}"
        )
    kept = tuple(tuple(int(e) for e in row) for row in kept_experts)
    header = replace(
        counts.header,
        num_experts=num_experts,
        kept_experts=kept,
        layers=counts.header.layers if layers is None else tuple(int(layer) for layer in layers),
    )
    wide = np.zeros((*counts.counts.shape[:2], num_experts), dtype=np.int64)
    for index, row in enumerate(kept):
        wide[:, index, list(row)] = counts.counts[:, index]
    return RoutingCounts(wide, counts.tokens.copy(), counts.task_names, header)
