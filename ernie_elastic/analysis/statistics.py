"""Routing statistics from counts: specialisation, overlap, entropy, load, and the difference of two routings.

Pure numpy. A task without tokens has no statistics: its entries are NaN (null in JSON), never zero. Experts that a
masked sub-model may not choose (`TraceHeader.kept_experts`) are left out of every N, mean and quarter below.

Shape letters: M tasks, L layers with a router, E experts per layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ernie_elastic.analysis.trace import RoutingCounts
from ernie_elastic.errors import ConfigError

AUDIO_ROW = "audio"


def paper_rows(counts: RoutingCounts) -> RoutingCounts:
    """Counts with all tasks named `audio_*` in one row, `audio`, when there are at least two of them.

    The row stands where the first of them stood. paper: section 6 (audio understanding and generation share a row).
    """
    audio = [i for i, name in enumerate(counts.task_names) if name.startswith("audio_")]
    if len(audio) < 2 or AUDIO_ROW in counts.task_names:
        return counts
    rest = [i for i in range(len(counts.task_names)) if i not in audio[1:]]
    summed, tokens = counts.counts.copy(), counts.tokens.copy()
    summed[audio[0]], tokens[audio[0]] = counts.counts[audio].sum(0), counts.tokens[audio].sum()
    names = tuple(AUDIO_ROW if i == audio[0] else counts.task_names[i] for i in rest)
    return replace(counts, counts=summed[rest], tokens=tokens[rest], task_names=names)


def all_tasks(counts: RoutingCounts) -> RoutingCounts:
    """Counts with every task added up into one row, `all`: the load of an expert over the whole trace."""
    return replace(
        counts, counts=counts.counts.sum(0, keepdims=True), tokens=counts.tokens.sum(keepdims=True), task_names=("all",)
    )


def shown_layers(num_layers: int) -> list[tuple[int, str]]:
    """(row of the layer axis, its word) of the first, middle and last layer; fewer when there are fewer layers.

    Of an even number of layers the lower middle one is taken. paper: figures 8 and 9 draw these three.
    """
    words = {0: "first"}
    words.setdefault((num_layers - 1) // 2, "middle")
    words.setdefault(num_layers - 1, "last")
    return sorted(words.items())


def fair_share(counts: RoutingCounts) -> np.ndarray:
    """float64 [L]: 100 * k / N in percent, the mean of `specialization` over the experts of a layer."""
    return 100.0 * counts.header.top_k / counts.header.available().sum(-1)


def specialization(counts: RoutingCounts) -> np.ndarray:
    """float64 [M, L, E] in percent: share of a task's tokens whose top-k contains the expert; NaN where undefined.

    paper: figure 8, frequency of expert activation. ours: the definition, since the report prints none.
    """
    tokens = np.where(counts.tokens > 0, counts.tokens, np.nan)[:, None, None]
    return np.where(counts.header.available(), 100.0 * counts.counts / tokens, np.nan)


def most_used_quarter(counts: RoutingCounts) -> np.ndarray:
    """bool [M, L, E]: the ceil(N / 4) most used experts of each task and layer.

    Of equally used experts the lower id is taken. An expert that the task never used is not taken, so the set of a task
    that uses fewer than ceil(N / 4) experts is smaller. paper: figure 9. ours: both rules for ties and unused experts;
    without the second, two tasks that each use one expert would share the unused experts with the lowest ids.
    """
    size_L = -(-counts.header.available().sum(-1) // 4)
    order = np.argsort(-counts.counts, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape).copy(), axis=-1)
    return (rank < size_L[:, None]) & (counts.counts > 0)


def quarter_iou(counts: RoutingCounts) -> np.ndarray:
    """float64 [L, M, M]: intersection over union of the most used quarters of two tasks; NaN when one has no tokens."""
    used_LME = most_used_quarter(counts).transpose(1, 0, 2).astype(np.int64)
    both = used_LME @ used_LME.transpose(0, 2, 1)
    size_LM = used_LME.sum(-1)
    union = size_LM[:, :, None] + size_LM[:, None, :] - both
    seen = counts.tokens > 0
    return np.where(seen[:, None] & seen[None, :], both / np.maximum(union, 1), np.nan)


def chance_iou(num_experts: int) -> float:
    """Expected intersection over union of two independent random quarters (ceil(N / 4) of N experts).

    Exact sum over the hypergeometric overlap; tends to 1/7 for large N. ours: the report states no chance level.
    """
    size = -(-num_experts // 4)
    total = math.comb(num_experts, size)
    return sum(
        math.comb(size, both) * math.comb(num_experts - size, size - both) / total * both / (2 * size - both)
        for both in range(size + 1)
    )


def chance_per_layer(counts: RoutingCounts) -> np.ndarray:
    """float64 [L]: `chance_iou` of each layer's number of experts."""
    return np.array([chance_iou(int(n)) for n in counts.header.available().sum(-1)])


def normalized_entropy(counts: RoutingCounts) -> np.ndarray:
    """float64 [M, L]: -sum p log p / log N, p the share of routed assignments; NaN for a task without tokens.

    1 = all experts equally used. The lowest possible value is `entropy_floor`. A layer with one expert counts as even
    (1), as does every layer with k = N. paper: figure 10.
    """
    total = counts.counts.sum(-1, keepdims=True)
    share = counts.counts / np.maximum(total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    size_L = counts.header.available().sum(-1)
    even = np.where(size_L > 1, entropy / np.log(np.maximum(size_L, 2)), 1.0)
    return np.where(counts.tokens[:, None] > 0, np.clip(even, 0.0, 1.0) + 0.0, np.nan)  # + 0.0: no minus zero


def entropy_floor(counts: RoutingCounts) -> np.ndarray:
    """float64 [L]: log k / log N, the normalised entropy of a router that sends every token to the same k experts."""
    size_L = counts.header.available().sum(-1)
    return np.where(size_L > 1, math.log(counts.header.top_k) / np.log(np.maximum(size_L, 2)), 1.0)


def max_over_mean(counts: RoutingCounts) -> np.ndarray:
    """float64 [M, L]: load of the busiest expert over the mean load; 1 = even, N / k = one expert in every top-k."""
    mean = (counts.tokens * counts.header.top_k)[:, None] / counts.header.available().sum(-1)
    return np.where(mean > 0, counts.counts.max(-1) / np.where(mean > 0, mean, 1.0), np.nan)


def dead_experts(counts: RoutingCounts) -> np.ndarray:
    """float64 [M, L]: number of experts that no token of the task chose; NaN for a task without tokens."""
    unused = ((counts.counts == 0) & counts.header.available()).sum(-1)
    return np.where(counts.tokens[:, None] > 0, unused, np.nan)


def tasks_served(counts: RoutingCounts) -> np.ndarray:
    """int64 [L, M + 1]: how many experts serve 0, 1, ... M tasks; an expert serves a task at its fair share or above.

    ours: the threshold k / N; the report says in words that some experts serve all modalities and others one.
    """
    available = counts.header.available()
    frequency = np.nan_to_num(specialization(counts))
    serves_LE = (frequency >= fair_share(counts)[:, None] - 1e-9).sum(0)
    bins = range(len(counts.task_names) + 1)
    return np.stack([((serves_LE == number) & available).sum(-1) for number in bins], axis=-1).astype(np.int64)


@dataclass(frozen=True)
class Comparison:
    """This routing minus another, on the layers and tasks that both have.

    frequency: float64 [M, L, E] in percentage points. entropy: float64 [M, L]. distance: float64 [M, L], total
    variation of the routed shares, 0 = same, 1 = disjoint. same_quarter: float64 [M, L], IoU of the most used quarters
    of the same task. NaN where one side has no tokens.
    """

    task_names: tuple[str, ...]
    layers: tuple[int, ...]
    frequency: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray
    same_quarter: np.ndarray


def compare_counts(counts: RoutingCounts, other: RoutingCounts) -> Comparison:
    """Difference of two routings of the same experts, such as two checkpoints or a model and its masked sub-model.

    Raises ConfigError when expert numbers differ (see `trace.in_parent_numbering`) or nothing is common. ours.
    """
    if counts.header.num_experts != other.header.num_experts:
        raise ConfigError(
            f"routing comparison: {counts.header.num_experts} experts in {counts.header.model!r}, "
            f"{other.header.num_experts} in {other.header.model!r}; renumber the smaller one with in_parent_numbering"
        )
    names = tuple(name for name in counts.task_names if name in other.task_names)
    layers = tuple(layer for layer in counts.header.layers if layer in other.header.layers)
    if not names or not layers:
        raise ConfigError(
            f"routing comparison: nothing in common: tasks {list(counts.task_names)} and {list(other.task_names)}, "
            f"layers {list(counts.header.layers)} and {list(other.header.layers)}"
        )
    mine, theirs = select(counts, names, layers), select(other, names, layers)
    seen = ((mine.tokens > 0) & (theirs.tokens > 0))[:, None]
    shares = [c.counts / np.maximum(c.counts.sum(-1, keepdims=True), 1) for c in (mine, theirs)]
    quarters = [most_used_quarter(c) for c in (mine, theirs)]
    union = (quarters[0] | quarters[1]).sum(-1)
    # An expert that only one side may choose is used 0 % by the other.
    frequency = np.nan_to_num(specialization(mine)) - np.nan_to_num(specialization(theirs))
    return Comparison(
        names,
        layers,
        np.where(seen[..., None], frequency, np.nan),
        normalized_entropy(mine) - normalized_entropy(theirs),
        np.where(seen, np.abs(shares[0] - shares[1]).sum(-1) / 2, np.nan),
        np.where(seen, (quarters[0] & quarters[1]).sum(-1) / np.maximum(union, 1), np.nan),
    )


def select(counts: RoutingCounts, task_names: tuple[str, ...], layers: tuple[int, ...]) -> RoutingCounts:
    """The part of `counts` with these tasks and model layers, in this order. Raises ValueError when one is absent."""
    rows = [counts.task_names.index(name) for name in task_names]
    columns = [counts.header.layers.index(layer) for layer in layers]
    kept = counts.header.kept_experts
    header = replace(
        counts.header, layers=layers, kept_experts=None if kept is None else tuple(kept[i] for i in columns)
    )
    return RoutingCounts(counts.counts[np.ix_(rows, columns)], counts.tokens[rows], task_names, header)
